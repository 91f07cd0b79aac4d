"""Launches: programs that take turns, and their registers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .instructions import compile_program
from .memory import SHARED_BASE, AsyncCopies, GlobalMemory, Order, SharedMemory
from .text import Program

__all__ = ["Launch"]

Array = Any
# No launch takes as many turns.
_PATIENCE = 200_000


class Launch:
    """One grid of programs over tensors.

    Args:
        program: the kernel.
        grid: programs along x, y and z.
        arguments: tensors and numbers, in the order of the kernel's parameters, the pointers to
            scratch memory left out.
        room: how many programs run at once.
    """

    def __init__(
        self, program: Program, grid: Sequence[int], arguments: list[Any], room: int
    ) -> None:
        self.program, self.code = program, compile_program(program)
        self.grid, self.room, self.threads = tuple(grid), room, program.threads
        warps = program.threads // 32
        self.order = Order(int(np.prod(self.grid)) * warps)
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        self.memory = GlobalMemory(tensors, self.order, warps)
        values = [_bits_of(value) for value in arguments]
        values += [np.uint64(0)] * (len(program.parameters) - len(values))
        self.parameters = dict(zip(program.parameters, values, strict=True))

    @np.errstate(all="ignore")  # a device says nothing of a division by zero either
    def run(self) -> None:
        """Run all programs, which start in order and take turns at random."""
        places = enumerate(np.ndindex(*self.grid[::-1]))
        running: list[Iterator[None]] = []
        for _ in range(_PATIENCE):
            while len(running) < self.room and (place := next(places, None)) is not None:
                running.append(State(self, place[0], place[1][::-1]).run())
            if not running:
                return
            program = random.choice(running)
            if next(program, "ended") == "ended":
                running.remove(program)
        raise RuntimeError("programs wait for each other forever")


def _bits_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return np.uint64(value.data_ptr())
    if isinstance(value, float):
        return np.float32(value).view(np.uint32)
    return np.uint64(value % 2**64)


class State:
    """One program as it runs: its registers, memory, and place in the grid."""

    def __init__(self, launch: Launch, number: int, place: tuple[int, ...]) -> None:
        self.code, self.threads, self.parameters = launch.code, launch.threads, launch.parameters
        self.order, self.shared = launch.order, SharedMemory()
        self.memory = {"global": launch.memory, "shared": self.shared}
        self.copies = AsyncCopies(self.shared)
        self.symbols = {"global_smem": SHARED_BASE}
        self.registers = Registers(self.threads)
        thread = np.arange(self.threads)
        self.warps = (number * self.threads + thread) // 32
        zeros = np.zeros(self.threads, np.uint32)
        self.special = {"%tid.x": thread.astype(np.uint32)}
        for axis, index, count in zip("xyz", place, launch.grid, strict=True):
            self.special[f"%ctaid.{axis}"] = zeros + np.uint32(index)
            self.special[f"%nctaid.{axis}"] = zeros + np.uint32(count)

    def run(self) -> Iterator[None]:
        """Run to the end, with a pause wherever another program's turn would be felt."""
        at = 0
        while True:
            went = self.code[at](self)
            at += 1
            if went is None:
                continue
            if went == "exit":
                return
            if went == "yield":
                yield
            else:
                at = went

    def synchronize(self) -> None:
        self.shared.epoch += 1
        self.order.join(slice(self.warps[0], self.warps[-1] + 1))

    def acquire(self, addresses: Array, mask: Array) -> None:
        for thread in np.flatnonzero(mask):
            self.order.acquire(self.warps[thread], int(addresses[thread]))

    def release(self, addresses: Array, mask: Array) -> None:
        for thread in np.flatnonzero(mask):
            self.order.release(self.warps[thread], int(addresses[thread]))


class Registers(dict[str, Array]):
    """What was never written is not zero."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.threads = threads

    def __missing__(self, name: str) -> Array:
        if name[1] == "p":
            return np.ones(self.threads, bool)
        size = {"rs": 2, "rd": 8}.get(name.strip("%0123456789"), 4)
        return np.frombuffer(random.randbytes(size) * self.threads, f"u{size}")
