"""From tensors to launches: describe the memory, ask the rule, run the kernels."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .loop import loop_backward, loop_forward
from .resident import resident_backward, resident_forward
from .rule import Choice, select_kernel
from .split import (
    merge_moments,
    split_backward,
    split_forward,
    split_gradients,
    split_moments,
)

__all__ = ["Share", "arrange", "backward", "describe", "forward"]

# Bytes that one thread moves in one instruction.
_VECTOR_BYTES = 16
# Offsets of masked rows may pass the end of a share by a tile.
_NARROW = 2**31 - 2**20
_MERGE_CHANNELS = 32


class Share(NamedTuple):
    """What the kernels are told about the batch."""

    samples: int
    channels: int
    positions: int
    vt_world_size: int
    interleaved: bool
    last: bool
    itemsize: int

    @property
    def values(self) -> int:
        """Values of one channel of the largest share."""
        return -(-self.samples // self.vt_world_size) * self.positions

    def choose(self, backward: bool) -> Choice:
        """Ask the rule."""
        return select_kernel(
            backward=backward,
            channels_last=self.last,
            itemsize=self.itemsize,
            vector=self.vector(),
            channels=self.channels,
            values=self.values,
            vt_world_size=self.vt_world_size,
        )

    def scalars(self) -> dict[str, int]:
        """What may change from call to call without compiling again."""
        quotient, remainder = divmod(self.samples, self.vt_world_size)
        return {
            "channels": self.channels,
            "positions": self.positions,
            "quotient": quotient,
            "remainder": remainder,
            "vt_world_size": self.vt_world_size,
        }

    def wide(self) -> bool:
        """Whether offsets within a share need 64 bits."""
        ranks = self.vt_world_size if self.interleaved else 1
        return self.values * self.channels * ranks >= _NARROW

    def vector(self) -> int:
        """Adjacent values that a thread can move at once."""
        adjacent = self.channels if self.last else self.positions
        return math.gcd(adjacent, _VECTOR_BYTES // self.itemsize)

    def constants(self, choice: Choice) -> dict[str, Any]:
        """What a kernel is compiled for."""
        fast_axis = choice.channels if self.last else choice.rows
        return {
            "ROWS": choice.rows,
            "CHANNELS": choice.channels,
            "VECTOR": min(self.vector(), fast_axis),
            "DIVISOR": self.positions if self.interleaved or not self.last else 0,
            "LAST": self.last,
            "INTERLEAVED": self.interleaved,
            "WIDE": self.wide(),
            "num_warps": choice.warps,
            "enable_fp_fusion": True,
        }

    def grid(self, choice: Choice) -> tuple[int, int]:
        """Programs: blocks of channels of every rank, pieces."""
        return -(-self.channels // choice.channels) * self.vt_world_size, choice.splits


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: tuple[Tensor, Tensor] | None,
    counts: Tensor | None,
    momentum: float | None,
    eps: float,
    vt_world_size: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward of a non-empty batch; ``running`` are contiguous and written."""
    x, last = arrange(input)
    share = describe(x, last, vt_world_size, interleaved)
    choice = share.choose(False)
    y = torch.empty_like(x)
    mean = x.new_empty((vt_world_size, share.channels), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    counts = counts if momentum is None else None
    momentum = None if momentum is None else float(momentum)
    update = (*(running or (None, None)), counts, momentum, eps)
    scalars, constants, grid = share.scalars(), share.constants(choice), share.grid(choice)
    with _on(input):
        if choice.kind == "split":
            partials = mean.new_empty((choice.splits, 2, *mean.shape))
            split_moments[grid](x, partials, choice.size, **scalars, **constants)
            merge_moments[_merge_grid(share)](
                partials, mean, rstd, *update, choice.splits, choice.size, **scalars,
                SPLITS=1 << (choice.splits - 1).bit_length(), CHANNELS=_MERGE_CHANNELS,
                WIDE=share.wide(), num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
            split_forward[grid](x, y, weight, bias, mean, rstd, choice.size, **scalars, **constants)
        else:
            kernel = resident_forward if choice.kind == "resident" else loop_forward
            kernel[grid](x, y, weight, bias, mean, rstd, *update, **scalars, **constants)
    return y, mean, rstd


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    vt_world_size: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Run the backward of a non-empty batch.

    Returns:
        the gradient of the input, and ``Tensor[2, V, C]``: each rank's share of the gradients
        of bias and weight.
    """
    x, last = arrange(input)
    dy = grad_output
    if not _is_arranged(dy, last):
        dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)
    share = describe(x, last, vt_world_size, interleaved)
    choice = share.choose(True)
    dx = torch.empty_like(x)
    scalars, constants, grid = share.scalars(), share.constants(choice), share.grid(choice)
    with _on(input):
        if choice.kind == "split":
            partials = mean.new_empty((choice.splits, 2, *mean.shape))
            split_gradients[grid](x, dy, mean, rstd, partials, choice.size, **scalars, **constants)
            sums = partials.sum(0)
            split_backward[grid](
                x, dy, dx, weight, mean, rstd, *sums, choice.size, **scalars, **constants
            )
        else:
            sums = mean.new_empty((2, *mean.shape))
            kernel = resident_backward if choice.kind == "resident" else loop_backward
            kernel[grid](x, dy, dx, weight, mean, rstd, *sums, **scalars, **constants)
    return dx, sums


def arrange(input: Tensor) -> tuple[Tensor, bool]:
    """Return the input with channels in one of two places, and whether they are last.

    Memory in any other order is copied, which costs a read and a write more.
    """
    if _is_arranged(input, False) and input.shape[2:].numel() > 1:
        return input, False
    if _is_arranged(input, True):
        return input, True
    return input.contiguous(), input.shape[2:].numel() == 1


def _is_arranged(tensor: Tensor, last: bool) -> bool:
    """Say whether ``Tensor[N, C, *]`` is dense with channels second, or last."""
    return (tensor.movedim(1, -1) if last else tensor).is_contiguous()


def describe(x: Tensor, last: bool, vt_world_size: int, interleaved: bool) -> Share:
    """Describe an arranged input."""
    return Share(
        x.shape[0],
        x.shape[1],
        x.shape[2:].numel(),
        vt_world_size,
        interleaved,
        last,
        x.element_size(),
    )


def _merge_grid(share: Share) -> tuple[int]:
    return (-(-share.channels // _MERGE_CHANNELS) * share.vt_world_size,)


def _on(input: Tensor) -> AbstractContextManager[Any]:
    """Make the input's device current, where Triton launches; the CPU is the interpreter's."""
    return torch.cuda.device(input.device) if input.is_cuda else nullcontext()
