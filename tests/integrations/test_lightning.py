from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, TensorDataset, WeightedRandomSampler

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


def fit(module: Any, callback: Any, loader: Any = None, epochs: int = ddp.EPOCHS) -> Any:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return trainer


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


def test_the_dealt_loader_keeps_the_options_of_the_first() -> None:
    def collate(samples: list[Any]) -> int:
        return len(samples)

    loader = make_loader(
        drop_last=True, num_workers=1, collate_fn=collate, persistent_workers=True, shuffle=False
    )
    dealt = VirtualRanks(4).deal(loader)
    assert (dealt.num_workers, dealt.persistent_workers) == (1, True)
    assert dealt.collate_fn is collate
    assert dealt.batch_sampler.shuffle is False
    assert [len(batch) for batch in dealt.batch_sampler] == [16, 16]
    assert VirtualRanks(4).deal(dealt) is dealt


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sampler": WeightedRandomSampler([1.0] * 42, 42), "shuffle": None}, "WeightedRandomSam"),
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
