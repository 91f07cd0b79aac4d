"""Zip archives opened for reading, with one sentence for whatever is wrong with them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CheckpointError, ReadError
from .places import StrPath, access_error, is_refusal

__all__ = ["CUT_SHORT", "reading_zip"]

CUT_SHORT = "the download or the save was probably cut short"


@contextmanager
def reading_zip(
    path: StrPath,
    called: StrPath | None = None,
    fault: str = "the zip directory is missing or broken",
) -> Iterator[zipfile.ZipFile]:
    """Open a zip; what that, or reading in the block, raises becomes one sentence.

    Args:
        path: **path** of the zip.
        called: **path**, its name in messages. Default: None, ``path``
        fault: **str**, what is wrong if reading fails. Default: the directory is

    Yields:
        zipfile.ZipFile: open for reading. A checksum of 0, which torch writes if it shall take
            none, becomes None: then it is not missed.

    Raises:
        ReadError: it is damaged, also if the directory leads before the start of the file.
        FileAccessError: the system cannot read it.
    """
    called = path if called is None else called
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
        size = os.path.getsize(path)
        raise ReadError(
            f"{called} is damaged: {fault} (file is {size:,} bytes); {CUT_SHORT}."
        ) from error
