"""Every difference between two open checkpoints, of any formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import VerificationError
from ..replicas import reduce_count, reduce_statistics
from .beside import files_beside, same_content
from .compare import differences, same_bits
from .groups import Group, KeyPath, dotted
from .header import PIECES
from .side import Side
from .stores import Place, Store
from .torchstore import TreeStore
from .words import and_more

__all__ = ["Comparison"]

T = TypeVar("T")


class Comparison:
    """Every difference between two checkpoints.

    Args:
        first: one of them.
        second: the other.
        tolerance: the largest absolute difference of statistics that counts as equal.
        files: whether to compare what folders have beside the weights, too.

    Attributes:
        largest: the largest difference of statistics.
    """

    def __init__(self, first: Side, second: Side, tolerance: float, files: bool) -> None:
        self.sides, self.tolerance = (first, second), tolerance
        self.trees = all(isinstance(side.store, TreeStore) for side in self.sides)
        self.largest = 0.0
        self._found: list[str] = []
        self._alone: tuple[list[str], list[str]] = ([], [])  # names of what was not compared
        self._tensors = [self._places(number, self.sides[number].tensors()) for number in (0, 1)]
        self._groups = [
            {self._place(number, group.path, group.prefix): group for group in side.groups}
            for number, side in enumerate(self.sides)
        ]
        self._statistics = {
            self._place(number, group.path, key)
            for number, side in enumerate(self.sides)
            for group in side.groups
            for key in group.keys
        }
        self._compare_groups()
        self._compare_tensors()
        self._compare_objects()
        if files:
            self._compare_files()
            self._compare_metadata()

    def raise_differences(self) -> None:
        """Raise VerificationError if there is a difference."""
        if self._found:
            first, second = (side.path for side in self.sides)
            more = f" (and {len(self._found) - 3} more)" if len(self._found) > 3 else ""
            raise VerificationError(
                f"{first} and {second} differ: {'; '.join(self._found[:3])}{more}."
            )

    def warnings(self) -> Iterator[str]:
        """Tell what either has that was not compared."""
        for names, side, other in zip(self._alone, self.sides, self.sides[::-1], strict=True):
            if names:
                yield f"{and_more(names)} in {side.path} had no counterpart in {other.path}."

    def _place(self, number: int, path: KeyPath, key: Any) -> Hashable | None:
        """Name a place alike in both; None if it is outside of the sub-tree.

        A flat format joins by dots the keys that a nested one has.
        """
        within = self.sides[number].within(path, key)
        if within is None:
            return None
        return self.sides[number].numbered(within) if self.trees else dotted(within)

    def _places(self, number: int, places: Iterable[Place]) -> dict[Hashable, Place]:
        named: dict[Hashable, Place] = {}
        for path, key in places:
            place = self._place(number, path, key)
            if place in named:
                self._found.append(f"{_name((path, key))} is twice in {self.sides[number].path}")
            if place is not None:
                named[place] = path, key
        return named

    def _pairs(
        self, first: Mapping[Hashable, T], second: Mapping[Hashable, T], name: Callable[[T], str]
    ) -> Iterator[tuple[T, T]]:
        """Yield what both have; tell what one has alone."""
        for place in {**first, **second}:
            if place in first and place in second:
                yield first[place], second[place]
            elif place in first:
                self._found.append(f"{name(first[place])} is in the first alone")
            else:
                self._found.append(f"{name(second[place])} is in the second alone")

    def _compare_groups(self) -> None:
        first, second = self._groups
        for one, two in self._pairs(
            first, second, lambda group: f"the BatchNorm {group.full_name}"
        ):
            self._compare_group(one, two)

    def _compare_group(self, one: Group, two: Group) -> None:
        if one.counted != two.counted:
            self._found.append(f"{one.full_name} has num_batches_tracked in one file alone")
        statistics = [
            _statistics(side.store, group, reduce=group.ranks is not None and other.ranks is None)
            for side, group, other in zip(self.sides, (one, two), (two, one), strict=True)
        ]
        for key, a, b in zip(one.keys, *statistics, strict=False):
            where = dotted((*one.path, key))
            if a.shape != b.shape or a.dtype != b.dtype:
                self._found.append(f"{where} is {_kind(a)} and {_kind(b)}")
            elif not same_bits(a, b):
                self._compare_values(where, a.double(), b.double())

    def _compare_values(self, where: str, a: Tensor, b: Tensor) -> None:
        same = (a == b) | (a.isnan() & b.isnan())
        apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf)
        difference = apart.max().item()
        self.largest = max(self.largest, difference)
        if difference > self.tolerance:
            self._found.append(f"{where} differs by {difference:g}")

    def _compare_tensors(self) -> None:
        """Compare what is no BatchNorm statistic."""
        first, second = (
            {place: what for place, what in tensors.items() if place not in self._statistics}
            for tensors in self._tensors
        )
        for one, two in self._pairs(first, second, _name):
            a, b = (side.store.tensor(*at) for side, at in zip(self.sides, (one, two), strict=True))
            if not same_bits(a, b, grad=self.trees):
                self._found.append(f"{_name(one)} differs")

    def _compare_objects(self) -> None:
        """Compare what is in no mapping, and what is no tensor, if both formats hold such alike."""
        first, second = self.sides
        if self.trees:
            known = {*self._tensors[0], *self._tensors[1]}
            for path, what in differences(first.trees, second.trees):
                if first.numbered(path) not in known:
                    self._found.append(f"{first.name(path)}: {what}")
            return
        if first.store.format == second.store.format:
            objects, others = self._places(0, first.objects), self._places(1, second.objects)
            for one, two in self._pairs(objects, others, _name):
                if first.objects[one]() != second.objects[two]():
                    self._found.append(f"{_name(one)} differs")
            return
        for names, side in zip(self._alone, self.sides, strict=True):
            names += [_name(place) for place in side.others() if side.within(*place) is not None]

    def _compare_files(self) -> None:
        """Compare the files of two folders beside the weights."""
        own = {file for side in self.sides for file in side.store.files()}
        first, second = (files_beside(side.path, own) for side in self.sides)
        for name in sorted({*first, *second}):
            if name in first and name in second:
                if not same_content(first[name], second[name]):
                    self._found.append(f"{name} differs")
            else:
                self._alone[0 if name in first else 1].append(name)

    def _compare_metadata(self) -> None:
        """Compare what safetensors say of themselves, but for what follows from the tensors."""
        one, two = (side.store.metadata for side in self.sides)
        if one is None or two is None:
            return
        optional = {"format"} - (one.keys() & two.keys())  # which files of ours always have
        for key in sorted({*one, *two} - optional - {PIECES}):
            if one.get(key) != two.get(key):
                self._found.append(f"the metadata {key!r} differs")


def _name(place: Place) -> str:
    path, key = place
    return dotted((*path, key))


def _statistics(store: Store, group: Group, reduce: bool) -> list[Tensor]:
    tensors = [store.tensor(group.path, key).detach() for key in group.keys]
    if not reduce:
        return tensors
    return [*reduce_statistics(tensors[0], tensors[1]), *map(reduce_count, tensors[2:])]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
