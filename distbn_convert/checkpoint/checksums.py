"""Checksums: those in a zip, which torch writes and never looks at, and that of a whole file."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from ..errors import ReadError
from .places import StrPath
from .stream import Source
from .zips import MAGIC, reading_zip

__all__ = ["Span", "check_piece", "check_zip", "checksum_of", "data_start", "sha256_of"]

Span = tuple[int, int]  # start and length of a part of a file, in bytes

_CHUNK = 1 << 20  # bytes; stays in the processor's cache
_ENCRYPTED = 1  # a flag
_LOCAL = struct.Struct("<4s22xHH")  # what stands before a member: signature, two lengths at its end


def check_zip(
    path: StrPath,
    called: StrPath | None = None,
    known: Mapping[Span, int | None] | None = None,
) -> int:
    """Compare each member of a zip with its checksum, on all processors.

    Args:
        path: **path** of the zip.
        called: **path**, its name in messages. Default: None, ``path``
        known: checksums of parts that were read already. Default: none

    Returns:
        int: the number of members that have a checksum; torch can be told to write none.

    Raises:
        ReadError: a member is damaged.
        FileAccessError: the system cannot read it.
    """
    called = path if called is None else called
    with reading_zip(path, called) as archive:
        infos = _with_checksum(archive)
        damaged = _damaged(Path(path), infos, known or {})
    if damaged:
        raise _mismatch(called, damaged[0].filename)
    return len(infos)


def check_piece(data: bytes | bytearray, called: str) -> int:
    """Compare each member of a zip in memory with its checksum; what is no zip has none.

    Args:
        data: all of it.
        called: its name in messages.

    Returns:
        int: the number of members that have a checksum.

    Raises:
        ReadError: a member is damaged.
    """
    if not data.startswith(MAGIC):
        return 0
    with reading_zip(io.BytesIO(data), called) as archive:
        infos = _with_checksum(archive)
        damaged = archive.testzip()
    if damaged is not None:
        raise _mismatch(called, damaged)
    return len(infos)


def _with_checksum(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """List the members that have a checksum, of what can be read without a password."""
    return [i for i in archive.infolist() if i.CRC is not None and not i.flag_bits & _ENCRYPTED]


def _mismatch(called: StrPath, member: str) -> ReadError:
    return ReadError(
        f"{called} is damaged: the checksum of {member} does not match; download or copy the file "
        "again."
    )


def checksum_of(file: io.FileIO, start: int, length: int) -> int | None:
    """Return the checksum of a part of a file; None if the file is cut short."""
    buffer = memoryview(bytearray(min(_CHUNK, length)))
    checksum = 0
    file.seek(start)
    while length:
        count = file.readinto(buffer[: min(length, _CHUNK)])
        if not count:
            return None
        checksum = zlib.crc32(buffer[:count], checksum)
        length -= count
    return checksum


def sha256_of(path: StrPath) -> str:
    """Return the SHA-256 of a file as hexadecimal digits, as ``sha256sum`` prints it.

    Raises:
        ReadError: it changed meanwhile.
        FileAccessError: the system cannot read it.
    """
    digest = hashlib.sha256()
    with Source(path) as source:
        for start in range(0, source.size, _CHUNK):
            digest.update(source.read(start, min(_CHUNK, source.size - start)))
    return digest.hexdigest()


def data_start(file: BinaryIO, info: zipfile.ZipInfo) -> int | None:
    """Return where in a zip the bytes of a member begin; None if the member is not there."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(MAGIC):
        return None
    _, name, extra = _LOCAL.unpack(header)
    return info.header_offset + _LOCAL.size + int(name) + int(extra)


def _damaged(
    path: Path, infos: list[zipfile.ZipInfo], known: Mapping[Span, int | None]
) -> list[zipfile.ZipInfo]:
    """Return the members that are not sound; those worth a thread are read in one each."""

    def is_sound(info: zipfile.ZipInfo) -> bool:
        with open(path, "rb", buffering=0) as file:
            return _is_sound(file, info, known)

    large = [info for info in infos if info.file_size > _CHUNK or info.compress_type]
    small = [info for info in infos if info.file_size <= _CHUNK and not info.compress_type]
    with ThreadPoolExecutor(os.cpu_count()) as threads, open(path, "rb", buffering=0) as file:
        sound = threads.map(is_sound, large)
        damaged = [info for info in small if not _is_sound(file, info, known)]
        return damaged + [info for info, is_ in zip(large, sound, strict=True) if not is_]


def _is_sound(file: io.FileIO, info: zipfile.ZipInfo, known: Mapping[Span, int | None]) -> bool:
    if info.compress_type != zipfile.ZIP_STORED:
        return _is_sound_compressed(file, info)
    start = data_start(file, info)
    if start is None:
        return False
    part = start, info.file_size
    found = known[part] if part in known else checksum_of(file, *part)
    return found == info.CRC


def _is_sound_compressed(file: io.FileIO, info: zipfile.ZipInfo) -> bool:
    try:
        with zipfile.ZipFile(file) as archive, archive.open(info) as member:
            while member.read(_CHUNK):
                pass
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        return False
    return True
