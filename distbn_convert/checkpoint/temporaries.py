"""Temporary names beside an output, and the removal of what was left under them."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import shutil
import sys
import time
from pathlib import Path

__all__ = ["is_temporary", "new_temporary", "remove_stale", "remove_temporary"]

_STALE_AFTER = 3600  # seconds
_NAME_BYTES = 200  # of the 255 that file systems allow, the rest is for the pid and the suffix

_ours: dict[str, Path] = {}


def new_temporary(target: Path) -> Path:
    """Return a name beside ``target`` that nothing else uses and ``remove_stale`` recognises.

    What is under it when the process ends is removed, unless it is killed.
    """
    path = target.with_name(f"{_stem(target)}{os.getpid()}.{secrets.token_hex(4)}.distbn-tmp")
    if not _ours:
        atexit.register(_remove_ours, os.getpid())
    _ours[path.name] = path
    return path


def is_temporary(name: str) -> bool:
    """Whether a file of this name is an output on its way, or was left of one."""
    return name.endswith(".distbn-tmp")


def remove_temporary(path: Path) -> None:
    """Remove what is under a temporary name, if anything; an interruption does not stop it."""
    try:
        _remove(path)
    except BaseException:
        _remove(path)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _remove_ours(pid: int) -> None:
    """Catch up on a signal that came between a ``with`` and its block, where no cleaning runs."""
    if pid == os.getpid():  # not in a fork, to which these do not belong
        for path in _ours.values():
            _remove(path)


def _stem(target: Path) -> str:
    start = os.fsencode(target.name)[:_NAME_BYTES]
    return f".{start.decode(sys.getfilesystemencoding(), 'ignore')}."


def remove_stale(target: Path) -> None:
    """Remove what killed processes left of ``target``: an hour old, the process gone."""
    if os.name == "nt":  # asking whether a process lives would end it there
        return
    if any(map(is_temporary, target.parent.parts)):  # a folder of ours, and a large one maybe
        return
    pattern = re.compile(re.escape(_stem(target)) + r"(\d{1,9})\.[0-9a-f]{8}\.distbn-tmp")
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(target.parent)):
            found = pattern.fullmatch(entry.name)
            if found is None or entry.name in _ours or _is_alive(int(found[1])):
                continue
            if time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_AFTER:
                _remove(Path(entry.path))


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():  # in a container each run may have the same one
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
