"""What virtual ranks must compute, written as people write it by hand: a loop of F.batch_norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rank_indices(num_samples: int, ranks: int, partition: str) -> list[Tensor]:
    """The samples of each rank, in order."""
    indices = torch.arange(num_samples)
    if partition == "interleaved":
        return [indices[rank::ranks] for rank in range(ranks)]
    return list(indices.tensor_split(ranks))


def loop_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    vt_world_size: int,
    partition: str = "contiguous",
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each rank's samples with torch's own batch norm; updates the rows in place."""
    indices = rank_indices(input.shape[0], vt_world_size, partition)
    shares = [
        F.batch_norm(
            input[index],
            None if running_mean is None else running_mean[rank],
            None if running_var is None else running_var[rank],
            weight,
            bias,
            True,
            momentum,
            eps,
        )
        for rank, index in enumerate(indices)
        if len(index)
    ]
    order = torch.cat([index for index in indices if len(index)])
    return torch.cat(shares)[order.argsort()]
