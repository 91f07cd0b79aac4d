"""Flushing a file to the disk beside other work: both take the time of the longer one."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO

__all__ = ["flushing", "start_flushing"]

_SYNC_FILE_RANGE_WRITE = 2


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


def start_flushing(descriptor: int, start: int, length: int) -> None:
    """Have the system begin to write a part to the disk, where it can be asked to (Linux).

    Waiting until the disk holds it, and hearing of failures, is left to fsync, which is then short.
    """
    if sys.platform == "linux" and (function := _sync_file_range()) is not None:
        function(descriptor, start, length, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function
