"""The header of a safetensors file: read strictly, written as the safetensors package does."""

from __future__ import annotations

import json
import os
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..errors import ReadError
from .places import StrPath, access_error
from .strict_json import StrictJsonError, parse_object

__all__ = [
    "DTYPE_BITS",
    "PIECES",
    "Header",
    "TensorInfo",
    "encode_header",
    "lay_out",
    "located",
    "merged_metadata",
    "read_header",
]

# In the order of the package, by which it sorts a file.
DTYPE_BITS = {
    **{"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8},
    **{"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32},
    **{"C64": 64, "F64": 64, "I64": 64, "U64": 64},
}

_LARGEST = 100_000_000  # bytes, the package's own limit
_WORD = 1 << 64  # the package counts in 64 bits
PIECES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch's words
_FIELDS = ("dtype", "shape", "data_offsets")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: its key.
        dtype: as the format spells it, ``"F32"``.
        shape: its sizes.
        start: its first byte, counted from the end of the header.
        stop: the byte after its last.
        extra: further fields of its entry, which nobody reads; carried through.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """What is in a file and where.

    Attributes:
        tensors: by name, in the order of their bytes.
        metadata: the file's ``__metadata__``, None without.
        start: the first byte after the header.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] | None
    start: int

    @cached_property
    def size(self) -> int:
        """The size of the whole file in bytes."""
        return self.start + max((info.stop for info in self.tensors.values()), default=0)


class _DamageError(Exception):
    """What is wrong with a header."""


def read_header(path: StrPath) -> Header:
    """Read the header of a safetensors file and check it against the file's size.

    Stricter than the package in one respect: a key must not occur twice.

    Raises:
        ReadError: the header is cut short, larger than 100 MB, not JSON, or describes tensors that
            overlap, leave holes, end elsewhere than the file, or do not fit their shapes.
        FileAccessError: the system cannot read it.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            _check_length(length, size)
            text = file.read(length)
        return Header(*_parse(text, size - 8 - length), 8 + length)
    except _DamageError as error:
        raise ReadError(
            f"{path} is damaged: {error}. Download or save the safetensors file again."
        ) from error
    except OSError as error:
        raise access_error(f"cannot read {path}", error) from error


def _check_length(length: int, size: int) -> None:
    if size < 8:
        raise _DamageError(f"it has {size} bytes, less than the length of a header")
    if length > _LARGEST:
        raise _DamageError(f"its header claims {length:,} bytes, more than the format's 100 MB")
    if 8 + length > size:
        raise _DamageError(f"its header claims {length:,} bytes, but the file has {size:,}")


def _parse(text: bytes, data: int) -> tuple[dict[str, TensorInfo], dict[str, str] | None]:
    try:
        entries = parse_object(text)
    except StrictJsonError as error:
        raise _DamageError(f"its header {error}") from error
    metadata = _metadata(entries.pop("__metadata__", None))
    infos = sorted(
        (_info(name, entry) for name, entry in entries.items()),
        key=lambda info: (info.start, info.stop),
    )
    _check_contiguous(infos, data)
    return {info.name: info for info in infos}, metadata


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _DamageError("its __metadata__ is no mapping of str to str")
    return value


def _info(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or any(key not in entry for key in _FIELDS):
        raise _DamageError(f"the entry of {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = (entry[key] for key in _FIELDS)
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _DamageError(f"{name!r} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape):
        raise _DamageError(f"{name!r} has the impossible shape {shape!r}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _DamageError(f"{name!r} has the impossible offsets {offsets!r}")
    _check_size(name, dtype, shape, offsets[1] - offsets[0])
    extra = {key: value for key, value in entry.items() if key not in _FIELDS}
    return TensorInfo(name, dtype, tuple(shape), offsets[0], offsets[1], extra)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _WORD for n in value)


def _check_size(name: str, dtype: str, shape: list[int], nbytes: int) -> None:
    bits = 1
    for factor in (*shape, DTYPE_BITS[dtype]):
        bits *= factor
        if bits >= _WORD:
            raise _DamageError(f"{name!r} has the impossible shape {shape!r}")
    if bits != nbytes * 8:
        raise _DamageError(
            f"{name!r} is {dtype} of shape {shape!r}, which are not {nbytes:,} bytes"
        )


def _check_contiguous(infos: list[TensorInfo], data: int) -> None:
    stop, before = 0, "the header"
    for info in infos:
        if info.start != stop:
            fault = "overlap" if info.start < stop else "leave a hole"
            raise _DamageError(f"{before} and {info.name!r} {fault} ({stop:,} and {info.start:,})")
        stop, before = info.stop, repr(info.name)
    if stop != data:
        raise _DamageError(f"its tensors need {stop:,} bytes, but {data:,} follow the header")


def merged_metadata(headers: Iterable[Header]) -> dict[str, str] | None:
    """Return what the metadata of several files say, the first one's where they contradict."""
    given = [dict(header.metadata) for header in headers if header.metadata is not None]
    return dict(ChainMap(*given)) if given else None


def lay_out(infos: Iterable[TensorInfo], metadata: Mapping[str, str] | None) -> Header:
    """Return the header of a file with these tensors one after another; offsets are made new."""
    placed, stop = {}, 0
    for info in infos:
        start, stop = stop, stop + info.nbytes
        placed[info.name] = TensorInfo(info.name, info.dtype, info.shape, start, stop, info.extra)
    header = Header(placed, located(metadata, placed), 0)
    return replace(header, start=len(encode_header(header)))


def located(
    metadata: Mapping[str, str] | None, tensors: Mapping[str, TensorInfo]
) -> Mapping[str, str] | None:
    """Return metadata in which torch.distributed.checkpoint finds these tensors.

    Its HuggingFaceStorageWriter notes where each tensor begins in the whole one, with as many
    numbers as axes, and its reader asks for all of a file. An axis of ranks comes first.
    """
    try:
        old = parse_object((metadata or {})[PIECES].encode())
        begins = {name: entry[_OFFSETS] for name, entry in old.items()}
        new = {}
        for name, info in tensors.items():
            padded = [0] * len(info.shape) + begins.get(name, [])
            new[name] = {_OFFSETS: padded[len(padded) - len(info.shape) :]}
    except (KeyError, TypeError, StrictJsonError):  # not by torch
        return metadata
    new = {name: new[name] for name in old if name in new} | new
    return metadata if new == old else {**(metadata or {}), PIECES: json.dumps(new)}


def encode_header(header: Header) -> bytes:
    """Return the bytes before the data, padded so that the data start at a multiple of 8."""
    entries: dict[str, Any] = {}
    if header.metadata is not None:
        entries["__metadata__"] = dict(header.metadata)
    for info in header.tensors.values():
        offsets = [info.start, info.stop]
        fields = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        entries[info.name] = {**fields, **info.extra}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
