"""Whether a checkpoint is as it was saved: all of it compared with its checksums."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from .checksums import check_zip
from .sniff import Kind, sniff
from .temporaries import is_temporary
from .zips import starts_as_zip

__all__ = ["check_checksums"]


def check_checksums(path: Path) -> int:
    """Compare the parts of a checkpoint with their checksums, where its format has any.

    Those are files of torch, in a folder as well: shards, the state of an optimizer, and the pieces
    of torch.distributed.checkpoint.

    Returns:
        int: how many parts had one.

    Raises:
        ReadError: a part is damaged.
        FileAccessError: the system cannot read a file.
    """
    kind = sniff(path)
    if kind is Kind.TORCH_ZIP:
        return check_zip(path)
    if kind is Kind.DCP:
        from .dcp import read_dcp

        folder = read_dcp(path)
        pieces = {info.relative_path for info in folder.metadata.storage_data.values()}
        return folder.check_pieces() + sum(map(check_zip, _zips(path, pieces)))
    if kind is Kind.SHARDED or kind is Kind.ACCELERATE:
        return sum(map(check_zip, _zips(path if path.is_dir() else path.parent)))
    return 0


def _zips(folder: Path, leave_out: Collection[str] = ()) -> Iterator[Path]:
    """Yield the zips in a folder and below, except files of these names."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != ".git")
        for name in sorted(files):
            file = Path(place, name)
            ours = is_temporary(name) or os.path.relpath(file, folder) in leave_out
            if not ours and file.is_file() and starts_as_zip(file):
                yield file
