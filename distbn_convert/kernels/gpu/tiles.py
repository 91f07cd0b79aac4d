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
    "finish",
    "lane_offset",
    "load_affine",
    "load_row",
    "load_saved",
    "locate",
    "make_tile",
    "merge_lanes",
    "place",
    "rectify",
    "row_offset",
    "rstd_of",
    "store_sums",
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
            multiplication; 0 where a rank's rows are one run of memory and nothing is divided.
        LAST: channels are the fast axis.
        INTERLEAVED: the partition.
        WIDE: offsets within the share need 64 bits, which costs some 30 registers.
        RELU: the forward ends in a ReLU; the backward masks the upstream gradient with the
            output's sign, which it computes from the input.
    """

    ROWS: Any
    CHANNELS: Any
    VECTOR: Any
    DIVISOR: Any
    LAST: Any
    INTERLEAVED: Any
    WIDE: Any
    RELU: Any


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
) -> Tile:
    """Return the one tile with these members."""
    # Each a constexpr of its own: Triton 3.6 takes no attribute of a constant for one.
    members = rows, channels, vector, divisor, last, interleaved, wide, relu
    return Tile(*map(tl.constexpr, members))


class Statistics(NamedTuple):
    """Where the statistics go, and how the running ones move.

    Args:
        mean: ``Tensor[V, C]``, float32.
        rstd: ``Tensor[V, C]``, float32.
        running_mean: ``Tensor[V, C]`` or None.
        running_var: ``Tensor[V, C]`` or None.
        counts: ``int64 Tensor[V]``, read if ``momentum`` is None.
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
    vt_world_size: Any


class Affine(NamedTuple):
    """``(x - mean) * scale + shift``, each ``[CHANNELS]``, on the device."""

    mean: Any
    scale: Any
    shift: Any


@triton.jit
def locate(program, channels, positions, quotient, remainder, vt_world_size, TILE: tl.constexpr):
    """Return the block of that program."""
    blocks = tl.cdiv(channels, TILE.CHANNELS)
    rank = (program // blocks).to(tl.int64)
    lanes = program % blocks * TILE.CHANNELS + tl.arange(0, TILE.CHANNELS)
    if TILE.INTERLEAVED:
        first = rank
    else:
        first = rank * quotient + tl.minimum(rank, remainder)
    total = (quotient + (rank < remainder).to(tl.int64)) * positions
    if not TILE.WIDE:
        total = total.to(tl.int32)
    start = tl.multiple_of(first * channels * positions, TILE.VECTOR)
    cells = rank * channels + lanes
    return Block(rank, total, start, lanes, lanes < channels, cells, channels, vt_world_size)


@triton.jit
def row_offset(rows, block, TILE: tl.constexpr):
    """Return the offset of one or more rows from ``block.start``, in the width of ``rows``."""
    channels = block.channels
    if TILE.DIVISOR == 0:
        offset = rows * channels
    else:
        sample = rows // TILE.DIVISOR
        position = rows - sample * TILE.DIVISOR
        if TILE.INTERLEAVED:
            sample = sample * block.vt_world_size
        if TILE.LAST:
            offset = (sample * TILE.DIVISOR + position) * channels
        else:
            offset = sample * channels * TILE.DIVISOR + position
    return offset


@triton.jit
def lane_offset(block, TILE: tl.constexpr):
    """Return the offsets of the channels within a row ``[CHANNELS]``."""
    lanes = block.lanes
    if TILE.WIDE:
        lanes = lanes.to(tl.int64)
    if not TILE.LAST:
        lanes = lanes * TILE.DIVISOR
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
def merge_lanes(mean, m2, count):
    """Merge moments along axis 0 by the formula of Chan, Golub and LeVeque (1979).

    ``mean``, ``m2`` (sum of squared deviations) and ``count`` are ``[LANES, CHANNELS]``; the
    results are ``[CHANNELS]``. Plain sums, so the order is fixed.
    """
    total = tl.maximum(tl.sum(count, 0), 1.0)
    # Rounded before they are summed. Threads that exchange two products would each fuse their own
    # into the sum, and go on with different bits.
    weighted = tl.fma(mean, count, tl.zeros_like(mean))
    merged = tl.div_rn(tl.sum(weighted, 0), total)
    deviation = mean - merged[None, :]
    return merged, tl.sum(m2 + count * deviation * deviation, 0)


@triton.jit
def rstd_of(m2, block, statistics):
    """Return a rank's ``1 / sqrt(var + eps)``."""
    # div_rn and sqrt_rn round as IEEE does; the operators are approximate on the device.
    var = tl.div_rn(m2, tl.maximum(block.total, 1).to(tl.float32))
    return tl.div_rn(1.0, tl.sqrt_rn(var + statistics.eps))


@triton.jit
def finish(mean, m2, block, statistics):
    """Store a rank's mean and rstd, move its running statistics, return rstd."""
    rstd = rstd_of(m2, block, statistics)
    tl.store(statistics.mean + block.cells, mean, mask=block.valid)
    tl.store(statistics.rstd + block.cells, rstd, mask=block.valid)
    if statistics.running_mean is not None:
        if statistics.momentum is None:
            factor = tl.div_rn(1.0, tl.load(statistics.counts + block.rank).to(tl.float32))
        else:
            factor = statistics.momentum
        unbiased = tl.div_rn(m2, tl.maximum(block.total - 1, 1).to(tl.float32))
        average_into(statistics.running_mean, mean, factor, block)
        average_into(statistics.running_var, unbiased, factor, block)
    return rstd


@triton.jit
def average_into(running, batch, factor, block):
    """Move a rank's row of ``running`` towards ``batch``; a rank with no samples keeps it."""
    mask = block.lanes < tl.where(block.total > 0, block.channels, 0)
    old = tl.load(running + block.cells, mask=mask, other=0.0).to(tl.float32)
    new = old * (1 - factor) + batch * factor
    tl.store(running + block.cells, new.to(running.dtype.element_ty), mask=mask)


@triton.jit
def load_row(rows, block):
    """Return the block's channels ``[CHANNELS]`` of a float32 ``[V, C]``.

    From L2 (``.cg``): where another program of the same launch wrote them, L1 may be stale.
    """
    return tl.load(rows + block.cells, mask=block.valid, other=0.0, cache_modifier=".cg")


@triton.jit
def load_affine(weight, bias, mean, rstd, block):
    """Return what turns the block's input into its output."""
    scale = rstd
    shift = tl.zeros_like(rstd)
    if weight is not None:
        gamma = tl.load(weight + block.lanes, mask=block.valid, other=0.0)
        scale = rstd * gamma.to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + block.lanes, mask=block.valid, other=0.0).to(tl.float32)
    return Affine(mean, scale, shift)


@triton.jit
def load_saved(weight, bias, mean, rstd, block):
    """Return :func:`load_affine` of what the forward saved, and rstd ``[CHANNELS]``."""
    rows = load_row(rstd, block)
    return load_affine(weight, bias, load_row(mean, block), rows, block), rows


@triton.jit
def store_sums(sum_dy_out, sum_dy_x_out, sum_dy, sum_dy_x, block):
    """Store a rank's shares of dbias and dweight."""
    tl.store(sum_dy_out + block.cells, sum_dy, mask=block.valid)
    tl.store(sum_dy_x_out + block.cells, sum_dy_x, mask=block.valid)


@triton.jit
def corrections(sum_dy, sum_dy_x, rstd, block):
    """Return what is taken from ``dy``, and how much of ``x - mean``, to make ``dx / scale``."""
    count = tl.maximum(block.total, 1).to(tl.float32)
    return tl.div_rn(sum_dy, count), tl.div_rn(sum_dy_x, count) * rstd


@triton.jit
def transform(value, affine):
    """Return the output ``[ROWS, CHANNELS]`` in float32, before residual and ReLU.

    The multiplication is fused by name, not at the compiler's discretion: the backward
    computes the sign of the output again and must find the forward's bits.
    """
    centred = value.to(tl.float32) - affine.mean[None, :]
    return tl.fma(centred, affine.scale[None, :], affine.shift[None, :])


@triton.jit
def rectify(grad, output):
    """Return ``grad`` where ReLU lets it through: as torch does, also where output is NaN."""
    return tl.where(output.to(tl.float32) <= 0.0, tl.zeros_like(grad), grad)
