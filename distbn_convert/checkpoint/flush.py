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
    descriptor = os.dup(file.fileno())  # stays open until the thread ends

    def flush() -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=flush, name="fsync")
    try:
        thread.start()
        yield
    finally:
        if thread.ident is not None:  # a signal can come before it started
            thread.join()
        os.close(descriptor)
    if failure:
        raise failure[0]
