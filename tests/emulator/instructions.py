"""Instructions as functions of a program's state: control, memory, and arithmetic."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import arithmetic
from .registers import TYPES, Reader, bits_of, number_of, raw_type, reader, writer
from .text import Instruction, Program

__all__ = ["compile_program"]

Step = Callable[[Any], Any]


def compile_program(program: Program) -> list[Step]:
    """Return a function of a program's state for each instruction.

    It returns None to go on, a number to go on there, ``"yield"`` to let other programs run
    first, or ``"exit"``.
    """
    return [_compile(each, program.labels) for each in program.instructions]


def _compile(instruction: Instruction, labels: dict[str, int]) -> Step:
    guard, negated, name, operands = instruction
    kind, *modifiers = name.replace("::", ":").split(".")
    active = _guard(guard, negated)
    if kind == "bra":
        return _branch(labels[operands[0]], active, instruction)
    if kind in _MEMORY:
        return _MEMORY[kind](modifiers, operands, active)
    if kind in ("ret", "bar"):
        assert guard is None, f"{instruction} is not known"
        if kind == "ret":
            return lambda state: "exit"
        if modifiers == ["warp", "sync"]:
            return lambda state: None  # warps are in step
        assert (modifiers, operands) == (["sync"], ["0"]), "expected a barrier of all threads"
        return lambda state: state.synchronize()
    compute, writes = arithmetic(kind, modifiers, operands)

    def execute(state: Any) -> None:
        mask = None if guard is None else active(state)
        for write, value in zip(writes, compute(state), strict=True):
            write(state, value, mask)

    return execute


def _guard(guard: str | None, negated: bool) -> Reader:
    """Return what says which threads execute an instruction."""
    if guard is None:
        return lambda state: np.ones(state.threads, bool)
    read = reader(guard, "pred")
    return lambda state: np.broadcast_to(read(state) ^ negated, state.threads)


def _branch(target: int, active: Reader, instruction: Instruction) -> Step:
    def branch(state: Any) -> int | None:
        mask = active(state)
        assert mask.all() or not mask.any(), f"threads branch differently at {instruction}"
        return target if mask[0] else None

    return branch


def _address(operand: str) -> Reader:
    match = re.match(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]$", operand)
    assert match is not None, f"expected an address, found {operand}"
    base, offset = match.groups()
    # Shared memory is addressed by 32 bits.
    read = reader(base, raw_type(base) if base[0] == "%" else "u32")
    shift = np.int64(int(offset or "0", 0))
    return lambda state: np.broadcast_to(read(state), state.threads).astype(np.int64) + shift


def _space(modifiers: list[str]) -> str:
    names = [each.split(":")[0] for each in modifiers]
    return next(name for name in names if name in ("global", "shared"))


def _listed(operand: Any) -> list[str]:
    return operand if isinstance(operand, list) else [operand]


def _load(modifiers: list[str], operands: list[Any], active: Reader) -> Step:
    kind = modifiers[-1]
    if modifiers[0] == "param":
        name, write = operands[1].strip("[]"), writer(operands[0], kind)
        return lambda state: write(state, number_of(state.parameters[name], kind), None)
    writes = [writer(target, kind) for target in _listed(operands[0])]
    address, space, size = _address(operands[1]), _space(modifiers), TYPES[kind].itemsize
    acquires = "acquire" in modifiers
    # Others may be waited for.
    atomic = acquires or bool({"relaxed", "volatile"} & set(modifiers))

    def load(state: Any) -> str | None:
        mask, places = active(state), address(state)
        if acquires:
            state.acquire(places, mask)
        values = state.memory[space].load(state.warps, places, mask, size, len(writes), atomic)
        for write, value in zip(writes, values.T, strict=True):
            write(state, value.view(TYPES[kind]), mask)
        return "yield" if atomic else None

    return load


def _store(modifiers: list[str], operands: list[Any], active: Reader) -> Step:
    kind = modifiers[-1]
    readers = [reader(source, kind) for source in _listed(operands[1])]
    address, space = _address(operands[0]), _space(modifiers)

    def store(state: Any) -> None:
        columns = [np.broadcast_to(bits_of(read(state), kind), state.threads) for read in readers]
        values = np.stack(columns, 1)
        state.memory[space].store(state.warps, address(state), active(state), values, False)

    return store


def _atomic(modifiers: list[str], operands: list[Any], active: Reader) -> Step:
    """An addition by some threads, one after the other; ``red`` does not tell what was there."""
    space, scope, order, operation, kind = modifiers
    assert (space, scope, operation) == ("global", "gpu", "add"), modifiers
    assert kind in ("u32", "u64"), modifiers
    size = TYPES[kind].itemsize
    *targets, place, source = operands
    writes = [writer(target, kind) for target in targets]
    address, read = _address(place), reader(source, kind)

    def add(state: Any) -> str:
        mask, places, memory = active(state), address(state), state.memory[space]
        added = np.broadcast_to(read(state), state.threads)
        if order in ("acquire", "acq_rel"):
            state.acquire(places, mask)
        if order in ("release", "acq_rel"):
            state.release(places, mask)
        old = np.zeros(state.threads, TYPES[kind])
        for thread in np.flatnonzero(mask):
            one = np.arange(state.threads) == thread
            old[thread] = memory.load(state.warps, places, one, size, 1, True)[thread, 0]
            memory.store(state.warps, places, one, (old + added)[:, None], True)
        for write in writes:
            write(state, old, mask)
        return "yield"

    return add


def _copy(modifiers: list[str], operands: list[Any], active: Reader) -> Step:
    """``cp.async``: to shared memory while the program goes on; zeros from a source of no bytes."""
    if modifiers == ["async", "commit_group"]:
        return lambda state: state.copies.commit()
    if modifiers == ["async", "wait_group"]:
        return lambda state: state.copies.wait(int(operands[0], 0))
    assert modifiers[2:4] == ["shared", "global"], modifiers
    target, source = map(_address, operands[:2])
    size = int(operands[2], 0)
    given = reader(operands[3], "u32") if len(operands) > 3 else lambda state: np.uint32(size)

    def begin(state: Any) -> None:
        mask, nbytes = active(state), np.broadcast_to(given(state), state.threads)
        assert np.isin(nbytes[mask], (0, size)).all(), "expected a source of all bytes or none"
        read, memory = mask & (nbytes > 0), state.memory["global"]
        values = memory.load(state.warps, source(state), read, 4, size // 4, False)
        values[~read] = 0
        state.copies.begin(state.warps, target(state), mask, values)

    return begin


def _matrix(modifiers: list[str], operands: list[Any], active: Reader, loads: bool) -> Step:
    """``ldmatrix`` and ``stmatrix``: rows of 8 halves that a warp exchanges with shared memory.

    Lane ``i`` holds the halves ``2 * (i % 4)`` and the next of row ``i // 4`` of each matrix;
    the address of row ``r`` of matrix ``m`` is lane ``8 * m + r``'s.
    """
    assert modifiers[:3] == ["sync", "aligned", "m8n8"], modifiers
    assert "trans" not in modifiers, modifiers
    count = {"x1": 1, "x2": 2, "x4": 4}[modifiers[3]]
    registers = _listed(operands[0] if loads else operands[1])
    address = _address(operands[1] if loads else operands[0])
    readers = [reader(register, "b32") for register in registers]
    writes = [writer(register, "b32") for register in registers]
    lanes = np.arange(32)

    def exchange(state: Any) -> None:
        everyone = active(state)
        assert everyone.all(), "expected all threads"
        rows = address(state).reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)
        assert not (rows % 16).any(), "rows of a matrix are aligned to 16 bytes"
        for matrix in range(count):
            places = (rows[:, matrix, lanes // 4] + 4 * (lanes % 4)).reshape(-1)
            if loads:
                values = state.shared.load(state.warps, places, everyone, 4, 1, False)
                writes[matrix](state, values[:, 0], None)
            else:
                bits = np.broadcast_to(readers[matrix](state), state.threads)
                state.shared.store(state.warps, places, everyone, bits[:, None], False)

    return exchange


_MEMORY: dict[str, Callable[..., Step]] = {
    "ld": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "cp": _copy,
    "ldmatrix": lambda *given: _matrix(*given, loads=True),
    "stmatrix": lambda *given: _matrix(*given, loads=False),
}
