"""One of two checkpoints that are compared: where in it things are, as far as it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import NothingToDoError
from .groups import PLAIN, KeyPath, Selection, dotted, find_groups
from .opaque import InertObject
from .stores import Place, Store
from .survey import survey
from .torchstore import TreeStore
from .tree import node_at

__all__ = ["Side"]


class Side:
    """An open checkpoint, or the sub-tree of it that is asked for.

    Args:
        path: where it is.
        store: the open file.
        selection: which groups the caller wants, and the sub-tree.
        strict: whether what may be wrong in it is an error.

    Attributes:
        state: the sub-tree; None for all, also of a flat file, which is a sub-tree as a whole.
        groups: the chosen BatchNorms.
        objects: those that a folder of DCP has as pieces; each returns its bytes.
        warnings: what the user should know.

    Raises:
        NothingToDoError: the file has sub-trees, but not this one.
        RefusedError: there may be something wrong in it, and ``strict``.
    """

    def __init__(self, path: Path, store: Store, selection: Selection, strict: bool) -> None:
        self.path, self.store = path, store
        self.objects: dict[Place, Callable[[], bytearray]] = {}
        if store.format == "dcp":
            from .dcpstore import DcpStore

            assert isinstance(store, DcpStore)
            self.objects = store.objects()
        paths = [path for path, _ in (*store.mappings(), *self.objects)]
        if not any(paths) and selection.state is not None:
            start = f"{selection.state}."
            include, exclude = (
                tuple(glob.removeprefix(start) for glob in globs)
                for globs in (selection.include, selection.exclude)
            )
            selection = replace(selection, state=None, include=include, exclude=exclude)
        self.state = selection.state
        self._roots: list[KeyPath] = [()]
        if self.state is not None:  # several if keys with dots of their own spell the same
            found = dict.fromkeys(map(self._root, paths))
            self._roots = [root for root in found if root is not None]
            if not self._roots:
                raise self.lacks(self.state)
        surveyed = survey(store, path, selection, None)
        surveyed.examine(store, path, strict)
        self.groups = surveyed.chosen
        self.warnings = [*store.warnings, *surveyed.concerns]
        self._numbers: dict[KeyPath, dict[Any, int]] = {}

    def lacks(self, state: str) -> NothingToDoError:
        """Make the error for a sub-tree that is not there."""
        where = [dotted(path) for path, specs in self.store.mappings() if find_groups(specs, path)]
        names = ", ".join(name or "(top level)" for name in where) or "none"
        return NothingToDoError(
            f"{self.path} has nothing at --state {state}; its state dicts with BatchNorms: {names}."
        )

    @property
    def trees(self) -> list[Any]:
        """What was loaded of a file of torch: the sub-trees."""
        assert isinstance(self.store, TreeStore)
        return [node_at(self.store.tree, root) for root in self._roots]

    def _root(self, path: KeyPath) -> KeyPath | None:
        """Return the start of a path that leads to a sub-tree; keys may have dots of their own."""
        if self.state is None:
            return ()
        for length in range(1, len(path) + 1):
            name = dotted(path[:length])
            if name == self.state:
                return path[:length]
            if not self.state.startswith(name + "."):
                break
        return None

    def within(self, path: KeyPath, key: Any) -> KeyPath | None:
        """Return a place from the sub-tree on, behind the number of that; None if outside."""
        root = self._root(path)
        return None if root is None else (self._roots.index(root), *path[len(root) :], key)

    def name(self, within: KeyPath) -> str:
        """Name a place within the sub-trees as the user knows it."""
        full = (*self._roots[within[0]], *within[1:]) if within else ()
        return dotted(full) or "(top level)"

    def numbered(self, within: KeyPath) -> KeyPath:
        """Return a place as it is in another file too, where a key may be another object.

        Such keys are numbered in the order in which they come.
        """
        place: KeyPath = ()
        for key in within:
            if not isinstance(key, PLAIN) or key != key:
                numbers = self._numbers.setdefault(place, {})
                key = ("", numbers.setdefault(key, len(numbers)))
            place = (*place, key)
        return place

    def tensors(self) -> Iterator[Place]:
        """Yield where the mappings have tensors."""
        for path, specs in self.store.mappings():
            yield from ((path, key) for key, spec in specs.items() if spec is not None)

    def others(self) -> Iterator[Place]:
        """Yield where there is something else than tensors and mappings."""
        yield from self.objects
        if isinstance(self.store, TreeStore):
            mappings = self.store.mapping_objects
            for path, mapping in mappings.items():
                for key, node in mapping.items():
                    if _is_other(node, (*path, key), mappings):
                        yield path, key


def _is_other(node: Any, place: KeyPath, mappings: Container[KeyPath]) -> bool:
    """Whether what is at a place is more than tensors and what the mappings have."""
    if isinstance(node, InertObject):  # of its class no other format knows
        return True
    if isinstance(node, dict) or place in mappings:
        return place not in mappings
    if isinstance(node, (list, tuple)):
        inside = (_is_other(part, (*place, at), mappings) for at, part in enumerate(node))
        return any(inside) or any(isinstance(part, Tensor) for part in node)
    return not isinstance(node, Tensor)
