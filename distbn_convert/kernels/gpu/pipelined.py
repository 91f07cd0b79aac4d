"""Kernels whose programs stay, and hold a slab in registers while the next one is on its way.

For channels_last inputs of 16 bits, whose shares few programs cannot hold: there are as many
programs as the device can run at once, in groups of ``splits``. A group takes every ``groups``-th
slab, one rank's share of a block of channels; each of its programs holds one piece, hands in its
partial results, *asks for its piece of the next slab*, waits for the partial results of the others,
merges them all, and finishes its piece from registers. So nothing is read twice, and memory is busy
while programs wait: those of :mod:`.cooperative` leave that to others on their multiprocessor, for
which such large pieces have no room.

Two tiles fit in registers because they are kept as they lie in memory: two channels in a word.

Why no program waits forever: it waits for programs of its own launch, all of which run at once
(``launch_cooperative_grid``: the device starts all of them or none, and an error says if it never
could), and for what each of them does before it waits for that slab itself. See :mod:`.waiting` for
the order of memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .held import normalize_tile
from .pieces import piece_of
from .tiles import (
    Affine,
    corrections,
    divide,
    finish,
    load_parameters,
    load_row,
    load_running,
    load_saved,
    locate,
    make_affine,
    multiply,
    place,
    reciprocal,
    rectify,
    row_offset,
    rstd_of,
    store_sums,
    transform,
)
from .waiting import announce, await_count, counter_of

__all__ = ["pipelined_backward", "pipelined_forward"]

_WORD = tl.constexpr(tl.pointer_type(tl.int32))


@triton.jit
def take_part(splits):
    """Return a program's group, how many groups there are, and which of the pieces is its own."""
    group = divide(tl.program_id(0), splits)
    return group, divide(tl.num_programs(0), splits), tl.program_id(0) - group * splits


@triton.jit
def first_lane(slab, block, TILE: tl.constexpr):
    """Return a slab's first channel."""
    blocks = tl.cdiv(block.channels, TILE.CHANNELS)
    return (slab - block.rank.to(tl.int32) * blocks) * TILE.CHANNELS


@triton.jit
def word_lanes(slab, block, TILE: tl.constexpr):
    """Return the offsets of a slab's words within a row, and which of them there are."""
    lanes = first_lane(slab, block, TILE) // 2 + tl.arange(0, TILE.CHANNELS // 2)
    return lanes, 2 * lanes < block.channels


@triton.jit
def load_words(x, slab, begin, stop, block, TILE: tl.constexpr):
    """Return rows as they lie in memory, ``[ROWS, CHANNELS / 2]`` of two channels each."""
    rows = begin + tl.arange(0, TILE.ROWS)
    lanes, valid = word_lanes(slab, block, TILE)
    mask = (rows < stop)[:, None] & valid[None, :]
    if TILE.WIDE:
        rows, lanes = rows.to(tl.int64), lanes.to(tl.int64)
    offsets = (row_offset(rows, block, TILE) >> 1)[:, None] + lanes[None, :]
    words: tl.constexpr = TILE.VECTOR // 2
    offsets = tl.multiple_of(tl.max_contiguous(offsets, (1, words)), (1, words))
    mask = tl.max_constancy(mask, (1, words))
    x = (x + block.start).to(_WORD)
    return tl.load(x + offsets, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def load_first(x, slab, stop, block, TILE: tl.constexpr):
    """Return a slab's first row, if it has any, ``[CHANNELS / 2]`` words."""
    lanes, valid = word_lanes(slab, block, TILE)
    valid &= tl.zeros_like(lanes) < stop  # no scalar, of which the interpreter makes no mask
    return tl.load((x + block.start).to(_WORD) + lanes, mask=valid, other=0)


@triton.jit
def widen(words, dtype: tl.constexpr):
    """Return the channels of words in float32, along the last axis."""
    if dtype == tl.bfloat16:  # the upper half of a float32
        even = (words << 16).to(tl.float32, bitcast=True)
        odd = (words & -65536).to(tl.float32, bitcast=True)
    else:
        even = words.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        odd = (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return tl.interleave(even, odd)


@triton.jit
def sum_pairs(first, second):
    """Return the sums along axis 0 of two tiles ``[ROWS, CHANNELS]``, side by side."""
    # Of both at once: threads exchange what they have summed, and wait for each other, once.
    return tl.sum(tl.join(first, second), 0)


@triton.jit
def store_pairs(partials, pairs, split, block):
    """Store two numbers for each of a piece's channels ``[CHANNELS, 2]``."""
    partials += split * 2 * block.vt_world_size.to(tl.int64) * block.channels
    offsets = block.cells[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(partials + offsets, pairs, mask=block.valid[:, None])


@triton.jit
def merge_pairs(partials, splits, slab, block, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Return both sums of a share ``[CHANNELS]``, its pieces in a fixed order."""
    split = tl.arange(0, SPLITS)
    lanes = first_lane(slab, block, TILE) * 2 + tl.arange(0, TILE.CHANNELS * 2)
    lanes = tl.multiple_of(tl.max_contiguous(lanes, 4), 4)
    mask = (split < splits)[:, None] & (lanes < 2 * block.channels)[None, :]
    partials += block.rank * block.channels * 2
    offsets = (split * (block.vt_world_size * block.channels * 2))[:, None] + lanes[None, :]
    pairs = tl.load(partials + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    return tl.split(tl.reshape(tl.sum(pairs, 0), (TILE.CHANNELS, 2)))


@triton.jit
def wait_for_scale(affine, zero):
    """Return ``affine`` unchanged, whose mean is not there before its scale is.

    ``zero`` is a scalar that is, though the compiler cannot know.
    """
    bits = affine.mean.to(tl.int32, bitcast=True) | (affine.scale.to(tl.int32, bitcast=True) & zero)
    return Affine(bits.to(tl.float32, bitcast=True), affine.scale, affine.shift)


@triton.jit
def next_rows(slab, slabs, split, size, block):
    """Return the rows of a piece; none behind the last slab."""
    begin, stop = piece_of(split, size, block)
    return begin, tl.where(slab < slabs, stop, 0)


@triton.jit(
    do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size", "splits"]
)
def pipelined_forward(
    x,  # [N, C, S], channels_last, 16 bits, C even
    y,  # as x
    weight,  # [C] or None
    bias,  # [C] or None
    residual,  # None
    statistics,
    partials,  # [splits, V, C, 2] float32: sums of differences from a value, and of their squares
    sync,  # [1 + slabs] int32, zero: unused, arrivals at each slab
    size,  # rows of a piece, at most TILE.ROWS
    splits,
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Normalise; sums are around a share's first value, as those of :mod:`.loop`."""
    dtype: tl.constexpr = x.dtype.element_ty
    first, groups, split = take_part(splits)
    slabs = tl.cdiv(channels, TILE.CHANNELS) * vt_world_size
    block = locate(first, channels, positions, quotient, remainder, vt_world_size, TILE)
    begin, stop = next_rows(first, slabs, split, size, block)
    words = load_words(x, first, begin, stop, block, TILE)
    pivot = load_first(x, first, stop, block, TILE)
    for slab in range(first, slabs, groups):
        block = locate(slab, channels, positions, quotient, remainder, vt_world_size, TILE)
        begin, stop = piece_of(split, size, block)
        around = widen(pivot, dtype)
        present = (begin + tl.arange(0, TILE.ROWS) < stop)[:, None]
        deviation = tl.where(present, widen(words, dtype) - around[None, :], 0.0)
        pairs = sum_pairs(deviation, multiply(deviation, deviation, TILE))
        store_pairs(partials, pairs, split, block)
        counter = counter_of(sync, slab)
        announce(counter)
        then = slab + groups
        following = locate(then, channels, positions, quotient, remainder, vt_world_size, TILE)
        next_begin, next_stop = next_rows(then, slabs, split, size, following)
        ahead = load_words(x, then, next_begin, next_stop, following, TILE)
        pivot = load_first(x, then, next_stop, following, TILE)
        # To the compiler it may be another number, so that it does not keep what it has widened.
        zero = await_count(counter, splits) >> 30
        parameters = load_parameters(weight, bias, block)
        shift, squares = merge_pairs(partials, splits, slab, block, SPLITS, TILE)
        part = reciprocal(tl.maximum(block.total, 1).to(tl.float32))
        m2 = tl.maximum(squares - shift * shift * part, 0.0, propagate_nan=tl.PropagateNan.ALL)
        mean, rstd = around + shift * part, rstd_of(m2, block, statistics)
        affine = make_affine(parameters, mean, rstd)
        tile = widen(words | zero, dtype)
        normalize_tile(tile, y, residual, affine, begin + zero, stop + zero, block, TILE)
        if split == 0:
            finish(mean, m2, rstd, load_running(statistics, block), block, statistics)
        words = ahead


@triton.jit(
    do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size", "splits"]
)
def pipelined_backward(
    x,  # [N, C, S], channels_last, 16 bits, C even
    dy,  # as x
    output,  # None
    dx,  # as x
    grad_residual,  # None
    weight,  # [C] or None
    bias,  # [C] or None, read for TILE.RELU
    mean_in,  # [V, C] float32
    rstd_in,  # [V, C] float32
    sum_dy_out,  # [V, C] float32: each rank's share of dbias
    sum_dy_x_out,  # [V, C] float32: and of dweight
    partials,  # [splits, V, C, 2] float32: the two sums of each piece
    sync,  # [1 + slabs] int32, zero: unused, arrivals at each slab
    size,  # rows of a piece, at most TILE.ROWS
    splits,
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Differentiate."""
    dtype: tl.constexpr = x.dtype.element_ty
    first, groups, split = take_part(splits)
    slabs = tl.cdiv(channels, TILE.CHANNELS) * vt_world_size
    block = locate(first, channels, positions, quotient, remainder, vt_world_size, TILE)
    begin, stop = next_rows(first, slabs, split, size, block)
    words = load_words(x, first, begin, stop, block, TILE)
    grad_words = load_words(dy, first, begin, stop, block, TILE)
    for slab in range(first, slabs, groups):
        block = locate(slab, channels, positions, quotient, remainder, vt_world_size, TILE)
        begin, stop = piece_of(split, size, block)
        # A thread waits for loads in few groups: what it still waits for when it asks for the next
        # slab would be of that one's, so that it is waited for here, or loaded after.
        affine, _ = load_saved(weight, bias, mean_in, rstd_in, block)
        if not TILE.RELU:  # which waits for it anyway
            affine = wait_for_scale(affine, size >> 30)
        tile, grad = widen(words, dtype), widen(grad_words, dtype)
        if TILE.RELU:
            grad = rectify(grad, transform(tile, affine).to(dtype))
        pairs = sum_pairs(grad, multiply(grad, tile - affine.mean[None, :], TILE))
        store_pairs(partials, pairs, split, block)
        counter = counter_of(sync, slab)
        announce(counter)
        then = slab + groups
        following = locate(then, channels, positions, quotient, remainder, vt_world_size, TILE)
        next_begin, next_stop = next_rows(then, slabs, split, size, following)
        ahead = load_words(x, then, next_begin, next_stop, following, TILE)
        grads_ahead = load_words(dy, then, next_begin, next_stop, following, TILE)
        zero = await_count(counter, splits) >> 30
        rstd = load_row(rstd_in, block)
        sum_dy, sum_dy_x = merge_pairs(partials, splits, slab, block, SPLITS, TILE)
        sum_dy_x *= rstd
        if split == 0:
            store_sums(sum_dy_out, sum_dy_x_out, sum_dy, sum_dy_x, block)
        mean_dy, slope = corrections(sum_dy, sum_dy_x, rstd, block)
        tile, grad = widen(words | zero, dtype), widen(grad_words | zero, dtype)
        if TILE.RELU:
            grad = rectify(grad, transform(tile, affine).to(dtype))
        rest = tl.fma(tile - affine.mean[None, :], -slope[None, :], grad - mean_dy[None, :])
        out = (rest * affine.scale[None, :]).to(dtype)
        offsets, mask = place(begin + zero, stop + zero, block, TILE)
        tl.store(dx + block.start + offsets, out, mask=mask)
        words, grad_words = ahead, grads_ahead
