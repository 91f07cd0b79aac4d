from __future__ import annotations

import copy
import io
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distbn_convert import (
    DistBatchNorm1d,
    DistBatchNorm2d,
    convert_model,
    recalibrate,
    register_pair,
    revert_model,
)
from distbn_convert.errors import (
    ConfigurationError,
    InputError,
    NothingToConvertError,
    UnsupportedModuleError,
)
from distbn_convert.functional import dist_batch_norm

from . import calibrated, ddp
from .calibrated import make_batches
from .oracle import rank_indices

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def population(shares: list[Tensor]) -> tuple[Tensor, Tensor]:
    values = torch.cat([share.movedim(1, -1).flatten(0, -2) for share in shares])
    return values.mean(0), values.var(0, correction=0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_plain_layer_gets_the_statistics_of_all_the_data(momentum: float | None) -> None:
    layer = nn.BatchNorm2d(3, momentum=momentum).double()
    layer(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    recalibrate(layer, [(batch, "label") for batch in make_batches()])
    torch.testing.assert_close(
        (layer.running_mean, layer.running_var), population(make_batches()), **CLOSE
    )
    assert layer.num_batches_tracked == 1
    assert layer.momentum == momentum


@pytest.mark.parametrize("partition", ["contiguous", "interleaved"])
def test_each_rank_gets_the_statistics_of_its_own_samples(partition: str) -> None:
    batches = make_batches()  # of the last one, rank 3 has no samples
    layer = convert_model(nn.BatchNorm2d(3).double(), 4, partition=partition)
    recalibrate(layer, batches)
    for rank in range(4):
        shares = [batch[rank_indices(len(batch), 4, partition)[rank]] for batch in batches]
        mean, var = population(shares)
        torch.testing.assert_close(layer.running_mean[rank], mean, **CLOSE)
        torch.testing.assert_close(layer.running_var[rank], var, **CLOSE)
    assert layer.num_batches_tracked.tolist() == [0] * 4


def test_pooled_gives_every_rank_the_statistics_of_all_the_data() -> None:
    layer = convert_model(nn.BatchNorm2d(3).double(), 4)
    recalibrate(layer, make_batches(), pooled=True)
    mean, var = population(make_batches())
    torch.testing.assert_close(layer.running_mean, mean.expand(4, 3), **CLOSE)
    torch.testing.assert_close(layer.running_var, var.expand(4, 3), **CLOSE)


class OfTokens(nn.BatchNorm1d):
    """Takes ``[B, L, C]``, and normalises it by channels."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class DistOfTokens(OfTokens, DistBatchNorm1d):
    pass


register_pair(OfTokens, DistOfTokens)


class Named(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, tokens: Tensor) -> Any:
        return self.norm(x=tokens)


@pytest.mark.parametrize("ranks", [None, 1])
def test_what_is_normalised_is_counted_not_what_the_layer_is_given(ranks: int | None) -> None:
    batches = [torch.randn(4, length, 3, dtype=torch.float64) * length for length in (2, 2, 8)]
    model = Named(OfTokens(3).double())
    model = model if ranks is None else convert_model(model, ranks)
    recalibrate(model, batches)
    var, mean = torch.var_mean(torch.cat([b.flatten(0, 1) for b in batches]), 0, correction=0)
    torch.testing.assert_close(model.norm.running_mean.view(3), mean, **CLOSE)
    torch.testing.assert_close(model.norm.running_var.view(3), var, **CLOSE)
    assert "_check_input_dim" not in vars(model.norm)


class Fused(nn.Module):
    """Calls ``normalize``, as a residual block does; for half of the batch, then for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = convert_model(nn.BatchNorm2d(3).double(), 2)

    def forward(self, input: Tensor) -> Tensor:
        parts = [self.norm.normalize(part, "relu", residual=part) for part in input.chunk(2)]
        return torch.cat(parts)


def test_what_a_block_normalises_without_the_layers_forward_is_measured() -> None:
    model = Fused()
    batch = make_batches()[0]
    recalibrate(model, [batch])
    mean, var = population([part.tensor_split(2)[1] for part in batch.chunk(2)])
    torch.testing.assert_close(model.norm.running_mean[1], mean, **CLOSE)
    torch.testing.assert_close(model.norm.running_var[1], var, **CLOSE)
    assert "normalize" not in vars(model.norm)


class Folded(DistBatchNorm1d):
    """Normalises the positions of its input by fewer channels."""

    def normalize(self, input: Tensor, *args: Any) -> Tensor:
        folded = input.reshape(len(input), self.num_features, -1)
        return super().normalize(folded, *args).view_as(input)


class OfItsOwn(DistBatchNorm2d):
    """Calls the operation and no method of the layer."""

    def forward(self, input: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        ranks = {"vt_world_size": self.vt_world_size, "momentum": self.momentum}
        return dist_batch_norm(input, *statistics, self.num_batches_tracked, **ranks)


@pytest.mark.parametrize(("cls", "channels"), [(Folded, 2), (OfItsOwn, 4)])
def test_layers_with_ways_of_their_own_to_normalise_are_measured(cls: Any, channels: int) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 4, size, size, dtype=torch.float64) * size for size in (2, 2, 4)]
    layer = cls(channels, vt_world_size=2, dtype=torch.float64)
    recalibrate(layer, batches, pooled=True)
    folded = torch.cat([batch.reshape(4, channels, -1).transpose(1, 2) for batch in batches], 1)
    var, mean = torch.var_mean(folded, (0, 1), correction=0)
    torch.testing.assert_close(layer.running_mean, mean.expand(2, channels), **CLOSE)
    torch.testing.assert_close(layer.running_var, var.expand(2, channels), **CLOSE)


def test_micro_steps_go_to_their_own_rows() -> None:
    batches = make_batches()
    layer = convert_model(nn.BatchNorm2d(3).double(), 2, accumulation_steps=2)
    recalibrate(layer, batches)
    for row in range(4):
        shares = [batch.tensor_split(2)[row % 2] for batch in batches[row // 2 :: 2]]
        torch.testing.assert_close(layer.running_var[row], population(shares)[1], **CLOSE)


def test_rows_without_samples_keep_their_statistics() -> None:
    layer = convert_model(nn.BatchNorm2d(3), 4)
    layer.running_mean.fill_(7)
    recalibrate(layer, [torch.randn(2, 3, 4, 4)])
    assert (layer.running_mean == 7).all(1).tolist() == [False, False, True, True]


@pytest.mark.parametrize("vt_world_size", [4, 8])
def test_it_is_closer_to_the_true_variance_than_every_reduction(vt_world_size: int) -> None:
    """Images differ (variance 9) more than the pixels of one (4); a rank sees few images."""

    def batch(size: int) -> Tensor:
        return 3 * torch.randn(size, 256, 1, 1) + 2 * torch.randn(size, 256, 4, 4)

    layer = DistBatchNorm2d(256, vt_world_size=vt_world_size)
    for _ in range(150):
        layer(batch(2 * vt_world_size))

    def error(model: nn.Module) -> float:
        return abs(float(model.running_var.mean()) - 13)

    errors = [
        error(revert_model(copy.deepcopy(layer), word)) for word in ("mean", "select", "pooled")
    ]
    for pooled in (False, True):
        recalibrate(layer, [batch(2 * vt_world_size) for _ in range(60)], pooled=pooled)
        for word in ("mean", "select", "pooled"):
            assert error(revert_model(copy.deepcopy(layer), word)) < min(errors) / 4
    assert min(errors) > 2


def test_a_large_mean_leaves_the_variance_exact() -> None:
    layer = convert_model(nn.BatchNorm1d(3).double(), 2)
    batches = [torch.randn(8, 3, dtype=torch.float64) + 1e6 for _ in range(5)]
    recalibrate(layer, batches, pooled=True)
    torch.testing.assert_close(layer.running_var[0], torch.cat(batches).var(0, correction=0))


def test_a_half_precision_layer_counts_more_values_than_its_dtype_can() -> None:
    layer = convert_model(nn.BatchNorm2d(2).half(), 2)
    batches = [torch.randn(16, 2, 64, 96).half() + n for n in range(2)]
    assert batches[0].numel() / 4 * 2 > torch.finfo(torch.half).max
    recalibrate(layer, batches, pooled=True)
    mean, var = population([batch.double() for batch in batches])
    for row in range(2):
        torch.testing.assert_close(layer.running_mean[row].double(), mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layer.running_var[row].double(), var, rtol=2e-3, atol=0)


@pytest.mark.parametrize("ranks", [None, 2])
def test_layers_that_count_no_batches_are_recalibrated(ranks: int | None) -> None:
    layer = nn.BatchNorm2d(3).double()
    layer = layer if ranks is None else convert_model(layer, ranks)
    layer.num_batches_tracked = None
    recalibrate(layer, make_batches(), pooled=True)
    mean, var = population(make_batches())
    torch.testing.assert_close(layer.running_mean, mean.expand_as(layer.running_mean), **CLOSE)
    torch.testing.assert_close(layer.running_var, var.expand_as(layer.running_var), **CLOSE)


@pytest.mark.parametrize("ranks", [None, 2])
@pytest.mark.parametrize("counts", [True, False])
def test_layers_that_training_does_not_update_are_recalibrated(
    ranks: int | None, counts: bool
) -> None:
    layer = nn.BatchNorm2d(3).double()
    layer = layer if ranks is None else convert_model(layer, ranks)
    layer.track_running_stats = False  # evaluation uses the buffers all the same
    if not counts:
        layer.num_batches_tracked = None
    recalibrate(layer, make_batches(), pooled=True)
    _, var = population(make_batches())
    torch.testing.assert_close(layer.running_var, var.expand_as(layer.running_var), **CLOSE)
    assert not layer.track_running_stats


class Twice(nn.Module):
    """A shared layer, a frozen one, dropout, and the layer's input by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = convert_model(nn.BatchNorm2d(3).double(), 2)
        self.frozen = nn.BatchNorm2d(3).double()
        self.drop = nn.Dropout(0.9)

    def forward(self, input: Tensor) -> Tensor:
        return self.frozen(self.drop(self.norm(input=self.norm(input=input))))


def test_modes_hooks_and_frozen_layers_stay_and_dropout_is_off() -> None:
    model = Twice()
    model.frozen.eval()
    batch = make_batches()[0]
    recalibrate(model, [batch])
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not model.norm._forward_hooks
    assert not model.norm._forward_pre_hooks
    assert torch.equal(model.frozen.running_var, torch.ones(3, dtype=torch.float64))
    normalized = convert_model(nn.BatchNorm2d(3).double(), 2)(batch).detach()
    shares = [torch.cat([b.tensor_split(2)[1] for b in (batch, normalized)])]
    torch.testing.assert_close(model.norm.running_var[1], population(shares)[1], **CLOSE)

    model.eval()
    recalibrate(model, [batch])
    assert not any(m.training for m in model.modules())
    assert not torch.equal(model.frozen.running_var, torch.ones(3, dtype=torch.float64))
    twin = Twice()
    twin.drop.p = 0.0
    recalibrate(twin.eval(), [batch])
    assert torch.equal(twin.frozen.running_var, model.frozen.running_var)


def test_after_an_error_everything_is_as_before() -> None:
    model = Twice()
    model(make_batches()[0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="expected 3 channels"):
        recalibrate(model, [make_batches()[0], torch.ones(4, 2, 2, 2, dtype=torch.float64)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert model.norm.momentum == 0.1


@pytest.mark.parametrize("most", [1, 2])
def test_only_so_many_batches_are_drawn(most: int) -> None:
    drawn = []

    def stream() -> Any:
        for batch in make_batches():
            drawn.append(batch)
            yield batch

    layer = nn.BatchNorm2d(3).double()
    recalibrate(layer, stream(), max_batches=most, device="cpu")
    assert len(drawn) == most
    torch.testing.assert_close(layer.running_mean, population(make_batches()[:most])[0], **CLOSE)


def test_a_compiled_model_is_measured_too() -> None:
    model = convert_model(ddp.make_model(), 2)
    compiled = torch.compile(model, backend="eager")
    batch = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    compiled(batch)
    twin = copy.deepcopy(model)
    recalibrate(compiled, [batch])
    recalibrate(twin, [batch])
    assert (twin[1].running_mean != 0).all()
    for name, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_a_line_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, progress: bool
) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    shown = ""
    for kind, most, total, count in (
        (list, 3, 3, 3),
        (list, 9, 4, 4),
        (list, None, 4, 4),
        (iter, None, "?", 4),
        (iter, 2, 2, 2),
    ):
        layer = nn.BatchNorm2d(3).double()
        recalibrate(layer, kind(make_batches()), max_batches=most, progress=progress)
        shown += "".join(f"\rrecalibrate: batch {n} of {total}" for n in range(1, count + 1))
        shown += "\n"
    assert stream.getvalue() == (shown if terminal and progress else "")


def test_what_cannot_be_recalibrated_is_refused() -> None:
    layer = convert_model(nn.BatchNorm2d(3), 2)
    with pytest.raises(InputError, match="the loader gave no samples"):
        recalibrate(layer, [])
    images = torch.ones(4, 3, 2, 2)
    for batch, kind in (({"image": images}, "dict"), ([], "list"), ([list(images), 3], "list")):
        with pytest.raises(InputError, match=f"but got a {kind}; give what the model takes"):
            recalibrate(layer, [batch])
    for value in (0, 1.5):
        with pytest.raises(ConfigurationError, match="max_batches must be a positive int or None"):
            recalibrate(layer, [], max_batches=value)
    frozen = nn.Sequential(layer)
    layer.eval()
    for model in (frozen, nn.Linear(2, 2), nn.BatchNorm2d(3, track_running_stats=False)):
        with pytest.raises(NothingToConvertError, match=r"found none; call model.eval\(\) first"):
            recalibrate(model, [])
    with pytest.raises(UnsupportedModuleError, match="'0' is a SyncBatchNorm"):
        recalibrate(nn.Sequential(nn.SyncBatchNorm(3)), [])


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
def test_processes_put_their_populations_together_row_by_row(tmp_path: Any) -> None:
    results = ddp.spawn(calibrated.recalibrate_here, 2, tmp_path)
    batches = [make_batches(seed) for seed in range(2)]
    for result in results:
        torch.testing.assert_close(
            result["plain"], population([*batches[0], *batches[1][:2]]), **CLOSE
        )
        for rank in range(2):
            shares = [b.tensor_split(2)[rank] for b in (*batches[0], *batches[1][:2])]
            mean, var = population(shares)
            torch.testing.assert_close(result["rows"][0][rank], mean, **CLOSE)
            torch.testing.assert_close(result["rows"][1][rank], var, **CLOSE)
