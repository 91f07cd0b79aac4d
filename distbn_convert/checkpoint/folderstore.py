"""Folders as stores: shards under an index, and what accelerate saves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .beside import not_looked_into
from .checksums import check_zip
from .flatstore import check_rewritten, read_numbers, specs_of_header
from .groups import KeyPath, TensorSpec
from .header import Header, merged_metadata
from .shard_index import read_index
from .sharded import read_accelerate, write_accelerate, write_sharded
from .stores import Mappings, Place, ReadOptions, WriteOptions, read_back_error
from .zips import starts_as_zip

if TYPE_CHECKING:
    from torch import Tensor

    from .edit import Replacements
    from .torchfile import TorchFile

__all__ = ["AccelerateStore", "ShardedStore"]


class _FolderStore:
    """What the two kinds share: mappings of several safetensors files."""

    format: str

    def __init__(self, folder: Path, headers: Mapping[str, Header]) -> None:
        self.folder = folder
        self.tensors = sum(len(header.tensors) for header in headers.values())
        flat = [header for file, header in headers.items() if file.endswith(".safetensors")]
        # None where all shards are torch's, which have no place for any.
        self.metadata = merged_metadata(flat) or {} if flat else None
        self.opaque_globals: list[str] = []
        self.concerns = not_looked_into(folder, headers)
        self.warnings: list[str] = []

    def place(self, path: KeyPath, key: Any) -> tuple[Path, Header]:
        """Return the file that has a tensor, and its header."""
        raise NotImplementedError

    def tensor(self, path: KeyPath, key: Any) -> Tensor:
        """Return one tensor of a mapping."""
        from .safetensors import read_tensor

        return read_tensor(*self.place(path, key), key)

    def numbers(self, path: KeyPath, key: Any) -> list[float]:
        """Return the values of one tensor."""
        return read_numbers(*self.place(path, key), key)

    def check(self, places: Iterable[Place] | None = None) -> None:
        """Do nothing: safetensors has no checksums."""


class AccelerateStore(_FolderStore):
    """A folder of ``accelerator.save_state``: safetensors, and files that are carried over."""

    format = "accelerate"

    def __init__(self, folder: Path) -> None:
        self.path, self.headers = folder, read_accelerate(folder)
        super().__init__(folder, self.headers)

    def files(self) -> Iterable[Path]:
        """Return the files that are read."""
        return [self.folder / file for file in self.headers]

    def _path(self, file: str) -> KeyPath:
        return () if len(self.headers) == 1 else (file,)

    def mappings(self) -> Mappings:
        """Describe each file; the path is its name if there are several."""
        for file, header in self.headers.items():
            yield self._path(file), specs_of_header(header)

    def place(self, path: KeyPath, key: Any) -> tuple[Path, Header]:
        """Return the file that has a tensor, and its header."""
        file = path[0] if path else next(iter(self.headers))
        return self.folder / file, self.headers[file]

    def write(self, dst: Path, replacements: Replacements, options: WriteOptions) -> None:
        """Write the folder with the replacements."""
        new: dict[str, dict[str, Tensor]] = {}
        for (path, key), tensor in replacements.items():
            new.setdefault(self.place(path, key)[0].name, {})[key] = tensor
        with write_accelerate(self.folder, self.headers, dst, new, options) as folder:
            for file, tensors in new.items() if options.verify else ():
                old = self.folder / file
                check_rewritten(old, self.headers[file], folder / file, tensors, dst)
            options.before_publish()


class ShardedStore(_FolderStore):
    """Shards under an index."""

    format = "sharded"

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self.path, self.index = path, read_index(path, options)
        super().__init__(self.index.folder, self.index.headers)

    def files(self) -> Iterable[Path]:
        """Return the index and the shards."""
        return [self.index.path, *(self.folder / shard for shard in self.index.headers)]

    def mappings(self) -> Mappings:
        """Describe all shards as the one mapping that they are."""
        specs: dict[str, dict[str, TensorSpec]] = {
            shard: specs_of_header(header) for shard, header in self.index.headers.items()
        }
        yield (), {name: specs[shard][name] for name, shard in self.index.weight_map.items()}

    def place(self, path: KeyPath, key: Any) -> tuple[Path, Header]:
        """Return the shard that has a tensor, and its header."""
        shard = self.index.weight_map[key]
        return self.folder / shard, self.index.headers[shard]

    def tensor(self, path: KeyPath, key: Any) -> Tensor:
        """Return one tensor."""
        return self.index.read_tensor(key)

    def numbers(self, path: KeyPath, key: Any) -> list[float]:
        """Return the values of one tensor."""
        if self.index.weight_map[key].endswith(".safetensors"):
            return super().numbers(path, key)
        values: list[float] = self.tensor(path, key).flatten().tolist()
        return values

    def check(self, places: Iterable[Place] | None = None) -> None:
        """Compare the torch shards that have these tensors with their checksums."""
        shards = self.index.weight_map
        for shard in sorted(
            {*shards.values()} if places is None else {shards[k] for _, k in places}
        ):
            if starts_as_zip(self.folder / shard):
                check_zip(self.folder / shard)

    def write(self, dst: Path, replacements: Replacements, options: WriteOptions) -> None:
        """Write the folder with the replacements."""
        if options.verify:
            self.check(replacements)  # a torch shard is saved anew
        new = {key: tensor for (_, key), tensor in replacements.items()}
        with write_sharded(self.index, dst, new, options) as folder:
            if options.verify:
                self._check(folder, new, dst)
            options.before_publish()

    def _check(self, folder: Path, new: dict[str, Tensor], dst: Path) -> None:
        """Read back what was written anew; the other shards are the old files."""
        written = read_index(folder / self.index.path.name, self.index.options)
        if written.weight_map != self.index.weight_map:
            raise read_back_error(dst, "its index")
        for shard, tensors in self.index.by_shard(new).items():
            old = self.folder / shard
            if shard.endswith(".safetensors"):
                check_rewritten(old, self.index.headers[shard], folder / shard, tensors, dst)
            else:
                _check_torch(self.index.load(shard), written.load(shard), tensors, dst)


def _check_torch(old: TorchFile, written: TorchFile, tensors: dict[str, Tensor], dst: Path) -> None:
    from .compare import first_difference

    old.tree.update(tensors)
    difference = first_difference(old.tree, written.tree)
    if difference is not None:
        raise read_back_error(dst, difference)
