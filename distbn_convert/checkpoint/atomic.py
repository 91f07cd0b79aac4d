"""Files that appear complete or not at all.

A file is written beside its place under a temporary name, or under none where the system can do
that, flushed to the disk and moved into place in one step. So a crash, a full disk or Ctrl-C
leaves what was there before.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, OutputExistsError
from .places import (
    StrPath,
    access_error,
    check_space,
    find_disk_full,
    output_place,
    stat_or_none,
    sync_folder,
    take_over,
)
from .rename import rename_to_free_name
from .temporaries import new_temporary, remove_stale, remove_temporary

__all__ = ["atomic_output"]

_BUFFER = 1 << 20  # bytes; what is larger goes to the system uncopied


@contextmanager
def atomic_output(
    path: StrPath,
    *,
    overwrite: bool = False,
    expected_bytes: int | None = None,
    fsync: bool = True,
    before_writing: Callable[[], None] = lambda: None,
) -> Iterator[io.BufferedWriter]:
    """Write a file that is complete when it appears under ``path``.

    Until the block ends without an exception, ``path`` is what it was; after an exception of any
    kind nothing remains of the new file. The object's ``name`` is a path under which the bytes
    written so far (after ``flush()``) can be read back before they are published.

    Args:
        path: **path**, the file to write; a symbolic link is followed and its target replaced.
        overwrite: **bool**, replace an existing file, whose mode, ACL and, where permitted, owner
            the new one gets. Default: False
        expected_bytes: **int**, checked against the free space before anything is written.
            Default: None, not checked
        fsync: **bool**, wait until the disk holds the file and its name. Default: True
        before_writing: **callable**, called when place and space are checked, before anything is
            made. Default: does nothing

    Yields:
        io.BufferedWriter: binary; what is larger than a megabyte goes to the system uncopied.

    Raises:
        OutputExistsError: ``path`` exists and ``overwrite`` is False, also if it appears meanwhile.
        FileAccessError: no such folder, no permission, ``path`` is a folder, no space; ``errno``
            is the system's. A write that failed is found also where the writer hid it.

    Example::

        >>> with atomic_output("model.pth") as file:
        ...     torch.save(state, file)
    """
    target = output_place(path, folder=False, overwrite=overwrite)
    check_space(target.parent, expected_bytes)
    before_writing()
    remove_stale(target)
    output = _Output(target, overwrite)
    try:
        yield output.open()
        output.publish(fsync)
    except BaseException as error:
        output.discard()
        failure = output.failure or find_disk_full(error) or _of_a_descriptor(error)
        expected = isinstance(error, CheckpointError) or not isinstance(error, Exception)
        if failure is None or expected:
            raise
        raise access_error(
            f"cannot write {path}", failure, folder=target.parent, needed=expected_bytes
        ) from error
    if fsync:
        sync_folder(target.parent)


class _Raw(io.FileIO):
    """A file that remembers the first write that failed."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "r+")
        self.name = name
        self.failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.failure = self.failure or error
            raise


class _Output:
    """One file on its way: open, then publish or discard."""

    def __init__(self, target: Path, overwrite: bool) -> None:
        self.target = target
        self.overwrite = overwrite
        self.temporary = new_temporary(target)
        self.named = True
        self.raw: _Raw | None = None
        self.stream: io.BufferedWriter | None = None
        self.failure: OSError | None = None

    def open(self) -> io.BufferedWriter:
        with self._noting_failure():
            existing = stat_or_none(self.target)
            self.raw = None if self.overwrite else self._open_unnamed()
            self.named = self.raw is None
            if self.raw is None:
                # What replaces a private file is private from its first byte.
                self.raw = self._open_named(0o600 if existing else 0o666)
            self.stream = io.BufferedWriter(self.raw, _BUFFER)
        return self.stream

    def publish(self, fsync: bool) -> None:
        assert self.raw is not None
        assert self.stream is not None
        with self._noting_failure():
            self.stream.flush()
            if self.raw.failure is not None:
                raise self.raw.failure
            if self.overwrite and stat_or_none(self.target) is not None:
                take_over(self.raw.fileno(), self.target)
            if fsync:
                os.fsync(self.raw.fileno())
            if not self.named and self._link_unnamed():
                self.stream.close()
                return
            self.stream.close()
            if self.overwrite:
                os.replace(self.temporary, self.target)
            else:
                rename_to_free_name(self.temporary, self.target)

    def discard(self) -> None:
        try:
            if self.raw is not None:
                self.failure = self.failure or self.raw.failure
            if self.stream is not None:
                with contextlib.suppress(OSError):
                    self.stream.close()
        finally:
            remove_temporary(self.temporary)

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except FileExistsError as error:
            raise OutputExistsError(
                f"{self.target} appeared meanwhile and was left alone; give another name, or use "
                "overwrite=True (--force) to replace it."
            ) from error
        except OSError as error:
            self.failure = error
            raise

    def _open_unnamed(self) -> _Raw | None:
        """Open a file without a name: not even SIGKILL leaves anything of it. Only on Linux."""
        if not hasattr(os, "O_TMPFILE"):
            return None
        try:
            descriptor = os.open(self.target.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
        except OSError:  # not on this file system, or no permission: a named file will tell
            return None
        name = f"/proc/self/fd/{descriptor}"
        if not os.path.exists(name):
            os.close(descriptor)
            return None
        return _Raw(descriptor, name)

    def _open_named(self, mode: int) -> _Raw:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        return _Raw(os.open(self.temporary, flags, mode), str(self.temporary))

    def _link_unnamed(self) -> bool:
        """Give the unnamed file its name; if the system will not, copy it to a temporary one."""
        assert self.raw is not None
        folder = os.open(self.target.parent, os.O_RDONLY)
        try:
            # Without a dir_fd CPython calls link(), which does not follow /proc's link.
            os.link(self.raw.name, self.target.name, src_dir_fd=folder, dst_dir_fd=folder)
        except FileExistsError:
            raise
        except OSError:
            self.raw.seek(0)
            with self._open_named(0o666) as copy:
                shutil.copyfileobj(self.raw, copy, _BUFFER)
                take_over(copy.fileno(), self.raw.fileno())
                os.fsync(copy.fileno())
            return False
        finally:
            os.close(folder)
        return True


def _of_a_descriptor(error: BaseException) -> OSError | None:
    """Take what the system refused about no named file, such as fsync, for a failed write."""
    if isinstance(error, OSError) and error.errno and error.filename is None:
        return error
    return None
