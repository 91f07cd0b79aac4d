"""What the kernels of this folder share: addressing, and the end of every statistic, in Triton.

A program works on one rank's share of a block of channels, seen as a matrix
``[values, CHANNELS]``: row ``i * S + s`` is position ``s`` of the rank's ``i``-th sample.
Every kernel takes the same description of it: ``channels``, ``positions``, ``quotient``,
``remainder`` and ``vt_world_size`` are C, S, ``divmod(N, V)`` and V, which may change from call
to call without compiling again (in a tuple they could not: Triton specialises its members), and
``TILE`` is a :class:`Tile`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = [
    "Affine",
    "Block",
    "Statistics",
    "Tile",
    "corrections",
    "count_batch",
    "differentiate",
    "divide",
    "finish",
    "lane_offset",
    "load_parameters",
    "load_row",
    "load_running",
    "load_saved",
    "locate",
    "make_affine",
    "make_tile",
    "merge_lanes",
    "multiply",
    "place",
    "positions_of",
    "reciprocal",
    "rectify",
    "row_offset",
    "rstd_of",
    "store_sums",
    "sum_products",
    "transform",
]


@dataclass(frozen=True, eq=False)
class Tile:
    """What a kernel is compiled for; each a ``tl.constexpr``. Made by :func:`make_tile`.

    Compared by identity, which is what Triton looks its compiled kernels up with at every call.

    Args:
        ROWS: values of a channel in one tile, a power of two.
        CHANNELS: channels in one tile, a power of two.
        VECTOR: values that are certainly adjacent and aligned along the fast axis.
        DIVISOR: S as a constant where rows must be divided by it, so that it costs a
            multiplication; -1 where the kernel is for every S; 0 where a rank's rows are one run of
            memory and nothing is divided.
        LAST: channels are the fast axis.
        INTERLEAVED: the partition.
        WIDE: offsets within the share need 64 bits, which costs some 30 registers.
        RELU: the forward ends in a ReLU; the backward masks the upstream gradient with the
            output's sign, which it computes from the input.
        DENSE: each thread has two rows or more of a tile.
        COLUMNS: positions of all the channels of a tile whose rows are samples, a power of two;
            0 for other tiles.
        STAGES: see :class:`.rule.Choice`.
    """

    ROWS: Any
    CHANNELS: Any
    VECTOR: Any
    DIVISOR: Any
    LAST: Any
    INTERLEAVED: Any
    WIDE: Any
    RELU: Any
    DENSE: Any
    COLUMNS: Any
    STAGES: Any


@cache
def make_tile(
    rows: int,
    channels: int,
    vector: int,
    divisor: int,
    last: bool,
    interleaved: bool,
    wide: bool,
    relu: bool,
    dense: bool,
    columns: int = 0,
    stages: int = 1,
) -> Tile:
    """Return the one tile with these members."""
    # Each a constexpr of its own: Triton 3.6 takes no attribute of a constant for one.
    members = rows, channels, vector, divisor, last, interleaved, wide, relu, dense, columns
    return Tile(*map(tl.constexpr, (*members, stages)))


class Statistics(NamedTuple):
    """Where the statistics go, and how the running ones move.

    Args:
        mean: ``Tensor[V, C]``, float32.
        rstd: ``Tensor[V, C]``, float32.
        running_mean: ``Tensor[V, C]`` or None.
        running_var: ``Tensor[V, C]`` or None.
        counts: ``int64 Tensor[V]`` or None; with this batch if ``momentum`` is None, else without
            it, and incremented.
        momentum: float or None.
        eps: added to the variance.
    """

    mean: Any
    rstd: Any
    running_mean: Any
    running_var: Any
    counts: Any
    momentum: float | None
    eps: float


class Block(NamedTuple):
    """One rank's share of a block of channels, on the device.

    ``total`` is its number of rows, ``start`` the offset of its first value, ``lanes`` are its
    channels ``[CHANNELS]``, ``valid`` which of them there are, ``cells`` their places in a
    ``[V, C]``.
    """

    rank: Any
    total: Any
    start: Any
    lanes: Any
    valid: Any
    cells: Any
    channels: Any
    positions: Any
    vt_world_size: Any


class Affine(NamedTuple):
    """``(x - mean) * scale + shift``, each ``[CHANNELS]``, on the device."""

    mean: Any
    scale: Any
    shift: Any


@triton.jit
def divide(number, by):
    """Return the quotient of two int32 that are not negative, in a third fewer instructions."""
    return (tl.cast(number, tl.uint32) // by.to(tl.uint32)).to(tl.int32)


@triton.jit
def positions_of(block, TILE: tl.constexpr):
    """Return S, as a constant where the kernel is for one."""
    positions = TILE.DIVISOR
    if TILE.DIVISOR < 0:
        positions = block.positions
    return positions


@triton.jit
def sample_of(rows, block, TILE: tl.constexpr):
    """Return the samples that rows lie in, of those of the share."""
    if TILE.DIVISOR > 0:
        sample = rows // TILE.DIVISOR
    elif TILE.WIDE:
        sample = (tl.cast(rows, tl.uint64) // block.positions.to(tl.uint64)).to(tl.int64)
    else:
        sample = divide(rows, block.positions)
    return sample


@triton.jit
def locate(program, channels, positions, quotient, remainder, vt_world_size, TILE: tl.constexpr):
    """Return the block of that program."""
    blocks = tl.cdiv(channels, TILE.CHANNELS)
    rank = divide(program, blocks)
    lanes = (program - rank * blocks) * TILE.CHANNELS + tl.arange(0, TILE.CHANNELS)
    rank = rank.to(tl.int64)
    if TILE.INTERLEAVED:
        first = rank
    else:
        first = rank * quotient + tl.minimum(rank, remainder)
    total = (quotient + (rank < remainder).to(tl.int64)) * positions
    if not TILE.WIDE:
        total = total.to(tl.int32)
    start = tl.multiple_of(first * channels * positions, TILE.VECTOR)
    cells = rank * channels + lanes
    valid = lanes < channels
    return Block(rank, total, start, lanes, valid, cells, channels, positions, vt_world_size)


@triton.jit
def row_offset(rows, block, TILE: tl.constexpr):
    """Return the offset of one or more rows from ``block.start``, in the width of ``rows``."""
    channels = block.channels
    if TILE.DIVISOR == 0:
        offset = rows * channels
    else:
        sample, positions = sample_of(rows, block, TILE), positions_of(block, TILE)
        position = rows - sample * positions
        if TILE.INTERLEAVED:
            sample = sample * block.vt_world_size
        if TILE.LAST:
            offset = (sample * positions + position) * channels
        else:
            offset = sample * channels * positions + position
    return offset


@triton.jit
def lane_offset(block, TILE: tl.constexpr):
    """Return the offsets of the channels within a row ``[CHANNELS]``."""
    lanes = block.lanes
    if TILE.WIDE:
        lanes = lanes.to(tl.int64)
    if not TILE.LAST:
        lanes = lanes * positions_of(block, TILE)
    return lanes


@triton.jit
def place(row, stop, block, TILE: tl.constexpr):
    """Return offsets from ``block.start``, and mask, ``[ROWS, CHANNELS]``, of a tile."""
    rows = row + tl.arange(0, TILE.ROWS)
    mask = (rows < stop)[:, None] & block.valid[None, :]
    if TILE.WIDE:
        rows = rows.to(tl.int64)
    offsets = row_offset(rows, block, TILE)[:, None] + lane_offset(block, TILE)[None, :]
    # Such hints stay only with what is computed in the same function.
    if TILE.LAST:
        offsets = tl.multiple_of(tl.max_contiguous(offsets, (1, TILE.VECTOR)), (1, TILE.VECTOR))
        mask = tl.max_constancy(mask, (1, TILE.VECTOR))
    else:
        offsets = tl.multiple_of(tl.max_contiguous(offsets, (TILE.VECTOR, 1)), (TILE.VECTOR, 1))
        mask = tl.max_constancy(mask, (TILE.VECTOR, 1))
    return offsets, mask


@triton.jit
def reciprocal(count):
    """Return ``1 / count`` of a float32, rounded as IEEE does or one unit off.

    An approximation and one step of Newton's: IEEE's division branches, which keeps what is
    around it from being interleaved, and here takes some 12 instructions for each channel.
    """
    approximate = 1.0 / count
    return tl.fma(approximate, tl.fma(-count, approximate, 1.0), approximate)


@triton.jit
def inverse_root(value):
    """Return ``1 / sqrt(value)`` of a float32 likewise; of zero, infinity."""
    # The approximation takes what is too small for full precision for zero.
    small = value < 2.0**-100
    value = tl.where(small, value * 2.0**100, value)
    approximate = tl.rsqrt(value)
    error = tl.fma(-(value * approximate), approximate, 1.0)
    refined = tl.fma(0.5 * approximate, error, approximate)
    root = tl.where(refined == refined, refined, approximate)
    return tl.where(small, root * 2.0**50, root)


@triton.jit
def merge_lanes(mean, m2, count, total):
    """Merge moments along axis 0 by the formula of Chan, Golub and LeVeque (1979).

    ``mean`` and ``m2`` (sum of squared deviations) are ``[LANES, CHANNELS]`` of ``count``
    ``[LANES]`` values, together ``total``; the results are ``[CHANNELS]``. Plain sums, so the
    order is fixed.
    """
    # Rounded before they are summed. Threads that exchange two products would each fuse their own
    # into the sum, and go on with different bits.
    weighted = tl.fma(mean, count[:, None], tl.zeros_like(mean))
    merged = tl.sum(weighted, 0) * reciprocal(tl.maximum(total, 1.0))
    deviation = mean - merged[None, :]
    return merged, tl.sum(m2 + count[:, None] * deviation * deviation, 0)


@triton.jit
def rstd_of(m2, block, statistics):
    """Return a rank's ``1 / sqrt(var + eps)``."""
    var = m2 * reciprocal(tl.maximum(block.total, 1).to(tl.float32))
    return inverse_root(var + statistics.eps)


@triton.jit
def load_running(statistics, block):
    """Return the running mean and variance ``[CHANNELS]`` in float32; zeros if there are none.

    Counts the batch too, so that no register is held for that until the end.
    """
    mean = tl.zeros_like(block.lanes).to(tl.float32)
    var = mean
    if statistics.running_mean is not None:
        mean = tl.load(statistics.running_mean + block.cells, mask=block.valid, other=0.0)
        var = tl.load(statistics.running_var + block.cells, mask=block.valid, other=0.0)
        if statistics.momentum is not None:
            count_batch(statistics.counts, block)
    return mean.to(tl.float32), var.to(tl.float32)


@triton.jit
def finish(mean, m2, rstd, running, block, statistics):
    """Store a rank's mean and rstd, and its running statistics, which were ``running``.

    Those are loaded long before, so that nothing waits for them here.
    """
    tl.store(statistics.mean + block.cells, mean, mask=block.valid)
    tl.store(statistics.rstd + block.cells, rstd, mask=block.valid)
    if statistics.running_mean is not None:
        if statistics.momentum is None:
            factor = tl.div_rn(1.0, tl.load(statistics.counts + block.rank).to(tl.float32))
        else:
            factor = statistics.momentum
        unbiased = m2 * reciprocal(tl.maximum(block.total - 1, 1).to(tl.float32))
        old_mean, old_var = running
        store_average(statistics.running_mean, old_mean, mean, factor, block)
        store_average(statistics.running_var, old_var, unbiased, factor, block)


@triton.jit
def count_batch(counts, block):
    """Increment the counter of a rank that has samples, once: with its first channels."""
    if counts is not None:
        # A store of what was loaded would wait for it; a mask of one number costs a register.
        counted = block.lanes < tl.where(block.total > 0, 1, 0)
        tl.atomic_add(counts + block.rank + block.lanes, 1, mask=counted, sem="relaxed")


@triton.jit
def store_average(rows, old, batch, factor, block):
    """Move a rank's row from ``old`` towards ``batch``; a rank with no samples keeps it."""
    mask = block.lanes < tl.where(block.total > 0, block.channels, 0)
    new = old * (1 - factor) + batch * factor
    tl.store(rows + block.cells, new.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def load_row(rows, block):
    """Return the block's channels ``[CHANNELS]`` of a float32 ``[V, C]``.

    From L2 (``.cg``): where another program of the same launch wrote them, L1 may be stale.
    """
    return tl.load(rows + block.cells, mask=block.valid, other=0.0, cache_modifier=".cg")


@triton.jit
def load_parameters(weight, bias, block):
    """Return weight and bias ``[CHANNELS]`` in float32; one and zero where there is none."""
    gamma = tl.full(block.lanes.shape, 1.0, tl.float32)
    beta = tl.zeros_like(gamma)
    if weight is not None:
        gamma = tl.load(weight + block.lanes, mask=block.valid, other=0.0).to(tl.float32)
    if bias is not None:
        beta = tl.load(bias + block.lanes, mask=block.valid, other=0.0).to(tl.float32)
    return gamma, beta


@triton.jit
def make_affine(parameters, mean, rstd):
    """Return what turns the block's input into its output."""
    gamma, beta = parameters
    return Affine(mean, rstd * gamma, beta)


@triton.jit
def load_saved(weight, bias, mean, rstd, block):
    """Return :func:`make_affine` of what the forward saved, and rstd ``[CHANNELS]``."""
    rows = load_row(rstd, block)
    parameters = load_parameters(weight, bias, block)
    return make_affine(parameters, load_row(mean, block), rows), rows


@triton.jit
def store_sums(sum_dy_out, sum_dy_x_out, sum_dy, sum_dy_x, block):
    """Store a rank's shares of dbias and dweight."""
    tl.store(sum_dy_out + block.cells, sum_dy, mask=block.valid)
    tl.store(sum_dy_x_out + block.cells, sum_dy_x, mask=block.valid)


@triton.jit
def corrections(sum_dy, sum_dy_x, rstd, block):
    """Return what is taken from ``dy``, and how much of ``x - mean``, to make ``dx / scale``."""
    part = reciprocal(tl.maximum(block.total, 1).to(tl.float32))
    return sum_dy * part, sum_dy_x * part * rstd


@triton.jit
def transform(value, affine):
    """Return the output ``[ROWS, CHANNELS]`` in float32, before residual and ReLU.

    The multiplication is fused by name, not at the compiler's discretion: the backward
    computes the sign of the output again and must find the forward's bits.
    """
    centred = value.to(tl.float32) - affine.mean[None, :]
    return tl.fma(centred, affine.scale[None, :], affine.shift[None, :])


@triton.jit
def differentiate(value, grad, affine, mean_dy, slope):
    """Return ``(grad - mean_dy - (value - mean) * slope) * scale`` in two multiplications."""
    centred = value.to(tl.float32) - affine.mean[None, :]
    level, steepness = -mean_dy * affine.scale, -slope * affine.scale
    rest = tl.fma(centred, steepness[None, :], level[None, :])
    return tl.fma(grad.to(tl.float32), affine.scale[None, :], rest)


@triton.jit
def multiply(left, right, TILE: tl.constexpr):
    """Return ``left * right``, which is summed along axis 0 next.

    A thread that has one product alone would fuse it into the sum with its neighbour's, each its
    own, and go on with other bits than that; so that is rounded before.
    """
    if TILE.DENSE:
        product = left * right
    else:
        product = tl.fma(left, right, tl.zeros_like(left))
    return product


@triton.jit
def sum_products(left, right, TILE: tl.constexpr):
    """Return ``tl.sum(left * right, 0)``."""
    return tl.sum(multiply(left, right, TILE), 0)


@triton.jit
def rectify(grad, output):
    """Return ``grad`` where ReLU lets it through: as torch does, also where output is NaN."""
    return tl.where(output.to(tl.float32) <= 0.0, tl.zeros_like(grad), grad)
