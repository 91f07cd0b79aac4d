"""Which samples of a batch belong to which virtual rank.

Shares are balanced as ``torch.tensor_split`` balances them: with ``N = q * V + r``
the first ``r`` ranks hold ``q + 1`` samples and the others ``q``. Rank ``v`` holds
block ``v`` of the batch (contiguous) or the samples ``p`` with ``p % V == v``
(interleaved).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "PARTITIONS",
    "divides",
    "gather_ranks",
    "holds",
    "is_exporting",
    "scatter_ranks",
    "share_of",
    "share_sizes",
]

PARTITIONS = ("contiguous", "interleaved")


def is_exporting() -> bool:
    """Say whether :func:`torch.export.export` traces; before torch 2.8 that cannot be told.

    The flag itself: to the compiler of torch 2.11, ``is_exporting()`` is whether it traces at all.
    """
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def share_of(num_samples: int, vt_world_size: int) -> tuple[int, int]:
    """Return the samples of every rank, and how many ranks have one more.

    Not ``divmod``: a compiler that keeps the batch size symbolic has none.
    """
    return num_samples // vt_world_size, num_samples % vt_world_size


def holds(condition: Any) -> bool:
    """Say whether a condition on sizes holds; of a program that is exported, for all that it takes.

    To ask plainly would bind those sizes to the answer.
    """
    if is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    answer: bool = condition  # symbolic to a compiler, which branches on it
    return answer


def divides(vt_world_size: int, num_samples: int) -> bool:
    """Say whether all shares are alike, so that a batch need only be viewed by rank."""
    return holds(num_samples % vt_world_size == 0)


def share_sizes(num_samples: int, vt_world_size: int) -> tuple[int, ...]:
    """Return the number of samples of each rank, ``V`` integers."""
    q, r = share_of(num_samples, vt_world_size)
    return (q + 1,) * r + (q,) * (vt_world_size - r)


def gather_ranks(samples: Tensor, vt_world_size: int, interleaved: bool) -> Tensor:
    """Lay per-sample values out by rank.

    Args:
        samples: ``Tensor[N, C]``.
        vt_world_size: number of virtual ranks ``V``.
        interleaved: the partition.

    Returns:
        ``Tensor[V, ceil(N / V), C]``; the missing samples of shorter shares are zeros.
    """
    q, r = share_of(samples.shape[0], vt_world_size)
    if divides(vt_world_size, samples.shape[0]):
        if interleaved:
            return samples.reshape(q, vt_world_size, samples.shape[1]).transpose(0, 1)
        return samples.reshape(vt_world_size, q, samples.shape[1])
    rank = torch.arange(vt_world_size, device=samples.device)[:, None]
    turn = torch.arange(q + 1, device=samples.device)
    if interleaved:
        index = rank + vt_world_size * turn
        missing = index >= samples.shape[0]
    else:
        index = rank * q + rank.clamp(max=r) + turn
        missing = turn >= q + (rank < r).long()
    values = samples[index.clamp(max=samples.shape[0] - 1)]
    return values.masked_fill(missing[:, :, None], 0)


def scatter_ranks(ranks: Tensor, num_samples: int, interleaved: bool) -> Tensor:
    """Give every sample the value of its rank.

    Args:
        ranks: ``Tensor[V, C]``.
        num_samples: batch size ``N``.
        interleaved: the partition.

    Returns:
        ``Tensor[N, C]``.
    """
    vt_world_size, channels = ranks.shape
    q, r = share_of(num_samples, vt_world_size)
    if divides(vt_world_size, num_samples):
        if interleaved:
            return ranks.repeat(q, 1)
        return ranks[:, None].expand(-1, q, -1).reshape(num_samples, channels)
    sample = torch.arange(num_samples, device=ranks.device)
    if interleaved:
        return ranks[sample % vt_world_size]
    longer = r * (q + 1)  # samples of the ranks that have one more
    rank = torch.where(sample < longer, sample // (q + 1), r + (sample - longer) // (q or 1))
    return ranks[rank]
