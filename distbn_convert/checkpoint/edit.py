"""The new statistics of the chosen groups; everything is computed before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import RefusedError
from ..replicas import reduce_count, reduce_statistics, replicate
from .groups import Group, KeyPath

__all__ = ["Replacements", "gather_groups", "pooled_excess", "reduce_groups", "replicate_groups"]

Read = Callable[[KeyPath, str], Tensor]
Replacements = dict[tuple[KeyPath, str], Tensor]  # (path of the mapping, key) -> new value


class _Ties:
    """Values already computed, by the memory that they come from, so that ties stay ties.

    After loading, a BatchNorm under two names is two tensors on one storage. A value is what its
    first source is, a Parameter or a tensor, with a gradient or without.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[tuple[Tensor, ...], Tensor]] = {}

    def get(self, sources: tuple[Tensor, ...], compute: Callable[[], Tensor]) -> Tensor:
        """Return the value computed for the same sources, else compute it.

        The sources are kept alive, so that their addresses are not given to others.
        """
        if any(source.numel() == 0 for source in sources):  # no memory, no identity
            return _like(sources[0], compute())
        key = tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in sources)
        if key not in self._known:
            self._known[key] = (sources, _like(sources[0], compute()))
        known, value = self._known[key]
        same = all(one is other for one, other in zip(known, sources, strict=True))
        # Else another tensor on the same memory.
        return value if same else _like(sources[0], value.detach())


def replicate_groups(groups: Iterable[Group], read: Read, ranks: int) -> Replacements:
    """Give each rank the statistics of plain groups.

    Args:
        groups: plain ones.
        read: returns the tensor of a mapping under a key.
        ranks: V.

    Returns:
        (path, key) -> ``Tensor[V, C]``, ``Tensor[V]`` for the counters.
    """
    ties = _Ties()
    replacements: Replacements = {}
    for group in groups:
        for key in group.keys:
            old = read(group.path, key)
            replacements[group.path, key] = ties.get((old,), partial(replicate, old, ranks))
    return replacements


def reduce_groups(groups: Iterable[Group], read: Read, reduction: str, rank: int) -> Replacements:
    """Reduce the ranks of virtual groups to one set of statistics.

    Args:
        groups: virtual ones.
        read: returns the tensor of a mapping under a key.
        reduction: ``"mean"``, ``"select"`` or ``"pooled"``.
        rank: the row that ``"select"`` takes.

    Returns:
        (path, key) -> ``Tensor[C]``, ``Tensor[]`` for the counters.

    Raises:
        ConfigurationError: unknown reduction, or a rank out of range.
        RefusedError: a reduced value is too large for its dtype.
    """
    ties = _Ties()
    replacements: Replacements = {}
    for group in groups:
        mean, var, *count = (read(group.path, key) for key in group.keys)
        reduced = reduce_statistics(mean.detach(), var.detach(), reduction, rank)
        for key, old, new in zip(group.keys, (mean, var), reduced, strict=False):
            _check_overflow(group, key, old, new, reduction)
            # A pooled variance depends on the mean as well.
            sources = (old,) if reduction != "pooled" or old is mean else (old, mean)
            replacements[group.path, key] = ties.get(sources, new.clone)
        for old in count:
            new = reduce_count(old.detach(), reduction, rank)
            replacements[group.path, group.keys[2]] = ties.get((old,), new.clone)
    return replacements


def gather_groups(groups: Iterable[Group], reads: Sequence[Read], reduction: str) -> Replacements:
    """Unite the statistics that several ranks saved for the same groups.

    Args:
        groups: of one V, or plain.
        reads: one for each rank's file.
        reduction: ``"stack"`` (rows in the order of the files), ``"mean"`` or ``"pooled"``.

    Returns:
        (path, key) -> the rows of all ranks, or what they reduce to.
    """
    ties = _Ties()
    replacements: Replacements = {}
    for group in groups:
        sources = {key: [read(group.path, key) for read in reads] for key in group.keys}
        stacked = {}
        for key, tensors in sources.items():
            rows = [t.detach() if group.ranks else t.detach().unsqueeze(0) for t in tensors]
            stacked[key] = torch.cat(rows)
        if reduction != "stack":
            mean, var, *count = (stacked[key] for key in group.keys)
            united = [*reduce_statistics(mean, var, reduction), *map(reduce_count, count)]
            for key, rows_of_all, new in zip(group.keys, stacked.values(), united, strict=True):
                _check_overflow(group, key, rows_of_all, new, reduction)
            stacked = dict(zip(group.keys, united, strict=True))
        for key, new in stacked.items():
            from_ = (
                sources[key]
                if reduction != "pooled"
                else [*sources[key], sources[group.keys[0]][0]]
            )
            replacements[group.path, key] = ties.get(tuple(from_), new.clone)
    return replacements


def pooled_excess(mean: Tensor, var: Tensor) -> float:
    """Return by what part pooled variances exceed averaged ones, at the median channel."""
    _, averaged = reduce_statistics(mean.detach(), var.detach(), "mean")
    _, pooled = reduce_statistics(mean.detach(), var.detach(), "pooled")
    excess = (pooled.double() / averaged.double() - 1)[averaged > 0]
    return float(excess.nanmedian()) if excess.numel() else 0.0


def _check_overflow(group: Group, key: str, old: Tensor, new: Tensor, reduction: str) -> None:
    if bool(new.isinf().any()) and not bool(old.isinf().any()):
        raise RefusedError(
            f"the {reduction} of {group.full_name}'s {key.removeprefix(group.prefix)} is too large "
            f"for {group.dtype}. Use another reduction, or store the statistics as float32 first."
        )


def _like(old: Tensor, new: Tensor) -> Tensor:
    """A statistic that was saved as a Parameter, or to have a gradient, still is."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, old.requires_grad)
    return new.requires_grad_(old.requires_grad)
