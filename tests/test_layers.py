from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distbn_convert import DistBatchNorm1d, DistBatchNorm2d, DistBatchNorm3d
from distbn_convert.errors import ConfigurationError, DistBNError, InputError, StateDictError

from .oracle import loop_batch_norm

CLASSES = [
    (DistBatchNorm1d, nn.BatchNorm1d, (8, 6)),
    (DistBatchNorm1d, nn.BatchNorm1d, (8, 6, 5)),
    (DistBatchNorm2d, nn.BatchNorm2d, (8, 6, 4, 3)),
    (DistBatchNorm3d, nn.BatchNorm3d, (8, 6, 2, 3, 2)),
]


def trained(layer: nn.Module, shape: tuple[int, ...] = (8, 6, 4, 3), steps: int = 3) -> Any:
    """Give a layer statistics that differ from rank to rank, and a weight and bias."""
    for step in range(steps):
        layer(torch.randn(shape) * (step + 1) + torch.arange(shape[0]).reshape(-1, 1, 1, 1))
    if layer.weight is not None:
        nn.init.uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize(("dist", "plain", "shape"), CLASSES)
def test_one_rank_gives_torchs_numbers(
    dist: type[nn.Module], plain: type[nn.Module], shape: tuple[int, ...]
) -> None:
    ours, torchs = dist(6, vt_world_size=1), plain(6)
    for _ in range(3):
        input = torch.randn(shape)
        torch.testing.assert_close(ours(input), torchs(input))
    for name, value in torchs.state_dict().items():
        own = ours.state_dict()[name]
        torch.testing.assert_close(own if own.shape == value.shape else own[0], value)


@pytest.mark.parametrize(("dist", "plain", "shape"), CLASSES)
def test_is_a_batch_norm_with_its_keys_and_rows_for_the_ranks(
    dist: type[nn.Module], plain: type[nn.Module], shape: tuple[int, ...]
) -> None:
    layer = dist(6, vt_world_size=4)
    assert isinstance(layer, plain)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "weight": (6,),
        "bias": (6,),
        "running_mean": (4, 6),
        "running_var": (4, 6),
        "num_batches_tracked": (4,),
    }
    assert list(layer.state_dict()) == list(plain(6).state_dict())


@pytest.mark.parametrize("partition", ["contiguous", "interleaved"])
def test_training_updates_each_row_with_its_own_share(partition: str) -> None:
    layer = DistBatchNorm2d(6, vt_world_size=4, partition=partition, momentum=0.2, eps=1e-3)
    mean, var = torch.zeros(4, 6), torch.ones(4, 6)
    for _ in range(3):
        input = torch.randn(9, 6, 4, 3)
        expected = loop_batch_norm(
            input, mean, var, None, None,
            vt_world_size=4, partition=partition, momentum=0.2, eps=1e-3,
        )  # fmt: skip
        torch.testing.assert_close(layer(input), expected)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)
    assert layer.num_batches_tracked.tolist() == [3] * 4
    assert (layer.running_mean[0] - layer.running_mean[1]).abs().max() > 0.01


def test_interleaved_ranks_take_the_same_samples_of_every_part_of_a_batch() -> None:
    torch.manual_seed(0)
    layer = DistBatchNorm1d(6, vt_world_size=4, partition="interleaved").double()
    views = torch.randn(2, 12, 6, dtype=torch.float64)
    outputs = layer(views.flatten(0, 1)).view_as(views)
    for rank in range(4):
        own = nn.BatchNorm1d(6).double()
        expected = own(views[:, rank::4].flatten(0, 1))
        torch.testing.assert_close(outputs[:, rank::4].flatten(0, 1), expected)
        torch.testing.assert_close(layer.running_var[rank], own.running_var)


@pytest.mark.parametrize(("reduction", "rank"), [("mean", 0), ("select", 2), ("pooled", 0)])
@pytest.mark.parametrize("samples", [1, 3, 8])
def test_evaluation_is_one_plain_batch_norm_bit_for_bit(
    samples: int, reduction: str, rank: int
) -> None:
    layer = trained(DistBatchNorm2d(6, vt_world_size=4)).eval()
    layer.eval_reduction, layer.eval_rank = reduction, rank
    rows, variances = layer.running_mean.double(), layer.running_var.double()
    plain = nn.BatchNorm2d(6).eval()
    plain.weight, plain.bias = layer.weight, layer.bias
    plain.running_mean = (rows[rank] if reduction == "select" else rows.mean(0)).float()
    plain.running_var = (variances[rank] if reduction == "select" else variances.mean(0)).float()
    if reduction == "pooled":
        plain.running_var = (variances.mean(0) + rows.var(0, correction=0)).float()
    before = copy.deepcopy(layer.state_dict())
    input = torch.randn(samples, 6, 4, 3)
    assert torch.equal(layer(input), plain(input))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_without_running_statistics_evaluation_uses_the_whole_batch(momentum: Any) -> None:
    layer = DistBatchNorm2d(6, momentum=momentum, vt_world_size=4, track_running_stats=False)
    assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
    input = torch.randn(8, 6, 4, 3)
    torch.testing.assert_close(
        layer(input), loop_batch_norm(input, None, None, None, None, vt_world_size=4)
    )
    plain = nn.BatchNorm2d(6, track_running_stats=False).eval()
    assert torch.equal(layer.eval()(input), plain(input))


def test_options_changed_after_construction_work_as_in_batch_norm() -> None:
    layer = trained(DistBatchNorm2d(6, vt_world_size=2))
    before = copy.deepcopy(layer.state_dict())
    layer.track_running_stats = False  # torch keeps the buffers and stops writing them
    layer(torch.randn(8, 6, 4, 3))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer.track_running_stats = True
    layer.momentum = None
    layer.reset_running_stats()
    inputs = [torch.randn(8, 6, 4, 3) for _ in range(3)]
    for input in inputs:
        layer(input)
    expected = torch.stack([input[:4].mean((0, 2, 3)) for input in inputs]).mean(0)
    torch.testing.assert_close(layer.running_mean[0], expected)
    layer.weight = layer.bias = None
    layer.affine = False
    layer(inputs[0])
    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    layer.eval()(inputs[0])
    layer.train()(inputs[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_affine_and_bias_are_options_on_every_torch(affine: bool, bias: bool) -> None:
    layer = DistBatchNorm2d(6, affine=affine, bias=bias, vt_world_size=2)
    assert (layer.weight is not None, layer.bias is not None) == (affine, affine and bias)
    input = torch.randn(8, 6, 4, 3, requires_grad=True)
    layer(input).sin().sum().backward()
    assert input.grad is not None
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_frozen_layer_in_a_training_model_uses_and_keeps_the_reduced_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), trained(DistBatchNorm2d(6, vt_world_size=4)))
    model.train()
    model[1].eval()
    before = copy.deepcopy(model[1].state_dict())
    input = torch.randn(1, 3, 4, 4)  # one sample: too few to train on, fine when frozen
    assert model(input).shape == (1, 6, 4, 4)
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_layers_of_other_dtypes_keep_them(dtype: torch.dtype) -> None:
    layer = DistBatchNorm2d(6, vt_world_size=2).to(dtype)
    output = layer(torch.randn(8, 6, 4, 3, dtype=dtype))
    assert output.dtype == layer.running_mean.dtype == layer.weight.dtype == dtype
    assert layer.eval()(output).dtype == dtype
    assert DistBatchNorm2d(6, vt_world_size=2, dtype=dtype).running_var.dtype == dtype


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("statistics", [True, False], ids=["low-statistics", "low-parameters"])
def test_what_training_takes_in_two_dtypes_evaluation_takes_too(
    low: torch.dtype, statistics: bool
) -> None:
    torch.manual_seed(0)
    layer = DistBatchNorm2d(6, vt_world_size=2)
    for name in ("running_mean", "running_var") if statistics else ("weight", "bias"):
        getattr(layer, name).data = getattr(layer, name).data.to(low)
    input = torch.randn(8, 6, 4, 3).to(low)
    layer(input).sum().backward()
    expected = copy.deepcopy(layer).float().eval()(input)
    torch.testing.assert_close(layer.eval()(input), expected)


def test_device_is_an_option() -> None:
    layer = DistBatchNorm2d(6, vt_world_size=2, device="meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert layer(torch.empty(8, 6, 4, 3, device="meta")).shape == (8, 6, 4, 3)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_accumulation_trains_the_next_rows_at_each_micro_step(momentum: float | None) -> None:
    layer = DistBatchNorm2d(6, vt_world_size=2, accumulation_steps=3, momentum=momentum)
    rows = DistBatchNorm2d(6, vt_world_size=6, momentum=momentum)
    assert layer.running_mean.shape == (6, 6)
    for step in range(2):
        batch = torch.randn(12, 6, 4, 3)
        outputs = []
        for micro_step, micro_batch in enumerate(batch.split(4)):
            outputs.append(layer(micro_batch))
            expected = [step + 1] * 2 * (micro_step + 1) + [step] * 2 * (2 - micro_step)
            assert layer.num_batches_tracked.tolist() == expected
            if (step, micro_step) == (1, 0):  # a saved model goes on with the same rows
                layer.eval()(micro_batch)
                layer = pickle.loads(pickle.dumps(layer.train()))
        torch.testing.assert_close(torch.cat(outputs), rows(batch))
    torch.testing.assert_close(layer.running_mean, rows.running_mean)
    torch.testing.assert_close(layer.running_var, rows.running_var)


@pytest.mark.parametrize("counts", [None, torch.zeros(2, dtype=torch.long)])
def test_accumulation_needs_a_counter_for_every_row(counts: Tensor | None) -> None:
    layer = DistBatchNorm2d(6, vt_world_size=2, accumulation_steps=3)
    layer.num_batches_tracked = counts
    got = "None" if counts is None else r"\(2,\)"
    with pytest.raises(ConfigurationError, match=rf"of shape \(6,\), but got {got}; set it when"):
        layer(torch.randn(4, 6, 2, 2))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "settings", [{}, {"accumulation_steps": 2}, {"track_running_stats": False}]
)
@pytest.mark.parametrize(("added", "activation"), [(True, None), (False, "relu"), (True, "relu")])
def test_normalize_adds_and_activates_as_the_operations_after_it_would(
    added: bool, activation: str | None, settings: dict[str, Any], training: bool
) -> None:
    layer = DistBatchNorm2d(3, vt_world_size=4, **settings).train(training)
    twin = copy.deepcopy(layer)
    input, residual = torch.randn(2, 8, 3, 4, 4)
    output = layer.normalize(input, activation, residual if added else None)
    expected = twin(input) + residual if added else twin(input)
    assert torch.equal(output, expected.relu() if activation else expected)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=0, atol=0)


def test_normalize_refuses_what_cannot_follow_in_training_and_evaluation() -> None:
    layer, input = DistBatchNorm2d(3, vt_world_size=2), torch.randn(4, 3, 2, 2)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="activation must be"):
            layer.normalize(input, "gelu")
        with pytest.raises(InputError, match="a residual with the shape"):
            layer.normalize(input, residual=input[:2])
        layer.eval()


def test_repr_names_the_ranks_after_torchs_words() -> None:
    text = repr(DistBatchNorm2d(6, vt_world_size=4, eval_reduction="select", eval_rank=1))
    plain = repr(nn.BatchNorm2d(6))
    assert text.startswith("Dist" + plain[:-1] + ", vt_world_size=4, partition='contiguous'")
    assert "eval_reduction='select', eval_rank=1" in text
    assert "accumulation_steps=2" in repr(DistBatchNorm1d(6, vt_world_size=4, accumulation_steps=2))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same_and_share_nothing(clone: Any) -> None:
    layer = trained(DistBatchNorm2d(6, vt_world_size=4, partition="interleaved"))
    twin = clone(layer)
    input = torch.randn(8, 6, 4, 3)
    assert torch.equal(layer(input), twin(input))
    twin(input)
    assert (layer.running_mean - twin.running_mean).abs().max() > 0
    assert repr(layer) == repr(twin)


def test_plain_checkpoint_loads_strictly_into_every_rank() -> None:
    plain = trained(nn.BatchNorm2d(6))
    layer = DistBatchNorm2d(6, vt_world_size=4)
    source = plain.state_dict()
    assert not any(layer.load_state_dict(source))
    assert torch.equal(layer.running_mean, plain.running_mean.expand(4, 6))
    assert layer.num_batches_tracked.tolist() == [3] * 4
    assert source["running_mean"].shape == (6,)
    layer.running_mean[0].fill_(7)  # the rows have memory of their own
    assert not (layer.running_mean[1] == 7).any()


def test_plain_checkpoint_loads_by_assignment_into_a_model_on_the_meta_device() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 6, 1), trained(nn.BatchNorm2d(6)))
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1, device="meta"), DistBatchNorm2d(6, vt_world_size=4, device="meta")
    )
    model.load_state_dict(plain.state_dict(), assign=True)
    input = torch.randn(8, 3, 4, 4)
    assert torch.equal(model.eval()(input), plain.eval()(input))


def test_checkpoint_from_before_torch_counted_batches_loads() -> None:
    source = trained(nn.BatchNorm2d(6)).state_dict()
    del source["num_batches_tracked"], source._metadata
    layer = DistBatchNorm2d(6, vt_world_size=4)
    layer.load_state_dict(source)
    assert layer.num_batches_tracked.tolist() == [0] * 4
    skeleton = DistBatchNorm2d(6, vt_world_size=4, device="meta")
    skeleton.load_state_dict(source, assign=True)
    assert skeleton.num_batches_tracked.tolist() == [0] * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_checkpoint_that_lost_its_counter_is_refused(device: str) -> None:
    source = trained(nn.BatchNorm2d(6)).state_dict()
    del source["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="Missing key.*num_batches_tracked"):
        DistBatchNorm2d(6, vt_world_size=4, device=device).load_state_dict(source, assign=True)


def test_own_checkpoint_loads_row_by_row() -> None:
    layer = trained(DistBatchNorm2d(6, vt_world_size=4))
    twin = DistBatchNorm2d(6, vt_world_size=4)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.running_mean, layer.running_mean)


@pytest.mark.parametrize("ranks", [1, 4])
def test_plain_checkpoint_with_its_counter_in_a_vector_loads_as_in_torch(ranks: int) -> None:
    plain = trained(nn.BatchNorm2d(6))
    state = plain.state_dict()
    state["num_batches_tracked"] = state["num_batches_tracked"][None]
    nn.BatchNorm2d(6).load_state_dict(state)
    layer = DistBatchNorm2d(6, vt_world_size=ranks)
    layer.load_state_dict(state)
    assert layer.num_batches_tracked.tolist() == [int(plain.num_batches_tracked)] * ranks
    own = DistBatchNorm2d(6, vt_world_size=1).state_dict()  # is that of one rank
    with pytest.raises(StateDictError, match="has 1 virtual ranks, but the layer has 4"):
        DistBatchNorm2d(6, vt_world_size=4).load_state_dict(own)


@pytest.mark.parametrize("strict", [True, False])
def test_checkpoint_with_other_ranks_is_refused_naming_both_numbers(strict: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), DistBatchNorm2d(6, vt_world_size=4))
    source = nn.Sequential(nn.Conv2d(3, 6, 1), DistBatchNorm2d(6, vt_world_size=8)).state_dict()
    with pytest.raises(
        StateDictError, match=r"1\.running_mean .* has 8 virtual ranks, but the layer has 4; build"
    ):
        model.load_state_dict(source, strict=strict)


def test_checkpoint_with_ranks_does_not_load_into_plain_batch_norm() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for running_mean"):
        nn.BatchNorm2d(6).load_state_dict(DistBatchNorm2d(6, vt_world_size=4).state_dict())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"vt_world_size": 0}, "vt_world_size must be a positive int, but got 0"),
        ({"vt_world_size": 8.0}, "but got 8.0"),
        ({"vt_world_size": 2, "accumulation_steps": 0}, "accumulation_steps must be a positive"),
        ({"vt_world_size": 2, "partition": "even"}, "partition must be one of"),
        ({"vt_world_size": 2, "eval_reduction": "max"}, "^eval_reduction must be one of"),
        ({"vt_world_size": 2, "eval_rank": 2}, "^eval_rank must be an int from 0 to 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        DistBatchNorm2d(6, **settings)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape", "match"),
    [
        (DistBatchNorm1d, (8, 6, 2, 2), "expected 2D or 3D input .got 4D"),
        (DistBatchNorm2d, (8, 6, 2), "expected 4D input .got 3D"),
        (DistBatchNorm3d, (8, 6), "expected 5D input .got 2D"),
        (DistBatchNorm2d, (8, 5, 2, 2), "expected 6 channels .dimension 1., but got .*8, 5, 2, 2"),
    ],
)
def test_wrong_dimensions_and_channels_are_refused_before_a_change(
    layer: Any, shape: tuple[int, ...], match: str, training: bool
) -> None:
    module = layer(6, vt_world_size=2).train(training)
    with pytest.raises(InputError, match=match):
        module(torch.randn(shape))
    assert module.num_batches_tracked.tolist() == [0, 0]


def test_every_error_is_of_this_package_and_of_a_builtin_kind() -> None:
    from distbn_convert import errors

    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, DistBNError)
        if not name.startswith(("DistBN", "Conversion", "Checkpoint")):
            assert any(base.__module__ == "builtins" for base in error.__bases__)
    public = {n for n, v in vars(errors).items() if inspect.isclass(v)}
    assert public == set(errors.__all__)


def test_double_backward_through_a_layer() -> None:
    layer = DistBatchNorm2d(2, vt_world_size=2).double()
    input = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(input: Tensor) -> Tensor:
        return layer(input).sin()

    assert torch.autograd.gradgradcheck(function, (input,))
