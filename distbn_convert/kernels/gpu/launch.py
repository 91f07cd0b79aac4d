"""From tensors to launches: describe the memory, ask the rule, run the kernels."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import arrange, arrange_like
from . import rule
from .cooperative import cooperative_backward, cooperative_forward
from .dispatch import Kernel
from .loop import loop_backward, loop_forward
from .pieces import sum_ranks
from .pipelined import pipelined_backward, pipelined_forward
from .planes import planes_backward, planes_forward
from .resident import resident_backward, resident_forward
from .rule import L2_BYTES, MULTIPROCESSORS, WAITING, Choice, power_of_two, select_kernel
from .split import (
    merge_gradients,
    merge_moments,
    split_backward,
    split_forward,
    split_gradients,
    split_moments,
)
from .swept import swept_backward, swept_forward
from .ticketed import ticketed_backward, ticketed_forward
from .tiles import Statistics, make_tile

__all__ = ["Share", "backward", "describe", "forward", "resources_of"]

# Bytes that one thread moves in one instruction.
_VECTOR_BYTES = 16
# What a pipelined kernel reads at once: two values.
_WORD_BYTES = 4
# Offsets of masked rows may pass the end of a share by a tile.
_NARROW = 2**31 - 2**20
_MERGE_CHANNELS = 32
_SUMMED_CHANNELS = 64
# Forward and backward; pieces of a split are merged between its two.
_KERNELS = {
    "planes": ((planes_forward,), (planes_backward,)),
    "resident": ((resident_forward,), (resident_backward,)),
    "cooperative": ((cooperative_forward,), (cooperative_backward,)),
    "pipelined": ((pipelined_forward,), (pipelined_backward,)),
    "loop": ((loop_forward,), (loop_backward,)),
    "swept": ((swept_forward,), (swept_backward,)),
    "ticketed": ((ticketed_forward,), (ticketed_backward,)),
    "split": ((split_moments, split_forward), (split_gradients, split_backward)),
}


# How many numbers of positions S may have kernels of their own, where rows are divided by S. All
# others share kernels that take S as an argument, else inputs whose size keeps changing would be
# compiled for at every step.
_MOST_SIZES = 16
_sizes: set[int] = set()


class Share(NamedTuple):
    """What the kernels are told about the batch.

    ``sized`` is whether they are compiled for its S, where that matters.
    """

    samples: int
    channels: int
    positions: int
    vt_world_size: int
    interleaved: bool
    last: bool
    itemsize: int
    multiprocessors: int = MULTIPROCESSORS
    l2_bytes: int = L2_BYTES
    sized: bool = True

    @property
    def values(self) -> int:
        """Values of one channel of the largest share."""
        return -(-self.samples // self.vt_world_size) * self.positions

    def choose(self, backward: bool, residual: bool = False) -> Choice:
        """Ask the rule; ``residual`` is whether one was added before the ReLU."""
        return select_kernel(
            backward=backward,
            channels_last=self.last,
            itemsize=self.itemsize,
            vector=self.vector(),
            channels=self.channels,
            samples=-(-self.samples // self.vt_world_size),
            values=self.values,
            vt_world_size=self.vt_world_size,
            residual=residual,
            multiprocessors=self.multiprocessors,
            l2_bytes=self.l2_bytes,
        )

    def scalars(self, choice: Choice) -> dict[str, int]:
        """What may change from call to call without compiling again."""
        quotient, remainder = divmod(self.samples, self.vt_world_size)
        scalars = {
            "channels": self.channels,
            "positions": self.positions,
            "quotient": quotient,
            "remainder": remainder,
            "vt_world_size": self.vt_world_size,
        }
        if choice.size:
            scalars["size"] = choice.size
        if choice.kind in WAITING:
            scalars["splits"] = choice.splits
        if choice.depth:
            scalars["depth"] = choice.depth
        return scalars

    def wide(self) -> bool:
        """Whether offsets within a share need 64 bits."""
        ranks = self.vt_world_size if self.interleaved else 1
        return self.values * self.channels * ranks >= _NARROW

    def vector(self) -> int:
        """Adjacent values that a thread can move at once."""
        adjacent = self.channels if self.last else self.positions
        return math.gcd(adjacent, _VECTOR_BYTES // self.itemsize)

    def constants(self, choice: Choice, relu: bool) -> dict[str, Any]:
        """What a kernel is compiled for."""
        divisor = self.positions if self.sized else -1
        lanes = 1
        if choice.kind == "planes":
            columns = power_of_two(choice.channels * self.positions)
            vector = math.gcd(choice.channels * self.positions, self.channels * self.positions)
            vector = lanes = math.gcd(vector, _VECTOR_BYTES // self.itemsize)
        else:
            columns = 0
            vector = min(self.vector(), choice.channels if self.last else choice.rows)
            if self.last:
                lanes = vector
        size = choice.rows * (columns or choice.channels)
        tile = make_tile(
            choice.rows,
            choice.channels,
            vector=vector,
            divisor=divisor if self.interleaved or not self.last else 0,
            last=self.last,
            interleaved=self.interleaved,
            wide=self.wide(),
            relu=relu,
            dense=size >= 64 * choice.warps * lanes,
            columns=columns,
            stages=choice.stages,
        )
        constants = {"TILE": tile, "num_warps": choice.warps, "enable_fp_fusion": True}
        if choice.kind in WAITING:
            constants["SPLITS"] = power_of_two(choice.splits)
        if choice.kind == "pipelined":
            constants["launch_cooperative_grid"] = True
        if choice.registers:
            constants["maxnreg"] = choice.registers
        return constants

    def merging(self, choice: Choice) -> dict[str, Any]:
        """What the kernels that merge the pieces of a split are compiled for."""
        tile = make_tile(1, _MERGE_CHANNELS, 1, 0, True, False, self.wide(), False, False)
        constants = {"TILE": tile, "num_warps": 4, "enable_fp_fusion": True}
        return {"SPLITS": power_of_two(choice.splits), **constants}

    def slabs(self, width: int) -> int:
        """Blocks of ``width`` channels of every rank."""
        return -(-self.channels // width) * self.vt_world_size

    def grid(self, choice: Choice) -> tuple[int, ...]:
        """Programs: blocks of channels of every rank, pieces; one axis where tickets are taken."""
        slabs = self.slabs(choice.channels)
        if choice.kind == "pipelined":
            return (choice.groups * choice.splits,)
        if choice.kind in WAITING:
            visits = 2 if choice.kind == "ticketed" else 1
            return (visits * slabs * choice.splits,)
        return slabs, choice.splits


class Plan(NamedTuple):
    """A choice, its launches, and the one that sums what the ranks of a backward have, if any."""

    choice: Choice
    kernels: tuple[Kernel, ...]
    summing: Kernel | None


@lru_cache(maxsize=4096)
def _plan(share: Share, backward: bool, residual: bool, relu: bool, *_: Any) -> Plan:
    """Plan launches. Asked at every call, so plans are kept, by all that a choice depends on."""
    choice = share.choose(backward, residual)
    scalars, grid = share.scalars(choice), share.grid(choice)
    options = scalars | share.constants(choice, relu)
    kernels = [Kernel(kernel, grid, options) for kernel in _KERNELS[choice.kind][backward]]
    if choice.kind != "split":
        return Plan(choice, tuple(kernels), _summing(share) if backward else None)
    merging = scalars | {"splits": choice.splits} | share.merging(choice)
    if backward:
        del merging["size"]  # a sum need not know of how many values
    merge = merge_gradients if backward else merge_moments
    kernels.insert(1, Kernel(merge, (share.slabs(_MERGE_CHANNELS),), merging))
    return Plan(choice, tuple(kernels), None)


def _summing(share: Share) -> Kernel:
    """Return the kernel that sums ranks."""
    options = {"channels": share.channels, "vt_world_size": share.vt_world_size}
    options |= {"CHANNELS": _SUMMED_CHANNELS, "num_warps": 2, "enable_fp_fusion": True}
    return Kernel(sum_ranks, (-(-share.channels // _SUMMED_CHANNELS),), options)


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: tuple[Tensor, Tensor] | None,
    counts: Tensor | None,
    momentum: float | None,
    eps: float,
    vt_world_size: int,
    interleaved: bool,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward of a non-empty batch; ``running`` are contiguous and written.

    So are ``counts``, unless ``momentum`` is None: then they have been.
    """
    x, last = arrange(input)
    added = None if residual is None else arrange_like(x, residual, last)
    share = describe(x, last, vt_world_size, interleaved)
    plan = _plan(share, False, added is not None, relu, select_kernel, rule.ENABLED)
    if plan.choice.kind == "pipelined":
        x = _in_words(x)
    y = torch.empty_like(x)
    mean = x.new_empty((vt_world_size, share.channels), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    momentum = None if momentum is None else float(momentum)
    running_mean, running_var = running or (None, None)
    statistics = Statistics(mean, rstd, running_mean, running_var, counts, momentum, eps)
    affine, device = (weight, bias), x.get_device()
    with _on(device):
        if plan.choice.kind == "split":
            partials = _partials(mean, plan.choice)
            gather, merge, apply = plan.kernels
            gather(device, x, partials)
            merge(device, partials, statistics)
            apply(device, x, y, *affine, added, mean, rstd)
        else:
            shared = _shared(mean, share, plan.choice)
            plan.kernels[0](device, x, y, *affine, added, statistics, *shared)
    return y, mean, rstd


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    vt_world_size: int,
    interleaved: bool,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run the backward of a non-empty batch.

    Returns:
        the gradients of input, bias and weight, and the masked ``grad_output`` if ``output`` is
        given.
    """
    x, last = arrange(input)
    dy = arrange_like(x, grad_output, last)
    out = None if output is None else arrange_like(x, output, last)
    share = describe(x, last, vt_world_size, interleaved)
    dx = torch.empty_like(x)
    masked = None if out is None else torch.empty_like(dy)
    # The sign of the output is read where there is one, and computed where there is none.
    relu = relu and out is None
    affine = weight, bias if relu else None
    plan = _plan(share, True, out is not None, relu, select_kernel, rule.ENABLED)
    if plan.choice.kind == "pipelined":
        x, dy = _in_words(x), _in_words(dy)
    rows, device = (*affine, mean, rstd), x.get_device()
    sums = torch.empty_like(mean), torch.empty_like(mean)
    totals = mean.new_empty((share.channels,)), mean.new_empty((share.channels,))
    with _on(device):
        if plan.choice.kind == "split":
            partials = _partials(mean, plan.choice)
            gather, merge, apply = plan.kernels
            gather(device, x, dy, out, masked, *rows, partials)
            merge(device, partials, *sums)
            apply(device, x, dy if masked is None else masked, dx, *rows, *sums, *totals)
        else:
            shared = _shared(mean, share, plan.choice)
            plan.kernels[0](device, x, dy, out, dx, masked, *rows, *sums, *shared)
        if plan.summing is not None:
            plan.summing(device, *sums, *totals)
    return dx, *totals, masked


def _in_words(tensor: Tensor) -> Tensor:
    """Return the tensor where two values can be read at once, which may be a copy."""
    return tensor.clone() if tensor.data_ptr() % _WORD_BYTES else tensor


def _partials(mean: Tensor, choice: Choice) -> Tensor:
    """Return two numbers for each piece, rank and channel."""
    return mean.new_empty((choice.splits, 2, *mean.shape))


def _shared(mean: Tensor, share: Share, choice: Choice) -> tuple[Tensor, ...]:
    """Return what programs that wait pass to each other: partials and counters; else nothing.

    The counters are zeroed on the stream, which a CUDA graph repeats at each replay.
    """
    if choice.kind not in WAITING:
        return ()
    counters = mean.new_zeros(share.slabs(choice.channels) + 1, dtype=torch.int32)
    return _partials(mean, choice), counters


def describe(x: Tensor, last: bool, vt_world_size: int, interleaved: bool) -> Share:
    """Describe an arranged input."""
    positions = x.shape[2:].numel()
    return Share(
        x.shape[0],
        x.shape[1],
        positions,
        vt_world_size,
        interleaved,
        last,
        x.element_size(),
        *resources_of(x.device),
        (last and not interleaved) or _has_own_kernels(positions),
    )


def _has_own_kernels(positions: int) -> bool:
    """Say whether that S is among the first of the process."""
    if positions not in _sizes and len(_sizes) < _MOST_SIZES:
        _sizes.add(positions)
    return positions in _sizes


@cache
def resources_of(device: torch.device) -> tuple[int, int]:
    """Return the multiprocessors of a device, and the bytes of its L2."""
    if device.type != "cuda":  # the interpreter's
        return MULTIPROCESSORS, L2_BYTES
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size or L2_BYTES  # 0 if not told


def _on(device: int) -> AbstractContextManager[Any]:
    """Make a device current, where Triton launches, if it is not; the CPU is the interpreter's."""
    if device < 0 or device == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
