"""Copying parts of files into others, in the kernel where it can, and telling how far it is."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from ..errors import ReadError
from .places import StrPath, access_error, find_disk_full

if TYPE_CHECKING:
    from .readback import ReadBack

__all__ = ["Progress", "Sink", "Source", "view_memory"]

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all

_BLOCK = 4096  # bytes, of a file system
_BUFFER = 1 << 20  # bytes; stays in the processor's cache
_CHUNK = 16 << 20  # bytes copied at once; between two, Ctrl-C is heard and progress told
_PIECE = 4 << 20  # bytes that Python copies at once; less is not worth the kernel's trouble


def view_memory(address: int, length: int) -> memoryview:
    """View bytes of memory where they are; whoever owns them must stay alive meanwhile."""
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")


class Source:
    """A file that must not change while it is read.

    Raises, in its block and at its end:
        ReadError: it changed.
        FileAccessError: the system cannot read it.
    """

    def __init__(self, path: StrPath, size: int | None = None) -> None:
        self.path = path
        self.expected = size
        self._buffer: memoryview | None = None

    def __enter__(self) -> Source:
        try:
            self._file = open(self.path, "rb", buffering=0)
        except OSError as error:
            raise access_error(f"cannot read {self.path}", error) from error
        self._status = os.fstat(self.fileno())
        if self.expected is not None and self.size != self.expected:
            self._file.close()
            raise self.changed()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        now, before = os.fstat(self.fileno()), self._status
        self._file.close()
        if kind is None and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise self.changed()

    @property
    def size(self) -> int:
        """Its size in bytes when it was opened."""
        return self._status.st_size

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._file.fileno()

    def read(self, start: int, length: int) -> bytearray:
        """Return exactly these bytes."""
        data = bytearray(length)
        view = memoryview(data)
        try:
            self._file.seek(start)
            while view:
                count = self._file.readinto(view)
                if not count:
                    raise self.changed()
                view = view[count:]
        except OSError as error:
            if isinstance(error, ReadError):
                raise
            raise access_error(f"cannot read {self.path}", error) from error
        return data

    def copy_to(self, target: int, count: int, start: int, position: int) -> int:
        """Copy a part to a descriptor and return how much of it; 0 if the system has no way.

        Some file systems share blocks instead of copying them, if a part begins one in both files.
        If not, the kernel's way is slower than a buffer that stays in the processor's cache, and a
        mapped file is slower still.
        """
        if not (start % _BLOCK or position % _BLOCK) and hasattr(os, "copy_file_range"):
            return os.copy_file_range(self.fileno(), target, count, start, position)
        if not hasattr(os, "pwrite"):
            return 0
        if self._buffer is None:
            self._buffer = memoryview(bytearray(_BUFFER))
        done = 0
        while done < count:
            part = self._buffer[: count - done]
            size = os.preadv(self.fileno(), [part], start + done)
            written = os.pwrite(target, part[:size], position + done)
            done += written
            if written < len(part):
                break
        return done

    def changed(self) -> ReadError:
        """Make the error for a file that is not what it was."""
        return ReadError(
            f"{self.path} changed while it was read; wait until nothing writes to it and run this "
            "again."
        )


class Sink:
    """A file being written, in known order, of known size.

    Args:
        out: **binary file**, as :func:`atomic_output` gives it, or any other.
        total: **int**, bytes in all.
        progress: **callable(bytes so far, total)**. Default: None
        back: **ReadBack**, compares what the kernel copied meanwhile. Default: None
    """

    def __init__(
        self,
        out: IO[bytes],
        total: int,
        progress: Progress | None = None,
        back: ReadBack | None = None,
    ) -> None:
        self.out = out
        self.total = total
        self.progress = progress
        self.back = back
        self.done = 0

    def write(self, data: Any) -> None:
        """Write bytes or a view of them."""
        self.out.write(data)
        self._advance(len(data))

    def copy(self, source: Source, start: int, stop: int) -> None:
        """Copy bytes ``start`` to ``stop`` of a file."""
        if stop - start >= _PIECE:
            start = self._copy_in_kernel(source, start, stop)
        while start < stop:
            data = source.read(start, min(_PIECE, stop - start))
            self.write(data)
            start += len(data)

    def _copy_in_kernel(self, source: Source, start: int, stop: int) -> int:
        """Copy as far as the system does it; return where it stopped."""
        try:
            self.out.flush()
            target, position = self.out.fileno(), self.out.tell()
        except (AttributeError, OSError):  # no file of the system's
            return start
        try:
            while start < stop:
                count = source.copy_to(target, min(_CHUNK, stop - start), start, position)
                if count == 0:
                    break
                if self.back is not None:
                    self.back.compare(position, count, start)
                start += count
                position += count
                self._advance(count)
        except OSError as error:  # between two file systems, for example
            if find_disk_full(error):
                raise
        self.out.seek(position)
        return start

    def _advance(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)
