"""Operands as numbers: registers hold bits, and an instruction's type says what they mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = [
    "TYPES",
    "Array",
    "Reader",
    "Writer",
    "bits_of",
    "dtype_of",
    "number_of",
    "raw_type",
    "reader",
    "writer",
]

Array = Any
Reader = Callable[[Any], Array]
Writer = Callable[[Any, Array, "Array | None"], None]
# Raw bits of a register by the first letters of its name.
_REGISTERS = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64, "f": np.uint32}
TYPES: dict[str, Any] = {
    f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
    for kind, letter in (("s", "i"), ("u", "u"), ("b", "u"))
    for bits in (8, 16, 32, 64)
} | {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype("?")}

# A device has one NaN, where NumPy has one of each operand; threads may write it to one place.
_NAN = {"f16": 0x7FFF, "f32": 0x7FFFFFFF}


def reader(operand: str, kind: str) -> Reader:
    """Return what reads an operand as numbers of that type: ``[threads]``, or one for all."""
    if operand[0] == "%" and "." in operand:
        return lambda state: number_of(state.special[operand], kind)
    if operand[0] == "%":
        return _register(operand, kind)
    if re.match(r"0[fF][0-9a-fA-F]{8}$", operand):
        bits = np.array(int(operand[2:], 16), np.uint32)
    elif re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", operand):
        size = TYPES.get(kind, np.dtype("u2")).itemsize
        number = int(operand.rstrip("U"), 0) % (1 << (8 * size))
        bits = np.array(number, f"u{size}")
    else:
        return lambda state: np.uint64(state.symbols[operand]).astype(TYPES[kind])
    value = number_of(bits, kind)
    return lambda state: value


def _register(operand: str, kind: str) -> Reader:
    if kind in ("pred", raw_type(operand)):
        return lambda state: state.registers[operand]
    return lambda state: number_of(state.registers[operand], kind)


def raw_type(register: str) -> str:
    """The type of a register's bits."""
    dtype = dtype_of(register)
    return "pred" if dtype is np.bool_ else f"b{8 * np.dtype(dtype).itemsize}"


def dtype_of(register: str) -> Any:
    return _REGISTERS[re.match(r"%([a-z]+)", register).group(1)]


def number_of(bits: Array, kind: str) -> Array:
    """Take bits for a number; bfloat16 widens to float32, pairs gain an axis ``[threads, 2]``."""
    if kind == "pred":
        return bits.astype(bool)
    if kind == "f32x2":
        return np.atleast_1d(bits).view(np.float32).reshape(-1, 2)
    if kind == "bf16":
        return (bits.astype(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    dtype = TYPES[kind]
    if bits.dtype.itemsize != dtype.itemsize:
        bits = bits.astype(f"u{dtype.itemsize}")
    return bits.view(dtype)


def bits_of(value: Array, kind: str) -> Array:
    """The opposite of :func:`number_of`; a float32 becomes the nearest bfloat16, ties to even."""
    value = np.asarray(value)
    if kind == "bf16":
        wide = value.astype(np.float32).view(np.uint32)
        odd = (wide >> np.uint32(16)) & np.uint32(1)
        rounded = ((wide + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)
    if kind == "pred":
        return value.astype(bool)
    if kind == "f32x2":
        return np.ascontiguousarray(bits_of(value, "f32")).view(np.uint64).reshape(-1)
    value = value.astype(TYPES[kind])
    bits = value.view(f"u{value.dtype.itemsize}")
    if kind in _NAN and np.isnan(value).any():
        return np.where(np.isnan(value), bits.dtype.type(_NAN[kind]), bits)
    return bits


def writer(register: str, kind: str) -> Writer:
    """Return what writes numbers of that type to a register, where a mask says so; to _ none."""
    if register == "_":
        return lambda state, value, mask: None
    dtype = np.dtype(dtype_of(register))

    def write(state: Any, value: Array, mask: Array | None) -> None:
        bits = bits_of(value, kind)
        if bits.dtype.itemsize < dtype.itemsize and kind[0] == "s":
            bits = bits.view(f"i{bits.dtype.itemsize}")  # so that it is filled with its sign
        old = state.registers[register]
        state.registers[register] = np.where(
            True if mask is None else mask, bits.astype(dtype), old
        )

    return write
