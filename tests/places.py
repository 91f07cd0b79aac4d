"""Places to write to for the tests: their limits, and what is there."""

from __future__ import annotations

import errno
import os
import resource
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distbn_convert.checkpoint import rename


@contextmanager
def umask(value: int) -> Iterator[None]:
    old = os.umask(value)
    try:
        yield
    finally:
        os.umask(old)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def set_access_list(path: Path, name: str = "access") -> bytes:
    """Give an ACL in which the group has no rights, though its mode shows rw, and return it."""
    entries = [(1, 6, -1), (2, 6, 12345), (4, 0, -1), (16, 6, -1), (32, 0, -1)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(path, f"system.posix_acl_{name}", value)
    except (AttributeError, OSError):
        pytest.skip("this system has no ACLs")
    return value


def access_list(path: Path, name: str = "access") -> bytes | None:
    attribute = f"system.posix_acl_{name}"
    return os.getxattr(path, attribute) if attribute in os.listxattr(path) else None


def restrict(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    """Take from the system what not every one has."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSYS, "no hard links here")  # as FUSE; FAT says EPERM

    if system != "linux":
        monkeypatch.setattr(rename, "_renameat2", lambda *args: False)
    if system == "no hard links":
        monkeypatch.setattr(os, "link", refuse)
