"""A folder of torch.distributed.checkpoint as a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from .beside import not_looked_into
from .compare import same_bits
from .dcp import DcpFolder, read_dcp, write_dcp
from .dcp_metadata import METADATA
from .edit import Replacements
from .flatstore import specs_of_header
from .groups import KeyPath, TensorSpec
from .stores import Mappings, Place, WriteOptions, read_back_error

__all__ = ["DcpStore"]


class DcpStore:
    """A folder whose flat names are placed in the nested state that they came from."""

    format = "dcp"

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, read_dcp(path)
        self.metadata = None
        self.opaque_globals: list[str] = []
        pieces = self.folder.metadata.storage_data.values()
        self.concerns = not_looked_into(path, {info.relative_path for info in pieces})
        self.warnings: list[str] = []
        specs = specs_of_header(self.folder.header)
        self.tensors = len(specs)
        self._names: dict[Place, str] = {}
        self._specs: dict[KeyPath, dict[Any, TensorSpec | None]] = {}
        for name in self.folder.metadata.state_dict_metadata:
            where, key = place = self._place(name)
            keys = (*where, key)
            for depth, part in enumerate(keys):  # each mapping is no tensor of the one above
                self._specs.setdefault(keys[:depth], {}).setdefault(part, None)
            if name in specs:
                self._names[place] = name
                self._specs[where][key] = specs[name]
        if len({info.relative_path.split("_0")[0] for info in pieces}) > 1:
            self.warnings.append(
                "several ranks wrote the folder, and torch takes each BatchNorm statistic from one "
                "of them, mean and variance perhaps from two; synchronise them before saving."
            )

    def _place(self, name: str) -> Place:
        """Return where in the nested state a flat name was."""
        nested: Mapping[str, Any] = self.folder.metadata.planner_data or {}
        *where, key = nested.get(name, (name,))
        return tuple(where), key

    def files(self) -> Iterable[Path]:
        """Return the files that are read."""
        pieces = self.folder.metadata.storage_data.values()
        names = {METADATA, *(info.relative_path for info in pieces)}
        return [self.folder.path / name for name in names]

    def mappings(self) -> Mappings:
        """Describe each mapping of the nested state."""
        yield from self._specs.items()

    def objects(self) -> dict[Place, Callable[[], bytearray]]:
        """Return what reads each piece that is no tensor, as it is stored, by its place."""
        entries = self.folder.metadata.state_dict_metadata
        return {
            self._place(index.fqn): partial(self.folder.read_bytes, info)
            for index, info in self.folder.metadata.storage_data.items()
            if isinstance(entries.get(index.fqn), BytesStorageMetadata)
        }

    def tensor(self, path: KeyPath, key: Any) -> Tensor:
        """Return one tensor."""
        return self.folder.read_tensor(self._names[path, key])

    def numbers(self, path: KeyPath, key: Any) -> list[float]:
        """Return the values of one tensor."""
        values: list[float] = self.tensor(path, key).flatten().tolist()
        return values

    def check(self, places: Iterable[Place] | None = None) -> None:
        """Do nothing: each piece is compared with its checksums when it is read."""

    def write(self, dst: Path, replacements: Replacements, options: WriteOptions) -> None:
        """Write the folder with the replacements."""
        new = {self._names[place]: tensor for place, tensor in replacements.items()}
        with write_dcp(self.folder, dst, new, options) as folder:
            if options.verify:
                _check(self.folder, read_dcp(folder), new, dst)
            options.before_publish()


def _check(old: DcpFolder, new: DcpFolder, replaced: Mapping[str, Tensor], dst: Path) -> None:
    """Read the folder back: the replacements are in it, the bytes of all else are as they were."""
    for name, tensor in replaced.items():
        if not same_bits(new.read_tensor(name), tensor.detach()):
            raise read_back_error(dst, name)
    before, after = old.metadata.storage_data, new.metadata.storage_data
    for index, info in before.items():
        if index.fqn in replaced:
            continue
        if index not in after or old.read_bytes(info) != new.read_bytes(after[index]):
            raise read_back_error(dst, index.fqn)
