"""Run the GPU kernels in Triton's interpreter: ``python -m tests.interpreter CASE``.

A process of its own, with ``TRITON_INTERPRET=1`` set before triton is imported. Every tensor
lies between margins of NaN, and what the kernels allocate starts as NaN: a value read that was
not written shows in the results, a value written outside shows in the margins. What the kernels
tell the compiler of their offsets and masks, which the interpreter has no use for, is checked.
Results are compared with the definition in float64.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from distbn_convert import kernels
from distbn_convert.functional import dist_batch_norm
from distbn_convert.kernels import gpu, reference
from distbn_convert.kernels.gpu import launch
from distbn_convert.kernels.gpu.ticketed import take_turn

from .concurrency import concurrent_programs
from .kernel_cases import (
    CASES,
    WORDS,
    Case,
    check,
    check_nan,
    check_tiny,
    check_underflow,
    cloned,
    compute,
    force,
    make,
    widened,
)

# Values of 16 bits behind it can be read two at a time.
MARGIN = 38
_buffers: list[tuple[Tensor, int]] = []
_empty_like, _new_empty = torch.empty_like, torch.Tensor.new_empty


def guarded(shape: Any, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of NaN between margins of NaN."""
    numel = torch.Size(shape).numel()
    buffer = torch.full((numel + 2 * MARGIN,), float("nan"), dtype=dtype)
    _buffers.append((buffer, numel))
    return buffer[MARGIN : MARGIN + numel].view(shape)


def guarded_copy(tensor: Tensor) -> Tensor:
    """The tensor, strides and all, between margins of NaN; integers are left alone."""
    if not tensor.is_floating_point():
        return tensor
    order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
    copy = guarded([tensor.shape[dim] for dim in order], tensor.dtype)
    copy = copy.permute([order.index(dim) for dim in range(tensor.dim())])
    return copy.copy_(tensor)


def guarded_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    model = _empty_like(tensor, dtype=dtype or tensor.dtype)
    return guarded_copy(model.fill_(float("nan")))


def guarded_new(self: Tensor, shape: Any, dtype: Any = None, **options: Any) -> Tensor:
    if options:  # the interpreter's own
        return _new_empty(self, shape, dtype=dtype, **options)
    return guarded(shape, dtype or self.dtype)


def check_margins() -> None:
    for buffer, numel in _buffers:
        margins = torch.cat([buffer[:MARGIN], buffer[MARGIN + numel :]])
        assert margins.isnan().all(), "a kernel wrote outside its tensors"
    _buffers.clear()


_checked_hints: dict[str, int] = {}
_set_attr = TensorHandle.set_attr


def check_hint(self: Any, name: str, values: Any) -> None:
    """What a kernel promises of a tensor must hold: a device would take it at its word."""
    _set_attr(self, name, values)
    data = np.atleast_1d(self.data)
    sizes = [int(getattr(value, "value", value)) for value in np.atleast_1d(values)]
    contiguity = self.attr.get("tt.contiguity", [1] * len(sizes))
    for axis, size in enumerate(sizes):
        lines = np.moveaxis(data, axis, -1)
        if name == "tt.divisibility":
            run = int(getattr(contiguity[axis], "value", contiguity[axis]))
            wrong = lines[..., ::run] % size
        else:
            runs = lines.reshape(-1, size)
            step = np.arange(size) if name == "tt.contiguity" else 0
            wrong = runs != runs[:, :1] + step if size > 1 else np.zeros(1)
        assert not wrong.any(), f"{name} is not {sizes}: {data}"
        _checked_hints[name] = _checked_hints.get(name, 0) + (size > 1)


def check_kernel(kind: str) -> None:
    launch.select_kernel = force(kind)
    TensorHandle.set_attr = check_hint
    # A slab is cut into five pieces at most, whose programs must run together; or into three, those
    # of two slabs.
    rooms = {"cooperative": 5, "pipelined": 6, "swept": 5}
    with concurrent_programs(rooms[kind]) if kind in rooms else nullcontext():
        check_cases(kind)
    assert _checked_hints.keys() == {"tt.divisibility", "tt.contiguity", "tt.constancy"}
    assert min(_checked_hints.values()) > 0, "no vector was promised"


def check_cases(kind: str) -> None:
    torch.empty_like = guarded_like
    torch.Tensor.new_empty = guarded_new
    for case in CASES:
        launch._NARROW = 0 if case.wide else 2**31 - 2**20
        torch.manual_seed(0)
        check(case, make(case, guarded_copy))
        check_margins()
    words = kind == "pipelined"
    check_nan(**(WORDS if words else {}))
    check_underflow(last=words)
    check_tiny()


@triton.jit
def record_turns(sync, splits, depth, visits):
    gathers, slab, piece = take_turn(sync, splits, depth)
    row = visits + 3 * tl.program_id(0)
    tl.store(row, gathers.to(tl.int32))
    tl.store(row + 1, slab)
    tl.store(row + 2, piece)


def check_schedule() -> None:
    """Tickets visit every piece twice, and no wait is for a later ticket."""
    for slabs, splits, depth in ((1, 3, 1), (2, 1, 2), (5, 2, 1), (5, 2, 3), (5, 1, 5), (7, 1, 4)):
        visits = torch.full((2 * slabs * splits, 3), -1, dtype=torch.int32)
        sync = torch.zeros(slabs + 1, dtype=torch.int32)
        record_turns[(len(visits),)](sync, splits, depth, visits)
        rows = [tuple(row) for row in visits.tolist()]
        pieces = {(slab, piece) for slab in range(slabs) for piece in range(splits)}
        for gathers in (0, 1):
            assert {row[1:] for row in rows if row[0] == gathers} == pieces
        assert len(set(rows)) == len(rows)
        for ticket, (gathers, slab, _) in enumerate(rows):
            before = {row[1:] for row in rows[:ticket] if row[0]}
            if not gathers:
                assert {(slab, piece) for piece in range(splits)} <= before
            # What is gathered and not yet applied must fit in L2.
            applied = [row[1] for row in rows[:ticket] if not row[0]]
            assert slab <= max(applied, default=-1) + depth


def check_concurrency() -> None:
    """Programs that wait give the same bits however many run at once, in whatever order."""
    case = Case((13, 3, 5), vt_world_size=3, relu=True, residual=True, momentum=0.0)
    for kind, channels_last, rooms in (
        ("cooperative", False, (4, 5, 30)),
        ("swept", True, (4, 5, 30)),
        ("ticketed", True, (1, 7)),
    ):
        launch.select_kernel = force(kind)
        torch.manual_seed(0)
        tensors, results = make(replace(case, channels_last=channels_last)), []
        for room in rooms:
            with concurrent_programs(room, shuffle=True):
                results.append(compute(gpu, case, cloned(tensors)))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def check_operator() -> None:
    """The public op, its autograd and a fullgraph capture go through the kernels."""
    torch.manual_seed(0)
    gpu.supports = lambda input: input.dtype != torch.float64
    kernels._BACKENDS = gpu, reference
    assert kernels.select_backend(torch.ones(1)) is gpu
    compiled = torch.compile(dist_batch_norm, backend="aot_eager", fullgraph=True)
    for case in (Case(), CASES[5], CASES[15]):
        tensors = make(case)
        leaves = [tensors[n] for n in ("x", "weight", "bias", "residual") if tensors[n] is not None]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        results = []
        for function in (dist_batch_norm, compiled):
            rows = tensors["mean"].clone(), tensors["var"].clone()
            y = function(
                tensors["x"], *rows, tensors["weight"], tensors["bias"],
                momentum=case.momentum, vt_world_size=case.vt_world_size,
                partition="interleaved" if case.interleaved else "contiguous",
                activation="relu" if case.relu else None, residual=tensors["residual"],
            )  # fmt: skip
            results.append((y, *rows, *torch.autograd.grad(y, leaves, tensors["dy"])))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
        wide = {n: None if t is None else t.detach() for n, t in widened(tensors).items()}
        exact = compute(reference, case, wide)
        names = ["y", "running mean", "running var", "dx", "dweight", "dbias"]
        names += ["dresidual"] if case.residual else []
        for name, result in zip(names, results[0], strict=True):
            eps = torch.finfo(result.dtype).eps
            torch.testing.assert_close(result.double(), exact[name], rtol=4 * eps, atol=16 * eps)


if __name__ == "__main__":
    checks = {"operator": check_operator, "schedule": check_schedule}
    checks["concurrency"] = check_concurrency
    name = sys.argv[1]
    checks[name]() if name in checks else check_kernel(name)
