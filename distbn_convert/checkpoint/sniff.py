"""What kind of checkpoint a path holds, judged by content and without loading anything."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from enum import Enum
from pathlib import Path

from ..errors import CheckpointError, FileAccessError, ReadError, RefusedError
from .places import StrPath, access_error, stat_or_none
from .words import human_size
from .zips import CUT_SHORT, MAGIC, reading_zip

__all__ = ["Kind", "sniff"]


class Kind(str, Enum):
    """The kinds of checkpoints that can be read."""

    TORCH_ZIP = "torch"
    TORCH_LEGACY = "torch-legacy"
    SAFETENSORS = "safetensors"
    SHARDED = "sharded"
    ACCELERATE = "accelerate"
    DCP = "dcp"

    def __str__(self) -> str:
        return self.value


_GRAPH = "its graph has the (C,) shapes built in. Convert the state dict that it was made from."
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LARGEST_HEADER = 1 << 40  # bytes; what claims more is no safetensors file, damaged or not

# How a file starts -> what it is and what to do.
_REFUSED = (
    (b"\x1f\x8b", "compressed with gzip; decompress it first"),
    (b"\xfd7zXZ\x00", "compressed with xz; decompress it first"),
    (b"BZh", "compressed with bzip2; decompress it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; decompress it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"\x93NUMPY", "a NumPy array (.npy), not a checkpoint"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?), not a checkpoint of PyTorch"),
    (
        b"GGUF",
        "a GGUF file, which has no BatchNorm in it; give the checkpoint that it was made from",
    ),
)

# Files of torch.distributed.checkpoint with what one rank has -> how they were saved, what to do.
_BY_RANK = (
    (
        r"__\d+\.metadata",
        "each rank saved its own .metadata (use_collectives=False); save it without that",
    ),
    (
        r"shard-\d+-model-\d+-of-\d+\.safetensors",
        "each rank saved its pieces of the tensors (HuggingFaceStorageWriter with "
        "save_distributed=True); load it with HuggingFaceStorageReader and save it without that",
    ),
)


def sniff(path: StrPath) -> Kind:
    """Return what kind of checkpoint ``path`` holds.

    Args:
        path: **path**, a file or a folder; symbolic links are followed.

    Raises:
        RefusedError: a kind that is not handled: TorchScript, torch.export, an archive, a plain
            pickle, a device, a folder with several checkpoints in it.
        ReadError: not a checkpoint, or damaged so that its kind cannot be told.
        FileAccessError: it does not exist, or may not be read.

    Example::

        >>> sniff("model.safetensors")
        <Kind.SAFETENSORS: 'safetensors'>
    """
    status = stat_or_none(path)
    if status is None:
        error = FileAccessError(f"{path} does not exist; check the path.")
        error.errno = errno.ENOENT
        raise error
    if stat.S_ISDIR(status.st_mode):
        return _sniff_folder(Path(path))
    if not stat.S_ISREG(status.st_mode):
        raise RefusedError(f"{path} is not a regular file; copy its content to one first.")
    try:
        return _sniff_file(path, status.st_size)
    except CheckpointError:
        raise
    except OSError as error:
        raise access_error(f"cannot read {path}", error) from error


def _sniff_folder(folder: Path) -> Kind:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise access_error(f"cannot read {folder}", error) from error
    if ".metadata" in names:
        return Kind.DCP
    indexes = [name for name in names if name.endswith(".index.json")]
    if len(indexes) > 1:
        raise RefusedError(
            f"{folder} holds {len(indexes)} sharded checkpoints ({', '.join(indexes)}); give the "
            "index of the one that you mean."
        )
    if indexes:
        return Kind.SHARDED
    if "model.safetensors" in names:
        return Kind.ACCELERATE
    for pattern, how in _BY_RANK:
        if any(re.fullmatch(pattern, name) for name in names):
            raise RefusedError(f"{folder} is a checkpoint of which {how}.")
    raise ReadError(
        f"{folder} is a folder without a checkpoint: expected .metadata, *.index.json or "
        f"model.safetensors among its {len(names)} entries; give the file itself."
    )


def _sniff_file(path: StrPath, size: int) -> Kind:
    with open(path, "rb") as file:
        head = file.read(1024)
    if not head:
        raise ReadError(f"{path} is empty (0 bytes); {CUT_SHORT}.")
    # First, as a length may look like the start of a pickle, or of JSON after a blank.
    length = int.from_bytes(head[:8], "little")
    if length < _LARGEST_HEADER and head[8:].lstrip().startswith(b"{"):
        return Kind.SAFETENSORS
    if head.startswith(MAGIC):
        return _sniff_zip(path)
    if re.match(rb"\x80[\x02-\x05]", head):
        return _sniff_pickle(path, head)
    _refuse_others(path, head, size)
    if str(path).endswith(".index.json"):
        return Kind.SHARDED
    raise ReadError(
        f"{path} is not a checkpoint, or is damaged: it starts with {head[:8].hex(' ')} "
        f"({human_size(size)}); expected a file by torch.save or safetensors."
    )


def _sniff_pickle(path: StrPath, head: bytes) -> Kind:
    if _LEGACY_MAGIC in head[:32]:
        return Kind.TORCH_LEGACY
    raise RefusedError(
        f"{path} is a plain pickle, which can execute anything when it is loaded, not a file by "
        "torch.save; save its state dict with torch.save."
    )


def _refuse_others(path: StrPath, head: bytes, size: int) -> None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        raise ReadError(
            f"{path} is a Git LFS pointer, not a checkpoint ({human_size(size)}); "
            'run "git lfs pull" first.'
        )
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise ReadError(
            f"{path} is a web page (HTML or XML), not a checkpoint; open it to see what the server "
            "answered, and download the file itself."
        )
    if text.startswith(b"{") and not str(path).endswith(".index.json"):
        raise ReadError(f"{path} is a JSON text, not a checkpoint; give the file with the tensors.")
    if head[257:262] == b"ustar":
        raise RefusedError(
            f"{path} is a tar archive; unpack it first (torch before 0.2 saved such files: load "
            "and save them with torch 0.4)."
        )
    for magic, what in _REFUSED:
        if head.startswith(magic):
            raise RefusedError(f"{path} is {what}.")


def _sniff_zip(path: StrPath) -> Kind:
    names = _zip_names(path)
    inner = {name.partition("/")[2] for name in names}  # without the folder around everything
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise RefusedError(f"{path} is a TorchScript archive; {_GRAPH}")
    exported = inner & {"archive_format", "models/model.json"}
    if exported or "serialized_exported_program.json" in names:
        raise RefusedError(f"{path} is by torch.export (.pt2); {_GRAPH}")
    if "data.pkl" in inner:
        return Kind.TORCH_ZIP
    if names and all(name.endswith(".npy") for name in names):
        raise RefusedError(f"{path} is a NumPy archive (.npz), not a checkpoint.")
    raise RefusedError(
        f"{path} is a zip archive, but not by torch.save: expected data.pkl among its {len(names)} "
        f"members ({', '.join(names[:3])}); if the checkpoint is inside, unpack it first."
    )


def _zip_names(path: StrPath) -> list[str]:
    with reading_zip(path) as archive:
        names = archive.namelist()
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ReadError(
            f"{path} is damaged: its zip directory lists {twice[0]!r} twice; get the file again."
        )
    return names
