"""Saving what was loaded from a torch zip: torch lays the new one out, storages are copied over.

``torch.save`` reads every byte of a mapped file through memory and takes its checksum. What did not
change has one already, in the old file's directory. So torch writes a zip that has holes where the
storages go (:class:`torch.serialization.skip_data`), and the holes are filled from the old file,
the checksums from its directory. The new file is the one that ``torch.save`` makes, byte for byte.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .checksums import Span, data_start
from .mapped import MappedPart, mapped_parts
from .readback import LARGE
from .stream import Sink, Source, view_memory
from .torchfile import TorchFile, save_torch
from .zips import reading_zip

__all__ = ["Plan", "checksums_beside", "plan_copy"]

_DESCRIPTOR = b"PK\x07\x08"  # behind each member's bytes: this, and their checksum
_NAME = re.compile(rb"[^/]+/data/(\d+)")
_STORAGE = re.compile(r"[^/]+/data/\d+")
_ENTRY = struct.Struct("<8xH18xHHH12x")  # of the directory: its flags and three lengths
_CHECKSUM = struct.Struct("<L")
_HAS_DESCRIPTOR = 8  # a flag


class _Part(NamedTuple):
    """A storage's bytes: where the old file has them, if it does, and their checksum."""

    storage: torch.UntypedStorage
    place: int | None
    checksum: int


class Plan:
    """The new file: what torch wrote, in order, and storages between that.

    Args:
        source: the old file.
        pieces: bytes as they shall be written, or a storage.
    """

    def __init__(self, source: Path, pieces: list[bytes | _Part]) -> None:
        self._source, self._pieces = source, pieces

    @property
    def copied(self) -> dict[Span, int]:
        """By start and length in the old file, the checksums of the storages that are copied."""
        parts = [piece for piece in self._pieces if isinstance(piece, _Part)]
        return {
            (part.place, part.storage.nbytes()): part.checksum
            for part in parts
            if part.place is not None
        }

    def write(self, sink: Sink) -> Iterator[Span]:
        """Write the file, and yield start and length of each large storage that is in it."""
        with Source(self._source) as source:
            for piece in self._pieces:
                if isinstance(piece, bytes):
                    sink.write(piece)
                    continue
                start, length = sink.done, piece.storage.nbytes()
                if piece.place is None:
                    sink.write(_bytes_of(piece.storage))
                else:
                    sink.copy(source, piece.place, piece.place + length)
                if length >= LARGE:
                    sink.out.flush()
                    yield start, length


def plan_copy(file: TorchFile) -> Plan | None:
    """Plan how to save a loaded checkpoint whose storages are still mapped from its file.

    Returns:
        Plan, or None where this is no way: nothing is mapped, a tensor's kind has no such layout
        (quantized ones), or torch laid it out in a way that is not understood.
    """
    if file.mapped is None:
        return None
    parts = mapped_parts(file.mapped)
    if not parts:
        return None
    layout = _lay_out(file)
    pieces = _filled(layout, _storages(file)) if layout else None
    if pieces is None:
        return None
    checksums = _checksums(file.mapped)
    return _patched(
        file.mapped,
        [piece if isinstance(piece, bytes) else _find(piece, parts, checksums) for piece in pieces],
    )


def checksums_beside(file: TorchFile, tensors: Iterable[torch.Tensor]) -> dict[Span, int]:
    """Return the checksums of all storages of a file but those of some tensors.

    Returns:
        dict: by start and length; empty if it is not known where in the file the tensors are.
    """
    if file.mapped is None:
        return {}
    parts = mapped_parts(file.mapped)
    places = []
    for storage in (tensor.untyped_storage() for tensor in tensors):
        place = _place(storage, parts)
        if place is not None:
            places.append(place)
        elif storage.nbytes():
            return {}
    places.sort()
    return {
        (start, length): checksum
        for (start, length), checksum in _checksums(file.mapped).items()
        if bisect_left(places, start) == bisect_left(places, start + length)  # none between them
    }


def _storages(file: TorchFile) -> list[torch.UntypedStorage]:
    """List the storages of a tree in the order in which torch numbers them."""
    found: dict[int, torch.UntypedStorage] = {}
    base: Any = pickle.Pickler if file.pickle_module is None else file.pickle_module.Pickler

    class Collector(base):  # type: ignore[misc]
        def persistent_id(self, obj: Any) -> str | None:
            if isinstance(obj, torch.storage.TypedStorage):
                obj = obj._untyped_storage
            elif not torch.is_storage(obj):
                return None
            found.setdefault(obj._cdata, obj)
            return "storage"

    Collector(_Skeleton(), protocol=file.protocol).dump(file.tree)
    storages = list(found.values())
    found.clear()  # which the class keeps, and itself until the garbage is collected
    return storages


class _Skeleton:
    """A file that keeps what is written to it, and the lengths of the holes that are left."""

    def __init__(self) -> None:
        self.pieces: list[bytes | int] = []

    def write(self, data: Any) -> int:
        self.pieces.append(bytes(data))
        return len(data)

    def seek(self, length: int, whence: int) -> None:
        assert whence == os.SEEK_CUR
        self.pieces.append(length)

    def flush(self) -> None:
        pass


def _lay_out(file: TorchFile) -> list[bytes | int]:
    """Return what torch would write, with the lengths of storages in their places."""
    skeleton = _Skeleton()
    try:
        with warnings.catch_warnings(), torch.serialization.skip_data():
            warnings.filterwarnings("ignore", "Serializing tensors on the meta device")
            save_torch(file, skeleton)
    except RuntimeError:  # a tensor of a kind that cannot be laid out without its data
        return []
    return skeleton.pieces


def _filled(
    pieces: list[bytes | int], storages: list[torch.UntypedStorage]
) -> list[bytes | torch.UntypedStorage] | None:
    """Put the storages into the holes, each of which follows its name; None if they do not fit."""
    filled: list[bytes | torch.UntypedStorage] = []
    left = {number: storage for number, storage in enumerate(storages) if storage.nbytes()}
    number = -1
    for piece in pieces:
        if isinstance(piece, bytes):
            name = _NAME.fullmatch(piece)
            number = int(name[1]) if name else number
            filled.append(piece)
            continue
        storage = left.pop(number, None)
        if storage is None or storage.nbytes() != piece:
            return None
        filled.append(storage)
    return None if left else filled


def _checksums(path: Path) -> dict[Span, int]:
    """Return the checksums that a zip has of its storages, by start and length."""
    with reading_zip(path) as archive, open(path, "rb", buffering=0) as file:
        return {
            (start, info.file_size): info.CRC
            for info in archive.infolist()
            if info.CRC
            and _STORAGE.fullmatch(info.filename)
            and info.compress_type == zipfile.ZIP_STORED
            and (start := data_start(file, info)) is not None
        }


def _find(
    storage: torch.UntypedStorage,
    parts: list[MappedPart],
    checksums: dict[Span, int],
) -> _Part:
    place = _place(storage, parts)
    # Without a checksum in the directory, which torch can be told to leave out, it is taken now.
    checksum = 0 if place is None else checksums.get((place, storage.nbytes()), 0)
    return _Part(storage, place, checksum or zlib.crc32(_bytes_of(storage)))


def _place(storage: torch.UntypedStorage, parts: list[MappedPart]) -> int | None:
    """Return where in the file a storage is, None if it is not mapped from there."""
    places = (part.place(storage.data_ptr(), storage.nbytes()) for part in parts)
    return next((place for place in places if place is not None), None)


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    return view_memory(storage.data_ptr(), storage.nbytes())


def _patched(source: Path, pieces: list[bytes | _Part]) -> Plan | None:
    """Put the checksums of the storages where torch, which saw none of them, wrote 0.

    They stand behind each storage and in the directory, and torch mixes all of them into the
    number that it calls the serialization id.
    """
    done: list[bytes | _Part] = []
    checksums: list[int] = []
    new: int | None = None  # the checksum of the piece before, where it is not what torch wrote
    before = after = 0  # the mixtures, of torch and with the storages
    for piece in pieces:
        if isinstance(piece, _Part):
            new = piece.checksum
        elif piece.startswith(_DESCRIPTOR):
            old = int.from_bytes(piece[4:8], "little")
            checksums.append(old if new is None else new)
            before, after = _mix(before, old), _mix(after, checksums[-1])
            piece = piece[:4] + checksums[-1].to_bytes(4, "little") + piece[8:]
            new = None
        elif len(piece) == 40 and piece[20:] == b"%020d" % before:
            piece = piece[:20] + b"%020d" % after
            new = zlib.crc32(piece)
        elif piece.startswith(b"PK\x01\x02"):
            directory = _patched_directory(piece, checksums)
            if directory is None:
                return None
            piece = directory
        done.append(piece)
    return Plan(source, done)


def _mix(seed: int, value: int) -> int:
    """Combine two hashes of 64 bits as torch does (``c10::hash_combine``)."""
    return seed ^ (value + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & (1 << 64) - 1


def _patched_directory(directory: bytes, checksums: list[int]) -> bytes | None:
    """Return a zip's directory with these checksums, None if it does not have as many entries."""
    result = bytearray(directory)
    place, left = 0, iter(checksums)
    while place + _ENTRY.size <= len(result):
        flags, *lengths = _ENTRY.unpack_from(result, place)
        if flags & _HAS_DESCRIPTOR:
            checksum = next(left, None)
            if checksum is None:
                return None
            _CHECKSUM.pack_into(result, place + 16, checksum)
        place += _ENTRY.size + sum(lengths)
    return bytes(result) if place == len(result) and next(left, None) is None else None
