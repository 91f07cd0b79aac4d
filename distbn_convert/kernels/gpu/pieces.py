"""A share cut into pieces: their rows, what each hands in, and how that is merged, in Triton.

For every kernel that gives a share to more than one program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import divide, merge_lanes
from .waiting import announce, await_count, counter_of, take_ticket

__all__ = [
    "exchange_partials",
    "merge_pieces",
    "piece_of",
    "store_partials",
    "store_totals",
    "sum_pieces",
    "sum_ranks",
    "take_piece",
]


# Rows that are summed at a time: a tile of more would take too many registers.
_RANKS = tl.constexpr(16)


@triton.jit
def take_piece(sync, splits):
    """Return a slab and which of its pieces."""
    ticket = take_ticket(sync)
    slab = divide(ticket, splits)
    return slab, ticket - slab * splits


@triton.jit
def piece_of(split, size, block):
    """Return the rows of a piece of the share."""
    begin = tl.minimum(split.to(block.total.dtype) * size, block.total)
    return begin, tl.minimum(begin + size, block.total)


@triton.jit
def store_partials(partials, first, second, split, block):
    """Store two numbers for each of the piece's channels in ``[splits, 2, V, C]``."""
    cells = block.vt_world_size.to(tl.int64) * block.channels
    partials += split * 2 * cells + block.cells
    tl.store(partials, first, mask=block.valid)
    tl.store(partials + cells, second, mask=block.valid)


@triton.jit
def exchange_partials(partials, first, second, sync, slab, splits, split, block):
    """Store this piece's results, wait for all others'; return how many there are."""
    store_partials(partials, first, second, split, block)
    counter = counter_of(sync, slab)
    announce(counter)
    return await_count(counter, splits)


@triton.jit
def load_partials(partials, which: tl.constexpr, splits, block, SPLITS: tl.constexpr):
    """Return the first or second number of all pieces ``[SPLITS, CHANNELS]``, zeros behind them.

    From L2 (``.cg``), where the programs of the same launch that wrote them can be seen.
    """
    split = tl.arange(0, SPLITS)
    mask = (split < splits)[:, None] & block.valid[None, :]
    cells = block.vt_world_size.to(tl.int64) * block.channels
    offsets = (split[:, None] * 2 + which) * cells + block.cells[None, :]
    return tl.load(partials + offsets, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def merge_pieces(partials, splits, size, block, SPLITS: tl.constexpr):
    """Return mean and sum of squared deviations of a share, its pieces in a fixed order."""
    # One kind of number after the other: together they cost a program its registers.
    within = tl.sum(load_partials(partials, 1, splits, block, SPLITS), 0)
    mean = load_partials(partials, 0, splits, block, SPLITS)
    split = tl.arange(0, SPLITS).to(block.total.dtype)
    count = tl.minimum(tl.maximum(block.total - split * size, 0), size).to(tl.float32)
    mean, between = merge_lanes(mean, tl.zeros_like(mean), count, block.total.to(tl.float32))
    return mean, within + between


@triton.jit
def sum_pieces(partials, splits, block, SPLITS: tl.constexpr):
    """Return both sums of a share, its pieces in a fixed order."""
    first = tl.sum(load_partials(partials, 0, splits, block, SPLITS), 0)
    return first, tl.sum(load_partials(partials, 1, splits, block, SPLITS), 0)


@triton.jit
def store_totals(sum_dy, sum_dy_x, dbias, dweight, lanes, channels, vt_world_size):
    """Store the sums over ranks of dbias's and dweight's shares of channels, in fixed order."""
    valid = lanes < channels
    total = tl.zeros_like(lanes).to(tl.float32)
    total_x = total
    for first in range(0, vt_world_size, _RANKS):
        ranks = first + tl.arange(0, _RANKS)
        cells = ranks[:, None] * channels + lanes[None, :]
        mask = (ranks < vt_world_size)[:, None] & valid[None, :]
        share = tl.load(sum_dy + cells, mask=mask, other=0.0)
        share_x = tl.load(sum_dy_x + cells, mask=mask, other=0.0)
        total += tl.sum(share, 0)
        total_x += tl.sum(share_x, 0)
    tl.store(dbias + lanes, total, mask=valid)
    tl.store(dweight + lanes, total_x, mask=valid)


@triton.jit(do_not_specialize=["vt_world_size"])
def sum_ranks(
    sum_dy,  # [V, C] float32: each rank's share of dbias
    sum_dy_x,  # [V, C] float32: and of dweight
    dbias,  # [C] float32
    dweight,  # [C] float32
    channels,
    vt_world_size,
    CHANNELS: tl.constexpr,
):
    """Sum the ranks' shares, for kernels that have no later launch to do it."""
    lanes = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    store_totals(sum_dy, sum_dy_x, dbias, dweight, lanes, channels, vt_world_size)
