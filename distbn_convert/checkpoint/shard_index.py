"""The index of a sharded checkpoint, checked against its shards before it is believed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ..errors import ReadError, RefusedError
from .header import Header, read_header
from .places import StrPath, points_outside
from .safetensors import header_of, read_tensor
from .sniff import sniff
from .stores import ReadOptions
from .stream import Source
from .strict_json import StrictJsonError, parse_object
from .words import human_size

if TYPE_CHECKING:
    from torch import Tensor

    from .torchfile import TorchFile

__all__ = ["ShardIndex", "other_checkpoints", "read_index"]

_LARGEST_INDEX = 64_000_000  # bytes, seven times that of the largest model known
_TORCH = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class ShardIndex:
    """A checkpoint in shards.

    Attributes:
        path: the index.
        content: what is in it, ``weight_map`` and more.
        headers: by the name of each shard, what is in that; of a torch shard without offsets.
        options: how torch shards are loaded.
    """

    path: Path
    content: Mapping[str, Any]
    headers: Mapping[str, Header]
    options: ReadOptions
    _last: dict[str, TorchFile] = field(default_factory=dict, repr=False, compare=False)

    @property
    def folder(self) -> Path:
        """The folder of the index and its shards."""
        return self.path.parent

    @property
    def weight_map(self) -> Mapping[str, str]:
        """The name of the shard of each tensor."""
        weight_map: dict[str, str] = self.content["weight_map"]
        return weight_map

    def by_shard(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Divide tensors among the shards that have them."""
        divided: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            divided.setdefault(self.weight_map[name], {})[name] = tensor
        return divided

    def read_tensor(self, name: str) -> Tensor:
        """Return one tensor, on the CPU.

        Raises:
            CheckpointError: its shard cannot be read.
        """
        shard = self.weight_map[name]
        if shard.endswith(".safetensors"):
            return read_tensor(self.folder / shard, self.headers[shard], name)
        if shard not in self._last:  # one is kept, because names come shard by shard
            self._last.clear()
            self._last[shard] = self.load(shard)
        tensor: Tensor = self._last[shard].tree[name]
        return tensor

    def load(self, shard: str) -> TorchFile:
        """Load a torch shard."""
        from .torchfile import load_torch

        return load_torch(self.folder / shard, self.options)


def read_index(path: StrPath, options: ReadOptions | None = None) -> ShardIndex:
    """Read the index of a sharded checkpoint and check it against its shards.

    Imports no torch if the shards are safetensors.

    Args:
        path: **path** of the index, or of a folder with one in it.
        options: **ReadOptions**, how torch shards are loaded. Default: None, ``ReadOptions()``

    Raises:
        RefusedError: a shard lies outside the folder, or is of a kind that is not handled; the
            index is larger than 64 MB.
        ReadError: the index is no valid JSON, a key occurs twice, a shard is missing or damaged,
            or index and shards disagree about what is where.
        FileAccessError: the system cannot read it.
    """
    place = Path(path)
    if place.is_dir():
        sniff(place)
        place = next(place.glob("*.index.json"))
    content = _read_content(place)
    index = ShardIndex(place, content, {}, options or ReadOptions())
    shards = sorted(set(index.weight_map.values()))
    for shard in shards:
        _check_shard(place, shard)
    headers = {shard: _read_shard(index, shard) for shard in shards}
    _check_agreement(place, index.weight_map, headers)
    return replace(index, headers=headers)


def _read_content(path: Path) -> dict[str, Any]:
    with Source(path) as source:
        size = source.size
        if size > _LARGEST_INDEX:
            raise RefusedError(
                f"{path} has {human_size(size)}, but an index has at most "
                f"{human_size(_LARGEST_INDEX)}. Refused."
            )
        text = bytes(source.read(0, size))
    try:
        content = parse_object(text)
    except StrictJsonError as error:
        raise ReadError(f"{path} is damaged: it {error}; download or save it again.") from error
    weight_map, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise ReadError(f"{path} is no index: expected a weight_map of names to names of shards.")
    if not isinstance(metadata, dict | None):
        raise ReadError(f"{path} is damaged: its metadata is no object; download it again.")
    return content


def _check_shard(index: Path, shard: str) -> None:
    """Refuse what is not a file of the right kind inside the index's folder, on any system."""
    if points_outside(shard):
        raise RefusedError(f"shard {shard!r} in {index.name} points outside the folder. Refused.")
    suffix = Path(index.name.removesuffix(".index.json")).suffix
    if suffix not in (".safetensors", *_TORCH):
        raise RefusedError(
            f"{index} is an index of {suffix or 'nameless'} files; expected one of safetensors or "
            "torch files (*.safetensors.index.json, *.bin.index.json)."
        )
    if PurePath(shard).suffix != suffix:
        raise RefusedError(
            f"shard {shard!r} in {index.name} is no {suffix} file, as the index's name says. "
            "Refused."
        )
    if not (index.parent / shard).is_file():
        raise ReadError(f"shard {shard!r} of {index} is missing; download the whole folder.")


def _read_shard(index: ShardIndex, shard: str) -> Header:
    if shard.endswith(".safetensors"):
        return read_header(index.folder / shard)
    tree = index.load(shard).tree
    if not isinstance(tree, Mapping):
        raise ReadError(f"shard {shard!r} of {index.path} is no mapping of names to tensors.")
    return header_of(tree)


def _check_agreement(
    path: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header]
) -> None:
    listed: dict[str, set[str]] = {shard: set() for shard in headers}
    for name, shard in weight_map.items():
        listed[shard].add(name)
    for shard, header in headers.items():
        for verb, names in (
            ("lacks", listed[shard] - header.tensors.keys()),
            ("holds", header.tensors.keys() - listed[shard]),
        ):
            if names:
                first = min(names)
                raise ReadError(
                    f"{path} and its shards disagree: {shard} {verb} {first!r}, which the index "
                    f"places {'there' if verb == 'lacks' else _place(weight_map, first)}; "
                    "download or save the whole folder again."
                )


def _place(weight_map: Mapping[str, str], name: str) -> str:
    return f"in {weight_map[name]}" if name in weight_map else "nowhere"


def other_checkpoints(index: ShardIndex) -> set[str]:
    """The indexes in the folder that were not asked for, and shards that only they have."""
    others: set[str] = set()
    for path in index.folder.glob("*.index.json"):
        if path.name != index.path.name:
            others.add(path.name)
            others.update(_read_content(path)["weight_map"].values())
    return others - set(index.weight_map.values())
