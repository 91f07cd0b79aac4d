"""Safetensors output in shards of a limited size under an index, as huggingface_hub lays it out."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import ReadError, RefusedError
from .carry import Writer, write_folder
from .flatstore import FlatStore
from .folderstore import AccelerateStore, ShardedStore
from .header import Header, TensorInfo, encode_header, lay_out, merged_metadata, read_header
from .readback import same_bytes_of
from .safetensors import describe, package_order, read_tensor, write_tensor
from .shard_index import other_checkpoints, read_index
from .stores import Store, WriteOptions, read_back_error
from .stream import Progress, Sink, Source

if TYPE_CHECKING:
    from torch import Tensor

    from .edit import Replacements

__all__ = ["split_into_shards", "write_shards"]

_INDEX_ENDING = ".safetensors.index.json"
_INDEX = f"model{_INDEX_ENDING}"


@dataclass(frozen=True)
class _Part:
    """One tensor on its way: what a header says of it, the tensor if it is new, its old file."""

    info: TensorInfo
    tensor: Tensor | None
    path: Path = Path()
    header: Header | None = None

    @property
    def start(self) -> int:
        """Where its bytes are in the old file."""
        assert self.header is not None
        return self.header.start + self.info.start


@dataclass(frozen=True)
class _OldFiles:
    """The safetensors files of the input, none if it is of another format.

    Attributes:
        files: where each is, and its header.
        names: of all tensors, in the order of the input.
        folder: what lies beside them, to be carried over; None for a single file.
        replaced: names in the folder that the new files stand for.
        content: of their index.
        extracted: metadata for what is of another format.
    """

    files: list[tuple[Path, Header]]
    names: list[str]
    folder: Path | None = None
    replaced: Collection[str] = ()
    content: Mapping[str, Any] = field(default_factory=dict)
    extracted: Mapping[str, str] | None = None

    @property
    def metadata(self) -> Mapping[str, str] | None:
        """For each new file: what the old ones have, the first one's where they contradict."""
        if not self.files:
            return self.extracted
        return merged_metadata(header for _, header in self.files)

    @property
    def as_the_package(self) -> bool:
        """Whether each file is in the order of the safetensors package, as new ones then are."""
        orders = [[package_order(info) for info in h.tensors.values()] for _, h in self.files]
        return all(order == sorted(order) for order in orders)

    def parts(self, new: Mapping[str, Tensor]) -> dict[str, _Part]:
        """Return all tensors in their order, some of them new."""
        old = {
            name: _Part(info, None, path, header)
            for path, header in self.files
            for name, info in header.tensors.items()
        }
        return {
            name: _Part(describe(name, new[name]), new[name]) if name in new else old[name]
            for name in self.names
        }

    def check_names(self, new: Iterable[str]) -> None:
        """Refuse a new file whose name something else beside the old ones has."""
        for name in new:
            if self.folder and name not in self.replaced and (self.folder / name).exists():
                raise RefusedError(
                    f"{self.folder} holds {name}, the name of a new file, beside its weights; "
                    "move it out of the folder first."
                )


@dataclass(frozen=True)
class _Shard:
    """One file to be written, and its parts in the order of the input."""

    header: Header
    parts: dict[str, _Part]

    def write(self, file: IO[bytes], progress: Progress | None) -> None:
        """Write it to a file."""
        sink = Sink(file, self.header.size, progress)
        sink.write(encode_header(self.header))
        for part in map(self.parts.__getitem__, self.header.tensors):
            if part.tensor is not None:
                write_tensor(sink, part.tensor)
            elif part.header is not None:
                with Source(part.path, part.header.size) as source:
                    sink.copy(source, part.start, part.start + part.info.nbytes)

    def check(self, file: Path, dst: Path) -> None:
        """Read it back.

        Raises:
            VerificationError: it is not what was meant.
        """
        if read_header(file) != self.header:
            raise read_back_error(dst, f"the header of {file.name}")
        for name, part in self.parts.items():
            if not self._holds(file, name, part):
                raise read_back_error(dst, name)

    def _holds(self, file: Path, name: str, part: _Part) -> bool:
        if part.tensor is not None:
            from .compare import same_bits

            return same_bits(read_tensor(file, self.header, name), part.tensor.detach())
        with open(file, "rb", buffering=0) as new, open(part.path, "rb", buffering=0) as old:
            new.seek(self.header.start + self.header.tensors[name].start)
            old.seek(part.start)
            return same_bytes_of(old, new, part.info.nbytes)


def split_into_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Divide tensors among shards in their order, as huggingface_hub does.

    Args:
        sizes: by name, bytes.
        limit: the most bytes in one shard; a tensor that is larger gets one of its own.

    Returns:
        list of list of str: the names in each shard.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if size > limit:
            shards.append([name])
            continue
        if filled + size > limit:
            shards.append(current)
            current, filled = [], 0
        current.append(name)
        filled += size
    return [*shards, current] if current else shards


def write_shards(
    store: Store,
    dst: Path,
    replacements: Replacements,
    limit: int,
    state: str | None,
    options: WriteOptions,
) -> None:
    """Write a store as a folder of shards and their index; as one file if all fits in one.

    Tensors of safetensors are copied from file to file, in the order of the input, and what lies
    beside old files in a folder is carried over; other formats are written as the package does.

    Args:
        store: the open input.
        dst: the folder.
        replacements: new tensors.
        limit: the most bytes of tensors in a shard.
        state: the sub-tree to extract of a file of torch; None is all.
        options: how to write.

    Raises:
        RefusedError: safetensors cannot hold what is in the input; a file beside the old shards
            has the name of a new one.
        VerificationError: what was read back is not what was meant.
    """
    old = _old_files(store)
    new: Mapping[str, Tensor] = {key: tensor for (_, key), tensor in replacements.items()}
    if old is None:
        from .crossformat import for_safetensors
        from .save import refuse_shared

        new, metadata = for_safetensors(store, replacements, state, options)
        refuse_shared(new)
        old = _OldFiles([], list(new), extracted=metadata)
    parts = old.parts(new)
    shards = _shards(parts, old, limit)
    writers: dict[str, Writer] = {name: shard.write for name, shard in shards.items()}
    sizes = {name: shard.header.size for name, shard in shards.items()}
    if len(shards) > 1:
        text = _index(shards, old)
        writers[_INDEX], sizes[_INDEX] = lambda file, _: file.write(text), len(text)
    old.check_names(writers)
    with write_folder(old.folder, dst, writers, sizes, options, old.replaced) as folder:
        if options.verify:
            _check(folder, shards, dst)
        options.before_publish()


def _old_files(store: Store) -> _OldFiles | None:
    """Return the safetensors files of a store, None if it has none or they hold several states."""
    if isinstance(store, FlatStore):
        return _OldFiles([(store.path, store.header)], list(store.header.tensors))
    if isinstance(store, AccelerateStore) and len(store.headers) == 1:
        ((name, header),) = store.headers.items()
        files = [(store.folder / name, header)]
        return _OldFiles(files, list(header.tensors), store.folder, {name})
    if isinstance(store, ShardedStore) and store.index.path.name.endswith(_INDEX_ENDING):
        index = store.index
        files = [(index.folder / shard, header) for shard, header in index.headers.items()]
        replaced = {*index.headers, index.path.name, *other_checkpoints(index)}
        return _OldFiles(files, list(index.weight_map), index.folder, replaced, index.content)
    return None


def _shards(parts: Mapping[str, _Part], old: _OldFiles, limit: int) -> dict[str, _Shard]:
    split = split_into_shards({name: part.info.nbytes for name, part in parts.items()}, limit)
    shards = {}
    for number, names in enumerate(split, 1):
        infos = [parts[name].info for name in names]
        if old.as_the_package:
            infos.sort(key=package_order)
        suffix = f"-{number:05d}-of-{len(split):05d}" if len(split) > 1 else ""
        shard = _Shard(lay_out(infos, old.metadata), {name: parts[name] for name in names})
        shards[f"model{suffix}.safetensors"] = shard
    return shards


def _index(shards: Mapping[str, _Shard], old: _OldFiles) -> bytes:
    """Return the text of the index, in the order of the input.

    What an old one says besides sizes and places is kept.
    """
    total = sum(part.info.nbytes for shard in shards.values() for part in shard.parts.values())
    places = {name: file for file, shard in shards.items() for name in shard.parts}
    content = dict(old.content)
    content["metadata"] = {**(content.get("metadata") or {}), "total_size": total}
    content["weight_map"] = {name: places[name] for name in old.names}
    return json.dumps(content, indent=2).encode()


def _check(folder: Path, shards: Mapping[str, _Shard], dst: Path) -> None:
    """Read the folder back."""
    try:
        for name, shard in shards.items():
            shard.check(folder / name, dst)
        if len(shards) > 1 and read_index(folder / _INDEX).headers.keys() != shards.keys():
            raise read_back_error(dst, "its index")
    except ReadError as error:
        raise read_back_error(dst, "its headers or its index") from error
