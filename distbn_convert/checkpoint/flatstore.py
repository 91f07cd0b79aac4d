"""A safetensors file as a store: read by its header, rewritten as a stream."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .groups import KeyPath, TensorSpec
from .header import Header, TensorInfo, located, read_header
from .readback import ReadBack, reading_back, same_bytes_of
from .safetensors import read_bytes, read_tensor, rewrite, torch_name, torch_shape
from .stores import Mappings, Place, WriteOptions, read_back_error

if TYPE_CHECKING:
    from torch import Tensor

    from .edit import Replacements

__all__ = ["FlatStore", "check_rewritten", "read_numbers", "specs_of_header"]

_CODES = {
    **{"F16": "e", "F32": "f", "F64": "d", "I64": "q", "I32": "i", "I16": "h", "I8": "b"},
    **{"U64": "Q", "U32": "I", "U16": "H", "U8": "B", "BOOL": "?"},
}


class FlatStore:
    """One safetensors file."""

    format = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self.tensors = len(self.header.tensors)
        self.metadata = self.header.metadata or {}
        self.concerns: list[str] = []
        self.warnings: list[str] = []
        self.opaque_globals: list[str] = []

    def files(self) -> Iterable[Path]:
        """Return the file that is read."""
        return [self.path]

    def mappings(self) -> Mappings:
        """Describe the file's only mapping."""
        yield (), specs_of_header(self.header)

    def tensor(self, path: KeyPath, key: Any) -> Tensor:
        """Return one tensor."""
        return read_tensor(self.path, self.header, key)

    def numbers(self, path: KeyPath, key: Any) -> list[float]:
        """Return the values of one tensor."""
        return read_numbers(self.path, self.header, key)

    def check(self, places: Iterable[Place] | None = None) -> None:
        """Do nothing: safetensors has no checksums."""

    def write(self, dst: Path, replacements: Replacements, options: WriteOptions) -> None:
        """Copy the file with the replacements."""
        new = {key: tensor for (_, key), tensor in replacements.items()}
        expected = self.header.size + sum(tensor.nbytes for tensor in new.values())
        with (
            options.output(dst, expected) as stream,
            reading_back(stream, options.verify, options.fsync, self.path) as back,
        ):
            rewrite(self.path, stream, self.header, new, progress=options.progress, back=back)
            if back is not None:
                stream.flush()
                check_rewritten(self.path, self.header, Path(stream.name), new, dst, back)
            options.before_publish()


def specs_of_header(header: Header) -> dict[str, TensorSpec]:
    """Describe the tensors of a file as the recognition wants them."""
    return {name: _spec(info) for name, info in header.tensors.items()}


def _spec(info: TensorInfo) -> TensorSpec:
    return TensorSpec(
        dtype=torch_name(info.dtype),
        shape=torch_shape(info),
        floating=info.dtype.startswith(("F", "BF")),
    )


def read_numbers(path: Path, header: Header, name: str) -> list[float]:
    """Return the numbers of one tensor; imports no torch but for what counters never are."""
    data, dtype = read_bytes(path, header, name), header.tensors[name].dtype
    if dtype == "BF16":  # the upper half of a float32
        halves = struct.unpack(f"<{len(data) // 2}H", data)
        data = bytearray(struct.pack(f"<{len(halves)}I", *(half << 16 for half in halves)))
        dtype = "F32"
    code = _CODES.get(dtype)
    if code is None:
        values: list[float] = read_tensor(path, header, name).flatten().tolist()
        return values
    return list(struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data))


def check_rewritten(
    src: Path,
    old: Header,
    written: Path,
    replacements: dict[str, Tensor],
    dst: Path,
    back: ReadBack | None = None,
) -> None:
    """Read a rewritten file back: the replacements are in it, all else is as it was.

    Args:
        src: the file that it was made of.
        old: its header.
        written: the new file.
        replacements: by name, the new tensors.
        dst: the new file's name in messages.
        back: what was read back while it was written. Default: None, nothing

    Raises:
        VerificationError: it is not.
    """
    new = read_header(written)
    metadata = located(old.metadata, new.tensors)
    if list(new.tensors) != list(old.tensors) or new.metadata != metadata:
        raise read_back_error(dst, "its header")
    with open(src, "rb", buffering=0) as source, open(written, "rb", buffering=0) as copy:
        for name, info in new.tensors.items():
            before = old.tensors[name]
            if name in replacements:
                same = _holds(written, new, name, replacements[name])
            else:
                start, source_start = new.start + info.start, old.start + before.start
                same = (info.dtype, info.shape) == (before.dtype, before.shape)
                if same and not (back and back.is_copy(start, info.nbytes, source_start)):
                    source.seek(source_start)
                    copy.seek(start)
                    same = same_bytes_of(source, copy, info.nbytes)
            if not same:
                raise read_back_error(dst, name)


def _holds(path: Path, header: Header, name: str, tensor: Tensor) -> bool:
    from .compare import same_bits

    return same_bits(read_tensor(path, header, name), tensor.detach())
