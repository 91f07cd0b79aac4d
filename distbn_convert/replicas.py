"""From one set of running statistics to the rows of V ranks, and back.

The one place that knows the reductions: the layers' evaluation, the converter and the
checkpoint code all use it.

======== ============================================= =====================================
word     running_mean, running_var                     is
======== ============================================= =====================================
select   row ``rank``                                  what DDP leaves in rank 0's checkpoint
mean     average of each                               timm's ``--dist-bn reduce``
pooled   mean of means; mean of variances + variance   the statistics of the union of the
         of the means (law of total variance)          ranks
======== ============================================= =====================================
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import ConfigurationError, ConversionError

__all__ = [
    "REDUCTIONS",
    "check_reduction",
    "evaluation_statistics",
    "merge_moments",
    "reduce_count",
    "reduce_rows",
    "reduce_statistics",
    "replicate",
    "wide_dtype",
]

REDUCTIONS = ("mean", "select", "pooled")

# Kinds of devices that all have it. Metal does not, nor do many of Intel's GPUs and others.
_WITH_FLOAT64 = ("cpu", "cuda", "meta")


def check_reduction(reduction: str, rank: int, ranks: int, prefix: str = "") -> None:
    """Raise ConfigurationError unless ``reduction`` is known and ``rank`` is in 0..ranks-1.

    The message calls them so, behind the prefix.
    """
    if reduction not in REDUCTIONS:
        raise ConfigurationError(
            f"{prefix}reduction must be one of {', '.join(map(repr, REDUCTIONS))}, but got "
            f"{reduction!r}; 'mean' averages the ranks, 'select' takes one, 'pooled' unites them."
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < ranks:
        raise ConfigurationError(
            f"{prefix}rank must be an int from 0 to {ranks - 1} (there are {ranks} ranks), "
            f"but got {rank!r}; choose one of them."
        )


def replicate(statistic: Tensor, ranks: int) -> Tensor:
    """Give every rank the same statistic.

    Args:
        statistic: ``Tensor[C]``, or ``Tensor[]`` for a counter.
        ranks: number of rows.

    Returns:
        ``Tensor[ranks, C]`` (``Tensor[ranks]``), contiguous, in memory of its own.
    """
    return (
        statistic.detach()
        .expand(ranks, *statistic.shape)
        .clone(memory_format=torch.contiguous_format)
    )


def wide_dtype(statistic: Tensor) -> torch.dtype:
    """Return the dtype to reduce a statistic in: float64 where there is one, else float32."""
    if statistic.device.type in _WITH_FLOAT64:
        return torch.float64
    return torch.promote_types(statistic.dtype, torch.float32)


def reduce_statistics(
    running_mean: Tensor, running_var: Tensor, reduction: str = "mean", rank: int = 0
) -> tuple[Tensor, Tensor]:
    """Reduce the rows of all ranks to one set of statistics.

    Computed in float64 and rounded once; equal rows give that row bit for bit, also its negative
    zeros, infinities and NaN.

    Args:
        running_mean: ``Tensor[V, C]``.
        running_var: ``Tensor[V, C]``.
        reduction: ``"mean"``, ``"select"`` or ``"pooled"``. Default: ``"mean"``
        rank: the row that ``"select"`` takes. Default: 0

    Returns:
        mean and variance, each ``Tensor[C]`` in the dtype given; views for ``"select"``.

    Raises:
        ConfigurationError: unknown reduction, or a rank out of range.
    """
    # Tracing makes a tensor of the size and warns of comparing it.
    if not torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        check_reduction(reduction, rank, running_mean.shape[0])
    if reduction == "select":
        return running_mean[rank], running_var[rank]
    # Both at once: an evaluation does this in every layer, and each operation is a launch.
    rows = torch.stack((running_mean, running_var))
    wide = rows.to(wide_dtype(rows))
    reduced = wide.mean(1)
    same = (rows.amin(1) == rows.amax(1)) | rows.isnan().all(1)
    if reduction == "pooled":
        spread = (wide[0] - reduced[0]).square().mean(0)
        reduced = torch.stack((reduced[0], reduced[1] + spread))
        same = torch.stack((same[0], same.all(0)))
    reduced = reduced.to(rows.dtype)
    mean, var = (torch.where(same[i], rows[i, 0], reduced[i]) for i in (0, 1))
    return mean.to(running_mean.dtype), var.to(running_var.dtype)


def evaluation_statistics(
    running_mean: Tensor, running_var: Tensor, reduction: str, rank: int
) -> tuple[Tensor, Tensor]:
    """Reduce for one evaluation: as :func:`reduce_statistics`, in a third of the operations.

    Each operation of each layer is a launch. A sum of equal values narrower than float64 is exact
    in it, and their mean rounds to that value, so that equal rows need no care; only the sign of
    zeros and the payload of NaN are lost.
    """
    dtype = running_mean.dtype
    narrow = dtype == running_var.dtype and dtype != torch.float64
    if reduction != "mean" or not narrow or wide_dtype(running_mean) != torch.float64:
        return reduce_statistics(running_mean, running_var, reduction, rank)
    mean, var = torch.stack((running_mean, running_var)).double().mean(1).to(dtype).unbind()
    return mean, var


def reduce_count(num_batches_tracked: Tensor, reduction: str = "mean", rank: int = 0) -> Tensor:
    """Reduce the counters ``int64 Tensor[V]``: the selected one, else the largest."""
    check_reduction(reduction, rank, num_batches_tracked.shape[0])
    if reduction == "select":
        return num_batches_tracked[rank]
    if num_batches_tracked.dtype == torch.int64:
        return num_batches_tracked.amax(0)
    # A file may have another dtype, of which torch may have no maximum.
    largest = num_batches_tracked.flatten().real.cpu().double().argmax()
    return num_batches_tracked[int(largest)]


def reduce_rows(
    rows: Mapping[str, Tensor], reduction: str = "mean", rank: int = 0
) -> dict[str, Tensor]:
    """Reduce all statistics of one layer, in memory of their own.

    Args:
        rows: ``running_mean`` and ``running_var`` ``Tensor[K, C]``, ``num_batches_tracked``
            ``int64 Tensor[K]``, as far as the layer has them.
        reduction: ``"mean"``, ``"select"`` or ``"pooled"``. Default: ``"mean"``
        rank: the row that ``"select"`` takes. Default: 0

    Returns:
        The same names, without the axis of ranks.

    Raises:
        ConfigurationError: unknown reduction, or a rank out of range.
        ConversionError: a reduced statistic is too large for its dtype.
    """
    reduced = {}
    if "running_mean" in rows and "running_var" in rows:
        new = reduce_statistics(rows["running_mean"], rows["running_var"], reduction, rank)
        for name, statistic in zip(("running_mean", "running_var"), new, strict=True):
            values = rows[name]
            if not values.is_meta and statistic.isinf().any() and not values.isinf().any():
                raise ConversionError(
                    f"the {reduction} {name} of the ranks is too large for {values.dtype}; "
                    "convert the model to float32 first, or use another reduction."
                )
            reduced[name] = statistic.clone()
    if "num_batches_tracked" in rows:
        count = reduce_count(rows["num_batches_tracked"], reduction, rank)
        reduced["num_batches_tracked"] = count.clone()
    return reduced


def merge_moments(count: Tensor, mean: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unite M populations, rank by rank.

    Args:
        count: values seen, ``Tensor[M, K, 1]`` or ``Tensor[M, 1]``.
        mean: their means, ``Tensor[M, K, C]`` or ``Tensor[M, C]``.
        deviations: sums of their squared deviations from those means, shaped like ``mean``.

    Returns:
        The same three of the union, without the axis M; an axis of one for ``Tensor[M, C]``.

    References:
        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979.
    """
    keepdim = mean.dim() == 2
    total = count.sum(0, keepdim)
    union = (count * mean).sum(0, keepdim) / total.clamp(min=1)
    deviations = (deviations + count * (mean - union).square()).sum(0, keepdim)
    return total, union, deviations
