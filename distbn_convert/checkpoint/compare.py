"""Whether two loaded checkpoints hold the same: structure, order, bits."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .groups import PLAIN, KeyPath, dotted, key_name
from .opaque import InertGlobal, InertObject, opaque_pickle
from .words import and_more

__all__ = ["differences", "first_difference", "same_bits"]

_END = 4096  # elements
_PICKLE = opaque_pickle()

# Not looked into: their attributes are not saved, such as torch's note that a storage comes from a
# legacy file.
_WHOLE = (Tensor, torch.UntypedStorage, torch.storage.TypedStorage, InertGlobal, type)

Parts = list[tuple[Any, Any]]


class _Attribute(str):
    """The name of an attribute in a path, which is not the key of that name."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Attribute) and str.__eq__(self, other)

    def __hash__(self) -> int:
        return hash(("attribute", str(self)))


def first_difference(first: Any, second: Any, ends: bool = False) -> str | None:
    """Describe the first place where two trees differ, None if there is none.

    Args:
        first: a tree of containers, tensors and objects.
        second: another.
        ends: compare of large tensors the two ends alone. Default: False
    """
    found = differences(first, second, ends)
    return next((f"{dotted(path)}: {what}" for path, what in found), None)


def differences(first: Any, second: Any, ends: bool = False) -> Iterator[tuple[KeyPath, str]]:
    """Yield the path of each place where two trees differ, and how, in the order of the first."""
    # Pairs that are the same, or were looked into. Those that differ are told at each of their
    # places: Python has one object for all that are the same small number.
    same: set[tuple[int, int]] = set()
    stack: list[tuple[KeyPath, Any, Any]] = [((), first, second)]
    while stack:
        path, one, two = stack.pop()
        pair = id(one), id(two)
        if one is two or pair in same:
            continue
        if type(one) is not type(two) and not _both_inert(one, two):
            yield path, f"{type(one).__name__} and {type(two).__name__}"
            continue
        parts, others = _parts(one), _parts(two)
        if parts is None or others is None:
            if _same_leaf(one, two, ends):
                same.add(pair)
            else:
                yield path, _how(one, two)
        elif _same_keys(parts, others):
            same.add(pair)
            pairs = zip(parts, others, strict=True)
            stack.extend(reversed([((*path, key), v, w) for (key, v), (_, w) in pairs]))
        else:
            yield path, _how_keys_differ(parts, others)


def same_bits(first: Tensor, second: Tensor, grad: bool = True) -> bool:
    """Whether two tensors have the same shape, dtype and bits; NaN equals itself.

    Args:
        first: a tensor.
        second: another.
        grad: count ``requires_grad``, of which safetensors knows nothing. Default: True
    """
    if first.dtype != second.dtype or (grad and first.requires_grad != second.requires_grad):
        return False
    if _is_plain(first) and _is_plain(second):
        wide = _fits_words(first) and _fits_words(second)
        return first.shape == second.shape and torch.equal(_bits(first, wide), _bits(second, wide))
    return _saved(first) == _saved(second)


def _is_plain(tensor: Tensor) -> bool:
    dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return bool(dense) and not tensor.is_nested and type(tensor) in (Tensor, torch.nn.Parameter)


def _fits_words(tensor: Tensor) -> bool:
    start = tensor.storage_offset() * tensor.element_size()
    return bool(tensor.is_contiguous() and tensor.nbytes % 8 == 0 and start % 8 == 0)


def _bits(tensor: Tensor, wide: bool) -> Tensor:
    """View the elements as integers, of 64 bits if they fit, which compare fastest."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype.is_complex:
        tensor = torch.view_as_real(tensor)
    if wide:
        return tensor.view(-1).view(torch.int64)
    dtypes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(dtypes[tensor.element_size()])


def _saved(value: Any) -> bytes:
    """Two objects that save to the same bytes are the same; saving is deterministic.

    Stand-ins are written as what they stand for, in the protocol that can write them all.
    """
    file = io.BytesIO()
    torch.save(value, file, _PICKLE, pickle_protocol=4)
    return file.getvalue()


def _ends(tensor: Tensor) -> list[Tensor]:
    """Return a part at the start and one at the end of a large tensor."""
    rows = max(1, _END * len(tensor) // tensor.numel())
    return [tensor[:rows], tensor[-rows:]]


def _both_inert(one: Any, two: Any) -> bool:
    kinds = (InertObject, InertGlobal)
    return any(isinstance(one, kind) and isinstance(two, kind) for kind in kinds)


def _parts(node: Any) -> Parts | None:
    """List what a container or an object holds; None for a value."""
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    if isinstance(node, InertObject):
        # Items and elements at the paths that walk_mappings gives them.
        rest = {name: v for name, v in vars(node).items() if name not in ("items", "elements")}
        inside = [*node.items.items(), *enumerate(node.elements)]
        return [*inside, *_attributes({**rest, "type": type(node)})]
    parts = list(node.items()) if isinstance(node, dict) else []
    if isinstance(node, _WHOLE) or not hasattr(node, "__dict__"):
        return parts if isinstance(node, dict) else None
    return parts + _attributes(vars(node))


def _attributes(values: dict[str, Any]) -> Parts:
    return [(_Attribute(name), value) for name, value in values.items()]


def _same_keys(parts: Parts, others: Parts) -> bool:
    return len(parts) == len(others) and all(
        _same_key(key, other) for (key, _), (other, _) in zip(parts, others, strict=True)
    )


def _same_key(key: Any, other: Any) -> bool:
    """Objects that equal nothing but themselves are the same key if they hold the same."""
    if isinstance(key, PLAIN) and isinstance(other, PLAIN):
        return bool(key == other or (key != key and other != other))
    return first_difference(key, other) is None


def _same_leaf(one: Any, two: Any, ends: bool) -> bool:
    if isinstance(one, Tensor):
        if ends and _is_plain(one) and one.numel() > 4 * _END and one.shape == two.shape:
            return one.stride() == two.stride() and all(
                same_bits(*parts) for parts in zip(_ends(one), _ends(two), strict=True)
            )
        return same_bits(one, two)
    if isinstance(one, InertGlobal):
        return bool(one.global_name == two.global_name)
    try:
        if bool(one == two):
            return True
    except Exception:  # arrays have no single truth
        pass
    if isinstance(one, (set, frozenset)):  # in the order of the addresses of what is in them
        return sorted(map(_saved, one)) == sorted(map(_saved, two))
    return _saved(one) == _saved(two)


def _how(one: Any, two: Any) -> str:
    if isinstance(one, Tensor) and not (one.is_nested or two.is_nested):  # these have no shape
        if one.shape != two.shape:
            return f"shapes {tuple(one.shape)} and {tuple(two.shape)}"
        if one.dtype != two.dtype:
            return f"{one.dtype} and {two.dtype}"
    return "the values differ"


def _how_keys_differ(parts: Parts, others: Parts) -> str:
    first, second = ({key: None for key, _ in each} for each in (parts, others))
    for names, others_names, which in ((first, second, "first"), (second, first, "second")):
        only = [key_name(key) for key in names if key not in others_names]
        if only:
            return f"only the {which} has {and_more(only)}"
    return "the same keys in another order"
