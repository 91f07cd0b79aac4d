"""What the kernels of this folder share: addressing, and the end of every statistic, in Triton.

A program works on one rank's share of a block of channels, seen as a matrix
``[values, CHANNELS]``: row ``i * S + s`` is position ``s`` of the rank's ``i``-th sample.
Every kernel takes the same description of it:

* ``channels``, ``positions``: C and S.
* ``quotient``, ``remainder``, ``vt_world_size``: ``divmod(N, V)`` and V.
* ``ROWS``, ``CHANNELS``: the tile, powers of two.
* ``VECTOR``: values that are certainly adjacent and aligned along the fast axis.
* ``DIVISOR``: S as a constant where rows must be divided by it, so that it costs a
  multiplication; 0 where a rank's rows are one run of memory and nothing is divided.
* ``LAST``: channels are the fast axis. ``INTERLEAVED``: the partition.
* ``WIDE``: offsets within the share need 64 bits, which costs some 30 registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["finish", "load_affine", "locate", "merge_lanes", "place"]


@triton.jit
def locate(
    channels,
    positions,
    quotient,
    remainder,
    CHANNELS: tl.constexpr,
    LAST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Return this program's rank, its values, where its share starts, and its channels."""
    program = tl.program_id(0)
    if REVERSE:
        program = tl.num_programs(0) - 1 - program
    blocks = tl.cdiv(channels, CHANNELS)
    rank = (program // blocks).to(tl.int64)
    lanes = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    if INTERLEAVED:
        first = rank
    else:
        first = rank * quotient + tl.minimum(rank, remainder)
    values = (quotient + (rank < remainder).to(tl.int64)) * positions
    if not WIDE:
        values = values.to(tl.int32)
    start = first * channels * positions
    return rank, values, tl.multiple_of(start, VECTOR), lanes


@triton.jit
def place(
    row,
    stop,
    lanes,
    channels,
    vt_world_size,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    DIVISOR: tl.constexpr,
    LAST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return offsets and mask ``[ROWS, CHANNELS]`` of the tile that starts at ``row``."""
    rows = row + tl.arange(0, ROWS)
    mask = (rows < stop)[:, None] & (lanes < channels)[None, :]
    if WIDE:
        rows = rows.to(tl.int64)
        lanes = lanes.to(tl.int64)
    if DIVISOR == 0:
        offsets = (rows * channels)[:, None] + lanes[None, :]
    else:
        sample = rows // DIVISOR
        position = rows - sample * DIVISOR
        if INTERLEAVED:
            sample = sample * vt_world_size
        if LAST:
            offsets = ((sample * DIVISOR + position) * channels)[:, None] + lanes[None, :]
        else:
            offsets = (sample * channels * DIVISOR + position)[:, None]
            offsets = offsets + (lanes * DIVISOR)[None, :]
    if LAST:
        offsets = tl.multiple_of(tl.max_contiguous(offsets, (1, VECTOR)), (1, VECTOR))
        mask = tl.max_constancy(mask, (1, VECTOR))
    else:
        offsets = tl.multiple_of(tl.max_contiguous(offsets, (VECTOR, 1)), (VECTOR, 1))
        mask = tl.max_constancy(mask, (VECTOR, 1))
    return offsets, mask


@triton.jit
def merge_lanes(mean, m2, count):
    """Merge moments along axis 0 by the formula of Chan, Golub and LeVeque (1979).

    ``mean``, ``m2`` (sum of squared deviations) and ``count`` are ``[LANES, CHANNELS]``; the
    results are ``[CHANNELS]``. Plain sums, so the order is fixed.
    """
    total = tl.maximum(tl.sum(count, 0), 1.0)
    merged = tl.div_rn(tl.sum(mean * count, 0), total)
    deviation = mean - merged[None, :]
    return merged, tl.sum(m2 + count * deviation * deviation, 0)


@triton.jit
def finish(
    mean,
    m2,
    values,
    rank,
    lanes,
    channels,
    mean_out,
    rstd_out,
    running_mean,
    running_var,
    counts,
    momentum,
    eps,
):
    """Store a rank's mean and rstd ``[V, C]``, move its running statistics, return rstd."""
    mask = lanes < channels
    cell = rank * channels + lanes
    # div_rn and sqrt_rn round as IEEE does; the operators are approximate on the device.
    var = tl.div_rn(m2, tl.maximum(values, 1).to(tl.float32))
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    tl.store(mean_out + cell, mean, mask=mask)
    tl.store(rstd_out + cell, rstd, mask=mask)
    if running_mean is not None:
        # A rank with no samples keeps its statistics.
        mask = lanes < tl.where(values > 0, channels, 0)
        if momentum is None:
            factor = tl.div_rn(1.0, tl.load(counts + rank).to(tl.float32))
        else:
            factor = momentum
        unbiased = tl.div_rn(m2, tl.maximum(values - 1, 1).to(tl.float32))
        old = tl.load(running_mean + cell, mask=mask, other=0.0).to(tl.float32)
        new = old * (1 - factor) + mean * factor
        tl.store(running_mean + cell, new.to(running_mean.dtype.element_ty), mask=mask)
        old = tl.load(running_var + cell, mask=mask, other=0.0).to(tl.float32)
        new = old * (1 - factor) + unbiased * factor
        tl.store(running_var + cell, new.to(running_var.dtype.element_ty), mask=mask)
    return rstd


@triton.jit
def load_affine(weight, bias, rstd, lanes, channels):
    """Return ``rstd * weight`` and ``bias`` of the program's channels."""
    valid = lanes < channels
    scale = rstd
    shift = tl.zeros_like(rstd)
    if weight is not None:
        scale = rstd * tl.load(weight + lanes, mask=valid, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + lanes, mask=valid, other=0.0).to(tl.float32)
    return scale, shift
