"""Reading a file back while it is being written: on another processor, so it takes no longer."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import IO

from .checksums import Span, checksum_of
from .flush import start_flushing
from .places import StrPath, access_error

__all__ = ["LARGE", "ReadBack", "reading_back", "same_bytes_of"]

LARGE = 1 << 18  # bytes; a part that is smaller is not worth reading back on its own

_CHUNK = 1 << 20  # bytes; two of them stay in the processor's cache
_REQUEST = 32 << 20  # bytes that the disk is given at once


@contextmanager
def reading_back(
    file: IO[bytes], enabled: bool, fsync: bool, source: StrPath | None = None
) -> Iterator[ReadBack | None]:
    """Read a file back during the block, as far as it is told to; None if not enabled.

    Args:
        file: being written, as :func:`atomic_output` gives it.
        enabled: whether to.
        fsync: whether the disk shall hold the file, so that each part is sent there at once.
        source: **path** of the file that parts are copied from. Default: None
    """
    if not enabled:
        yield None
        return
    with ExitStack() as files:
        written = files.enter_context(open(file.name, "rb", buffering=0))
        original = None
        if source is not None:
            original = files.enter_context(_open(source))
        thread = ThreadPoolExecutor(1, "read-back")
        files.callback(thread.shutdown, cancel_futures=True)
        yield ReadBack(written, original, thread, fsync)


def _open(source: StrPath) -> io.FileIO:
    try:
        return open(source, "rb", buffering=0)
    except OSError as error:
        raise access_error(f"cannot read {source}", error) from error


class ReadBack:
    """What is known of the parts of a file that were read back.

    A part must be in the file, flushed, before it is named here. An error of the system's is raised
    where a result is asked for.

    Args:
        written: the file, of which only this object moves the position.
        source: the file that parts are copied from, likewise, if there is one.
        thread: with one worker, which reads.
        fsync: whether parts are sent to the disk.
    """

    def __init__(
        self,
        written: io.FileIO,
        source: io.FileIO | None,
        thread: ThreadPoolExecutor,
        fsync: bool,
    ) -> None:
        self._written, self._source, self._thread = written, source, thread
        self._fsync = fsync
        self._sent = 0
        self._checksums: dict[Span, Future[int | None]] = {}
        self._runs: list[_Run] = []

    def take_checksum(self, start: int, length: int) -> None:
        """Begin to read a part that was written."""
        self._send(start + length)
        job = self._thread.submit(checksum_of, self._written, start, length)
        self._checksums[start, length] = job

    def checksums(self) -> dict[Span, int | None]:
        """Return the checksums by start and length; None for a part that was cut short."""
        return {part: job.result() for part, job in self._checksums.items()}

    def compare(self, start: int, length: int, source_start: int) -> None:
        """Begin to compare a part with that of the source from which it was copied."""
        shift = source_start - start
        if not self._runs or (self._runs[-1].stop, self._runs[-1].shift) != (start, shift):
            self._runs.append(_Run(start, shift))
        self._send(start + length)
        job = self._thread.submit(self._is_same, start, length, source_start)
        self._runs[-1].add(length, job)

    def is_copy(self, start: int, length: int, source_start: int) -> bool:
        """Whether these bytes were read back and are those of the source from there on."""
        place = bisect_right(self._runs, start, key=lambda run: run.start) - 1
        if place < 0:
            return False
        run = self._runs[place]
        return start + length <= run.stop and run.shift == source_start - start and run.is_same()

    def _send(self, stop: int) -> None:
        """Let the disk begin with what is written so far, if that is worth a request."""
        if self._fsync and stop - self._sent >= _REQUEST:
            descriptor = self._written.fileno()
            self._thread.submit(start_flushing, descriptor, self._sent, stop - self._sent)
            self._sent = stop

    def _is_same(self, start: int, length: int, source_start: int) -> bool:
        assert self._source is not None
        self._written.seek(start)
        self._source.seek(source_start)
        return same_bytes_of(self._source, self._written, length)


class _Run:
    """Parts that follow one another in both files."""

    def __init__(self, start: int, shift: int) -> None:
        self.start = self.stop = start
        self.shift = shift
        self._jobs: list[Future[bool]] = []

    def add(self, length: int, job: Future[bool]) -> None:
        self.stop += length
        self._jobs.append(job)

    def is_same(self) -> bool:
        return all(job.result() for job in self._jobs)


def same_bytes_of(one: io.FileIO, other: io.FileIO, length: int) -> bool:
    """Compare the next bytes of two files; one that is cut short is not the same."""
    first, second = bytearray(min(length, _CHUNK)), bytearray(min(length, _CHUNK))
    while length:
        size = min(length, _CHUNK)
        if size < len(first):
            first, second = bytearray(size), bytearray(size)
        if _fill(one, first) != size or _fill(other, second) != size or first != second:
            return False
        length -= size
    return True


def _fill(file: io.FileIO, buffer: bytearray) -> int:
    view = memoryview(buffer)
    done = 0
    while done < len(buffer):
        count = file.readinto(view[done:])
        if not count:
            break
        done += count
    return done
