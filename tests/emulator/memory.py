"""Memory, and the order that is certain between those who use it.

Every access must lie in a tensor that the launch was given, aligned to its size. It must also be
ordered after what it depends on: two warps that touch the same bytes, at least one of them to
write, need a barrier of their program between them, or a chain of release and acquire. That is
checked with vector clocks (Fidge 1988, Mattern 1989), whatever order the programs happen to run
in, so that a race shows although nothing went wrong this time.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["SHARED_BASE", "AsyncCopies", "GlobalMemory", "Order", "SharedMemory"]

Array = Any
SHARED_BASE = 1024
_SHARED_BYTES = 232_448
# Bytes that clocks tell apart, and that a device moves to and from memory.
_GRAIN = 2
_SECTOR = 32


class Order:
    """What each warp of a launch knows of what the others have done."""

    def __init__(self, warps: int) -> None:
        self.clocks = np.eye(warps, dtype=np.int32)
        self.released: dict[int, Array] = {}

    def join(self, warps: slice) -> None:
        """A barrier: each knows what all of them know."""
        self.clocks[warps] = self.clocks[warps].max(0)
        each = np.arange(warps.start, warps.stop)
        self.clocks[each, each] += 1

    def release(self, warp: int, address: int) -> None:
        known = self.released.get(address, self.clocks[warp])
        self.released[address] = np.maximum(known, self.clocks[warp])
        self.clocks[warp, warp] += 1

    def acquire(self, warp: int, address: int) -> None:
        known = self.released.get(address, self.clocks[warp])
        self.clocks[warp] = np.maximum(self.clocks[warp], known)

    def knows(self, warps: Array, others: Array, times: Array) -> Array:
        """Whether what the others did at those times is before what the warps do now."""
        return (others < 0) | (others == warps) | (self.clocks[warps, others] >= times)


class GlobalMemory:
    """The tensors of a launch.

    Attributes:
        sectors: by a tensor's address, the 32-byte sectors that its ``"ld"`` and ``"st"`` move.
    """

    def __init__(self, tensors: list[Tensor], order: Order, warps: int) -> None:
        self.order, self.warps = order, warps
        # By address, so that one given twice is there once.
        bytes_by_address = {tensor.data_ptr(): _bytes_of(tensor) for tensor in tensors}
        self.bases = np.array(sorted(bytes_by_address), np.int64)
        self.bytes = [bytes_by_address[base] for base in self.bases.tolist()]
        self.sectors = {base: {"ld": 0, "st": 0} for base in self.bases.tolist()}
        grains = [len(data) // _GRAIN + 1 for data in self.bytes]
        # Warp and time of the last write and of the last read of each grain, and a bit for each
        # warp of that reader's program which read it.
        self.written = [np.full((2, size), -1, np.int32) for size in grains]
        self.seen = [np.full((2, size), -1, np.int32) for size in grains]
        self.readers = [np.zeros(size, np.int64) for size in grains]

    def load(
        self, warps: Array, addresses: Array, mask: Array, size: int, count: int, atomic: bool
    ) -> Array:
        """Return ``count`` numbers for each thread, as bits; what is masked is garbage."""
        values = np.full((len(mask), count), 0xAA, f"u{size}")
        if not mask.any():
            return values
        which, data, items = self._find(addresses[mask], size, count)
        values[mask] = data[items]
        if not atomic:
            warps, grains = self._touch(warps[mask], which, items * size, size, "ld")
            self._check(warps, grains, self.written[which], "a read races with a write")
            bits = self.readers[which]
            bits[grains[~self._same_program(self.seen[which], warps, grains)]] = 0
            np.bitwise_or.at(bits, grains, 1 << warps % self.warps)
            self._note(self.seen[which], warps, grains)
        return values

    def store(
        self, warps: Array, addresses: Array, mask: Array, values: Array, atomic: bool
    ) -> None:
        """Write each thread's numbers, given as bits."""
        if not mask.any():
            return
        size = values.dtype.itemsize
        which, data, items = self._find(addresses[mask], size, values.shape[1])
        data[items] = values[mask]
        if not atomic:
            _check_written(data[items], values[mask])
            warps, grains = self._touch(warps[mask], which, items * size, size, "st")
            self._check(warps, grains, self.written[which], "two writes race")
            # Where all warps of a program read what one of them writes, the others' is not used.
            alike = self._same_program(self.seen[which], warps, grains)
            alike &= (self.readers[which][grains] >> warps % self.warps) & 1 == 1
            self._check(
                warps[~alike], grains[~alike], self.seen[which], "a write races with a read"
            )
            self._note(self.written[which], warps, grains)

    def _find(self, addresses: Array, size: int, count: int) -> tuple[int, Array, Array]:
        """Return the tensor that all these lie in, its numbers, and which of them."""
        which = int(np.searchsorted(self.bases, addresses[0], side="right")) - 1
        places, data = addresses - self.bases[which], self.bytes[which]
        inside = (places >= 0) & (places + size * count <= len(data))
        if which < 0 or not inside.all():
            raise IndexError(f"{(~inside).sum()} threads access memory outside their tensor")
        if (addresses % (size * count)).any():
            raise IndexError(f"an access of {size * count} bytes is not aligned")
        items = places[:, None] // size + np.arange(count)
        return which, data[: len(data) // size * size].view(f"u{size}"), items

    def _touch(
        self, warps: Array, which: int, places: Array, size: int, kind: str
    ) -> tuple[Array, Array]:
        """Count sectors; return the warps and grains of an access."""
        warps = np.broadcast_to(warps[:, None], places.shape)
        moved = np.unique(warps * 2**40 + places // _SECTOR)
        self.sectors[int(self.bases[which])][kind] += len(moved)
        steps = np.arange(max(size // _GRAIN, 1))
        grains = places[..., None] // _GRAIN + steps
        return np.broadcast_to(warps[..., None], grains.shape), grains

    def _check(self, warps: Array, grains: Array, past: Array, what: str) -> None:
        if not self.order.knows(warps, past[0, grains], past[1, grains]).all():
            raise RuntimeError(f"{what} of another warp")

    def _note(self, past: Array, warps: Array, grains: Array) -> None:
        past[0, grains] = warps
        past[1, grains] = self.order.clocks[warps, warps]

    def _same_program(self, past: Array, warps: Array, grains: Array) -> Array:
        return past[0, grains] // self.warps == warps // self.warps


def _bytes_of(tensor: Tensor) -> Array:
    """The bytes of a dense tensor from its first value on, shared with it."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy()


def _check_written(found: Array, written: Array) -> None:
    """Threads may write to one place in one instruction only if they write the same."""
    if (found != written).any():
        raise RuntimeError("two writes of one instruction race")


class SharedMemory:
    """A program's own memory, where a barrier alone orders one warp after another."""

    def __init__(self) -> None:
        self.bytes = np.frombuffer(bytearray(random.randbytes(_SHARED_BYTES)), np.uint8)
        self.epoch = 0
        # The epoch of the last write and its warp; of the last reads and their warps' bits.
        self.written = np.full((2, _SHARED_BYTES), -1, np.int64)
        self.seen = np.full((2, _SHARED_BYTES), -1, np.int64)

    def load(
        self, warps: Array, addresses: Array, mask: Array, size: int, count: int, atomic: bool
    ) -> Array:
        """See :meth:`GlobalMemory.load`."""
        values = np.full((len(mask), count), 0xAA, f"u{size}")
        items, cells, bits = self._find(warps, addresses, mask, size, count)
        self._check_past(cells, bits, "a read of shared memory races with a write")
        self.seen[1, cells[self.seen[0, cells] < self.epoch]] = 0
        self.seen[0, cells] = self.epoch
        np.bitwise_or.at(self.seen[1], cells, bits)
        values[mask] = self.bytes.view(f"u{size}")[items]
        return values

    def store(
        self, warps: Array, addresses: Array, mask: Array, values: Array, atomic: bool
    ) -> None:
        """See :meth:`GlobalMemory.store`."""
        size, count = values.dtype.itemsize, values.shape[1]
        items, cells, bits = self._find(warps, addresses, mask, size, count)
        self._check_past(cells, bits, "two writes of shared memory race")
        seen, readers = self.seen[:, cells]
        if ((seen == self.epoch) & (readers & ~bits != 0)).any():
            raise RuntimeError("a write of shared memory races with a read")
        self.written[0, cells] = self.epoch
        self.written[1, cells] = bits
        numbers = self.bytes.view(f"u{size}")
        numbers[items] = values[mask]
        _check_written(numbers[items], values[mask])

    def _find(
        self, warps: Array, addresses: Array, mask: Array, size: int, count: int
    ) -> tuple[Array, Array, Array]:
        """Return which numbers, which bytes, and the bit of the warp for each of these."""
        places = addresses[mask] - SHARED_BASE
        if not ((places >= 0) & (places + size * count <= _SHARED_BYTES)).all():
            raise IndexError("threads access memory outside shared memory")
        if (places % (size * count)).any():
            raise IndexError("an access of shared memory is not aligned")
        cells = places[:, None] + np.arange(size * count)
        bits = 1 << (warps[mask] - warps[0])
        items = places[:, None] // size + np.arange(count)
        return items, cells, np.broadcast_to(bits[:, None], cells.shape)

    def _check_past(self, cells: Array, bits: Array, what: str) -> None:
        epoch, writer = self.written[:, cells]
        if ((epoch == self.epoch) & (writer != bits)).any():
            raise RuntimeError(what)


class AsyncCopies:
    """What a program has asked to be copied to its shared memory, in groups.

    Its threads may use a copy once they have waited for its group. Until then garbage is in its
    place, where others may neither read nor write.
    """

    def __init__(self, shared: SharedMemory) -> None:
        self.shared = shared
        self.begun: list[tuple[Array, ...]] = []
        self.groups: list[list[tuple[Array, ...]]] = []

    def begin(self, warps: Array, addresses: Array, mask: Array, values: Array) -> None:
        garbage = np.frombuffer(random.randbytes(values.nbytes), values.dtype)
        self.shared.store(warps, addresses, mask, garbage.reshape(values.shape), False)
        self.begun.append((warps, addresses, mask, values))

    def commit(self) -> None:
        self.groups.append(self.begun)
        self.begun = []

    def wait(self, most: int) -> None:
        """Until at most so many groups, the last ones, are on their way."""
        while len(self.groups) > most:
            for copy in self.groups.pop(0):
                self.shared.store(*copy, False)
