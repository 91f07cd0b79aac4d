"""From files of torch to safetensors and back: what one format cannot hold is refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import RefusedError
from .edit import Replacements
from .groups import dotted, find_groups, key_name
from .save import write_flat
from .stores import ReadOptions, Store, WriteOptions
from .torchfile import TorchFile
from .torchstore import TreeStore, write_tree

__all__ = ["for_safetensors", "write_as"]


def write_as(
    format: str,
    store: Store,
    dst: Path,
    replacements: Replacements,
    state: str | None,
    options: WriteOptions,
) -> None:
    """Write a store in another format than its own.

    Args:
        format: ``"torch"`` or ``"safetensors"``.
        store: the open input.
        dst: the output.
        replacements: new tensors.
        state: the sub-tree to extract; None is all.
        options: how to write.

    Raises:
        RefusedError: safetensors cannot hold what is in the file.
    """
    if format == "torch":
        tensors = _tensors(store, replacements, state)
        expected = sum(tensor.nbytes for tensor in tensors.values())
        write_tree(TorchFile(tensors), dst, expected, options, ReadOptions())
    else:
        tensors = for_safetensors(store, replacements, state, options)
        write_flat(tensors, dst, options, {"format": "pt"})


def for_safetensors(
    store: Store, replacements: Replacements, state: str | None, options: WriteOptions
) -> Mapping[str, Tensor]:
    """Return the tensors of a store as safetensors can hold them; note what that changes.

    Raises:
        RefusedError: there is something else than tensors.
    """
    tensors = _tensors(store, replacements, state)
    strided = [name for name, tensor in tensors.items() if not tensor.is_contiguous()]
    if len(strided) == 1:
        options.note(f"{strided[0]} is made contiguous for safetensors.")
    elif strided:
        options.note(
            f"{strided[0]} and {len(strided) - 1} more are made contiguous for safetensors."
        )
    return tensors


def _tensors(store: Store, replacements: Replacements, state: str | None) -> Mapping[str, Tensor]:
    if isinstance(store, TreeStore):
        store.replace(replacements)
        return _extract(store, state)
    return _collect(store, replacements)


def _collect(store: Store, replacements: Replacements) -> OrderedDict[str, Tensor]:
    tensors = OrderedDict()
    for path, specs in store.mappings():
        for key in specs:
            new = replacements.get((path, key))
            tensors[dotted((*path, key))] = store.tensor(path, key) if new is None else new
    return tensors


def _extract(store: TreeStore, state: str | None) -> Mapping[str, Tensor]:
    """Return the one mapping that a flat format can hold."""
    mappings = {dotted(path): mapping for path, mapping in store.mapping_objects()}
    wanted = mappings.get(state or "")
    if wanted is None:
        raise RefusedError(
            f"{store.path} has no state dict at {state or 'its top'}; it has "
            f"{', '.join(_state_dicts(store)) or 'none'}. Name one with --state."
        )
    others = [key for key, value in wanted.items() if not isinstance(value, Tensor)]
    odd = [key for key in wanted if not isinstance(key, str)]
    if others or odd:
        shown = ", ".join(map(key_name, (others or odd)[:5]))
        more = ", ..." if len(others or odd) > 5 else ""
        names = " or ".join(f"--state {name}" for name in _state_dicts(store))
        advice = f"Take one state dict with {names}." if names else "Save its tensors alone."
        raise RefusedError(
            f"safetensors holds tensors by name alone, but {store.path} also has {shown}{more}. "
            f"{advice}"
        )
    return wanted


def _state_dicts(store: TreeStore) -> list[Any]:
    """Name the mappings that hold BatchNorms."""
    return [dotted(path) for path, specs in store.mappings() if path and find_groups(specs, path)]
