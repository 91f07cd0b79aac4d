"""The formats behind one face: what a file holds, and how it is written with new statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import VerificationError
from .atomic import atomic_output
from .groups import KeyPath, Specs
from .sniff import Kind, sniff
from .stream import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from .edit import Replacements

__all__ = [
    "Place",
    "ReadOptions",
    "Store",
    "WriteOptions",
    "open_store",
    "read_back_error",
]

Place = tuple[KeyPath, Any]  # path of a mapping, key in it
Mappings = Iterable[tuple[KeyPath, Specs]]


@dataclass(frozen=True)
class ReadOptions:
    """How a file is opened; see :class:`~distbn_convert.checkpoint.Options`."""

    state: str | None = None
    opaque: bool = False
    allow_globals: Sequence[str] = ()
    allow_compressed: bool = False


@dataclass(frozen=True)
class WriteOptions:
    """How a file is written; see :class:`~distbn_convert.checkpoint.Options`."""

    overwrite: bool = False
    keep_old: bool = False  # the files of a folder that is replaced stay under other names
    fsync: bool = True
    verify: bool = True
    progress: Progress | None = None
    before_writing: Callable[[], None] = lambda: None
    before_publish: Callable[[], None] = lambda: None
    note: Callable[[str], object] = lambda note: None  # takes what the user should know

    def output(self, dst: Path, expected_bytes: int) -> AbstractContextManager[BufferedWriter]:
        """Return the file to write to, see :func:`~.atomic.atomic_output`."""
        return atomic_output(
            dst,
            overwrite=self.overwrite,
            expected_bytes=expected_bytes,
            fsync=self.fsync,
            before_writing=self.before_writing,
        )


class Store(Protocol):
    """An open checkpoint.

    Attributes:
        path: where it is.
        format: its name in reports.
        tensors: how many it holds.
        concerns: what may be wrong in it; an error under ``strict``.
        warnings: what else the user should know.
        opaque_globals: names of Python objects carried through unexecuted.
    """

    path: Path
    format: str
    tensors: int
    concerns: list[str]
    warnings: list[str]
    opaque_globals: list[str]

    @property
    def metadata(self) -> Mapping[str, str] | None:
        """What safetensors say of themselves; None where the format has no place for it."""

    def files(self) -> Iterable[Path]:
        """Yield the files that are read."""

    def mappings(self) -> Mappings:
        """Yield each mapping of the file that can hold a state dict, described, with its path."""

    def tensor(self, path: KeyPath, key: Any) -> Tensor:
        """Return one tensor of a mapping, on the CPU."""

    def numbers(self, path: KeyPath, key: Any) -> list[float]:
        """Return the values of one tensor in order, where the format permits without torch."""

    def check(self, places: Iterable[Place] | None = None) -> None:
        """Compare what these tensors depend on with its checksums, if it has any.

        Args:
            places: of the tensors. Default: None, all of the file

        Raises:
            ReadError: it is damaged.
        """

    def write(self, dst: Path, replacements: Replacements, options: WriteOptions) -> None:
        """Write everything to ``dst``, with the replacements; verified before it appears."""


def open_store(path: Path, options: ReadOptions) -> Store:
    """Open a checkpoint of any format that is handled.

    Raises:
        CheckpointError: the file cannot be read, is refused, or is no checkpoint.
    """
    kind = sniff(path)
    if kind is Kind.TORCH_ZIP or kind is Kind.TORCH_LEGACY:
        from .torchstore import TreeStore

        return TreeStore(path, kind.value, options)
    if kind is Kind.SHARDED:
        from .folderstore import ShardedStore

        return ShardedStore(path, options)
    if kind is Kind.ACCELERATE:
        from .folderstore import AccelerateStore

        return AccelerateStore(path)
    if kind is Kind.DCP:
        from .dcpstore import DcpStore

        return DcpStore(path)
    from .flatstore import FlatStore

    return FlatStore(path)


def read_back_error(dst: Path, where: str) -> VerificationError:
    """Make the error for an output that is not what was meant."""
    return VerificationError(
        f"{dst} was read back and differs at {where}. It was removed; please report this."
    )
