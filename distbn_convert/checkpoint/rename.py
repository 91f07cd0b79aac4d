"""Renaming in one step: to a name that must be free, or two names exchanged."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path

__all__ = ["exchange", "rename_to_free_name"]

# Of Linux's renameat2(2).
_AT_FDCWD = -100
_NOREPLACE = 1
_EXCHANGE = 2
_NOT_THERE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def rename_to_free_name(source: Path, target: Path) -> None:
    """Rename a file or folder; nothing that another process puts at ``target`` is replaced.

    Raises:
        FileExistsError: ``target`` exists; it and ``source`` are as before.
        OSError: the system refuses.
    """
    if _renameat2(source, target, _NOREPLACE):
        return
    if source.is_dir():
        _rename_folder(source, target)
        return
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        _reserve_and_replace(source, target)
    else:
        os.unlink(source)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; return whether the system can."""
    return _renameat2(first, second, _EXCHANGE)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    """Return whether it was done; False where the system or the file system lacks it."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    names = os.fsencode(source), os.fsencode(target)
    if function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_THERE:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def _rename_folder(source: Path, target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)  # over what appears meanwhile it fails, unless that is empty


def _reserve_and_replace(source: Path, target: Path) -> None:
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.replace(source, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(target)
        raise
