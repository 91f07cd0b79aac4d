"""Where in a file the memory lies that was mapped from it, as torch maps checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["MappedPart", "mapped_parts"]

_MAPS = Path("/proc/self/smaps")
_ENTRY = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S{4} ([0-9a-f]+) \S+ \d+ *(.*)")


class MappedPart(NamedTuple):
    """A part of this process's memory that holds a part of a file.

    Attributes:
        start: the first address.
        stop: the one after the last.
        offset: in the file, of what is at ``start``, in bytes.
    """

    start: int
    stop: int
    offset: int

    def place(self, address: int, length: int) -> int | None:
        """Return where in the file these bytes are, None if they are not of this part."""
        if self.start <= address and address + length <= self.stop:
            return address - self.start + self.offset
        return None


def mapped_parts(path: Path) -> list[MappedPart]:
    """List the parts of memory that were mapped from a file and not written to since.

    Only Linux tells this; elsewhere, and for a file that was removed or renamed meanwhile, the list
    is empty.
    """
    try:
        lines = _MAPS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    return list(_unwritten(lines, os.path.realpath(path)))


def _unwritten(lines: list[str], name: str) -> Iterator[MappedPart]:
    """Take the mappings of this name of which no page became the process's own."""
    current: MappedPart | None = None
    own = ""  # pages of the process's own, in memory
    for line in lines:
        entry = _ENTRY.fullmatch(line)
        if entry is not None:
            start, stop, offset = (int(number, 16) for number in entry.groups()[:3])
            current = MappedPart(start, stop, offset) if entry[4] == name else None
        elif current is not None and line.startswith("Anonymous:"):
            own = line.split()[1]
        elif current is not None and line.startswith("Swap:") and own == line.split()[1] == "0":
            yield current
