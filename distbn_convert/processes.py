"""Bring what every process of a group holds into one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigurationError

__all__ = ["gather_rows", "group_place"]


def group_place(process_group: Any = None) -> tuple[int, int]:
    """Return the number of processes in the group and this one's place; (1, 0) without any.

    Args:
        process_group: **ProcessGroup**. Default: None, the default group if there is one

    Raises:
        ConfigurationError: this process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    size, place = dist.get_world_size(process_group), dist.get_rank(process_group)
    if place < 0:
        raise ConfigurationError(
            "expected a process_group that this process belongs to, but it does not; "
            "call this in the group's processes alone."
        )
    return size, place


def gather_rows(rows: Sequence[Tensor], process_group: Any = None) -> list[Tensor]:
    """Stack the rows of all processes in the order of their places, bit for bit.

    All tensors travel as bytes in one collective, so that each process can do exact arithmetic
    on the same numbers; their shapes are compared before. It takes as much memory as the rows of
    all processes.

    Args:
        rows: each ``Tensor[K, *]``, of any dtype; shapes and dtypes must be the same in every
            process.
        process_group: **ProcessGroup**. Default: None, the default group if there is one

    Returns:
        Each ``Tensor[R * K, *]``; the tensors themselves if there are no other processes.

    Raises:
        ConfigurationError: this process is not in the group, or, in every process, their rows
            differ in shape or dtype.
    """
    size, _ = group_place(process_group)
    if size == 1:
        return list(rows)
    _raise_unless_alike(rows, size, process_group)
    if not rows:
        return []
    device = rows[0].device
    own = torch.cat([tensor.detach().reshape(-1).view(torch.uint8).to(device) for tensor in rows])
    everything = own.new_empty(size * own.numel())
    # The old name warns since torch 2.14.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(everything, own, group=process_group)
    parts = everything.view(size, -1).split([tensor.nbytes for tensor in rows], dim=1)
    return [
        part.clone(memory_format=torch.contiguous_format)
        .view(tensor.dtype)
        .view(-1, *tensor.shape[1:])
        .to(tensor.device)
        for part, tensor in zip(parts, rows, strict=True)
    ]


def _raise_unless_alike(rows: Sequence[Tensor], size: int, process_group: Any) -> None:
    """Compare the processes first: a collective of other sizes never ends, or mixes numbers."""
    layouts: list[Any] = [None] * size
    own = [f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in rows]
    # Torch sends objects from the current device, which need not be that of the rows.
    with torch.cuda.device(rows[0].get_device() if rows and rows[0].is_cuda else -1):
        dist.all_gather_object(layouts, own, group=process_group)
    for place, layout in enumerate(layouts):
        pairs = zip_longest(layouts[0], layout, fillvalue="missing")
        for number, (first, other) in enumerate(pairs):
            if first != other:
                raise ConfigurationError(
                    "expected the same batch norm layers in every process of the group, but "
                    f"their running statistics differ: tensor {number} is {first} in process 0 and "
                    f"{other} in process {place}; make the same model in all of them, or give the "
                    "process_group of those that have the same one."
                )
