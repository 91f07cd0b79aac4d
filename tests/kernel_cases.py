"""Batches for the GPU kernels and their comparison with the definition, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distbn_convert.kernels import gpu, reference
from distbn_convert.kernels.gpu.rule import Choice


@dataclass(frozen=True)
class Case:
    """One batch and how it is normalised; the defaults are the plainest."""

    shape: tuple[int, ...] = (8, 2, 6)
    vt_world_size: int = 4
    interleaved: bool = False
    channels_last: bool = False
    dtype: torch.dtype = torch.float32
    affine: str = "weight bias"
    running: torch.dtype | None = torch.float32
    momentum: float | None = 0.1
    shift: float = 2.0
    wide: bool = False
    memory: str = "dense"
    residual: bool = False
    relu: bool = False


CASES = [
    Case(),
    Case((9, 2, 5), dtype=torch.bfloat16, momentum=None),
    Case((9, 2, 8), interleaved=True, dtype=torch.float16, affine="weight"),
    Case((3, 2, 8), running=torch.bfloat16, affine="bias", wide=True),
    Case((8, 3, 4), channels_last=True, affine=""),
    Case((9, 4, 2, 3), interleaved=True, channels_last=True, dtype=torch.bfloat16),
    Case((3, 4, 2, 2, 2), channels_last=True, momentum=None, wide=True),
    Case((10, 5), running=None, interleaved=True, dtype=torch.float16),
    Case((6, 2, 33), vt_world_size=2, shift=1000.0),
    Case((6, 2, 33), vt_world_size=2, shift=1000.0, channels_last=True),
    Case((4, 1, 5), vt_world_size=1, memory="strided"),
    Case((9, 2, 5), relu=True),
    Case((9, 2, 8), interleaved=True, dtype=torch.float16, affine="weight", relu=True),
    Case((9, 4, 2, 3), channels_last=True, dtype=torch.bfloat16, affine="bias", relu=True),
    Case((9, 2, 5), dtype=torch.bfloat16, residual=True),
    Case((3, 4, 2, 3), channels_last=True, residual=True, relu=True),
    Case((9, 2, 8), interleaved=True, dtype=torch.float16, residual=True, relu=True),
    Case((4, 1, 5), vt_world_size=1, memory="strided", residual=True, relu=True),
    Case((13, 6, 3, 3), vt_world_size=3, channels_last=True, dtype=torch.float16, wide=True),
    Case((70, 2, 6), vt_world_size=70),
]
# Some of those in which rows are divided by S, which may be a constant or not.
DIVIDED = [CASES[place] for place in (1, 3, 5, 8, 12, 16)]
Tensors = dict[str, Any]
KINDS = (
    "resident",
    "planes",
    "cooperative",
    "pipelined",
    "loop",
    "staged",
    "swept",
    "split",
    "ticketed",
)


def make(case: Case, place: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensors:
    """Random tensors of a case, each passed through ``place``; counters start above zero."""
    ranks, channels = case.vt_world_size, case.shape[1]
    x = (torch.randn(case.shape, dtype=torch.float64) + case.shift).to(case.dtype)
    dy = torch.randn(case.shape, dtype=torch.float64).to(case.dtype)
    residual = torch.randn(case.shape, dtype=torch.float64).to(case.dtype)
    if case.channels_last:
        x, dy, residual = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy, residual))
    rows = torch.randn(ranks, channels), torch.rand(ranks, channels)
    mean, var = (None if case.running is None else row.to(case.running) for row in rows)
    tensors = {
        "x": x,
        "dy": dy,
        "residual": residual if case.residual else None,
        "weight": torch.rand(channels) + 0.5 if "weight" in case.affine else None,
        "bias": torch.randn(channels) if "bias" in case.affine else None,
        "mean": mean,
        "var": var,
        "counts": torch.arange(ranks) + 2,
    }
    placed = {name: None if t is None else place(t) for name, t in tensors.items()}
    if case.memory == "strided":
        placed["x"] = torch.stack([placed["x"], placed["x"]], -1)[..., 0]
        placed["dy"] = placed["dy"][:1].expand(case.shape)
        if case.residual:
            placed["residual"] = placed["residual"][:1].expand(case.shape)
        for name in ("mean", "counts"):
            placed[name] = torch.stack([placed[name], placed[name]], -1)[..., 0]
    return placed


def compute(
    backend: Any, case: Case, tensors: Tensors, active: Tensor | None = None
) -> dict[str, Tensor]:
    """Everything that a backend returns and writes, by name.

    ``active`` is an output to take the ReLU's gradient from, where that of the backend itself
    would be another: an error of rounding may have moved a value across zero.
    """
    x, weight, bias, residual = (tensors[name] for name in ("x", "weight", "bias", "residual"))
    rows = tensors["mean"], tensors["var"]
    partition = case.vt_world_size, case.interleaved, case.relu
    y, mean, rstd = backend.forward(
        x, weight, bias, residual, *rows, tensors["counts"], case.momentum, 1e-5, *partition
    )
    kept = None
    if case.relu and (case.residual or active is not None):
        kept = y if active is None else active.to(y.dtype)
    dx, dw, db, dz = backend.backward(tensors["dy"], x, weight, bias, kept, mean, rstd, *partition)
    dz = dz if case.relu and case.residual else None
    names = "y", "batch mean", "rstd", "dx", "dweight", "dbias", "dresidual"
    names += "running mean", "running var", "counts"
    results = zip(names, (y, mean, rstd, dx, dw, db, dz, *rows, tensors["counts"]), strict=True)
    return {name: result for name, result in results if result is not None}


def cloned(tensors: Tensors) -> Tensors:
    """Copies that share nothing."""
    return {name: None if t is None else t.clone() for name, t in tensors.items()}


def widened(tensors: Tensors) -> Tensors:
    """Copies in float64, apart from the counters."""
    return {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in cloned(tensors).items()
    }


def check(
    case: Case,
    tensors: Tensors,
    backend: Any = gpu,
    slack: float = 1,
    rounds_sums: bool = False,
) -> None:
    """Compare with the definition: the error is at most twice its own in the case's dtype.

    ``slack`` times as much is allowed to a backend whose sums are not ours. One that
    ``rounds_sums`` keeps those of the backward in the input's dtype on the way.
    """
    written = ("mean", "var", "counts") if case.running else ("counts",)
    versions = [tensors[name]._version for name in written]
    twins = cloned(tensors), widened(tensors)
    ours = compute(backend, case, tensors)
    active = ours["y"] if case.relu else None
    peers = compute(reference, case, twins[0], active)
    exact = compute(reference, case, twins[1], active)
    for name, result in ours.items():
        truth, peer = exact[name], peers[name]
        if name == "counts":
            assert result.tolist() == truth.tolist(), name
            continue
        assert result.dtype == peer.dtype, f"{name}: {result.dtype}, not {peer.dtype}"
        assert result.stride() == peer.stride() or name == "running mean", name
        assert not result.isnan().any(), f"{name}: not a number, in {case}"
        error, allowed = ((t.double() - truth).abs().max().item() for t in (result, peer))
        rounding = torch.finfo(result.dtype).eps * truth.abs().max().item()
        # A mean of `shift` is rounded to float32, whatever is done after.
        limit = 2 * allowed + 2 * rounding + 2 * torch.finfo(torch.float32).eps * case.shift
        limit *= slack
        if rounds_sums and name in ("dweight", "dbias"):
            rows = tensors["dy"].double().transpose(0, 1).flatten(1)
            limit += 2 * torch.finfo(case.dtype).eps * rows.norm(dim=1).max().item()
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}, in {case}"
    after = [tensors[name]._version for name in written]
    assert all(new > old for old, new in zip(versions, after, strict=True)), "version counters"


# What a pipelined kernel takes.
WORDS: dict[str, Any] = {"channels_last": True, "dtype": torch.bfloat16}


def check_nan(
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor, backend: Any = gpu, **settings: Any
) -> None:
    """A NaN passes a ReLU as it does in torch, in both directions."""
    for residual in (False, True):
        torch.manual_seed(0)
        case = Case((6, 2, 5), vt_world_size=2, relu=True, residual=residual, **settings)
        tensors = make(case, place)
        tensors["residual" if residual else "x"][1, 1, 3] = float("nan")
        ours, theirs = (compute(b, case, cloned(tensors)) for b in (backend, reference))
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert ours["y"].isnan().sum() == (1 if residual else 15)
        assert not ours["dbias"].isnan().any()


def check_underflow(
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    backend: Any = gpu,
    last: bool = False,
) -> None:
    """Where the output is above zero until it is rounded, its gradient is zero as in torch."""
    case = Case((6, 2, 5), 2, channels_last=last, relu=True, dtype=torch.float16, affine="weight")
    tensors = make(case, place)
    tensors["weight"].fill_(1e-9)
    ours = compute(backend, case, tensors)
    assert not ours["y"].any()
    assert not ours["dbias"].any()
    assert not ours["dweight"].any()


def check_tiny(
    place: Callable[[Tensor], Tensor] = lambda tensor: tensor, backend: Any = gpu
) -> None:
    """A variance below the smallest normal float32 is not taken for zero."""
    x = place(torch.randn(6, 2, 5) * 1e-20)
    rows = [None] * 5
    _, _, ours = backend.forward(x, *rows, None, None, 0.0, 2, False, False)
    _, _, exact = reference.forward(x.double(), *rows, None, None, 0.0, 2, False, False)
    assert 1e19 < exact.min() < exact.max() < 1e21
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=0)


def force(kind: str) -> Callable[..., Choice]:
    """A rule that always takes one kernel, with tiles so small that every loop turns.

    What a pipelined one cannot take is split; staged is a loop that asks for tiles ahead, those of
    32 bits into shared memory.
    """

    def choose(
        *,
        channels_last: bool,
        itemsize: int,
        samples: int,
        values: int,
        channels: int,
        vt_world_size: int,
        residual: bool = False,
        **_: Any,
    ) -> Choice:
        width = 2 if channels_last and channels > 1 and kind != "cooperative" else 1
        rows = 1 << (values - 1).bit_length()
        words = channels_last and itemsize == 2 and channels % 2 == 0
        if kind == "pipelined" and words and not residual:
            size = -(-values // 3)  # pieces that do not fill their tile
            rows = 1 << (size - 1).bit_length()
            return Choice(kind, rows, width, 1, -(-values // size), size, groups=2)
        if kind == "planes" and not channels_last:
            return Choice(kind, 1 << (samples - 1).bit_length(), 2, 1)
        if kind in ("resident", "planes"):
            return Choice("resident", rows, width, 1)
        rows = max(rows // 4, 8)
        if kind in ("loop", "staged"):
            ahead = 3 if itemsize == 4 else 2
            return Choice("loop", rows, width, 1, stages=ahead if kind == "staged" else 1)
        if kind == "cooperative":  # pieces that do not fill their tile
            size = rows - 1 if channels_last else rows
            return Choice(kind, rows, width, 1, -(-values // size), size)
        if kind == "swept":  # pieces of two tiles that do not fill them
            rows = max(rows // 2, 4)
            size = 2 * rows - channels_last
            return Choice(kind, rows, width, 1, -(-values // size), size)
        depth = min(2, -(-channels // width) * vt_world_size) if kind == "ticketed" else 0
        other = "split" if kind == "pipelined" else kind
        return Choice(other, rows, width, 1, -(-values // rows), rows, depth)

    return choose
