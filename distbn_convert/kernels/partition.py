"""Which samples of a batch belong to which virtual rank.

Shares are balanced as ``torch.tensor_split`` balances them: with ``N = q * V + r``
the first ``r`` ranks hold ``q + 1`` samples and the others ``q``. Rank ``v`` holds
block ``v`` of the batch (contiguous) or the samples ``p`` with ``p % V == v``
(interleaved).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PARTITIONS", "gather_ranks", "scatter_ranks", "share_sizes"]

PARTITIONS = ("contiguous", "interleaved")


def share_sizes(num_samples: int, vt_world_size: int) -> tuple[int, ...]:
    """Return the number of samples of each rank, ``V`` integers."""
    q, r = divmod(num_samples, vt_world_size)
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
    q, r = divmod(samples.shape[0], vt_world_size)
    channels = samples.shape[1]
    if interleaved:
        if r:
            samples = F.pad(samples, (0, 0, 0, vt_world_size - r))
        return samples.reshape(-1, vt_world_size, channels).transpose(0, 1)
    if not r:
        return samples.reshape(vt_world_size, q, channels)
    longer, shorter = samples.split([r * (q + 1), (vt_world_size - r) * q])
    return torch.cat(
        [
            longer.reshape(r, q + 1, channels),
            F.pad(shorter.reshape(vt_world_size - r, q, channels), (0, 0, 0, 1)),
        ]
    )


def scatter_ranks(ranks: Tensor, num_samples: int, interleaved: bool) -> Tensor:
    """Give every sample the value of its rank.

    Args:
        ranks: ``Tensor[V, C]``.
        num_samples: batch size ``N``.
        interleaved: the partition.

    Returns:
        ``Tensor[N, C]``.
    """
    q, r = divmod(num_samples, ranks.shape[0])
    if interleaved:
        return ranks.repeat(q + bool(r), 1)[:num_samples]
    if not r:
        return ranks.repeat_interleave(q, 0)
    return torch.cat([ranks[:r].repeat_interleave(q + 1, 0), ranks[r:].repeat_interleave(q, 0)])
