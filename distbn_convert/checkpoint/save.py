"""State dicts written as new checkpoints, complete or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RefusedError
from .compare import same_bits
from .flush import flushing
from .header import read_header
from .places import StrPath, as_path
from .safetensors import describe, read_tensor, write
from .stores import ReadOptions, WriteOptions, read_back_error
from .torchfile import TorchFile
from .torchstore import write_tree

__all__ = ["refuse_shared", "save_state_dict", "write_flat"]


def save_state_dict(
    state_dict: Mapping[str, Tensor], dst: StrPath, *, overwrite: bool = False
) -> None:
    """Save a state dict, read it back, and only then let the file appear.

    Args:
        state_dict: **mapping** of str to Tensor.
        dst: **path**; ``*.safetensors`` becomes that, everything else a file of ``torch.save``.
        overwrite: **bool**, replace an existing file. Default: False

    Raises:
        OutputExistsError: ``dst`` exists and ``overwrite`` is False.
        FileAccessError: it cannot be written.
        RefusedError: safetensors cannot hold a value.
        VerificationError: what was read back is not what was meant.
    """
    writing = WriteOptions(overwrite=overwrite)
    path = as_path(dst)
    if path.suffix == ".safetensors":
        write_flat(state_dict, path, writing)
        return
    expected = sum(tensor.nbytes for tensor in state_dict.values())
    write_tree(TorchFile(state_dict), path, expected, writing, ReadOptions())


def write_flat(
    tensors: Mapping[str, Tensor],
    dst: Path,
    options: WriteOptions,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as a safetensors file; read it back before it appears.

    Raises:
        RefusedError: tensors share memory, or are of a kind that the format cannot hold.
        VerificationError: what was read back is not what was meant.
    """
    refuse_shared(tensors)
    expected = sum(describe(name, tensor).nbytes for name, tensor in tensors.items())
    with options.output(dst, expected) as stream:
        write(stream, tensors, metadata, progress=options.progress)
        if options.verify:
            with flushing(stream, options.fsync):
                _read_back(Path(stream.name), tensors, dst)
        options.before_publish()


def _read_back(written: Path, tensors: Mapping[str, Tensor], dst: Path) -> None:
    header = read_header(written)
    for name, tensor in tensors.items():
        if not same_bits(read_tensor(written, header, name), tensor.detach()):
            raise read_back_error(dst, name)


def refuse_shared(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that overlap: safetensors would write each, and untie them for good."""
    extents = sorted((*_extent(tensor), name) for name, tensor in tensors.items() if tensor.numel())
    for (_, stop, first), (start, _, second) in pairwise(extents):
        if start < stop:
            raise RefusedError(
                f"{first} and {second} share memory, which safetensors cannot hold. Write a file "
                "of torch instead (--format torch)."
            )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of a tensor's memory and the one after its last."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return 0, 0
    steps = ((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (sum(steps) + 1) * tensor.element_size()
