"""Files that folders have beside their weights: other weights, and all compared as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatch
from pathlib import Path

from .places import access_error, raise_unreadable
from .readback import same_bytes_of
from .temporaries import is_temporary
from .words import and_more

__all__ = ["files_beside", "is_part", "not_looked_into", "other_weights", "same_content"]

_WEIGHTS = (".safetensors", ".bin", ".msgpack", ".h5", ".ckpt", ".pt", ".pth", ".distcp")
# What accelerate, the Trainer of transformers and Lightning save beside them.
_NO_WEIGHTS = (
    *("optimizer*.bin", "scheduler*.bin", "sampler*.bin", "dl_state_dict*.bin", "scaler.pt"),
    *("optimizer.pt", "scheduler.pt", "rng_state*.pth", "training_args.bin", "meta.pt"),
)


def not_looked_into(folder: Path, own: Collection[str]) -> list[str]:
    """Return a sentence about :func:`other_weights`, if there are any."""
    others = other_weights(folder, own)
    if not others:
        return []
    verb = "were" if len(others) > 1 else "was"
    return [f"{and_more(others)} beside the weights {verb} not looked into."]


def other_weights(folder: Path, own: Collection[str]) -> list[str]:
    """List what in a folder and below looks like weights and is not among ``own``.

    What the system does not tell is left out.
    """
    names = {
        Path(place, name).relative_to(folder).as_posix()
        for place, folders, files in _walk(folder)
        for name in (*folders, *files)
        if name.endswith(_WEIGHTS) and not any(fnmatch(name, other) for other in _NO_WEIGHTS)
    }
    return sorted(names.difference(own))


def files_beside(path: Path, own: Collection[Path]) -> dict[str, Path]:
    """Return the files in the folder of a checkpoint and below, by their names in it.

    Args:
        path: a folder, or the index in one; any other file has none beside it.
        own: files of the checkpoint itself, which are left out.

    Raises:
        FileAccessError: the system does not tell.
    """
    if path.name.endswith(".index.json") and path.is_file():
        path = path.parent
    files = _files_below(path) if path.is_dir() else ()
    return {os.path.relpath(file, path): file for file in files if file not in own}


def _files_below(folder: Path) -> Iterator[Path]:
    for place, _, files in _walk(folder, raise_unreadable):
        for file in (Path(place, name) for name in files):
            if file.is_file():
                yield file


def _walk(
    folder: Path, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder without what is no part of a checkpoint."""
    for place, folders, files in os.walk(folder, onerror=onerror):
        folders[:] = filter(is_part, folders)
        yield place, folders, [name for name in files if not is_temporary(name)]


def is_part(folder: str) -> bool:
    """Whether a folder of this name is part of a checkpoint: no ``.git``, no output on its way."""
    return folder != ".git" and not is_temporary(folder)


def same_content(first: Path, second: Path) -> bool:
    """Whether two files have the same bytes.

    Raises:
        FileAccessError: the system cannot read one.
    """
    try:
        with open(first, "rb", buffering=0) as one, open(second, "rb", buffering=0) as other:
            size = os.fstat(one.fileno()).st_size
            return size == os.fstat(other.fileno()).st_size and same_bytes_of(one, other, size)
    except OSError as error:
        raise access_error(f"cannot read {error.filename or first}", error) from error
