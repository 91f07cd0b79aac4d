"""The ``.metadata`` of torch.distributed.checkpoint, read without executing what is in it.

PyTorch reads this file with plain ``pickle.load``. Here only the names of its own record types are
known, and no object but an instance of one can be given a state.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from collections import OrderedDict
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata

from ..errors import CheckpointError, ReadError, RefusedError
from .places import points_outside
from .stream import Source
from .unpickler import BoundedUnpickler

__all__ = ["METADATA", "pickled", "read_metadata"]

METADATA = ".metadata"

_OLD = "torch.distributed._shard.sharded_tensor.metadata"  # the place of these before torch 2.4
_RECORDS = (
    *(metadata.Metadata, metadata.MetadataIndex, metadata.TensorStorageMetadata),
    *(metadata.ChunkStorageMetadata, metadata.BytesStorageMetadata, metadata.TensorProperties),
    *(metadata.StorageMeta, filesystem._StorageInfo, filesystem._StoragePrefix),
)


def _known_names() -> dict[tuple[str, str], Any]:
    """What the file may name: records, dtypes, layouts, sizes and paths."""
    known: dict[tuple[str, str], Any] = {
        (kind.__module__, kind.__name__): kind for kind in _RECORDS
    }
    encoding = metadata._MEM_FORMAT_ENCODING
    known[metadata.__name__, encoding.__name__] = known[_OLD, "MEM_FORMAT_ENCODING"] = encoding
    known[_OLD, "TensorProperties"] = metadata.TensorProperties
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype):
            known["torch", name] = value
    known["torch", "Size"] = torch.Size
    known["torch.serialization", "_get_layout"] = torch.serialization._get_layout
    known["collections", "OrderedDict"] = OrderedDict
    for name in ("PosixPath", "WindowsPath"):  # that of the other system cannot be made
        kind = getattr(pathlib, name if type(Path()).__name__ == name else f"Pure{name}")
        known["pathlib", name] = known["pathlib._local", name] = kind  # the latter in Python 3.13
    return known


class _UnknownNameError(Exception):
    """What the file holds, as the object of a sentence."""


class _NewerTorchError(Exception):
    """The file holds more than this torch knows of."""


class _Unpickler(BoundedUnpickler):
    """Knows only the names above; BUILD, which sets attributes, only reaches records."""

    dispatch: ClassVar[dict[int, Any]] = dict(BoundedUnpickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._known = _known_names()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise _UnknownNameError(f"{module}.{name}")
        return self._known[module, name]

    def load_build(self) -> None:
        kind = type(self.stack[-2])
        if kind not in _RECORDS:
            raise _UnknownNameError(f"a state for a {kind.__qualname__}")
        # A state of one value for each field; torch 2.15 added one.
        if kind is metadata.TensorProperties and len(self.stack[-1]) > len(fields(kind)):
            raise _NewerTorchError
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def read_metadata(folder: Path) -> tuple[metadata.Metadata, int]:
    """Read and check ``.metadata``; nothing in it is executed.

    Returns:
        tuple: the records, as torch has them, and the protocol of the pickle.

    Raises:
        RefusedError: it names anything but those records, or a file outside the folder.
        ReadError: it is damaged, does not fit the files, or is a newer torch's.
        FileAccessError: the system cannot read it.
    """
    path = folder / METADATA
    with Source(path) as source:
        data = bytes(source.read(0, source.size))
    try:
        records = _Unpickler(io.BytesIO(data)).load()
    except _UnknownNameError as error:
        raise RefusedError(
            f"{path} holds {error}, which no checkpoint of torch.distributed needs. Nothing was "
            "executed."
        ) from error
    except _NewerTorchError as error:
        raise ReadError(
            f"{path} was saved by a newer torch than {torch.__version__}; use that one."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # unpicklers raise many kinds on damaged bytes
        raise _damaged(path, f"it cannot be read ({type(error).__name__})") from error
    try:
        _check(path, records)
    except CheckpointError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise _damaged(path, f"its records are incomplete ({type(error).__name__})") from error
    return records, data[1] if data[:1] == pickle.PROTO else 2


class _Pickler(pickle.Pickler):
    """Leaves out strides that are not known: no torch before 2.15 reads a sixth field."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, metadata.TensorProperties):
            return NotImplemented
        reduced: Any = obj.__reduce_ex__(2)
        make, arguments, state, *_ = reduced
        return make, arguments, state[:5] if state[5:] == (None,) else state


def pickled(records: metadata.Metadata, protocol: int) -> bytes:
    """Return the file for these records, which the torch that saved them can read."""
    file = io.BytesIO()
    _Pickler(file, protocol).dump(records)
    return file.getvalue()


def _damaged(path: Path, what: str) -> ReadError:
    return ReadError(f"{path} is damaged: {what}; copy or save the whole folder again.")


def _check(path: Path, records: Any) -> None:
    """Check types and that each piece lies inside a file of the folder."""
    if not isinstance(records, metadata.Metadata):
        raise _damaged(path, f"it holds a {type(records).__name__} instead of Metadata")
    stored = records.storage_data
    if not isinstance(records.state_dict_metadata, dict) or not isinstance(stored, dict):
        raise _damaged(path, "it lists no pieces")
    sizes: dict[str, int] = {}
    for index, info in stored.items():
        if type(index) is not metadata.MetadataIndex or type(info) is not filesystem._StorageInfo:
            raise _damaged(path, "it lists pieces of an unknown type")
        _check_piece(path, info, sizes)
    for name, entry in records.state_dict_metadata.items():
        if isinstance(entry, metadata.TensorStorageMetadata):
            _check_tensor(path, name, entry, stored)
        elif not isinstance(entry, metadata.BytesStorageMetadata):
            raise _damaged(path, f"{name!r} is of an unknown type")


def _check_piece(path: Path, info: filesystem._StorageInfo, sizes: dict[str, int]) -> None:
    name = info.relative_path
    if not isinstance(name, str) or points_outside(name):
        raise RefusedError(f"file {name!r} in {path} points outside the folder. Refused.")
    if name not in sizes:
        if not (path.parent / name).is_file():
            raise _damaged(path, f"its file {name!r} is missing")
        sizes[name] = (path.parent / name).stat().st_size
    whole = all(type(number) is int and number >= 0 for number in (info.offset, info.length))
    if not whole or info.offset + info.length > sizes[name]:
        raise _damaged(path, f"it lists bytes of {name!r} beyond its end at {sizes[name]:,}")


def _check_tensor(
    path: Path,
    name: str,
    entry: metadata.TensorStorageMetadata,
    stored: dict[metadata.MetadataIndex, Any],
) -> None:
    dtype, size = entry.properties.dtype, entry.size
    if not isinstance(name, str) or not isinstance(dtype, torch.dtype) or not _is_size(size):
        raise _damaged(path, f"{name!r} has no dtype or size")
    covered = 0
    for chunk in entry.chunks:
        fits = _is_size(chunk.offsets) and _is_size(chunk.sizes)
        fits = fits and len(chunk.offsets) == len(chunk.sizes) == len(size)
        if not fits or any(
            start + length > stop
            for start, length, stop in zip(chunk.offsets, chunk.sizes, size, strict=True)
        ):
            raise _damaged(path, f"a piece of {name!r} lies outside of its {tuple(size)}")
        if metadata.MetadataIndex(name, chunk.offsets) not in stored:
            raise _damaged(path, f"a piece of {name!r} is stored nowhere")
        covered += chunk.sizes.numel()
    if covered != size.numel():
        raise _damaged(path, f"the pieces of {name!r} do not make up its {tuple(size)}")


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.Size) and all(number >= 0 for number in value)
