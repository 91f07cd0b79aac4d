"""Safetensors files: read tensor by tensor, rewritten as a stream, without the package."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING

from ..errors import RefusedError
from .header import DTYPE_BITS, Header, TensorInfo, encode_header, lay_out, read_header
from .places import StrPath
from .stream import Progress, Sink, Source, view_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .readback import ReadBack

__all__ = [
    "Header",
    "TensorInfo",
    "describe",
    "header_of",
    "package_order",
    "read_bytes",
    "read_header",
    "read_tensor",
    "rewrite",
    "tensor_info",
    "torch_name",
    "torch_shape",
    "write",
    "write_tensor",
]

# The format's name of a dtype -> torch's; what is missing can be copied but not read.
_TORCH_NAMES = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16"},
    **{"I32": "int32", "U32": "uint32", "I64": "int64", "U64": "uint64"},
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
    **{"C64": "complex64", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
    **{"F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2"},
}
_FORMAT_NAMES = {f"torch.{name}": dtype for dtype, name in _TORCH_NAMES.items()}
_PACKED = "F4"  # torch has two numbers in each element, which the format counts one by one
_ORDER = {dtype: place for place, dtype in enumerate(DTYPE_BITS)}


def read_bytes(path: StrPath, header: Header, name: str) -> bytearray:
    """Return the bytes of one tensor, little-endian; imports no torch.

    Raises:
        ReadError: the file changed since its header was read.
        FileAccessError: the system cannot read it.
    """
    info = header.tensors[name]
    with Source(path, header.size) as source:
        return source.read(header.start + info.start, info.nbytes)


def read_tensor(path: StrPath, header: Header, name: str) -> Tensor:
    """Return one tensor of a file, on the CPU, in memory of its own.

    Raises:
        RefusedError: torch has no such dtype.
        ReadError: the file changed since its header was read.
        FileAccessError: the system cannot read it.
    """
    import torch

    info = header.tensors[name]
    dtype: torch.dtype | None = getattr(torch, torch_name(info.dtype), None)
    shape = torch_shape(info)
    if dtype is None or math.prod(shape) * dtype.itemsize != info.nbytes:  # an odd number, packed
        raise RefusedError(
            f"{path} holds {name!r} as {info.dtype}, for which torch {torch.__version__} has no "
            "dtype of that shape; leave it out."
        )
    data = read_bytes(path, header, name)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)


def rewrite(
    src: StrPath,
    out: IO[bytes],
    header: Header,
    replacements: Mapping[str, Tensor],
    *,
    progress: Progress | None = None,
    back: ReadBack | None = None,
) -> Header:
    """Copy a file with some tensors replaced; all other bytes, names, order and metadata stay.

    Args:
        src: **path** of the file, not modified.
        out: **binary file** to write to, as :func:`atomic_output` gives it.
        header: **Header** of ``src``.
        replacements: by name, **Tensor** on the CPU; shape and dtype may differ from the old ones.
        progress: **callable(bytes written, bytes in all)**. Default: None
        back: **ReadBack**, compares what is copied meanwhile. Default: None

    Returns:
        Header: of what was written.

    Raises:
        RefusedError: a replacement is of a kind that the format cannot hold.
        ReadError: ``src`` changed meanwhile.
        FileAccessError: ``src`` cannot be read.
    """
    unknown = replacements.keys() - header.tensors.keys()
    assert not unknown, unknown
    changed = {name: describe(name, tensor) for name, tensor in replacements.items()}
    new = lay_out(
        (changed.get(info.name, info) for info in header.tensors.values()), header.metadata
    )
    sink = Sink(out, new.size, progress, back)
    sink.write(encode_header(new))
    with Source(src, header.size) as source:
        for start, stop, name in _runs(header, replacements):
            if name is None:
                sink.copy(source, header.start + start, header.start + stop)
            else:
                write_tensor(sink, replacements[name])
    return new


def _runs(
    header: Header, replacements: Mapping[str, Tensor]
) -> Iterator[tuple[int, int, str | None]]:
    """Yield what the data consist of: runs of bytes that stay, and names of those replaced."""
    start = stop = 0
    for info in header.tensors.values():
        if info.name in replacements:
            yield start, stop, None
            yield info.start, info.stop, info.name
            start = info.stop
        stop = info.stop
    yield start, stop, None


def write(
    out: IO[bytes],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    progress: Progress | None = None,
) -> Header:
    """Write a new file, byte for byte as the safetensors package does, with metadata in order.

    Tensors that are not contiguous are made so, one at a time; those that share memory are each
    written whole.

    Args:
        out: **binary file** to write to, as :func:`atomic_output` gives it.
        tensors: by name, **Tensor** on the CPU.
        metadata: of **str** to str. Default: None
        progress: **callable(bytes written, bytes in all)**. Default: None

    Returns:
        Header: of what was written.

    Raises:
        RefusedError: a tensor is of a kind that the format cannot hold.
    """
    infos = [describe(name, tensor) for name, tensor in tensors.items()]
    infos.sort(key=package_order)
    new = lay_out(infos, None if metadata is None else dict(sorted(metadata.items())))
    sink = Sink(out, new.size, progress)
    sink.write(encode_header(new))
    for name in new.tensors:
        write_tensor(sink, tensors[name])
    return new


def tensor_info(name: str, dtype: torch.dtype, shape: Sequence[int]) -> TensorInfo:
    """Describe a tensor as a header does, but without offsets.

    A dtype that the format lacks keeps torch's name.
    """
    known, size = _FORMAT_NAMES.get(str(dtype), str(dtype)), math.prod(shape) * dtype.itemsize
    if known == _PACKED and shape:
        shape = (*shape[:-1], 2 * shape[-1])
    return TensorInfo(name, known, tuple(shape), 0, size)


def torch_name(dtype: str) -> str:
    """Return torch's name of a dtype without the prefix, the format's own if torch lacks it."""
    return _TORCH_NAMES.get(dtype, dtype)


def torch_shape(info: TensorInfo) -> tuple[int, ...]:
    """Return the sizes that torch gives to a tensor."""
    if info.dtype == _PACKED and info.shape:
        return (*info.shape[:-1], info.shape[-1] // 2)
    return info.shape


def header_of(state: Mapping[str, object]) -> Header:
    """Describe the tensors of a state dict, see :func:`tensor_info`; leave out what is none."""
    import torch

    infos = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and isinstance(name, str):
            infos[name] = tensor_info(name, value.dtype, value.shape)
    return Header(infos, None, 0)


def package_order(info: TensorInfo) -> tuple[int, bytes]:
    """Return the key by which the package sorts a file."""
    return -_ORDER[info.dtype], info.name.encode()


def describe(name: str, tensor: Tensor) -> TensorInfo:
    """Return what a header says of a tensor; where it is in the file is not known yet.

    Raises:
        RefusedError: the format cannot hold it.
    """
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if not plain or tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = f"{type(tensor).__name__} ({tensor.layout}, {tensor.device})"
        raise RefusedError(
            f"expected dense tensors on the CPU for safetensors, but {name!r} is a {kind}; write "
            "a file of torch instead (--format torch)."
        )
    info = tensor_info(name, tensor.dtype, tensor.shape)
    half = info.dtype == _PACKED and not info.shape  # one number, where torch has two
    if half or info.dtype not in _TORCH_NAMES:
        raise RefusedError(
            f"safetensors has no dtype for {name!r}, which is {tensor.dtype}"
            f"{' without dimensions' if half else ''}; write a file of torch instead "
            "(--format torch)."
        )
    return info


def write_tensor(sink: Sink, tensor: Tensor) -> None:
    """Write the bytes of a tensor from where they are; works without NumPy and for every dtype."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    size = dense.numel() * dense.element_size()
    if size:
        sink.write(view_memory(dense.data_ptr(), size))
