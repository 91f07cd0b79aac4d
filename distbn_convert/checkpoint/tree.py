"""The mappings of a loaded checkpoint: found, described and edited in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RefusedError
from .groups import KeyPath, TensorSpec, key_name
from .opaque import InertObject

__all__ = ["node_at", "spec_of", "specs_of", "spell_out", "walk_leaves", "walk_mappings"]

# A path as a linked list, as few are ever asked for: that of the node above, and a key there.
_Way = tuple["_Way", Any] | None
# The most keys that lead to a mapping; the memory for all paths grows with the square of it.
_DEEPEST = 1000
_MOST_PLACES = 1_000_000  # of shared containers, which nesting can multiply without end


def walk_mappings(
    tree: Any, first: str | None = None, objects: bool = False
) -> Iterator[tuple[KeyPath, MutableMapping[Any, Any]]]:
    """Yield each mapping of a nested tree once, with the keys that lead to it, in order.

    Cycles end, and a mapping that is shared appears under the first of its paths. Dictionaries,
    lists and tuples are looked into, and the items of unknown dictionaries and lists.

    Args:
        tree: what was loaded.
        first: dotted path of a sub-tree to begin with, so that what is shared appears under it.
            Default: None, the top
        objects: look into all else that unknown objects are made of, too, and no deeper than any
            checkpoint's mappings are. Default: False

    Raises:
        RefusedError: mappings are nested deeper than that, without ``objects``.
    """
    seen: set[int] = set()
    stack: list[tuple[KeyPath, _Way, Any]] = [((), None, tree)]
    if first is not None:
        stack.extend(((), way, node) for way, node in _at(tree, first))
    while stack:
        path, way, node = stack.pop()
        if id(node) in seen:
            continue
        children = list(_children(node, objects))
        if children:
            seen.add(id(node))
        if isinstance(node, InertObject):
            node = node.items
        if isinstance(node, dict):
            path, way = (*path, *_keys(way)), None
            if len(path) > _DEEPEST and objects:
                continue
            if len(path) > _DEEPEST:
                raise RefusedError(
                    f"the checkpoint has a mapping {len(path)} levels deep, and at most {_DEEPEST} "
                    "are looked into; save its state dict alone."
                )
            yield path, node
        stack.extend((path, (way, key), value) for key, value in reversed(children))


def spell_out(tree: Any, lists: bool) -> Iterator[tuple[KeyPath, MutableMapping[Any, Any]]]:
    """Yield each mapping of a nested tree at each of its paths, as formats have it without objects.

    Args:
        tree: what was loaded.
        lists: give lists that hold tensors or mappings as mappings by number, and look into no
            tuple, as ``torch.distributed.checkpoint`` does.

    Raises:
        RefusedError: what is shared is in more places than can be looked at.
    """
    places = 0
    seen: set[int] = set()
    stack: list[tuple[KeyPath, Any, frozenset[int]]] = [((), tree, frozenset())]
    while stack:
        path, node, above = stack.pop()
        children = [] if lists and isinstance(node, tuple) else list(_children(node))
        if id(node) in above or not (children or isinstance(node, dict)):
            continue
        places += id(node) in seen
        seen.add(id(node))
        if places > _MOST_PLACES:
            raise RefusedError(
                f"the checkpoint has shared objects in more than {_MOST_PLACES:,} places, too many "
                "to compare with another format; save its state dict alone."
            )
        if isinstance(node, (dict, InertObject)):
            yield path, node.items if isinstance(node, InertObject) else node
        elif lists and _is_spelled_out(node):
            yield path, dict(enumerate(node))
        above |= {id(node)}
        stack.extend(((*path, key), value, above) for key, value in reversed(children))


def _is_spelled_out(node: Any) -> bool:
    """Whether a list holds tensors or mappings, or lists that do."""
    seen: set[int] = set()
    stack = [node]
    while stack:
        part = stack.pop()
        if isinstance(part, (Tensor, dict)):
            return True
        if isinstance(part, list) and id(part) not in seen:
            seen.add(id(part))
            stack.extend(part)
    return False


def _keys(way: _Way) -> KeyPath:
    keys = []
    while way is not None:
        way, key = way
        keys.append(key)
    return tuple(reversed(keys))


def _at(node: Any, wanted: str, way: _Way = None) -> Iterator[tuple[_Way, Any]]:
    """Yield what is at a dotted path; keys may have dots of their own."""
    for key, value in _children(node):
        name = key_name(key)
        if name == wanted:
            yield (way, key), value
        elif wanted.startswith(name + "."):
            yield from _at(value, wanted[len(name) + 1 :], (way, key))


def node_at(tree: Any, path: KeyPath) -> Any:
    """Return what is at a path that :func:`walk_mappings` has given."""
    for key in path:
        if isinstance(tree, InertObject):
            tree = next(value for name, value in _children(tree, objects=True) if name == key)
        else:
            tree = tree[key]
    return tree


def walk_leaves(tree: Any) -> Iterator[Any]:
    """Yield everything in a nested tree that is no container, in order."""
    seen: set[int] = set()
    stack = [tree]
    while stack:
        node = stack.pop()
        if not isinstance(node, (dict, list, tuple, InertObject)):
            yield node
        elif id(node) not in seen:
            seen.add(id(node))
            stack.extend(value for _, value in reversed(list(_children(node, objects=True))))


def _children(node: Any, objects: bool = False) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, (list, tuple)):
        yield from enumerate(node)
    elif isinstance(node, InertObject):
        yield from node.items.items()
        yield from enumerate(node.elements)
        if objects:
            yield from (("args", node.args), ("kwargs", node.kwargs), ("states", node.states))


def specs_of(mapping: Mapping[Any, Any]) -> dict[Any, TensorSpec | None]:
    """Describe the values of a mapping; None for what is no tensor."""
    return {
        key: spec_of(value) if isinstance(value, Tensor) else None for key, value in mapping.items()
    }


def spec_of(tensor: Tensor) -> TensorSpec:
    """Describe one tensor, with the reason if its values cannot be handled."""
    refusal = _refusal(tensor)
    try:
        shape = tuple(tensor.shape)
    except (RuntimeError, ValueError):  # an uninitialised parameter of a lazy layer has none
        shape = ()
    return TensorSpec(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=shape,
        floating=tensor.is_floating_point(),
        refusal=refusal,
    )


def _refusal(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        return (
            f"is a {type(tensor).__name__}, a part of a sharded or special tensor; "
            "gather the full state dict before saving it"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"is stored as {tensor.layout}, not as a plain tensor; save it dense"
    if tensor.is_meta:
        return "has no data (it was saved from the meta device); save the model with its weights"
    return None
