"""Folders of torch.distributed.checkpoint (DCP): read piece by piece, written whole.

A folder holds files of pieces, each what ``torch.save`` makes of a tensor or of a part of one, and
``.metadata``, which says where they are.
"""

from __future__ import annotations

import copy
import io
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from ..errors import CheckpointError, ReadError, RefusedError
from .carry import Writer, write_folder
from .checksums import check_piece
from .dcp_metadata import METADATA, pickled, read_metadata
from .header import Header
from .places import StrPath
from .safetensors import tensor_info
from .stores import WriteOptions
from .stream import Progress, Sink, Source

__all__ = ["DcpFolder", "read_dcp", "write_dcp"]

_OVERHEAD = 1_000_000  # bytes that torch.save adds to a tensor, at most


@dataclass(frozen=True)
class DcpFolder:
    """A folder of torch.distributed.checkpoint.

    Attributes:
        path: the folder.
        metadata: as torch has it, checked against the files.
        protocol: of the pickle that it came in.
    """

    path: Path
    metadata: Metadata
    protocol: int

    @property
    def header(self) -> Header:
        """Its tensors by their flat names, described as in a safetensors file."""
        infos = {}
        for name, entry in self.metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                infos[name] = tensor_info(name, entry.properties.dtype, entry.size)
        return Header(infos, None, 0)

    def read_tensor(self, name: str) -> Tensor:
        """Return one tensor on the CPU, put together from its pieces.

        Raises:
            ReadError: a piece is damaged.
            RefusedError: a piece is compressed or holds something else than a tensor.
        """
        entry = self.metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        covered = torch.zeros(entry.size, dtype=torch.bool)
        for chunk in entry.chunks:
            info = self.metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            place = tuple(
                slice(start, start + length)
                for start, length in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            whole[place] = self._read_piece(name, info, chunk.sizes, whole.dtype)
            covered[place] = True
        if not covered.all():
            raise self.damaged(name, "its pieces overlap and leave a hole")
        return whole

    def _read_piece(
        self, name: str, info: _StorageInfo, sizes: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        if getattr(info, "transform_descriptors", None):
            raise RefusedError(
                f"{self.path / info.relative_path} is transformed by {info.transform_descriptors}; "
                "save it without extensions."
            )
        data = self.read_bytes(info)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > sizes.numel() * dtype.itemsize + _OVERHEAD:
                raise RefusedError(f"{self.path}: {name!r} unpacks to {unpacked:,} bytes. Refused.")
            check_piece(data, self._called(name, info))
            tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (MemoryError, CheckpointError):
            raise
        except Exception as error:  # torch.load raises many kinds on damaged bytes
            raise self.damaged(name, f"it cannot be read ({type(error).__name__})") from error
        if type(tensor) is not Tensor or tensor.shape != sizes or tensor.dtype != dtype:
            raise self.damaged(name, f"expected {dtype} of {tuple(sizes)}, but it is another")
        return tensor

    def read_bytes(self, info: _StorageInfo) -> bytearray:
        """Return a piece as it is stored."""
        with Source(self.path / info.relative_path) as source:
            return source.read(info.offset, info.length)

    def check_pieces(self) -> int:
        """Compare all pieces with their checksums, one at a time.

        Returns:
            int: how many checksums there are.

        Raises:
            ReadError: a piece is damaged.
        """
        pieces = self.metadata.storage_data.items()
        return sum(
            check_piece(self.read_bytes(info), self._called(index.fqn, info))
            for index, info in pieces
        )

    def _called(self, name: str, info: _StorageInfo) -> str:
        return f"{name!r} in {self.path / info.relative_path}"

    def damaged(self, name: str, what: str) -> ReadError:
        """Make the error for a tensor that is not as it should be."""
        return ReadError(
            f"{self.path} is damaged at {name!r}: {what}; copy or save the whole folder again."
        )


def read_dcp(path: StrPath) -> DcpFolder:
    """Read what is in a folder of torch.distributed.checkpoint, and where.

    Nothing in it is executed, other than by torch's own reader, and no process group is needed.

    Raises:
        RefusedError: ``.metadata`` holds what no checkpoint needs, or leads out of the folder.
        ReadError: it is damaged, or a file is missing or too short.
        FileAccessError: the system cannot read it.

    Example::

        >>> folder = read_dcp("checkpoint")
        >>> folder.read_tensor("model.bn1.running_mean").shape
        torch.Size([64])
    """
    return DcpFolder(Path(path), *read_metadata(Path(path)))


def write_dcp(
    folder: DcpFolder,
    dst: StrPath,
    replacements: Mapping[str, Tensor],
    options: WriteOptions,
) -> AbstractContextManager[Path]:
    """Write a folder of torch.distributed.checkpoint with some tensors replaced.

    All other pieces are copied as bytes, those that are no tensors unopened. A replaced tensor
    that was in several pieces becomes one.

    Args:
        folder: **DcpFolder**; not modified.
        dst: **path** of the new folder; may be the old one with ``overwrite``.
        replacements: by flat name, **Tensor** on the CPU.
        options: **WriteOptions**, as for :func:`write_folder`.

    Returns:
        context manager of Path: the complete folder; published when the block ends.

    Raises:
        ReadError: a replaced piece shares bytes with another.

    Raises, in the block:
        CheckpointError: as :func:`write_folder`.
    """
    edits = _edits(folder, replacements)
    writers: dict[str, Writer] = {}
    sizes: dict[str, int] = {}
    for name, changes in edits.items():
        size = (folder.path / name).stat().st_size
        sizes[name] = size + sum(edit.growth for edit in changes)
        writers[name] = partial(_write_pieces, folder.path / name, size, sizes[name], changes)
    records = pickled(_edited(folder.metadata, replacements, edits), folder.protocol)
    writers[METADATA] = lambda file, _: file.write(records)
    sizes[METADATA] = len(records)
    return write_folder(folder.path, dst, writers, sizes, options)


@dataclass(frozen=True)
class _Edit:
    """Bytes of a file that are replaced by others."""

    start: int
    stop: int
    data: bytes

    @property
    def growth(self) -> int:
        return len(self.data) - (self.stop - self.start)


def _edits(folder: DcpFolder, replacements: Mapping[str, Tensor]) -> dict[str, list[_Edit]]:
    """Return what changes in each file, in the order of its bytes."""
    edits: dict[str, list[_Edit]] = {}
    written: set[str] = set()
    stops: dict[str, int] = {}
    pieces = folder.metadata.storage_data.items()
    overlapping: dict[str, str] = {}
    for index, info in sorted(pieces, key=lambda piece: (piece[1].offset, piece[1].length)):
        if info.offset < stops.get(info.relative_path, 0):
            overlapping[info.relative_path] = index.fqn
        stops[info.relative_path] = info.offset + info.length
        if index.fqn in replacements:
            new = b"" if index.fqn in written else _saved(replacements[index.fqn])
            written.add(index.fqn)
            edit = _Edit(info.offset, info.offset + info.length, new)
            edits.setdefault(info.relative_path, []).append(edit)
    for name in overlapping.keys() & edits.keys():
        raise folder.damaged(overlapping[name], "its bytes overlap those of another")
    return edits


def _saved(tensor: Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(tensor.detach().clone(memory_format=torch.contiguous_format), file)
    return file.getvalue()


def _edited(
    old: Metadata, replacements: Mapping[str, Tensor], edits: Mapping[str, list[_Edit]]
) -> Metadata:
    """Return the metadata of the new folder."""
    new = copy.copy(old)
    new.state_dict_metadata = dict(old.state_dict_metadata)
    for name, tensor in replacements.items():
        entry = old.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        changed: dict[str, Any] = {"dtype": tensor.dtype}
        if getattr(entry.properties, "strides", None) is not None:  # torch 2.15 and later
            changed["strides"] = tensor.contiguous().stride()
        properties = replace(entry.properties, **changed)
        whole = ChunkStorageMetadata(torch.Size([0] * tensor.ndim), tensor.shape)
        new.state_dict_metadata[name] = TensorStorageMetadata(properties, tensor.shape, [whole])
    new.storage_data = {}
    for index, info in old.storage_data.items():
        changes = edits.get(info.relative_path, [])
        if index.fqn not in replacements:
            new.storage_data[index] = _moved(info, changes, info.length)
            continue
        edit = next(edit for edit in changes if edit.start == info.offset)
        if edit.data:
            hint = None if index.index is None else 0
            place = MetadataIndex(index.fqn, [0] * replacements[index.fqn].ndim, hint)
            new.storage_data[place] = _moved(info, changes, len(edit.data))
    return new


def _moved(info: _StorageInfo, edits: list[_Edit], length: int) -> _StorageInfo:
    offset = info.offset + sum(edit.growth for edit in edits if edit.start < info.offset)
    return replace(info, offset=offset, length=length)


def _write_pieces(
    path: Path,
    size: int,
    total: int,
    edits: list[_Edit],
    file: IO[bytes],
    progress: Progress | None,
) -> None:
    sink = Sink(file, total, progress)
    with Source(path, size) as source:
        done = 0
        for edit in edits:
            sink.copy(source, done, edit.start)
            sink.write(edit.data)
            done = edit.stop
        sink.copy(source, done, size)
