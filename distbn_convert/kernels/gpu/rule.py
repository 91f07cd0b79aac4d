"""Which kernel runs, with which tile: a static rule, so that nothing is tuned at run time.

Tuning at run time would repeat the update of the running statistics, stall the first steps and
break CUDA-graph capture. The limits below come from compiling for sm_90 (registers, no spills);
the byte limits are estimates for a GPU with 132 multiprocessors and 50 MB of L2.

Shares that do not fit in one program's registers can be read twice or thrice in kernels whose
programs do not wait (``"loop"``, ``"split"``), or in one launch whose programs wait for others:
held in the registers of several (``"cooperative"``), read once, or, in channels_last, gathered and
applied some slabs later (``"ticketed"``), the second time from L2. By bytes the latter two win:
forward and backward move 2 and 3 tensors, where the others move up to 3 and 5, on half to three
quarters of ResNet-50's bytes. ``ENABLED`` says which of the two may be chosen.
``scripts/gpu_bench.py`` times all.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ENABLED", "MULTIPROCESSORS", "WAITING", "Choice", "select_kernel"]

# Kinds whose programs wait for others, and those of them that may be chosen.
WAITING = frozenset({"cooperative", "ticketed"})
ENABLED = WAITING
# Of the GPU that the limits are for.
MULTIPROCESSORS = 132

_MAX_WARPS = 16
# A program that holds the values of twice these warps has a multiprocessor to itself, so that
# nothing is moved there while it makes its sums.
_HELD_WARPS = 8
# Values of a cooperative piece, and of how many it takes larger ones.
_PIECE_TILES = (4096, 8192, 16384)
_FEW_PIECES = 16
# At most this part of the multiprocessors waits for one program; see :mod:`.cooperative`.
_WAITING_PART = 4
# Values; a multiple of what a thread and a cache line of memory hold.
_ALIGNMENT = 32
# Fewer programs than this leave multiprocessors idle, so that a share must be cut.
_ENOUGH_PROGRAMS = 256
# Shares that are live at once should stay in L2 for the second sweep of a loop (132 programs of
# 32 warps, or 264 of 16), or between the two visits of a ticketed kernel.
_L2_BYTES = 26_500_000
# How many programs a launch that cuts shares aims at, and the most pieces that a merge holds.
_SPLIT_PROGRAMS = 1056
_MAX_SPLITS = 128
# Programs of 8 warps that a device holds at once: two or three on each multiprocessor.
_LIVE_PROGRAMS = 396
_MAX_DEPTH = 16
# Fewer tiles than this in a piece do not pay for a ticket and an arrival.
_LEAST_TILES = 4


class Choice(NamedTuple):
    """A kernel and its tile.

    Args:
        kind: ``"resident"``, ``"cooperative"``, ``"loop"``, ``"ticketed"`` or ``"split"``.
        rows: values of a channel in one tile, a power of two.
        channels: channels in one tile, a power of two; 1 where channels are not adjacent.
        warps: warps of a program.
        splits: pieces of a share; 1 where it is not cut.
        size: rows of a piece, 0 where shares are not cut; a multiple of ``rows``, or at most that
            for ``"cooperative"``, whose pieces are one tile.
        depth: slabs between the two visits of a ``"ticketed"`` kernel, else 0.
        registers: the most of a thread, so that enough programs fit on a multiprocessor; 0 for no
            limit.
    """

    kind: str
    rows: int
    channels: int
    warps: int
    splits: int = 1
    size: int = 0
    depth: int = 0
    registers: int = 0


def select_kernel(
    *,
    backward: bool,
    channels_last: bool,
    itemsize: int,
    vector: int,
    channels: int,
    values: int,
    vt_world_size: int,
    residual: bool = False,
    multiprocessors: int = MULTIPROCESSORS,
) -> Choice:
    """Choose the kernel of a share.

    Args:
        backward: the pass.
        channels_last: whether channels are the fast axis.
        itemsize: bytes of a value of the input.
        vector: adjacent values that a thread can move at once.
        channels: C.
        values: values of one channel of the largest share, ``ceil(N / V) * S``.
        vt_world_size: number of virtual ranks V.
        residual: whether one was added before the ReLU, which takes registers. Default: False
        multiprocessors: of the device, for programs that wait. Default: 132
    """
    rows = _power_of_two(values)
    widths = _channel_widths(channels, itemsize) if channels_last else [1]
    held = _resident_values(backward, residual, channels_last, itemsize, vector)
    # Where others can take the larger shares, two programs or more fit on a multiprocessor.
    warps = _HELD_WARPS if ENABLED and not channels_last else _MAX_WARPS
    for width in widths:
        if rows * width <= held * 32 * warps:
            # What a program does once it does in every warp, so that few warps with many values
            # take the fewest instructions. Values moved one by one take registers for addresses.
            each = 32
            if vector == 1:
                each = 8 if backward else 64 // itemsize
            return Choice("resident", rows, width, _resident_warps(rows * width // each))
    loop = _loop(widths, values, itemsize, backward, channels_last, channels, vt_world_size)
    ticketed = _ticketed(widths, values, itemsize, backward, channels, vt_world_size)
    if channels_last:
        return loop or ticketed or _split(widths[0], values, itemsize, channels, vt_world_size)
    cooperative = _cooperative(values, held, itemsize, vector, backward, residual, multiprocessors)
    return cooperative or ticketed or loop or _split(1, values, itemsize, channels, vt_world_size)


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
    for few in (min(_FEW_PIECES, most), most):
        for tile in _PIECE_TILES:
            warps = tile // (32 * held)
            size = -(-values // (-(-values // tile) * _ALIGNMENT)) * _ALIGNMENT
            splits = -(-values // size)
            if splits <= few and warps <= _HELD_WARPS:
                registers = _registers(backward or residual, held, itemsize, vector)
                return Choice(
                    "cooperative", _power_of_two(size), 1, warps, splits, size, 0, registers
                )
    return None


def _registers(two: bool, held: int, itemsize: int, vector: int) -> int:
    """Return the most registers of a thread of a cooperative kernel that do not spill.

    ``two`` is whether it moves two tensors at once.
    """
    if held > 32 or vector == 1 or (two and itemsize == 4):
        return 128
    return 80 if two else 64


def _ticketed(
    widths: list[int],
    values: int,
    itemsize: int,
    backward: bool,
    channels: int,
    vt_world_size: int,
) -> Choice | None:
    """Choose the widest slabs of which at least two stay in L2, or none.

    A slab is gathered ``2 * depth - 1`` phases before it is applied; half as many pieces again as
    fill the device in that time keep the wait from being felt. Slabs of one channel are small, so
    that it takes more of them.
    """
    if "ticketed" not in ENABLED:
        return None
    for width in widths:
        slab = values * width * itemsize * (2 if backward else 1)
        slabs = -(-channels // width) * vt_world_size
        depth = min(_L2_BYTES // slab, _MAX_DEPTH if width > 1 else 4 * _MAX_DEPTH, slabs)
        if depth < 2 or 1 < width < min(64 // itemsize, channels):
            continue
        tile = _piece_tile(width, itemsize)
        wanted = min(-(-3 * _LIVE_PROGRAMS // (4 * depth - 2)), _MAX_SPLITS)
        size = max(-(-values // (wanted * tile)), _LEAST_TILES) * tile
        # Three programs on a multiprocessor, or two where that would spill.
        registers = 128 if backward and width > 1 and itemsize == 2 else 80
        splits = -(-values // size)
        return Choice("ticketed", tile, width, 8, splits, size, depth, registers)
    return None


def _loop(
    widths: list[int],
    values: int,
    itemsize: int,
    backward: bool,
    channels_last: bool,
    channels: int,
    vt_world_size: int,
) -> Choice | None:
    """Choose a program for each share if those fill the device, or none.

    In channels_last only if their shares stay in L2, as others there find theirs in it.
    """
    width = widths[-1] if len(widths) < 3 else widths[1]
    if -(-channels // width) * vt_world_size < _ENOUGH_PROGRAMS:
        return None
    share = values * width * itemsize * (2 if backward else 1)
    if channels_last:
        return Choice("loop", _tile(16, width, 16), width, 16) if _fits_l2(share, 1) else None
    warps = 16 if _fits_l2(share, 2) else 32
    return Choice("loop", _tile(warps, width, 8), width, warps)


def _split(width: int, values: int, itemsize: int, channels: int, vt_world_size: int) -> Choice:
    """Cut shares so that their pieces fill the device."""
    programs = -(-channels // width) * vt_world_size
    wanted = min(-(-_SPLIT_PROGRAMS // programs), _MAX_SPLITS)
    tile = _piece_tile(width, itemsize)
    size = -(-values // (wanted * tile)) * tile
    return Choice("split", tile, width, 8, -(-values // size), size)


def _power_of_two(number: int) -> int:
    """Return the next power of two."""
    return 1 << (number - 1).bit_length()


def _resident_values(
    backward: bool, residual: bool, channels_last: bool, itemsize: int, vector: int
) -> int:
    """Return how many values a thread can hold without spilling.

    The backward holds that many of two tensors, and a forward that adds a residual nearly so;
    values that are moved one by one, or along channels, need registers for their addresses.
    """
    narrow = channels_last or itemsize == 4
    if backward or vector == 1 or (channels_last and itemsize == 4) or (residual and narrow):
        return 32
    return 64


def _channel_widths(channels: int, itemsize: int) -> list[int]:
    """Return channels that make 128, 64 and 32 adjacent bytes; all there are if fewer."""
    every = _power_of_two(channels)
    return sorted({min(every, size // itemsize) for size in (128, 64, 32)}, reverse=True)


def _resident_warps(threads: int) -> int:
    """Return the warps of as many threads, or what there may be."""
    return min(max(threads // 32, 1), _MAX_WARPS)


def _fits_l2(share: int, programs: int) -> bool:
    """Say whether shares stay in L2 with that many programs on each multiprocessor."""
    return share * MULTIPROCESSORS * programs <= _L2_BYTES


def _piece_tile(width: int, itemsize: int) -> int:
    """Return the rows of a tile of the kernels that cut shares, which have 8 warps."""
    return _tile(8, width, 16 if itemsize == 2 else 8)


def _tile(warps: int, width: int, values: int) -> int:
    """Return the rows of a tile with that many values for each thread."""
    return max(warps * 32 * values // width, 1)
