"""Where scripts write: what cannot be written is refused before the work for it, not after."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def make_folder(path: str | Path) -> Path:
    """Make a folder unless it is there; see that it takes files."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        sys.exit(
            f"Error: expected a folder to write in, but {path}: {error.strerror}; name another."
        )
    return Path(path)


def check_file(path: str | Path) -> Path:
    """See that a file can be written, leave what is in it; make its folder unless it is there."""
    if not Path(path).exists():
        make_folder(Path(path).parent)
        return Path(path)
    try:
        open(path, "ab").close()
    except OSError as error:
        sys.exit(f"Error: expected a file to write, but {path}: {error.strerror}; name another.")
    return Path(path)
