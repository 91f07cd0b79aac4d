"""The input of a command in place, kept under a second name while the output replaces it."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from ..errors import OutputExistsError
from .places import access_error, take_over, take_owner
from .rename import rename_to_free_name
from .temporaries import new_temporary, remove_stale, remove_temporary

__all__ = ["Backup"]


class Backup:
    """``SRC.bak``: appears complete, under a free name, and goes only while SRC is the original.

    Args:
        source: what to keep, a file or a folder; a symbolic link is followed.
    """

    def __init__(self, source: Path) -> None:
        self.source = Path(os.path.realpath(source))
        self.path = self.source.with_name(self.source.name + ".bak")
        self._original: os.stat_result | None = None  # what is kept, from when it is

    def check(self) -> None:
        """Refuse a name that is taken.

        Raises:
            OutputExistsError: it is.
        """
        if os.path.lexists(self.path):
            raise self._exists()

    def make(self) -> None:
        """Give the files of the source second names; they are copied only where there are none.

        So nothing is copied, but no file of the output may be one of the source.

        Raises:
            OutputExistsError: another run has made its backup meanwhile.
            FileAccessError: the system refuses.
        """
        remove_stale(self.path)
        temporary = new_temporary(self.path)
        try:
            original = os.stat(self.source)
            if self.source.is_dir():
                shutil.copytree(self.source, temporary, symlinks=True, copy_function=_link_or_copy)
                for place, _, _ in os.walk(temporary):
                    relative = os.path.relpath(place, temporary)
                    take_owner(place, os.stat(self.source / relative))
            else:
                _link_or_copy(self.source, temporary)
            rename_to_free_name(temporary, self.path)
            self._original = original
        except FileExistsError as error:
            raise self._exists() from error
        except OSError as error:
            raise access_error(f"cannot keep a backup as {self.path}", error) from error
        finally:
            remove_temporary(temporary)

    def drop(self) -> None:
        """Remove what this run made, unless something else has taken the source's place."""
        if self._original is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.source), self._original):
                temporary = new_temporary(self.path)
                os.rename(self.path, temporary)  # so that no part of it is ever left
                remove_temporary(temporary)

    def _exists(self) -> OutputExistsError:
        return OutputExistsError(
            f"{self.path} exists; move it away, or use backup=False (--no-backup)."
        )


def _link_or_copy(source: str | Path, copy: str | Path) -> None:
    try:
        os.link(source, copy)
    except OSError:  # no hard links on this file system
        shutil.copy2(source, copy)
        take_over(copy, source)
        with open(copy, "rb") as file:
            os.fsync(file.fileno())  # soon it is all that there is of the original
