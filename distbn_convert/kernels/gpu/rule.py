"""Which kernel runs, with which tile: a static rule, so that nothing is tuned at run time.

Tuning at run time would repeat the update of the running statistics, stall the first steps and
break CUDA-graph capture. Kinds and tiles are what was fastest on an H100 among some two thousand
that were timed over ResNet-50's layers, of those that spill with neither Triton 3.8 nor 3.9.

Where a device has less L2, or less of it for each multiprocessor, the limits shrink in proportion.

Shares that do not fit in one program's registers are read twice by one program (``"loop"``, the
second time from L2), cut between programs in launches of their own (``"split"``), or read in one
launch whose programs wait for others: once, held in the registers of several (``"cooperative"``)
or, with the next one on its way, of all that run at once (``"pipelined"``); or twice, by several
that each take a piece (``"swept"``), or gathered and applied some slabs later (``"ticketed"``).

``ENABLED`` says which of the latter four may be chosen. What waits until a device has shown it
right, and faster than what it would replace (predicted, over the floor, for what was measured):

- ``"pipelined"``, 1.3 for 1.7;
- ``"swept"`` in the backward, for shares of which those of all loops at once are more than L2
  keeps, 1.25 for 1.33 to 1.44;
- ``"staged"``, loops of the backward that ask for the next tile before they use one, 1.2 to 1.3 for
  1.2 to 1.4, or 1.6 for 2 in channels_last.

``scripts/gpu_bench.py`` times all.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "ENABLED",
    "L2_BYTES",
    "MULTIPROCESSORS",
    "WAITING",
    "Choice",
    "power_of_two",
    "select_kernel",
]

# Kinds whose programs wait for others, and those of them that may be chosen; also "staged".
WAITING = frozenset({"cooperative", "pipelined", "swept", "ticketed"})
ENABLED = frozenset({"cooperative", "ticketed"})
# Of the GPU that the limits are for.
MULTIPROCESSORS, L2_BYTES = 132, 50 * 2**20

_MAX_WARPS = 16
# Of programs that keep few registers a thread.
_MANY_WARPS = 32
# Values of a share up to which it is held, in channels_last.
_HELD_ROWS = 512
# Values that a cooperative piece may have, fewest first; more are taken where a share would have
# more pieces than this.
_PIECE_TILES = (4096, 8192, 16384)
_FEW_PIECES = 16
# At most this part of the multiprocessors waits for one program; see :mod:`.cooperative`.
_WAITING_PART = 4
# Values; a multiple of what a thread and a cache line of memory hold.
_ALIGNMENT = 32
# Values of 16 bits that a thread moves at once.
_WORDS = 8
# Fewer programs than this leave multiprocessors idle, so that a share must be cut.
_ENOUGH_PROGRAMS = 256
# Bytes of a share, by those of a value, which a loop finds in L2 again; values in channels_last.
_LOOP_BYTES = {2: 420_000, 4: 300_000}
_LOOP_ROWS = 2048
# Values of a share up to which two loops fit on a multiprocessor.
_SMALL_LOOP = 2**15
# Bytes of a share above which L2 may lose some between the two sweeps of a loop, and the pieces
# that it is cut into then.
_SWEPT_BYTES, _SWEPT_PIECES = 210_000, 4
# Between the two visits of a ticketed kernel: L2 also holds what is written.
_TICKETED_BYTES = 14_000_000
# How many programs a launch that cuts shares aims at.
_SPLIT_PROGRAMS = 528
# Large shares are cut into more pieces than that takes: up to the first, each of the second's rows.
_SPLITS, _PIECE_ROWS = 33, 760
# Values of a share above which its blocks of channels are wide.
_LARGE_ROWS = 8192
# Pieces that a merge can hold.
_MAX_SPLITS = 128
# Programs of 4 warps that a ticketed kernel keeps busy.
_LIVE_PROGRAMS = 792
_MAX_DEPTH = 64
_LEAST_DEPTH = 16
# Fewer tiles than this in a piece do not pay for a ticket and an arrival.
_LEAST_TILES = 2
# Pipelined programs, of which a multiprocessor takes one; their warps; the values that a thread
# holds in all tensors, twice; slabs of a group, of which the first is waited for.
_PIPELINED, _PIPELINED_WARPS, _PIPELINED_VALUES, _LEAST_SLABS = 128, 8, 128, 4


class Choice(NamedTuple):
    """A kernel and its tile.

    Args:
        kind: ``"resident"``, ``"planes"``, ``"cooperative"``, ``"pipelined"``, ``"loop"``,
            ``"swept"``, ``"ticketed"`` or ``"split"``.
        rows: values of a channel in one tile, a power of two; of ``"planes"`` samples.
        channels: channels in one tile, a power of two; 1 where channels are not adjacent.
        warps: warps of a program.
        splits: pieces of a share; 1 where it is not cut.
        size: rows of a piece, 0 where shares are not cut; at most ``rows`` for ``"cooperative"``
            and ``"pipelined"``, whose pieces are one tile.
        depth: slabs between the two visits of a ``"ticketed"`` kernel, else 0.
        groups: of programs that share the slabs of a ``"pipelined"`` kernel, else 0.
        registers: the most of a thread, so that enough programs fit on a multiprocessor; 0 for no
            limit.
        stages: tiles of a loop of the backward that are in use or on their way: 1 where each is
            asked for when it is used, 2 where the next one is, into registers, more where they are
            copied to shared memory.
    """

    kind: str
    rows: int
    channels: int
    warps: int
    splits: int = 1
    size: int = 0
    depth: int = 0
    groups: int = 0
    registers: int = 0
    stages: int = 1


def select_kernel(
    *,
    backward: bool,
    channels_last: bool,
    itemsize: int,
    vector: int,
    channels: int,
    samples: int,
    values: int,
    vt_world_size: int,
    residual: bool = False,
    multiprocessors: int = MULTIPROCESSORS,
    l2_bytes: int = L2_BYTES,
) -> Choice:
    """Choose the kernel of a share.

    Args:
        backward: the pass.
        channels_last: whether channels are the fast axis.
        itemsize: bytes of a value of the input.
        vector: adjacent values that a thread can move at once.
        channels: C.
        samples: of the largest share, ``ceil(N / V)``.
        values: of one channel of it, ``samples * S``.
        vt_world_size: number of virtual ranks V.
        residual: whether one was added before the ReLU, which takes registers. Default: False
        multiprocessors: of the device, for programs that wait. Default: 132
        l2_bytes: of the device, for what is read twice. Default: 50 MiB
    """
    tensors = 2 if backward else 1
    kept = min(l2_bytes / L2_BYTES, 1.0)
    if channels_last:
        widths = _channel_widths(channels, itemsize)
        return (
            _resident_lanes(widths, values)
            or _loop_lanes(widths, values, itemsize, backward, residual, channels, vt_world_size)
            or _pipelined(
                widths, values, tensors, vector, residual, channels, vt_world_size, multiprocessors
            )
            or _ticketed(widths[2], values, itemsize, tensors, channels, vt_world_size, kept)
            or _split(widths[0], widths[1], values, itemsize, channels, vt_world_size)
        )
    held = _held_values(backward, residual, itemsize, vector)
    # Where a multiprocessor has less of L2 than an H100's, a share counts for more bytes of it.
    crowding = max(multiprocessors / MULTIPROCESSORS * L2_BYTES / l2_bytes, 1.0)
    share = values * itemsize * tensors * crowding
    return (
        (_planes(samples, values // samples, backward, channels, itemsize) if vector == 1 else None)
        or _resident(values, held, itemsize, vector, backward or residual)
        or _swept(
            _loop(values, share, itemsize, backward, residual, channels, vt_world_size),
            values,
            share,
            backward,
            multiprocessors,
        )
        or _cooperative(values, held, itemsize, vector, backward, residual, multiprocessors)
        or _ticketed(1, values, itemsize, tensors, channels, vt_world_size, kept)
        or _split(1, 1, values, itemsize, channels, vt_world_size)
    )


def _planes(
    samples: int, positions: int, backward: bool, channels: int, itemsize: int
) -> Choice | None:
    """Choose whole channels, if their tile is not mostly empty, or none."""
    # Channels that make small programs: 2 of 16 bits, 4 of 32.
    width = min(itemsize, power_of_two(channels))
    rows, columns = power_of_two(samples), power_of_two(width * positions)
    if rows * columns > 2 * samples * width * positions:
        return None
    warps = max(rows * columns // (32 * (32 if backward else 64)), 1)
    return Choice("planes", rows, width, warps) if warps <= _MAX_WARPS else None


def _resident(values: int, held: int, itemsize: int, vector: int, two: bool) -> Choice | None:
    """Choose a program that holds a channel of a share, or none.

    ``two`` is whether it moves two tensors at once.
    """
    rows = power_of_two(values)
    most = _MAX_WARPS
    if vector == 1:
        each = 8 if two else 64 // itemsize
    elif itemsize == 4 and not two:
        each, most = 32, _MANY_WARPS
    else:
        # What a program does once it does in every warp: few warps with many values take the
        # fewest instructions, more of them wait for memory together.
        each = held if rows > 32 * 32 * _MAX_WARPS else 32
    warps = max(rows // (32 * each), 1)
    if warps > most and rows <= 32 * held * most:
        warps = most
    return Choice("resident", rows, 1, warps) if warps <= most else None


def _resident_lanes(widths: list[int], values: int) -> Choice | None:
    """Choose a program that holds a block of channels of a share, or none."""
    if values > _HELD_ROWS:
        return None
    rows = power_of_two(values)
    width = next(width for width in widths if rows * width <= 32 * 32 * _MAX_WARPS)
    return Choice("resident", rows, width, min(max(rows * width // (32 * 32), 1), _MAX_WARPS))


def _loop(
    values: int,
    share: float,
    itemsize: int,
    backward: bool,
    residual: bool,
    channels: int,
    vt_world_size: int,
) -> Choice | None:
    """Choose a program for each share if those fill the device and stay in L2, or none."""
    if channels * vt_world_size < _ENOUGH_PROGRAMS or share > _LOOP_BYTES[itemsize]:
        return None
    stages = _stages(itemsize, backward, residual)
    each, warps = 8, _MANY_WARPS
    if itemsize == 2 and values <= _SMALL_LOOP:
        warps = _MAX_WARPS
    elif itemsize == 2 and stages == 1 and not (backward and residual):
        each = 16
    return Choice("loop", _tile(warps, 1, each), 1, warps, stages=stages)


def _loop_lanes(
    widths: list[int],
    values: int,
    itemsize: int,
    backward: bool,
    residual: bool,
    channels: int,
    vt_world_size: int,
) -> Choice | None:
    """Choose a program for each share of 128 bytes of channels, or of 64, or none."""
    wide, narrow = widths[1:3]
    slabs = -(-channels // wide) * vt_world_size
    width = wide if slabs >= _ENOUGH_PROGRAMS and not backward else narrow
    if values > _LOOP_ROWS or -(-channels // width) * vt_world_size < _ENOUGH_PROGRAMS // 2:
        return None
    stages = _stages(itemsize, backward, residual)
    each = 16 if itemsize == 2 and not backward else 8
    if stages > 1 or (itemsize == 4 and backward and residual):
        each = 4
    return Choice("loop", _tile(_MAX_WARPS, width, each), width, _MAX_WARPS, stages=stages)


def _swept(
    loop: Choice | None, values: int, share: float, backward: bool, multiprocessors: int
) -> Choice | None:
    """Choose pieces of what a loop would take, if L2 may lose it and they can wait; else that."""
    if loop is None or not backward or share <= _SWEPT_BYTES or "swept" not in ENABLED:
        return loop
    if multiprocessors // _WAITING_PART < _SWEPT_PIECES:
        return loop
    size = -(-values // (_SWEPT_PIECES * _ALIGNMENT)) * _ALIGNMENT
    splits, rows = -(-values // size), _tile(_MAX_WARPS, 1, 8)
    return Choice("swept", rows, 1, _MAX_WARPS, splits, size, stages=loop.stages)


def _stages(itemsize: int, backward: bool, residual: bool) -> int:
    """Return how many tiles a loop has in use or on their way."""
    spills = itemsize == 4 and residual
    return 2 if backward and "staged" in ENABLED and not spills else 1


def _cooperative(
    values: int,
    held: int,
    itemsize: int,
    vector: int,
    backward: bool,
    residual: bool,
    multiprocessors: int,
) -> Choice | None:
    """Choose pieces of which few enough make a share, or none.

    Small pieces leave less of their tiles empty; many of them wait for each other longer.
    """
    if "cooperative" not in ENABLED:
        return None
    most = multiprocessors // _WAITING_PART
    if itemsize == 4:
        held = 32  # of more, too few programs would fit on a multiprocessor to wait side by side
    for few in (min(_FEW_PIECES, most), most):
        for tile in _PIECE_TILES:
            warps = tile // (32 * held)
            size = -(-values // (-(-values // tile) * _ALIGNMENT)) * _ALIGNMENT
            splits = -(-values // size)
            if splits <= few and warps <= _MAX_WARPS:
                fits = itemsize == 4 and vector > 1 and not backward and not residual
                registers = 64 if fits else 0
                return Choice(
                    "cooperative",
                    power_of_two(size),
                    1,
                    warps,
                    splits,
                    size,
                    registers=registers,
                )
    return None


def _pipelined(
    widths: list[int],
    values: int,
    tensors: int,
    vector: int,
    residual: bool,
    channels: int,
    vt_world_size: int,
    multiprocessors: int,
) -> Choice | None:
    """Choose the widest slabs of 16-bit values that groups of programs hold, or none."""
    if "pipelined" not in ENABLED or vector < _WORDS or residual:
        return None
    if 2 * _PIPELINED * vt_world_size * channels >= 2**31:  # partial results past 32-bit offsets
        return None
    programs = min(multiprocessors, _PIPELINED)
    held = 32 * _PIPELINED_WARPS * _PIPELINED_VALUES // tensors
    for width in widths[1:]:
        slabs = -(-channels // width) * vt_world_size
        fits = programs // -(-values * width // held)
        groups = min(fits, slabs // _LEAST_SLABS)
        if groups > 0:
            groups = power_of_two(groups + 1) // 2
            size = -(-values // (programs // groups))
            splits, warps = -(-values // size), _PIPELINED_WARPS
            return Choice("pipelined", power_of_two(size), width, warps, splits, size, 0, groups)
    return None


def _ticketed(
    width: int,
    values: int,
    itemsize: int,
    tensors: int,
    channels: int,
    vt_world_size: int,
    kept: float,
) -> Choice | None:
    """Choose slabs of which enough stay in L2, or none.

    A slab is gathered ``2 * depth - 1`` phases before it is applied. ``kept`` is what L2 keeps
    until then, over what an H100's does.
    """
    if "ticketed" not in ENABLED:
        return None
    slab = values * width * itemsize * tensors
    slabs = -(-channels // width) * vt_world_size
    depth = min(int(kept * _TICKETED_BYTES / slab), _MAX_DEPTH, slabs)
    least = _LEAST_DEPTH if width > 1 else 2
    if depth < least or (width > 1 and slabs < _ENOUGH_PROGRAMS // 2):
        return None
    tile = _tile(4, width, 16 if itemsize == 2 else 8)
    wanted = min(-(-_LIVE_PROGRAMS // depth), _MAX_SPLITS)
    size = max(-(-values // (wanted * tile)), _LEAST_TILES) * tile
    return Choice("ticketed", tile, width, 4, -(-values // size), size, depth)


def _split(
    wide: int, narrow: int, values: int, itemsize: int, channels: int, vt_world_size: int
) -> Choice:
    """Cut shares so that their pieces fill the device; small ones take more blocks of channels."""
    width = wide if values > _LARGE_ROWS and channels >= 2 * wide else narrow
    programs = -(-channels // width) * vt_world_size
    wanted = max(-(-_SPLIT_PROGRAMS // programs), min(values // _PIECE_ROWS, _SPLITS))
    tile = _tile(4, width, 32 if itemsize == 2 else 16)
    size = -(-values // (min(wanted, _MAX_SPLITS) * tile)) * tile
    return Choice("split", tile, width, 4, -(-values // size), size)


def power_of_two(number: int) -> int:
    """Return the next power of two."""
    return 1 << (number - 1).bit_length()


def _held_values(backward: bool, residual: bool, itemsize: int, vector: int) -> int:
    """Return how many values a thread can hold without spilling.

    The backward holds that many of two tensors, and a forward that adds a residual nearly so;
    values that are moved one by one need registers for their addresses.
    """
    return 32 if backward or vector == 1 or (residual and itemsize == 4) else 64


def _channel_widths(channels: int, itemsize: int) -> list[int]:
    """Return channels that make 256, 128, 64 and 32 adjacent bytes; all there are if fewer."""
    every = power_of_two(channels)
    return [min(every, size // itemsize) for size in (256, 128, 64, 32)]


def _tile(warps: int, width: int, values: int) -> int:
    """Return the rows of a tile with that many values for each thread."""
    return max(warps * 32 * values // width, 1)
