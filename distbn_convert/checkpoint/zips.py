"""Zip archives opened for reading, with one sentence for whatever is wrong with them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from ..errors import CheckpointError, ReadError
from .places import StrPath, access_error, is_refusal

__all__ = ["CUT_SHORT", "MAGIC", "reading_zip", "starts_as_zip"]

MAGIC = b"PK\x03\x04"  # how a zip that holds something starts

CUT_SHORT = "the download or the save was probably cut short"


@contextmanager
def reading_zip(
    path: StrPath | IO[bytes],
    called: StrPath | None = None,
    fault: str = "the zip directory is missing or broken",
) -> Iterator[zipfile.ZipFile]:
    """Open a zip; what that, or reading in the block, raises becomes one sentence.

    Args:
        path: **path** of the zip, or a file in memory.
        called: **path**, its name in messages. Default: None, ``path``
        fault: **str**, what is wrong if reading fails. Default: the directory is

    Yields:
        zipfile.ZipFile: open for reading. A checksum of 0, which torch writes where it is told to
            compute none, becomes None, so that nothing is compared with it.

    Raises:
        ReadError: it is damaged, also if the directory leads before the start of the file.
        FileAccessError: the system cannot read it.
    """
    called = str(path) if called is None else called
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.file_size and not info.CRC:
                    info.CRC = None  # type: ignore[assignment]
            yield archive
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # zipfile raises many kinds on damaged bytes
        if is_refusal(error):
            raise access_error(f"cannot read {called}", error) from error
        size = os.path.getsize(path) if isinstance(path, str | os.PathLike) else path.seek(0, 2)
        raise ReadError(
            f"{called} is damaged: {fault} (file is {size:,} bytes); {CUT_SHORT}."
        ) from error


def starts_as_zip(path: StrPath) -> bool:
    """Whether a file is a zip, judged by how it starts.

    Raises:
        FileAccessError: the system cannot read it.
    """
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise access_error(f"cannot read {path}", error) from error
