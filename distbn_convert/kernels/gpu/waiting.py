"""How programs of one launch wait for each other, in :mod:`.ticketed`, :mod:`.cooperative`,
:mod:`.swept` and :mod:`.pipelined`.

A *slab*, one rank's share of a block of channels, is cut into ``splits`` pieces. Programs take
tickets, and a ticket's number says which piece its program works on: pieces are thereby dealt in
the order in which programs start, and the order of ``program_id`` is not relied upon. (Those of
:mod:`.pipelined` all run at once and need none.)

Why what is read is what was written: ``sync`` holds the number of tickets taken, then one counter
for each slab.

1. A program stores the partial results of its piece; ``debug_barrier`` orders the stores of all its
   threads before the one thread that counts the piece as stored (``release``, gpu scope).
2. A program that needs them all reads the counter, as it counts its own or while it waits
   (``acquire``), until all have been counted, which acquires what they released. A barrier
   orders the loads of all its threads behind that. It merges the partial results in the order
   of the pieces, whoever it is, so that the bits repeat.
3. What it stores for others in turn it counts likewise. Release and acquire are cumulative, so
   that those who wait for that count also see what the first programs stored (``grad_residual``).

An acquire is what invalidates L1 (``CCTL.IVALL`` in the machine code); the few numbers that other
programs have stored are loaded past it in any case (``.cg``).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["announce", "arrive", "await_count", "counter_of", "take_ticket"]


@triton.jit
def take_ticket(sync):
    """Return how many programs of this launch have started before."""
    # No order is needed beyond that of this one counter.
    return tl.atomic_add(sync, 1, sem="relaxed")


@triton.jit
def counter_of(sync, slab):
    """Return where what has been stored for a slab is counted."""
    return sync + 1 + slab


@triton.jit
def arrive(counter):
    """Count that what this program has for others is stored; return how many did so before."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


@triton.jit
def announce(counter):
    """Count that what this program has for others is stored, without a look at others'."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def await_count(counter, count):
    """Wait until that many have been counted, and return how many."""
    counted = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while counted < count:
        counted = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    return counted
