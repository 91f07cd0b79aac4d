"""Two memory layouts, to which every other is brought: channels second, or last."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

__all__ = ["arrange", "arrange_like", "in_torch_format"]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_torch_format(input: Tensor) -> Tensor:
    """Return ``input`` in the memory format that torch's batch norm gives its output.

    That is channels_last if the strides have that order, else contiguous, so that what can be
    viewed after batch norm can be after ours. Differentiable.
    """
    if input.is_contiguous():
        return input
    if torch._C._are_functorch_transforms_active():  # vmap does not tell of channels_last
        return input.contiguous()
    last = _CHANNELS_LAST.get(input.dim())
    # To suggest a format takes much longer than to look for one.
    if last and input.is_contiguous(memory_format=last):
        return input
    return input.contiguous(memory_format=suggest_memory_format(input))


def arrange(input: Tensor) -> tuple[Tensor, bool]:
    """Return ``Tensor[N, C, *]`` with channels in one of two places, and whether they are last.

    Memory in any other order is copied, which costs a read and a write more.
    """
    if not input.is_contiguous() and _is_arranged(input, True):
        return input, True
    return input.contiguous(), input.shape[2:].numel() == 1


def arrange_like(x: Tensor, other: Tensor, last: bool) -> Tensor:
    """Return a tensor of the shape of an arranged ``x``, with channels in the same place."""
    if _is_arranged(other, last):
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


def _is_arranged(tensor: Tensor, last: bool) -> bool:
    """Say whether ``Tensor[N, C, *]`` is dense with channels second, or last."""
    if not last:
        return tensor.is_contiguous()
    known = _CHANNELS_LAST.get(tensor.dim())
    if known:  # much faster than to move an axis
        return tensor.is_contiguous(memory_format=known)
    return tensor.movedim(1, -1).is_contiguous()
