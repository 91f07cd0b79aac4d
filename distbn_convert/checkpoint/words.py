"""How messages say sizes and lists."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["and_more", "human_size"]

_UNITS = ("kB", "MB", "GB", "TB")


def human_size(count: int) -> str:
    """Return a number of bytes as people write it: ``133 bytes``, ``2.1 GB``."""
    if count < 1000:
        return f"{count} bytes"
    power = 1
    while power < len(_UNITS) and round(count / 1000**power, 1) >= 1000:
        power += 1
    return f"{count / 1000**power:.1f} {_UNITS[power - 1]}"


def and_more(names: Sequence[str], shown: int = 1) -> str:
    """Return the first names, and how many more there are: ``a, b and 3 more``."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
