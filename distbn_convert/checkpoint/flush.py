"""Flushing a file to the disk while it is read back: the two cost the time of the longer one."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

__all__ = ["flushing"]


@contextmanager
def flushing(file: IO[bytes], enabled: bool) -> Iterator[None]:
    """Flush a written file to the disk while the block runs.

    Raises:
        OSError: the disk failed. The system tells this once, so it must not get lost.
    """
    file.flush()
    if not enabled:
        yield
        return
    failure: list[OSError] = []

    def flush() -> None:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=flush, name="fsync")
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failure:
        raise failure[0]
