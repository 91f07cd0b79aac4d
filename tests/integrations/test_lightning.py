from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from distbn_convert import VirtualDistributedSampler, convert_model, revert_model
from distbn_convert.errors import ConfigurationError
from distbn_convert.integrations.lightning import VirtualRanks

from .. import ddp, loaders

# Lightning warns of its environment and uses what others deprecate; none of it is ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
]


def make_module(source: str = "argument") -> Any:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = ddp.make_model()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            images, labels = batch
            return F.cross_entropy(self.net(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return ddp.make_optimizer(self.net)

    if source == "module":
        Module.train_dataloader = lambda self: make_loader()
    return Module()


def make_loader(**options: Any) -> DataLoader[Any]:
    options = {"batch_size": ddp.SHARE, "shuffle": True, **options}
    return DataLoader(TensorDataset(*ddp.make_data(loaders.SAMPLES)), **options)


def fit(
    module: Any, callbacks: Any, loader: Any = None, epochs: int = ddp.EPOCHS, **options: Any
) -> Any:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loader)
    return trainer


class Recorder(L.LightningModule):
    """Writes down the samples of each batch, of all loaders at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.BatchNorm1d(1)
        self.trained: list[Any] = []
        self.validated: list[Any] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.trained.append(tree_map(lambda samples: samples.flatten().tolist(), batch))
        return sum(self.layer(samples).sum() for samples in tree_leaves(batch))

    def validation_step(self, batch: Any, _: int) -> None:
        self.validated.append(batch.flatten().tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def count(samples: int = 64, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(torch.arange(float(samples))[:, None], batch_size, **options)


@pytest.mark.parametrize("source", ["argument", "module"])
@pytest.mark.parametrize("partition", ["contiguous", "interleaved"])
def test_fitting_equals_a_loop_over_the_samplers_batches(
    monkeypatch: pytest.MonkeyPatch, source: str, partition: str
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    module = make_module(source)
    callback = VirtualRanks(4, partition=partition)
    fit(module, callback, make_loader() if source == "argument" else None)
    model = convert_model(ddp.make_model(), 4)
    sampler = VirtualDistributedSampler(range(loaders.SAMPLES), ddp.SHARE, 4, seed=3)
    loaders.train(model, loaders.make_loader(sampler), sampler)
    assert model[1].num_batches_tracked.tolist() == [6] * 4
    for name, value in model.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_without_the_sampler_the_loaders_batches_are_cut_as_they_are() -> None:
    module = make_module()
    loader = make_loader(batch_size=14, shuffle=False)
    fit(module, VirtualRanks(2, sampler=False), loader, epochs=1)
    model = convert_model(ddp.make_model(), 2)
    optimizer = ddp.make_optimizer(model)
    for images, labels in loader:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_micro_steps_of_the_trainer_equal_one_step_of_all_ranks() -> None:
    modules = make_module(), make_module()
    fit(modules[0], VirtualRanks(4), make_loader(), epochs=1)
    ranks = VirtualRanks(2, accumulation_steps=2)
    fit(modules[1], ranks, make_loader(), epochs=1, accumulate_grad_batches=2)
    for name, value in modules[0].state_dict().items():
        torch.testing.assert_close(modules[1].state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_a_trainer_that_steps_between_micro_steps_is_refused() -> None:
    module = make_module()
    before = copy.deepcopy(module.state_dict())
    match = "accumulation_steps=2 says, but it has accumulate_grad_batches=3; pass accum"
    with pytest.raises(ConfigurationError, match=match):
        fit(module, VirtualRanks(2, accumulation_steps=2), make_loader(), accumulate_grad_batches=3)
    assert all(module.state_dict()[name].equal(before[name]) for name in before if "weight" in name)


def test_a_module_that_steps_by_itself_needs_nothing_of_the_trainer() -> None:
    module = Recorder()
    module.automatic_optimization = False  # Lightning then refuses accumulate_grad_batches
    fit(module, VirtualRanks(2, accumulation_steps=2), count(), epochs=1)
    assert module.layer.num_batches_tracked.tolist() == [4] * 4


def test_an_epoch_for_the_statistics_alone_needs_no_steps() -> None:
    """Which Lightning adds after averaging weights, and calls one of an odd number of batches."""
    module = make_module()
    average = L.callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=1, device=None)
    ranks = VirtualRanks(2, accumulation_steps=2)
    fit(module, [ranks, average], make_loader(), accumulate_grad_batches=2)
    assert module.net[1].num_batches_tracked.tolist() == [3] * 4  # counted anew


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
def test_the_loaders_in_a_combined_loader_are_dealt(mode: Any) -> None:
    module, plain = Recorder(), Recorder()
    fit(module, VirtualRanks(4), CombinedLoader({"a": count(), "b": count(32)}, mode), epochs=1)
    steps = {"min_size": 2, "max_size_cycle": 4}[mode]
    sampler = VirtualDistributedSampler(range(64), 4, 4, shuffle=False)
    assert [batch["a"] for batch in module.trained] == list(sampler)[:steps]
    assert [len(batch["b"]) for batch in module.trained] == [16] * steps
    fit(plain, VirtualRanks(4), {"a": count(), "b": count(32)}, epochs=1)
    assert plain.trained[:steps] == module.trained


def test_only_training_is_dealt() -> None:
    module = Recorder()
    module.val_dataloader = lambda: count(16)
    trainer = fit(module, VirtualRanks(4), count(), epochs=1, num_sanity_val_steps=0)
    assert [len(batch) for batch in module.validated] == [4] * 4
    trainer.callbacks.clear()
    trainer.fit_loop.max_epochs = 2
    plain = Recorder()
    trainer.fit(plain, count())  # without the callback, as it comes
    assert [len(batch) for batch in plain.trained] == [4] * 16


@pytest.mark.parametrize("given", [False, True])
def test_overfitting_sees_the_same_batch_in_each_epoch(given: bool) -> None:
    loader = count(shuffle=True)
    if given:
        sampler = VirtualDistributedSampler(range(64), 4, 4)
        loader = DataLoader(loader.dataset, batch_sampler=sampler)
    module = Recorder()
    fit(module, VirtualRanks(4), loader, epochs=3, overfit_batches=1)
    batch = module.trained[0]
    assert module.trained == [batch] * 3
    assert given or batch == [rank + 4 * sample for rank in range(4) for sample in range(4)]
    if given:  # and is yours as before
        fit(module, None, loader, epochs=2)
        assert module.trained[3:7] != module.trained[7:]


def test_a_sampler_of_yours_is_told_the_epoch() -> None:
    module, sampler = Recorder(), VirtualDistributedSampler(range(64), 4, 4)
    fit(module, VirtualRanks(4), DataLoader(count().dataset, batch_sampler=sampler))
    expected = []
    for epoch in range(ddp.EPOCHS):
        sampler.set_epoch(epoch)
        expected += list(sampler)
    assert module.trained == expected


@pytest.mark.parametrize("options", [{"vt_world_size": 2}, {"partition": "interleaved"}])
def test_a_sampler_for_other_ranks_is_refused(options: dict[str, Any]) -> None:
    sampler = VirtualDistributedSampler(range(64), 4, **{"vt_world_size": 4, **options})
    with pytest.raises(ConfigurationError, match="the ranks of the layers"):
        VirtualRanks(4).deal(DataLoader(range(64), batch_sampler=sampler))


class Twice(DataLoader[Any]):
    def __init__(self, *args: Any, times: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._times = times

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield from [batch] * self._times


@pytest.mark.parametrize("source", ["argument", "module"])
def test_a_loader_of_a_class_of_yours_stays_one(source: str) -> None:
    module, calls = Recorder(), []

    def load() -> DataLoader[Any]:
        calls.append(loader := Twice(torch.arange(64.0)[:, None], 4, False, times=2))
        return loader

    if source == "module":
        module.train_dataloader = load
    callback = VirtualRanks(4)
    trainer = fit(module, callback, load() if source == "argument" else None, epochs=1)
    dealt = trainer.train_dataloader
    assert type(dealt) is Twice
    assert dealt is not calls[0]
    assert calls[0].batch_size == 4
    batches = list(VirtualDistributedSampler(range(64), 4, 4, shuffle=False))
    assert [batch.flatten().tolist() for batch in dealt] == [b for b in batches for _ in range(2)]


def test_a_trainer_alone_deals_to_itself_whatever_the_environment_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    trainer = fit(make_module(), VirtualRanks(4), make_loader(), epochs=1)
    batches = trainer.train_dataloader.batch_sampler
    assert (batches.num_replicas, batches.rank) == (1, 0)


def test_a_trainer_that_forks_or_spawns_takes_a_converted_module() -> None:
    """Else it failed after training: its first process has the module as it was given."""
    ranks, module = VirtualRanks(4, partition="interleaved"), make_module()
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False)
    with pytest.raises(ConfigurationError, match=r"call convert_model\(module, 4\), with"):
        ranks.setup(trainer, module, "fit")
    assert type(module.net[1]) is nn.BatchNorm2d
    convert_model(module, 4, partition="interleaved")
    ranks.setup(trainer, module, "fit")
    ranks.setup(trainer, make_module(), "test")


def test_a_loader_that_has_begun_with_its_own_batches_is_refused() -> None:
    loader = count()
    loader.ahead = iter(loader)
    with pytest.raises(ConfigurationError, match="'ahead'"):
        VirtualRanks(4).deal(loader)


def test_the_dealt_loader_keeps_the_options_of_the_first() -> None:
    def collate(samples: list[Any]) -> int:
        return len(samples)

    loader = make_loader(
        drop_last=True,
        num_workers=1,
        collate_fn=collate,
        persistent_workers=True,
        shuffle=False,
        in_order=False,
    )
    dealt = VirtualRanks(4).deal(loader)
    assert (dealt.num_workers, dealt.persistent_workers, dealt.in_order) == (1, True, False)
    assert (dealt.batch_size, dealt.drop_last, type(dealt.sampler)) == (
        None,
        False,
        SequentialSampler,
    )
    assert dealt.collate_fn is collate
    assert dealt.batch_sampler.shuffle is False
    assert [len(batch) for batch in dealt.batch_sampler] == [16, 16]
    assert VirtualRanks(4).deal(dealt) is dealt


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sampler": WeightedRandomSampler([1.0] * 42, 42), "shuffle": None}, "WeightedRandomSam"),
        (
            {"sampler": DistributedSampler(range(42), 2, 0), "shuffle": None},
            "DistributedSampler.*pass use_distributed_sampler=False",
        ),
        (
            {
                "batch_sampler": type("Buckets", (BatchSampler,), {})(range(42), 4, False),
                "batch_size": 1,
                "shuffle": None,
            },
            "Buckets",
        ),
    ],
)
def test_an_order_that_cannot_be_dealt_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"its samples come from {name}"):
        VirtualRanks(4).deal(make_loader(**options))


def test_a_refused_loader_leaves_torchs_class_as_it_was() -> None:
    before = DataLoader.__init__
    loader = make_loader(sampler=WeightedRandomSampler([1.0] * 42, 42), shuffle=None)
    with pytest.raises(ConfigurationError, match="WeightedRandomSampler"):
        fit(make_module(), VirtualRanks(4), loader)
    assert DataLoader.__init__ is before


def test_an_export_sees_a_plain_module_that_has_its_ranks_again_afterwards() -> None:
    module = make_module()
    callback = VirtualRanks(4)
    fit(module, callback, make_loader(), epochs=1)
    before = copy.deepcopy(module.net.state_dict())
    plain = revert_model(copy.deepcopy(module.net), "pooled")
    with callback.reverted(module, "pooled") as exported:
        assert type(exported.net[1]) is nn.BatchNorm2d
        for name, value in plain.state_dict().items():
            assert torch.equal(exported.net.state_dict()[name], value)
    for name, value in before.items():
        assert torch.equal(module.net.state_dict()[name], value)
    context = callback.reverted(module)
    context.__enter__()
    assert not context.__exit__(KeyError, KeyError(), None)  # an error in the block goes on
    assert module.net[1].running_mean.shape == (4, 8)
    fit(module, callback, make_loader(), epochs=1)  # converted already: nothing to do
    assert module.net[1].num_batches_tracked.tolist() == [6] * 4


def test_an_export_leaves_layers_that_were_converted_elsewhere_as_they_were() -> None:
    module = make_module()
    convert_model(module.net[1], 2, eval_reduction="select", eval_rank=1)
    callback = VirtualRanks(4, filter_fn=lambda _, name: name == "net.4")
    fit(module, callback, make_loader(), epochs=1)
    before = copy.deepcopy(module.net.state_dict())
    hooks = [dict(part._load_state_dict_pre_hooks) for part in module.modules()]
    with callback.reverted(module):
        assert [type(module.net[i]) for i in (1, 4)] == [nn.BatchNorm2d] * 2
    layer = module.net[1]
    assert (layer.vt_world_size, layer.eval_reduction, layer.eval_rank) == (2, "select", 1)
    for name, value in before.items():
        assert torch.equal(module.net.state_dict()[name], value)
    assert [dict(part._load_state_dict_pre_hooks) for part in module.modules()] == hooks


def test_what_an_export_does_to_the_dtype_stays() -> None:
    module = convert_model(make_module(), 4)
    with VirtualRanks(4).reverted(module):
        module.net[1].running_mean.fill_(7)
        module.float()
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32, torch.int64}
    assert module.net[1].running_mean.eq(0).all()


@pytest.mark.skipif(
    not hasattr(L.callbacks, "EMAWeightAveraging"), reason="needs a Lightning that averages"
)
@pytest.mark.parametrize("first", [True, False])
def test_weights_are_averaged_whichever_callback_is_first(first: bool) -> None:
    average = L.callbacks.EMAWeightAveraging(decay=0.5)
    module = make_module()
    order = (average, VirtualRanks(4)) if first else (VirtualRanks(4), average)
    fit(module, list(order), make_loader(shuffle=False), epochs=1)
    model = convert_model(ddp.make_model(), 4)
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    sampler = VirtualDistributedSampler(range(loaders.SAMPLES), ddp.SHARE, 4, shuffle=False)
    optimizer = ddp.make_optimizer(model)
    for images, labels in loaders.make_loader(sampler):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        averaged.update_parameters(model)
    for name, value in averaged.module.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], value, rtol=1e-9, atol=1e-9)
