"""Folders of checkpoints: shards under an index, and what accelerate saves; written whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .carry import Writer, write_folder
from .header import Header, read_header
from .places import StrPath
from .safetensors import rewrite
from .shard_index import ShardIndex, other_checkpoints
from .stores import WriteOptions
from .stream import Progress

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_accelerate", "write_accelerate", "write_sharded"]


def write_sharded(
    index: ShardIndex,
    dst: StrPath,
    replacements: Mapping[str, Tensor],
    options: WriteOptions,
) -> AbstractContextManager[Path]:
    """Write the folder of a sharded checkpoint with some tensors replaced.

    Shards without a replaced tensor and all other files are carried over unchanged;
    ``total_size`` in the index follows. Weights under another index are left out.

    Args:
        index: **ShardIndex**, the checkpoint; not modified.
        dst: **path** of the new folder; may be the old one with ``overwrite``.
        replacements: by name, **Tensor** on the CPU.
        options: **WriteOptions**, as for :func:`write_folder`.

    Returns:
        context manager of Path: the complete folder; published when the block ends.

    Raises, in the block:
        CheckpointError: as :func:`write_folder` and :func:`rewrite`.
    """
    by_shard = index.by_shard(replacements)
    writers: dict[str, Writer] = {
        shard: partial(_write_shard, index, shard, new) for shard, new in by_shard.items()
    }
    growth = {shard: _growth(index.headers[shard], new) for shard, new in by_shard.items()}
    sizes = {shard: (index.folder / shard).stat().st_size + growth[shard] for shard in by_shard}
    text = _grown_index(index, sum(growth.values()))
    if text is not None:
        writers[index.path.name] = lambda file, _: file.write(text)
        sizes[index.path.name] = len(text)
    return write_folder(index.folder, dst, writers, sizes, options, other_checkpoints(index))


def _growth(header: Header, new: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes - header.tensors[name].nbytes for name, tensor in new.items())


def _grown_index(index: ShardIndex, growth: int) -> bytes | None:
    """Return the index with its ``total_size`` grown, None if it stays as it is.

    Nothing else of the file's text changes, so that the way back restores it.
    """
    metadata = index.content.get("metadata") or {}
    total = metadata.get("total_size")
    if not growth or isinstance(total, bool) or not isinstance(total, int | float):
        return None
    grown = {**index.content, "metadata": {**metadata, "total_size": total + growth}}
    text = index.path.read_bytes().decode()
    number = json.dumps(total + growth)
    edited = re.sub(r'("total_size"\s*:\s*)[-+.\deE]+', rf"\g<1>{number}", text, count=1)
    if json.loads(edited) != grown:  # a tensor of that name, for example
        edited = json.dumps(grown, indent=2, ensure_ascii=False) + "\n"
    return edited.encode()


def _write_shard(
    index: ShardIndex,
    shard: str,
    new: Mapping[str, Tensor],
    file: IO[bytes],
    progress: Progress | None,
) -> None:
    if shard.endswith(".safetensors"):
        rewrite(index.folder / shard, file, index.headers[shard], new, progress=progress)
        return
    from .torchfile import save_torch

    loaded = index.load(shard)
    for name, tensor in new.items():
        loaded.tree[name] = tensor
    save_torch(loaded, file)


def read_accelerate(path: StrPath) -> dict[str, Header]:
    """Read the headers of the safetensors files directly in a folder, by their names.

    Raises:
        ReadError: one is damaged.
        FileAccessError: one cannot be read.
    """
    return {file.name: read_header(file) for file in sorted(Path(path).glob("*.safetensors"))}


def write_accelerate(
    src: StrPath,
    headers: Mapping[str, Header],
    dst: StrPath,
    replacements: Mapping[str, Mapping[str, Tensor]],
    options: WriteOptions,
) -> AbstractContextManager[Path]:
    """Write a folder with tensors of its safetensors files replaced; the rest is carried over.

    Args:
        src: **path** of the folder; not modified.
        headers: as :func:`read_accelerate` gives them.
        dst: **path** of the new folder; may be the old one with ``overwrite``.
        replacements: by file and name, **Tensor** on the CPU.
        options: **WriteOptions**, as for :func:`write_folder`.

    Returns:
        context manager of Path: the complete folder; published when the block ends.

    Raises, in the block:
        CheckpointError: as :func:`write_folder` and :func:`rewrite`.
    """

    def writer(name: str) -> Writer:
        return lambda file, progress: rewrite(
            Path(src) / name, file, headers[name], replacements[name], progress=progress
        )

    writers = {name: writer(name) for name in replacements}
    sizes = {
        name: headers[name].size + _growth(headers[name], new) for name, new in replacements.items()
    }
    return write_folder(src, dst, writers, sizes, options)
