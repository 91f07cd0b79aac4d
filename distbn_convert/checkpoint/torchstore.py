"""Files of ``torch.save`` as a store: the loaded tree is edited in place and saved again."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import ReadError
from .checksums import check_zip
from .compare import first_difference
from .edit import Replacements
from .groups import KeyPath
from .readback import LARGE, ReadBack, reading_back
from .stores import Mappings, Place, ReadOptions, WriteOptions, read_back_error
from .stream import Progress, Sink
from .torchfile import TorchFile, load_torch, save_torch
from .tree import specs_of, spell_out, walk_leaves, walk_mappings
from .zipcopy import checksums_beside, plan_copy

__all__ = ["TreeStore", "write_tree"]


class TreeStore:
    """A loaded tree, edited in place and saved as a torch zip.

    Args:
        path: a torch zip or a legacy file.
        format: its name in reports.
        options: how to load it.
    """

    def __init__(self, path: Path, format: str, options: ReadOptions) -> None:
        self.path, self.format, self.options = path, format, options
        self.file = file = load_torch(path, options)
        self.metadata = None
        self.concerns: list[str] = []
        self.warnings = file.warnings
        self.opaque_globals = file.opaque_globals
        self.tensors = sum(isinstance(leaf, Tensor) for leaf in walk_leaves(file.tree))
        self._mappings: dict[KeyPath, Any] = dict(walk_mappings(file.tree, options.state))
        self._in_objects: list[tuple[KeyPath, MutableMapping[Any, Any]]] = []
        if options.opaque:
            known = {id(mapping) for mapping in self._mappings.values()}
            mappings = walk_mappings(file.tree, objects=True)
            self._in_objects = [
                (where, mapping)
                for where, mapping in mappings
                if id(mapping) not in known and any(map(_is_mean, mapping))
            ]

    @property
    def tree(self) -> Any:
        """What was saved."""
        return self.file.tree

    def files(self) -> Iterable[Path]:
        """Return the file that is read."""
        return [self.path]

    def mappings(self) -> Mappings:
        """Describe each dictionary of the tree; of those in unknown objects the keys alone."""
        for path, mapping in self._mappings.items():
            yield path, specs_of(mapping)
        for path, mapping in self._in_objects:
            yield path, dict.fromkeys(mapping)

    @property
    def mapping_objects(self) -> dict[KeyPath, MutableMapping[Any, Any]]:
        """The dictionaries of the tree, by their paths."""
        return self._mappings

    def spell_out(self, lists: bool) -> None:
        """Describe mappings that are shared at each of their paths, and lists as mappings."""
        self._mappings = dict(spell_out(self.tree, lists))

    def tensor(self, path: KeyPath, key: Any) -> Tensor:
        """Return one tensor of a mapping."""
        tensor = self._mappings[path][key]
        assert isinstance(tensor, Tensor)
        return tensor

    def numbers(self, path: KeyPath, key: Any) -> list[float]:
        """Return the values of one tensor."""
        values: list[float] = self.tensor(path, key).flatten().tolist()
        return values

    def check(self, places: Iterable[Place] | None = None) -> None:
        """Compare the file, or what of it these tensors depend on, with its checksums."""
        if self.file.zipped is None:
            return
        known = {}
        if places is not None:
            known = checksums_beside(self.file, [self.tensor(*place) for place in places])
        check_zip(self.file.zipped, known=known)

    def replace(self, replacements: Replacements) -> None:
        """Put new tensors in the places of old ones."""
        for (path, key), new in replacements.items():
            self._mappings[path][key] = new

    def write(self, dst: Path, replacements: Replacements, options: WriteOptions) -> None:
        """Put the replacements into the tree and save it."""
        self.replace(replacements)
        grown = sum(new.nbytes for new in replacements.values())
        write_tree(self.file, dst, self.path.stat().st_size + grown, options, self.options)


def _is_mean(key: Any) -> bool:
    return isinstance(key, str) and key.endswith("running_mean")


def write_tree(
    file: TorchFile, dst: Path, expected: int, options: WriteOptions, reading: ReadOptions
) -> None:
    """Save a tree as a torch zip, read it back, and only then let it appear.

    What is not copied from the old file with its checksum is compared with that first.

    Raises:
        ReadError: the old file is damaged.
        VerificationError: what was read back is not what was meant.
    """
    plan = plan_copy(file)
    if options.verify and file.zipped is not None:
        check_zip(file.zipped, known=plan.copied if plan else None)
    with (
        options.output(dst, expected) as stream,
        reading_back(stream, options.verify, options.fsync) as back,
    ):
        if plan is None:
            save_torch(file, _Counted(stream, options.progress, expected, back))
        else:
            for part in plan.write(Sink(stream, expected, options.progress)):
                if back is not None:
                    back.take_checksum(*part)
        if back is not None:
            stream.flush()
            try:
                check_zip(stream.name, dst, back.checksums())
                again = load_torch(Path(stream.name), replace(reading, allow_compressed=True))
            except ReadError as error:
                if file.mapped is not None:
                    check_zip(file.mapped)  # a damage that was copied
                raise read_back_error(dst, "a checksum") from error
            # Where a checksum was compared of every byte, the two ends of a large tensor are enough
            # to show that it did not change places with another.
            ends = plan is not None or torch.serialization.get_crc32_options()
            difference = first_difference(file.tree, again.tree, ends=ends)
            if difference is not None:
                raise read_back_error(dst, difference)
        options.before_publish()


class _Counted:
    """A file that tells how much was written to it, and has large parts read back at once."""

    def __init__(
        self,
        file: IO[bytes],
        progress: Progress | None,
        expected: int,
        back: ReadBack | None,
    ) -> None:
        self._file, self._progress, self._expected, self._back = file, progress, expected, back
        self._written = 0
        self.flush = file.flush

    def write(self, data: Any) -> int:
        """Write, then tell."""
        size = self._file.write(data)
        if self._back is not None and size >= LARGE:
            self._file.flush()
            self._back.take_checksum(self._written, size)
        self._written += size
        if self._progress is not None:
            self._progress(self._written, self._expected)
        return size
