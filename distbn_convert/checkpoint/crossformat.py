"""One state dict as a new file of torch or safetensors: what that cannot hold is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import RefusedError
from .edit import Replacements
from .flatstore import FlatStore
from .folderstore import AccelerateStore, ShardedStore
from .groups import Group, KeyPath, Specs, dotted, find_groups, key_name
from .header import Header, merged_metadata
from .save import write_flat
from .stores import ReadOptions, Store, WriteOptions
from .temporaries import is_temporary
from .torchfile import TorchFile
from .torchstore import TreeStore, write_tree
from .tree import node_at, spec_of, walk_leaves
from .words import and_more

__all__ = ["for_safetensors", "write_as"]


def write_as(
    format: str,
    store: Store,
    dst: Path,
    replacements: Replacements,
    state: str | None,
    options: WriteOptions,
) -> None:
    """Write a state dict of a store, or its only one, in a format.

    Args:
        format: ``"torch"`` or ``"safetensors"``.
        store: the open input.
        dst: the output.
        replacements: new tensors.
        state: dotted path of the state dict; None is the top.
        options: how to write.

    Raises:
        RefusedError: the format cannot hold what is in the state dict.
    """
    if format == "safetensors":
        tensors, metadata = for_safetensors(store, replacements, state, options)
        write_flat(tensors, dst, options, metadata)
    elif isinstance(store, TreeStore):
        store.replace(replacements)
        path, _ = _find(store, state)
        file, reading = replace(store.file, tree=node_at(store.tree, path)), store.options
        write_tree(file, dst, _size(file.tree), options, reading)
    else:
        holds = f"a file of torch made of {store.format} holds"
        path, tensors = _tensors(store, replacements, state, holds)
        lost = sorted(merged_metadata(_headers(store, path)) or ())
        if lost and lost != ["format"]:
            options.note(
                f"the metadata of {store.path} ({_listed(lost)}) is left out: a file of torch has "
                "no place for it."
            )
        _note_left_out(store, options)
        write_tree(TorchFile(tensors), dst, _size(tensors), options, ReadOptions())


def for_safetensors(
    store: Store, replacements: Replacements, state: str | None, options: WriteOptions
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a state dict as safetensors can hold it, and its metadata; note what that changes.

    Raises:
        RefusedError: there is something else than tensors.
    """
    path, tensors = _tensors(store, replacements, state, "safetensors holds")
    strided = [name for name, tensor in tensors.items() if not tensor.is_contiguous()]
    if strided:
        verb = "are" if len(strided) > 1 else "is"
        options.note(f"{and_more(strided)} {verb} made contiguous for safetensors.")
    _note_left_out(store, options)
    return tensors, {"format": "pt", **(merged_metadata(_headers(store, path)) or {})}


def _tensors(
    store: Store, replacements: Replacements, state: str | None, holds: str
) -> tuple[KeyPath, dict[str, Tensor]]:
    """Return the path of a state dict and its tensors; refuse one that has more than tensors."""
    path, specs = _find(store, state)
    others = [key for key, spec in specs.items() if spec is None]
    odd = [key for key in specs if not isinstance(key, str)]
    if others or odd:
        names = " or ".join(f"--state {name}" for name in _state_dicts(store))
        advice = f"Take one state dict with {names}." if names else "Save its tensors alone."
        raise RefusedError(
            f"{holds} tensors by name alone, but {store.path} also has {_listed(others or odd)}. "
            f"{advice}"
        )
    new = {key: tensor for (place, key), tensor in replacements.items() if place == path}
    return path, {key: new[key] if key in new else store.tensor(path, key) for key in specs}


def _find(store: Store, state: str | None) -> tuple[KeyPath, Specs]:
    """Return the path of a state dict, and what is in it."""
    for path, specs in store.mappings():
        if dotted(path) == (state or ""):
            return path, specs
    raise RefusedError(
        f"{store.path} has no state dict at {state or 'its top'}; it has "
        f"{', '.join(_state_dicts(store)) or 'none'}. Name one with --state."
    )


def _state_dicts(store: Store) -> list[str]:
    """Name the mappings that hold BatchNorms."""
    return [
        dotted(path)
        for path, specs in store.mappings()
        if path and any(isinstance(item, Group) for item in find_groups(specs, path))
    ]


def _listed(keys: list[Any]) -> str:
    return ", ".join(map(key_name, keys[:5])) + (", ..." if len(keys) > 5 else "")


def _size(tree: Any) -> int:
    tensors = [leaf for leaf in walk_leaves(tree) if isinstance(leaf, Tensor)]
    return sum(tensor.nbytes for tensor in tensors if spec_of(tensor).refusal is None)


def _headers(store: Store, path: KeyPath) -> list[Header]:
    """Return the headers of the files of safetensors that hold a state dict."""
    if isinstance(store, FlatStore):
        return [store.header]
    if isinstance(store, ShardedStore):
        return list(store.index.headers.values())
    return [store.place(path, None)[1]] if isinstance(store, AccelerateStore) else []


def _note_left_out(store: Store, options: WriteOptions) -> None:
    """Tell of the files beside a state dict in a folder."""
    if isinstance(store, (FlatStore, TreeStore)):
        return
    folder = store.path if store.path.is_dir() else store.path.parent
    read = {file.relative_to(folder).parts[0] for file in store.files()}
    names = [file.name for file in folder.iterdir() if not is_temporary(file.name)]
    left = sorted({*names} - read)
    if left:
        options.note(f"left out, as one state dict is written: {_listed(left)} in {folder}.")
