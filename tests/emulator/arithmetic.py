"""What instructions compute from registers alone.

Semantics are those of NVIDIA's "Parallel Thread Execution ISA". Floating point rounds as IEEE
does, except where a device approximates; a fused multiplication and addition is rounded to float64
first. What is not known here raises: an instruction is never skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .registers import (
    TYPES,
    Array,
    Writer,
    bits_of,
    dtype_of,
    number_of,
    raw_type,
    reader,
    writer,
)

__all__ = ["arithmetic"]


def _truncated(a: Array, b: Array) -> Array:
    """Divide integers towards zero; by zero, where a device says nothing, by one."""
    quotient = np.abs(a.astype(object)) // np.maximum(np.abs(b.astype(object)), 1)
    return (quotient * np.sign(a.astype(object)) * np.sign(b.astype(object))).astype(a.dtype)


def _fma(a: Array, b: Array, c: Array) -> Array:
    wide = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    return wide.astype(np.result_type(a, b))


def _flushed(a: Array) -> Array:
    """What is too small for full precision counts as zero (``ftz``)."""
    return np.where(np.abs(a) < np.finfo(np.float32).tiny, 0 * a, a)


def _inverse_root(a: Array) -> Array:
    return np.float32(1) / np.sqrt(_flushed(a))


def _flushed_quotient(a: Array, b: Array) -> Array:
    return _flushed(_flushed(a) / _flushed(b))


def _extract(a: Array, start: Array, length: Array) -> Array:
    """Bits from ``start`` on; of a signed number, the last one is its sign."""
    assert (length > 0).all()
    bits = np.uint32(8 * a.dtype.itemsize)
    assert (start + length <= bits).all()
    left = (bits - start - length).astype(a.dtype)
    return (a << left) >> (bits - length).astype(a.dtype)


def _add_halves(a: Array, b: Array) -> Array:
    """Add both halves of 32 bits, each for itself."""
    low, high = np.uint32(0xFFFF), np.uint32(0xFFFF0000)
    return ((a + b) & low) | ((a & high) + (b & high))


def _shift(function: Any, a: Array, b: Array) -> Array:
    """Shift by ``b`` bits, also by more than there are."""
    last = np.uint32(8 * a.dtype.itemsize - 1)
    shifted = function(a, np.minimum(b, last).astype(a.dtype))
    return shifted if a.dtype.kind == "i" else np.where(b > last, a.dtype.type(0), shifted)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
}
_UNARY: dict[str, Callable[[Array], Array]] = {
    "mov": lambda a: a,
    "cvta": lambda a: a,
    "neg": lambda a: -a if a.dtype.kind != "u" else (~a + a.dtype.type(1)),
    "not": lambda a: ~a,
    "abs": np.abs,
    "sqrt": np.sqrt,
}
_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: (a != a) | (b != b),
    "num": lambda a, b: (a == a) & (b == b),
}
Compute = Callable[[Any], tuple[Array, ...]]
_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
# What a device approximates is off by two units here, always the same way.
_APPROXIMATE = {"full", "approx"}
_ERROR = np.float32(1 + 2.0**-22)


def arithmetic(
    kind: str, modifiers: list[str], operands: list[Any]
) -> tuple[Compute, list[Writer]]:
    """Return what computes an instruction's results, and what writes each."""
    if kind == "mov" and any(isinstance(operand, list) for operand in operands):
        return _pack(operands)
    if kind == "shfl":
        return _shuffle(modifiers, operands)
    if kind == "cvt":
        return _convert(modifiers, operands)
    if kind == "createpolicy":
        return lambda state: (np.uint64(0),), [writer(operands[0], "b64")]
    error = _ERROR if _APPROXIMATE & set(modifiers) else None
    *how, dtype = (each for each in modifiers if each not in {"rn"} | _APPROXIMATE)
    target, *sources = operands
    if kind == "setp" and dtype in ("f16x2", "bf16x2"):
        return _compare_pairs(_COMPARE[how[0]], dtype[:-2], target, sources)
    if kind == "setp":
        assert len(how) == 1, f"setp.{'.'.join(how)} is not known"
        compare = _COMPARE[how[0]]
        a, b = (reader(source, dtype) for source in sources)
        return lambda state: (compare(a(state), b(state)),), [writer(target, "pred")]
    if kind == "selp":
        yes, no = (reader(source, dtype) for source in sources[:2])
        which = reader(sources[2], "pred")
        chosen = [writer(target, dtype)]
        return lambda state: (np.where(which(state), yes(state), no(state)),), chosen
    function, types, result = _function(kind, how, dtype)
    readers = [reader(source, each) for source, each in zip(sources, types, strict=True)]

    def compute(state: Any) -> tuple[Array, ...]:
        value = function(*(read(state) for read in readers))
        return (value if error is None else value * error,)

    return compute, [writer(target, result)]


def _function(kind: str, how: list[str], dtype: str) -> tuple[Any, list[str], str]:
    """Return an instruction as a function, the types of its arguments and of its result."""
    if kind in _UNARY and (not how or kind == "cvta"):
        return _UNARY[kind], [dtype], dtype
    if (kind, dtype, how) == ("rsqrt", "f32", ["ftz"]):
        return _inverse_root, ["f32"], "f32"
    if (kind, dtype, how) == ("div", "f32", ["ftz"]):  # of Triton before 3.6
        return _flushed_quotient, ["f32"] * 2, "f32"
    if (kind, dtype, how) == ("add", "s16x2", []):
        return _add_halves, ["b32"] * 2, "b32"
    if kind in ("add", "sub") and dtype in ("f16", "bf16") and how == ["f32"]:  # since sm_100
        return lambda a, b: _BINARY[kind](a.astype(np.float32), b), [dtype, "f32"], "f32"
    if kind in _BINARY and not how:
        return _BINARY[kind], [dtype] * 2, dtype
    if kind in ("max", "min") and how in ([], ["NaN"]):
        nan = bool(how) or dtype[0] != "f"
        functions = {"max": (np.fmax, np.maximum), "min": (np.fmin, np.minimum)}
        return functions[kind][nan], [dtype] * 2, dtype
    if kind in ("shl", "shr") and not how:
        function = np.left_shift if kind == "shl" else np.right_shift
        return partial(_shift, function), [dtype, "b32"], dtype
    if kind == "div" and not how:
        divide = np.divide if dtype[0] == "f" else _truncated
        return divide, [dtype] * 2, dtype
    if kind == "rem" and not how:
        return lambda a, b: a - _truncated(a, b) * b, [dtype] * 2, dtype
    if kind == "fma" and not how:
        return _fma, [dtype] * 3, dtype
    if kind == "mul" and how in ([], ["lo"]):
        return np.multiply, [dtype] * 2, dtype
    if kind == "mad" and how == ["lo"]:
        return lambda a, b, c: a * b + c, [dtype] * 3, dtype
    if kind in ("mul", "mad") and how == ["wide"]:
        wide = _WIDER[dtype]
        to = TYPES[wide]
        if kind == "mul":
            return lambda a, b: a.astype(to) * b.astype(to), [dtype] * 2, wide
        return lambda a, b, c: a.astype(to) * b.astype(to) + c, [dtype] * 2 + [wide], wide
    if kind == "mul" and how == ["hi"]:
        to, bits = TYPES[_WIDER[dtype]], TYPES[dtype].itemsize * 8
        high = to.type(bits)
        return lambda a, b: (a.astype(to) * b.astype(to)) >> high, [dtype] * 2, dtype
    if kind == "prmt":
        return _permute, ["u32"] * 3, "u32"
    if kind == "bfe":
        return _extract, [dtype, "u32", "u32"], dtype
    raise NotImplementedError(f"{kind}.{'.'.join([*how, dtype])}")


def _permute(low: Array, high: Array, selectors: Array) -> Array:
    """Choose four of eight bytes; a selector's highest bit asks for the byte's sign instead."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    result = np.zeros(both.shape, np.uint32)
    for place in range(0, 32, 8):
        selector = selectors >> np.uint32(place // 2)
        byte = both >> (np.uint64(8) * (selector & np.uint32(7)).astype(np.uint64))
        byte = (byte & np.uint64(0xFF)).astype(np.uint32)
        sign = np.where(byte >> np.uint32(7) == 1, np.uint32(0xFF), np.uint32(0))
        chosen = np.where(selector & np.uint32(8), sign, byte)
        result |= chosen << np.uint32(place)
    return result


def _compare_pairs(
    compare: Callable[[Array, Array], Array], half: str, target: str, sources: list[Any]
) -> tuple[Compute, list[Writer]]:
    """``setp`` of two halves of a register each, the lower into the first predicate."""
    readers = [reader(source, "b32") for source in sources]

    def both(state: Any) -> tuple[Array, ...]:
        pairs = (np.broadcast_to(read(state), state.threads) for read in readers)
        halves = (np.ascontiguousarray(pair).view("u2").reshape(-1, 2) for pair in pairs)
        a, b = (number_of(bits, half) for bits in halves)
        return tuple(compare(a, b).T)

    return both, [writer(predicate, "pred") for predicate in target.split("|")]


def _pack(operands: list[Any]) -> tuple[Compute, list[Writer]]:
    """``mov`` between a register and parts of it, the lowest bits first."""
    target, source = operands
    parts = target if isinstance(target, list) else source
    whole = source if isinstance(target, list) else target
    size = np.dtype(dtype_of(whole)).itemsize // len(parts)
    if isinstance(target, list):
        read = reader(whole, raw_type(whole))

        def split(state: Any) -> tuple[Array, ...]:
            bits = np.ascontiguousarray(np.broadcast_to(read(state), state.threads))
            return tuple(bits.view(f"u{size}").reshape(state.threads, -1).T)

        return split, [writer(part, f"b{8 * size}") for part in parts]
    readers = [reader(part, f"b{8 * size}") for part in parts]

    def join(state: Any) -> tuple[Array, ...]:
        columns = [np.broadcast_to(read(state), state.threads) for read in readers]
        return (np.stack(columns, 1).view(dtype_of(whole)).reshape(-1),)

    return join, [writer(whole, raw_type(whole))]


def _shuffle(modifiers: list[str], operands: list[Any]) -> tuple[Compute, list[Writer]]:
    """Exchange between the lanes of a warp; all take part, and none is out of range."""
    assert modifiers[0] == "sync"
    assert modifiers[1] in ("bfly", "idx"), f"shfl.{'.'.join(modifiers)} is not known"
    assert operands[3:] in (["31", "-1"], ["0x1f", "0xffffffff"]), "expected a whole warp"
    source, lane = reader(operands[1], "b32"), reader(operands[2], "u32")
    butterfly = modifiers[1] == "bfly"

    def exchange(state: Any) -> tuple[Array, ...]:
        value, other = (
            np.broadcast_to(read(state), state.threads).reshape(-1, 32) for read in (source, lane)
        )
        other = np.arange(32) ^ other if butterfly else other
        return (np.take_along_axis(value, other.astype(np.int64), 1).reshape(-1),)

    return exchange, [writer(operands[0], "b32")]


def _convert(modifiers: list[str], operands: list[Any]) -> tuple[Compute, list[Writer]]:
    to, of = modifiers[-2:]
    assert set(modifiers[:-2]) <= {"rn"}, f"cvt.{'.'.join(modifiers)} is not known"
    if to in ("bf16x2", "f16x2"):
        half = to[:-2]
        readers = [reader(operand, of) for operand in operands[1:]]

        def pair(state: Any) -> tuple[Array, ...]:
            high, low = (
                np.broadcast_to(bits_of(read(state), half), state.threads) for read in readers
            )
            return (np.stack([low, high], 1).view(np.uint32).reshape(-1),)

        return pair, [writer(operands[0], "b32")]
    read = reader(operands[1], of)
    return lambda state: (read(state),), [writer(operands[0], to)]
