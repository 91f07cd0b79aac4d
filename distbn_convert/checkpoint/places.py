"""Where output may go: paths, space, and sentences for what the system refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import TypeGuard

from ..errors import CheckpointError, ConfigurationError, FileAccessError, OutputExistsError
from .words import human_size

__all__ = [
    "StrPath",
    "access_error",
    "as_path",
    "check_space",
    "find_disk_full",
    "is_refusal",
    "output_place",
    "points_outside",
    "raise_unreadable",
    "same_file",
    "stat_or_none",
    "sync_folder",
    "take_over",
    "take_owner",
    "told",
]

StrPath = str | os.PathLike[str]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def as_path(path: StrPath) -> Path:
    """Return ``path`` as a Path.

    Raises:
        ConfigurationError: it is empty, which a Path would take for the current folder.
    """
    if not os.fspath(path):
        raise ConfigurationError("expected a path, but got an empty one; name a file or a folder.")
    return Path(path)


def access_error(
    what: str, cause: OSError, *, folder: Path | None = None, needed: int | None = None
) -> FileAccessError:
    """Make the sentence for a refusal of the system; it keeps ``errno``.

    Args:
        what: **str**, what could not be done, ``"cannot write model.pth"``.
        cause: **OSError**, the refusal.
        folder: **Path**, whose free space is told if the disk is full. Default: None
        needed: **int**, bytes of the output, told if there was no room for them. Default: None
    """
    reason = os.strerror(cause.errno).lower() if cause.errno else str(cause)
    sizes = []
    if cause.errno in _DISK_FULL and needed is not None:
        sizes.append(f"needs {human_size(needed)}")
    if cause.errno == errno.ENOSPC and folder is not None:
        with contextlib.suppress(OSError):
            sizes.append(f"{human_size(shutil.disk_usage(folder).free)} free in {folder}")
    reason += f" ({', '.join(sizes)})" if sizes else ""
    error = FileAccessError(f"{what}: {reason}.")
    error.errno = cause.errno
    return error


def raise_unreadable(error: OSError) -> None:
    """Raise what ``os.walk`` met as a sentence."""
    raise access_error(f"cannot read {error.filename}", error) from error


def is_refusal(error: BaseException) -> TypeGuard[OSError]:
    """Whether the system refuses to read, and not for being asked for the impossible.

    Damaged numbers make a reader seek before the start of a file, or beyond what any file has.
    """
    impossible = (errno.EINVAL, errno.EOVERFLOW)
    return isinstance(error, OSError) and bool(error.errno) and error.errno not in impossible


def find_disk_full(error: BaseException | None) -> OSError | None:
    """Find a full disk among the causes of ``error``; torch.save hides it there."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def told(path: StrPath) -> Iterator[None]:
    """Turn what the system refuses while ``path`` is written into a sentence.

    Raises:
        FileAccessError: instead of any OSError that is not one of ours yet.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise access_error(f"cannot write {path}", error) from error


def _refusal(code: int, message: str) -> FileAccessError:
    error = FileAccessError(message)
    error.errno = code
    return error


def stat_or_none(path: StrPath) -> os.stat_result | None:
    """Return the status of what ``path`` leads to, or None if there is nothing.

    Raises:
        FileAccessError: the system does not tell.
    """
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise access_error(f"cannot look at {path}", error) from error


def same_file(first: StrPath, second: StrPath) -> bool:
    """Return whether two paths lead to one file or folder, by whatever links or spelling."""
    one, other = stat_or_none(first), stat_or_none(second)
    return one is not None and other is not None and os.path.samestat(one, other)


def output_place(path: StrPath, *, folder: bool, overwrite: bool) -> Path:
    """Return the place that ``path`` leads to, having checked that output may go there.

    Args:
        path: **path**; symbolic links are followed.
        folder: **bool**, the output is a folder, not a file.
        overwrite: **bool**, it may replace what is there.

    Raises:
        OutputExistsError: there is something, and it may not be replaced.
        FileAccessError: no such parent folder, or it may not be written to; something else than a
            file (a folder) is there.
    """
    target = Path(os.path.realpath(path))
    parent = stat_or_none(target.parent)
    if parent is None:
        raise _refusal(
            errno.ENOENT,
            f"cannot write {path}: the folder {target.parent} does not exist; make it first.",
        )
    if not stat.S_ISDIR(parent.st_mode):
        raise _refusal(errno.ENOTDIR, f"cannot write {path}: {target.parent} is not a folder.")
    existing = stat_or_none(path)  # of an open pipe, target is a name in /proc that is none
    if existing is not None:
        _check_kind(path, existing.st_mode, folder)
        if not overwrite:
            raise OutputExistsError(
                f"{path} exists; use overwrite=True (--force) to replace it, or another name."
            )
        if folder:
            _check_replaceable(path, target)
    elif not folder and os.fspath(path).endswith(os.sep):
        raise _refusal(errno.EISDIR, f"cannot write {path}: that is the name of a folder.")
    effective = os.access in os.supports_effective_ids
    if not os.access(target.parent, os.W_OK | os.X_OK, effective_ids=effective):
        raise access_error(f"cannot write {path}", _why_not(target.parent))
    return target


def _why_not(folder: Path) -> OSError:
    """Say why a folder may not be written to, as writing would."""
    read_only = hasattr(os, "statvfs") and os.statvfs(folder).f_flag & os.ST_RDONLY
    return OSError(errno.EROFS if read_only else errno.EACCES, "")


def _check_kind(path: StrPath, mode: int, folder: bool) -> None:
    if folder and not stat.S_ISDIR(mode):
        raise _refusal(errno.ENOTDIR, f"cannot write {path}: it is no folder; give another name.")
    if not folder and stat.S_ISDIR(mode):
        raise _refusal(
            errno.EISDIR, f"cannot write {path}: it is a folder; give the name of a file in it."
        )
    if not folder and not stat.S_ISREG(mode):
        raise _refusal(
            errno.EINVAL, f"cannot write {path}: it is not a regular file; give another name."
        )


def _check_replaceable(path: StrPath, folder: Path) -> None:
    """Refuse a folder that another one cannot take the place of, or not for who is in it."""
    if os.path.ismount(folder):
        raise _refusal(
            errno.EBUSY,
            f"cannot write {path}: a mounted folder cannot be replaced; give a folder in it.",
        )
    with contextlib.suppress(FileNotFoundError):  # the current folder was removed
        here = Path.cwd()
        if folder in (here, *here.parents):
            raise _refusal(
                errno.EBUSY,
                f"cannot write {path}: the current folder, which stays the old one if that is "
                "replaced, is in it; change to another first.",
            )


def points_outside(name: str) -> bool:
    """Return whether a name that a file gives for another may lead out of its folder.

    Judged alike on every system: drives, both slashes, roots and ``..`` are understood.
    """
    parts = PureWindowsPath(name)
    return bool(parts.drive or parts.root) or ".." in parts.parts or not name.isprintable()


def check_space(folder: Path, needed: int | None) -> None:
    """Refuse, before anything is written, what does not fit into ``folder``.

    Raises:
        FileAccessError: fewer than ``needed`` bytes are free, with errno ENOSPC.
    """
    if needed is None:
        return
    free = shutil.disk_usage(folder).free
    if needed > free:
        needs, has = human_size(needed), human_size(free)
        if needs == has:
            needs, has = f"{needed:,} bytes", f"{free:,}"
        raise _refusal(
            errno.ENOSPC,
            f"not enough space in {folder}: needs {needs}, has {has}; nothing was written.",
        )


def sync_folder(folder: Path) -> None:
    """Wait until the disk holds the names in ``folder``.

    Raises:
        FileAccessError: the disk fails; the names are there, but may not survive a crash.
    """
    if os.name == "nt":  # folders cannot be opened there
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES):
            raise access_error(
                f"the output is in place, but {folder} could not be flushed to the disk", error
            ) from error


def take_over(new: StrPath | int, old: StrPath | int) -> None:
    """Give a new file or folder, or what a descriptor is of, the owner and rights of an old one."""
    existing = os.stat(old)
    take_owner(new, existing)
    _take_access_lists(new, old)  # which change the mode
    if not isinstance(new, int):
        os.chmod(new, stat.S_IMODE(existing.st_mode))
    elif hasattr(os, "fchmod"):
        os.fchmod(new, stat.S_IMODE(existing.st_mode))


def take_owner(path: StrPath | int, existing: os.stat_result) -> None:
    """Give a file or folder, or what a descriptor is of, an owner, as far as the system can."""
    for owner in ((existing.st_uid, -1), (-1, existing.st_gid)):
        with contextlib.suppress(OSError):  # not permitted, not in this namespace, no owners
            if hasattr(os, "chown"):  # Windows has none
                os.chown(path, *owner)


def _take_access_lists(new: StrPath | int, old: StrPath | int) -> None:
    """Take over POSIX ACLs, and only those: a mode shows as the group's what they give others."""
    if not hasattr(os, "getxattr"):  # only Linux has it
        return
    for name in ("system.posix_acl_access", "system.posix_acl_default"):
        wanted, inherited = _attribute(old, name), _attribute(new, name)
        if wanted is not None:
            os.setxattr(new, name, wanted)
        elif inherited is not None:
            os.removexattr(new, name)


def _attribute(path: StrPath | int, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name)
    except OSError:  # there is none, or the file system or a container knows of none
        return None
