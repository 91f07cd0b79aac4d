"""Whether a checkpoint is sound, and whether two hold the same."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigurationError, VerificationError
from ..replicas import reduce_count, reduce_statistics
from .compare import differences, same_bits
from .groups import Group, dotted, key_name
from .intact import check_checksums
from .job import file_info
from .options import Options
from .places import StrPath, as_path
from .report import VerifyReport
from .stores import Store, open_store
from .survey import Survey, survey
from .torchstore import TreeStore

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["verify_checkpoint"]

Path_ = tuple[Any, ...]
Place = tuple[Path_, Any]


def verify_checkpoint(
    src: StrPath, against: StrPath | None = None, tolerance: float = 0.0, **options: Any
) -> VerifyReport:
    """Check that a checkpoint is sound, or that two hold the same.

    Where a BatchNorm is plain in one file and virtual in the other, the mean of the ranks is
    compared. All other tensors must be equal bit for bit.

    Args:
        src: **path** of a checkpoint.
        against: **path** of another, of any format. Default: None, check ``src`` alone
        tolerance: **float**, the largest absolute difference of statistics that counts as equal.
            Default: 0
        **options: see :class:`Options`; those of writing have no effect. ``state`` takes the
            sub-tree of a file that has it.

    Returns:
        VerifyReport: what was checked.

    Raises:
        VerificationError: the files differ; the message names the first places.
        ReadError: the file is damaged.
        CheckpointError: it cannot be read.

    Example::

        >>> verify_checkpoint("virtual.pth", against="plain.pth").largest_difference
        0.0
    """
    if not tolerance >= 0:
        raise ConfigurationError(f"tolerance must be 0 or more, but got {tolerance!r}.")
    chosen = Options(**options)
    path = as_path(src)
    checksums = check_checksums(path)
    store, found = _open(path, chosen)
    report = VerifyReport(file_info(path, store.format, chosen.sha256), checksums=checksums)
    report.groups = len(found.chosen)
    warnings = [*store.warnings, *found.concerns]
    if against is None:
        if not checksums:
            warnings.append(f"{src} has no checksums ({store.format}); its structure was checked.")
    else:
        second = as_path(against)
        check_checksums(second)
        other, others = _open(second, chosen)
        report.against = file_info(second, other.format, chosen.sha256)
        comparison = _Comparison((store, other), (found, others), chosen.state, tolerance)
        comparison.raise_differences(src, against)
        report.largest_difference = comparison.largest
    report.warnings = tuple(warnings)
    return report


def _open(path: Path, options: Options) -> tuple[Store, Survey]:
    store = open_store(path, options.reading)
    selection = options.selection
    if _is_flat(store):
        selection = replace(selection, state=None)  # a flat file is the sub-tree asked for
    return store, survey(store, path, selection, None)


def _is_flat(store: Store) -> bool:
    return all(not path for path, _ in store.mappings())


class _Comparison:
    """Every difference between two stores."""

    def __init__(
        self,
        stores: tuple[Store, Store],
        surveys: tuple[Survey, Survey],
        state: str | None,
        tolerance: float,
    ) -> None:
        self.stores, self.tolerance = stores, tolerance
        self.states = [None if _is_flat(store) else state for store in stores]
        self.largest = 0.0
        self.found: list[str] = []
        self.groups = [
            {self._place(number, group.path, group.prefix): group for group in found.chosen}
            for number, found in enumerate(surveys)
        ]
        self._compare_groups()
        self._compare_tensors()
        self._compare_objects()

    def raise_differences(self, first: StrPath, second: StrPath) -> None:
        """Raise VerificationError if there is a difference."""
        if self.found:
            more = f" (and {len(self.found) - 3} more)" if len(self.found) > 3 else ""
            raise VerificationError(
                f"{first} and {second} differ: {'; '.join(self.found[:3])}{more}."
            )

    def _place(self, number: int, path: Path_, key: Any) -> Place | None:
        """Return where a key is, without the sub-tree that was asked for; None if outside."""
        state = self.states[number]
        parts = state.split(".") if state is not None else []
        if list(map(key_name, path[: len(parts)])) != parts:
            return None
        return path[len(parts) :], key

    def _compare_groups(self) -> None:
        first, second = self.groups
        for place in {**first, **second}:
            if place in first and place in second:
                self._compare_group(first[place], second[place])
            else:
                group, which = (
                    (first[place], "first") if place in first else (second[place], "second")
                )
                self.found.append(f"the BatchNorm {group.full_name} is in the {which} alone")

    def _compare_group(self, one: Group, two: Group) -> None:
        if one.counted != two.counted:
            self.found.append(f"{one.full_name} has num_batches_tracked in one file alone")
        statistics = [
            _statistics(store, group, reduce=group.ranks is not None and other.ranks is None)
            for store, group, other in zip(self.stores, (one, two), (two, one), strict=True)
        ]
        for key, a, b in zip(one.keys, *statistics, strict=False):
            where = dotted((*one.path, key))
            if a.shape != b.shape or a.dtype != b.dtype:
                self.found.append(f"{where} is {_kind(a)} and {_kind(b)}")
            elif not same_bits(a, b):
                self._compare_values(where, a.double(), b.double())

    def _compare_values(self, where: str, a: Tensor, b: Tensor) -> None:
        same = (a == b) | (a.isnan() & b.isnan())
        apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)
        difference = apart.max().item()
        self.largest = max(self.largest, difference)
        if difference > self.tolerance:
            self.found.append(f"{where} differs by {difference:g}")

    def _compare_tensors(self) -> None:
        """Compare what is no BatchNorm statistic."""
        first, second = (self._tensors(number) for number in (0, 1))
        grad = all(isinstance(store, TreeStore) for store in self.stores)
        for place in {**first, **second}:
            where = dotted((*place[0], place[1]))
            if place not in first or place not in second:
                self.found.append(
                    f"{where} is in the {'first' if place in first else 'second'} alone"
                )
            else:
                a = self.stores[0].tensor(*first[place])
                if not same_bits(a, self.stores[1].tensor(*second[place]), grad):
                    self.found.append(f"{where} differs")

    def _tensors(self, number: int) -> dict[Place, tuple[Path_, Any]]:
        """Map places to where the file has them: tensors of mappings but the statistics."""
        groups = self.groups[number].values()
        statistics = {(group.path, key) for group in groups for key in group.keys}
        tensors = {}
        for path, specs in self.stores[number].mappings():
            for key, spec in specs.items():
                place = self._place(number, path, key)
                if spec is not None and place is not None and (path, key) not in statistics:
                    tensors[place] = (path, key)
        return tensors

    def _compare_objects(self) -> None:
        """Compare what is in no mapping, and what is no tensor, if both files can hold such."""
        if any(self.states) or not all(isinstance(store, TreeStore) for store in self.stores):
            return
        first, second = (store.tree for store in self.stores if isinstance(store, TreeStore))
        tensors = {
            (*path, key) for number in (0, 1) for path, key in self._tensors(number).values()
        }
        statistics = {
            (*group.path, key)
            for groups in self.groups
            for group in groups.values()
            for key in group.keys
        }
        self.found += [
            f"{dotted(path)}: {what}"
            for path, what in differences(first, second)
            if path not in tensors and path not in statistics
        ]


def _statistics(store: Store, group: Group, reduce: bool) -> list[Tensor]:
    tensors = [store.tensor(group.path, key).detach() for key in group.keys]
    if not reduce:
        return tensors
    return [*reduce_statistics(tensors[0], tensors[1]), *map(reduce_count, tensors[2:])]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
