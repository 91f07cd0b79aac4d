"""A folder written anew with some of its files changed and all others carried over."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO

from ..errors import RefusedError
from .atomic import atomic_output
from .beside import is_part
from .folders import atomic_folder, check_nothing_lost
from .places import StrPath, access_error, raise_unreadable, same_file, take_over, told
from .stores import WriteOptions
from .stream import Progress, Sink, Source
from .temporaries import is_temporary

__all__ = ["Writer", "write_folder"]

Writer = Callable[[IO[bytes], "Progress | None"], object]


@contextmanager
def write_folder(
    src: StrPath | None,
    dst: StrPath,
    writers: Mapping[str, Writer],
    sizes: Mapping[str, int],
    options: WriteOptions,
    leave_out: Collection[str] = (),
) -> Iterator[Path]:
    """Write a copy of a folder in which some files are made anew; it appears complete.

    Other files are copied, so that nothing which is later written into one of the two folders
    shows in the other. Only if ``dst`` is ``src`` itself, which then disappears, are they linked.
    Where the system can, a copy shares the blocks on the disk. A ``.git`` and the folder of an
    output on its way are not copied, except in place.

    Args:
        src: **path** of the folder, not modified; None if there is none to copy.
        dst: **path** of the new folder, outside of ``src`` or the same.
        writers: by file name relative to ``src``, **callable(file, progress)** that writes it;
            a file that is not in ``src`` is added.
        sizes: of what each writer writes, for the check of the free space.
        options: **WriteOptions**, how to write; reading back is left to the caller. With
            ``keep_old`` the files of ``src`` stay under other names when ``dst`` takes its place,
            so that none is linked; symbolic links in place stay such.
        leave_out: names of files that are not carried over, nor are folders with nothing else in
            them. Default: none

    Yields:
        Path: the complete folder, to be looked at before it is published.

    Raises:
        RefusedError: ``dst`` is inside ``src``, or ``src`` holds what is neither file nor folder.
        OutputExistsError, FileAccessError: as :func:`atomic_folder`.
    """
    source = None if src is None else Path(os.path.realpath(src))
    target = Path(os.path.realpath(dst))
    in_place = source is not None and same_file(source, target)
    if source in target.parents:
        raise RefusedError(f"{dst} is inside {src}, which is copied there; give a place outside.")
    plan = _Plan(source, writers, leave_out, in_place, in_place and not options.keep_old)
    total = sum(sizes.values()) + plan.bytes_to_copy()
    meter = _Meter(total, options.progress)
    if options.overwrite and target.is_dir():
        check_nothing_lost(dst, target, {*plan.folders, *plan.files, *writers})
    output = atomic_folder(
        dst,
        overwrite=options.overwrite,
        expected_bytes=total,
        fsync=options.fsync,
        before_writing=options.before_writing,
    )
    with output as folder:
        with told(dst):
            for name in plan.folders:
                os.mkdir(folder / name)
            for name in dict.fromkeys([*plan.files, *writers]):
                if name in writers:
                    size = sizes[name]
                    with atomic_output(folder / name, expected_bytes=size, fsync=False) as file:
                        tell = meter.of_one_file()
                        writers[name](file, tell)
                        tell(size, size)
                        if in_place:
                            take_over(file.fileno(), plan.source / name)
                else:
                    plan.carry(name, folder, meter.of_one_file())
            for name in plan.folders:
                if in_place:
                    take_over(folder / name, plan.source / name)
                shutil.copystat(plan.source / name, folder / name)
        yield folder


class _Plan:
    """What a folder consists of, and how each piece gets into the new one."""

    def __init__(
        self,
        source: Path | None,
        changed: Collection[str],
        leave_out: Collection[str],
        in_place: bool,
        hard_link: bool,
    ) -> None:
        self.source = source or Path()
        self.changed = changed
        self.in_place = in_place
        self.hard_link = hard_link
        self.folders: list[str] = []
        self.files: list[str] = []
        self.links: set[str] = set()
        for place, folders, files in os.walk(source, onerror=raise_unreadable) if source else ():
            if not in_place:
                folders[:] = filter(is_part, folders)
            relative = os.path.relpath(place, source)
            for name in sorted(folders):
                self._add_folder(os.path.normpath(os.path.join(relative, name)))
            for name in sorted(files):
                path = os.path.normpath(os.path.join(relative, name))
                if path not in leave_out and not is_temporary(name):
                    self._add_file(path)
        below = sorted(self.links & _parents(changed))
        if below:
            raise RefusedError(
                f"{self.source / below[0]} is a link to a folder with files to change, which may "
                "serve others; put the folder itself there, or choose an output of another format."
            )
        emptied = _parents(leave_out)  # unless something else is in them
        filled = _parents([*self.files, *(set(self.folders) - emptied)])
        self.folders = [name for name in self.folders if name in filled or name not in emptied]

    def _add_folder(self, name: str) -> None:
        if os.path.islink(self.source / name):
            self.files.append(name)
            self.links.add(name)
        else:
            self.folders.append(name)

    def _add_file(self, name: str) -> None:
        path = self.source / name
        if self.in_place and path.is_symlink() and name not in self.changed:
            self.links.add(name)
        else:
            self._check_regular(path)
        self.files.append(name)

    def _check_regular(self, path: Path) -> None:
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise access_error(f"cannot read {path}", error) from error
        if not stat.S_ISREG(mode):
            raise RefusedError(f"{path} is no regular file; move it out of the folder first.")

    def bytes_to_copy(self) -> int:
        """The bytes of files that are neither changed nor linked."""
        if self.hard_link:
            return 0
        copied = set(self.files) - set(self.changed) - self.links
        return sum((self.source / name).stat().st_size for name in copied)

    def carry(self, name: str, folder: Path, progress: Progress) -> None:
        """Bring one unchanged file, or link to a folder, into the new folder."""
        old, new = self.source / name, folder / name
        if name in self.links:
            os.symlink(os.readlink(old) if self.in_place else os.path.realpath(old), new)
        elif not self.hard_link or not _link(old, new):
            _copy(old, new, progress, self.in_place)


def _parents(names: Iterable[str]) -> set[str]:
    return {str(parent) for name in names for parent in PurePath(name).parents}


def _link(old: Path, new: Path) -> bool:
    try:
        os.link(old, new)
    except OSError:  # this file system, or this file, takes no more links
        return False
    return True


def _copy(old: Path, new: Path, progress: Progress, in_place: bool) -> None:
    with (
        Source(old) as source,
        atomic_output(new, expected_bytes=source.size, fsync=False) as file,
    ):
        Sink(file, source.size, progress).copy(source, 0, source.size)
        if in_place:
            take_over(file.fileno(), source.fileno())
    shutil.copystat(old, new)


class _Meter:
    """Adds up the progress of many files."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.progress = progress
        self.finished = 0
        self.current = 0

    def of_one_file(self) -> Progress:
        """Return the function that the next file's writer tells its progress."""
        self.finished += self.current
        self.current = 0

        def tell(done: int, _: int) -> None:
            self.current = done = max(self.current, done)
            if self.progress is not None:
                self.progress(self.finished + done, max(self.total, self.finished + done))

        return tell
