"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

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
    told,
)
from .rename import exchange, rename_to_free_name
from .temporaries import new_temporary, remove_stale, remove_temporary
from .words import and_more

__all__ = ["atomic_folder", "check_nothing_lost"]


@contextmanager
def atomic_folder(
    path: StrPath,
    *,
    overwrite: bool = False,
    expected_bytes: int | None = None,
    fsync: bool = True,
    before_writing: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Fill a folder that is complete when it appears under ``path``.

    Until the block ends without an exception, ``path`` is what it was; after an exception of any
    kind nothing remains of the new folder. A process that is killed leaves it, under a name that
    ends in ``.distbn-tmp``; the next run removes it after an hour.

    Args:
        path: **path**, the folder to make; a symbolic link is followed.
        overwrite: **bool**, replace an existing folder, which must hold nothing that the new one
            lacks. Default: False
        expected_bytes: **int**, checked against the free space before anything is written.
            Default: None, not checked
        fsync: **bool**, wait until the disk holds the files and their names. Default: True
        before_writing: **callable**, called when place and space are checked, before anything is
            made. Default: does nothing

    Yields:
        Path: an empty folder beside ``path``, to be filled.

    Raises:
        OutputExistsError: ``path`` exists and ``overwrite`` is False, or it holds entries that
            would be lost.
        FileAccessError: no such parent, no permission, ``path`` is a file, no space.

    Example::

        >>> with atomic_folder("converted") as folder:
        ...     (folder / "config.json").write_text("{}")
    """
    target = output_place(path, folder=True, overwrite=overwrite)
    check_space(target.parent, expected_bytes)
    before_writing()
    remove_stale(target)
    temporary = new_temporary(target)
    existing = stat_or_none(target)
    try:
        with told(path):
            os.mkdir(temporary, 0o700 if existing else 0o777)
        with _body_errors(path, temporary):
            yield temporary
        with told(path):
            if existing:
                take_over(temporary, target)
            if fsync:
                _sync_tree(temporary)
            if existing:
                check_nothing_lost(path, target, _entries(temporary))
                _replace(temporary, target)
            else:
                _publish(path, temporary, target)
    finally:
        remove_temporary(temporary)
    if fsync:
        sync_folder(target.parent)


@contextmanager
def _body_errors(path: StrPath, temporary: Path) -> Iterator[None]:
    """Turn what the system refused while the caller filled the folder into a sentence."""
    try:
        yield
    except CheckpointError as error:
        error.args = tuple(str(text).replace(str(temporary), str(path)) for text in error.args)
        raise
    except Exception as error:
        failure = find_disk_full(error)
        if isinstance(error, OSError) and str(error.filename).startswith(str(temporary)):
            failure = error
        if failure is None:
            raise
        raise access_error(f"cannot write {path}", failure, folder=temporary.parent) from error


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for path in (os.path.join(place, name) for name in names):
            if not os.path.islink(path):  # what it leads to is not ours, and need not be there
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        sync_folder(Path(place))


def check_nothing_lost(path: StrPath, old: Path, new: Collection[str]) -> None:
    """Refuse to replace a folder that holds more than the new one.

    Args:
        path: **path** of the output, for the message.
        old: the folder that is there.
        new: the names of all files and folders of the new one, relative to it.

    Raises:
        OutputExistsError: entries would be lost.
    """
    lost = sorted(_entries(old).difference(new))
    if lost:
        raise OutputExistsError(
            f"{path} was left alone, because it holds what the new folder would not: "
            f"{and_more(lost, 3)}; remove that first, or give another name."
        )


def _entries(folder: Path) -> set[str]:
    return {
        os.path.relpath(os.path.join(place, name), folder)
        for place, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


def _publish(path: StrPath, temporary: Path, target: Path) -> None:
    try:
        rename_to_free_name(temporary, target)
    except FileExistsError as error:
        raise OutputExistsError(
            f"{path} appeared meanwhile and was left alone; give another name."
        ) from error


def _replace(temporary: Path, target: Path) -> None:
    """Put the new folder in the old one's place; the old one is removed."""
    if exchange(temporary, target):
        return  # the temporary name now holds the old one
    aside = temporary.with_suffix(".distbn-old")
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
