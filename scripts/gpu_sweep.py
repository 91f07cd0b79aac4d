"""Time every kernel and tile that a layer might take: what ``rule.py`` is chosen by.

``PYTHONPATH=. python scripts/gpu_sweep.py RESULTS.json``, on a GPU machine: for each of ResNet-50's
layers, passes, layouts and dtypes, N=256, V=8, some hundred candidates, compiled on all cores first
(minutes). Each must give what the rule's choice gives, to rounding. The fastest is printed beside
the rule's choice; all are kept. ``--only contiguous backward`` leaves out what is not both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gpu_bench
import torch
from gpu_bench import DTYPES, LAYOUTS
from outputs import check_file
from torch import Tensor

from distbn_convert.kernels.gpu import launch
from distbn_convert.kernels.gpu.launch import Share
from distbn_convert.kernels.gpu.rule import Choice, power_of_two
from tests.dispatched import nothing_launched

FORMATS = [("contiguous", "bf16"), ("contiguous", "fp32"), ("channels_last", "bf16")]
PASSES = "forward", "backward"
# Bytes between the two visits of a ticketed kernel, and pieces that a split makes.
DEPTH_BYTES, PIECES = (5e6, 9e6, 14e6, 20e6), (264, 528, 1056, 2112)
# Of shared memory, for tiles on their way.
STAGED_BYTES = 192 * 1024
ROUNDING = {torch.bfloat16: 2e-2, torch.float32: 2e-5}


class Layer(NamedTuple):
    """One pass of one layer."""

    layout: str
    dtype: str
    channels: int
    side: int
    backward: bool

    def share(self) -> Share:
        last, itemsize = self.layout == "channels_last", DTYPES[self.dtype].itemsize
        positions = self.side * self.side
        batch = gpu_bench.SAMPLES, self.channels, positions, gpu_bench.RANKS
        device = torch.device(gpu_bench.DEVICE)
        return Share(*batch, False, last, itemsize, *launch.resources_of(device))


def layers(only: Sequence[str] = ()) -> Iterator[Layer]:
    for (layout, dtype), (channels, side) in itertools.product(FORMATS, gpu_bench.LAYERS):
        for backward in (False, True):
            if {*only} <= {layout, dtype, PASSES[backward]}:
                yield Layer(layout, dtype, channels, side, backward)


def candidates(layer: Layer) -> list[Choice]:
    """Ways to run a pass, the rule's first."""
    share = layer.share()
    find = find_channels_last if share.last else find_contiguous
    return list(dict.fromkeys([share.choose(layer.backward), *find(share, layer.backward)]))


def find_contiguous(share: Share, backward: bool) -> Iterator[Choice]:
    rows, samples = power_of_two(share.values), power_of_two(share.samples // share.vt_world_size)
    held = (16, 32) if backward and share.itemsize == 4 else (16, 32, 64)
    for warps, tile in tiles((1, 2, 4, 8, 16, 32), held):
        if tile == rows:
            yield Choice("resident", rows, 1, warps)
        for width in (1, 2, 4, 8):
            columns = power_of_two(width * share.positions)
            if tile == samples * columns and columns <= 1024:
                yield Choice("planes", samples, width, warps)
    for warps, tile in tiles((8, 16, 32), (8, 16)):
        if tile < share.values:
            yield from staged(Choice("loop", tile, 1, warps), share, backward)
            for pieces in (2, 4, 8) if backward and share.values > 8 * tile else ():
                size = -(-share.values // (pieces * 32)) * 32
                splits = -(-share.values // size)
                for stages in (1, 2):
                    yield Choice("swept", tile, 1, warps, splits, size, stages=stages)
    for warps, tile in tiles((2, 4, 8, 16), (32,) if share.itemsize == 4 else (32, 64)):
        size = -(-share.values // (-(-share.values // tile) * 32)) * 32
        splits = -(-share.values // size)
        # More could wait for some that never start.
        if 1 < splits <= share.multiprocessors // 4:
            for most in (0, 80 if backward else 64):
                yield Choice("cooperative", power_of_two(size), 1, warps, splits, size, 0, most)


def find_channels_last(share: Share, backward: bool) -> Iterator[Choice]:
    values, each = share.values, (8, 16, 32) if share.itemsize == 2 else (8, 16)
    if share.itemsize == 2:
        yield from find_pipelined(share, backward)
    widths = [width for width in (16, 32, 64, 128) if width <= share.channels]
    for width, (warps, tile) in itertools.product(widths, tiles((8, 16, 32), (4, *each))):
        if tile // width < values and values * width <= 2**21:
            yield from staged(Choice("loop", tile // width, width, warps), share, backward)
    for width, (warps, tile) in itertools.product(widths, tiles((4, 8), each)):
        rows, slabs = tile // width, share.slabs(width)
        for pieces in PIECES:
            size = -(-values // (min(-(-pieces // slabs), 128) * rows)) * rows
            yield Choice("split", rows, width, warps, -(-values // size), size)
        slab = values * width * share.itemsize * (2 if backward else 1)
        for depth in {min(int(most / slab), slabs) for most in DEPTH_BYTES} - {0, 1}:
            size = max(-(-values // (min(-(-792 // depth), 128) * rows)), 2) * rows
            yield Choice("ticketed", rows, width, warps, -(-values // size), size, depth)


def staged(loop: Choice, share: Share, backward: bool) -> Iterator[Choice]:
    """A loop, and in the backward with up to three tiles on their way."""
    yield loop
    for stages in (2, 3, 4) if backward else ():
        tiles = 2 * (stages - 1) if stages > 2 else 0  # of both tensors, in shared memory
        if tiles * loop.rows * loop.channels * share.itemsize <= STAGED_BYTES:
            yield loop._replace(stages=stages)


def find_pipelined(share: Share, backward: bool) -> Iterator[Choice]:
    """All of whose programs run at once, on as many multiprocessors as are a power of two."""
    for width, (warps, tile) in itertools.product((16, 32, 64, 128), tiles((4, 8, 16), (64, 128))):
        rows = tile // (2 * width if backward else width)
        programs = min(share.multiprocessors, 128) * (2 if warps == 4 else 1)
        most = min(programs // -(-share.values // rows), share.slabs(width) // 2)
        # A thread of 16 warps has registers for half as many values.
        if tile > 2**15 or width > share.channels or not most:
            continue
        groups = power_of_two(most + 1) // 2
        size = -(-share.values // (programs // groups))
        splits = -(-share.values // size)
        if 2 * width * power_of_two(splits) > 64 * 32 * warps:
            continue  # threads that merge more than they have registers for
        yield Choice("pipelined", power_of_two(size), width, warps, splits, size, 0, groups)


def tiles(warps: tuple[int, ...], values: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Warps, and the size of a tile with so many values for each thread."""
    for count, each in itertools.product(warps, values):
        yield count, 32 * count * each


@contextmanager
def forced(choice: Choice) -> Iterator[None]:
    """Let the rule take that, whatever it is asked."""
    before, launch.select_kernel = launch.select_kernel, lambda **_: choice
    try:
        yield
    finally:
        launch.select_kernel = before


def prepare(layer: Layer, device: str) -> Callable[[Choice], list[Tensor]]:
    """Return what runs the pass in some way; its results that are not a mean, which may be zero."""
    shape = gpu_bench.SAMPLES, layer.channels, layer.side, layer.side
    dtype, layout, ranks = DTYPES[layer.dtype], LAYOUTS[layer.layout], gpu_bench.RANKS
    options: Any = {"dtype": dtype, "device": device, "memory_format": layout}
    x, dy = (torch.empty(shape, **options) for _ in range(2))
    if device != "cpu":
        x.normal_()
        dy.normal_()
    weight, bias = (torch.ones(layer.channels, device=device) for _ in range(2))
    mean, var = (torch.ones(ranks, layer.channels, device=device) for _ in range(2))

    def run(choice: Choice) -> list[Tensor]:
        with forced(choice):
            if layer.backward:
                statistics = mean, var, ranks, False, False
                return list(launch.backward(dy, x, weight, bias, None, *statistics)[:3])
            statistics = (mean, var), None, 0.1, 1e-5, ranks, False, False
            y, _, rstd = launch.forward(x, weight, bias, None, *statistics)
            return [y, rstd]

    return run


def compile_part(part: int, parts: int, only: Sequence[str]) -> None:
    """Compile what that process is to."""
    with nothing_launched():
        jobs = [(layer, choice) for layer in layers(only) for choice in candidates(layer)]
        for layer, choice in jobs[part::parts]:
            prepare(layer, "cpu")(choice)


def sweep(only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Time all candidates, each layer's fastest first."""
    for layer in layers(only):
        run, found = prepare(layer, gpu_bench.DEVICE), []
        choices = candidates(layer)
        expected = run(choices[0])
        for choice in choices:
            for result, truth in zip(run(choice), expected, strict=True):
                error = (result.float() - truth.float()).abs().max().item()
                limit = ROUNDING[result.dtype] * truth.float().abs().max().item()
                if not error <= limit:
                    sys.exit(
                        f"Error: expected what {choices[0]} gives, but {choice} is {error:.1e} "
                        f"off, for {layer}; mend the kernel first."
                    )
            found.append((gpu_bench.median_ms(partial(run, choice)), choice))
        ruled = found[0][0]
        fastest, choice = min(found)
        print(*layer, f"rule {ruled:.4f} ms, fastest {fastest:.4f} ms, {choice}", flush=True)
        for ms, choice in sorted(found):
            yield {"layer": layer._asdict(), "choice": choice._asdict(), "ms": ms}


def compile_all(only: Sequence[str]) -> None:
    """Compile all candidates, on all cores."""
    cores = os.cpu_count() or 1
    command = [sys.executable, __file__, "compile"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    parts = [
        subprocess.Popen([*command, str(part), str(cores), *only], env=environment)
        for part in range(cores)
    ]
    failed = [part.wait() for part in parts]  # of each, before the first that failed ends this
    if any(failed):
        sys.exit("Error: expected every candidate to compile, but some did not, see above.")


def main(path: str, only: Sequence[str] = ()) -> None:
    check_file(path)
    compile_all(only)
    gpu_bench.REPEATS = 11
    results: list[dict[str, Any]] = []
    try:
        results.extend(sweep(only))
    finally:
        kept = {"machine": gpu_bench.machine(), "candidates": results}
        Path(path).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:  # one process of compile_all
        compile_part(*map(int, sys.argv[2:4]), sys.argv[4:])
        sys.exit()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="RESULTS.json")
    words = sorted({*itertools.chain(*FORMATS), *PASSES})
    parser.add_argument("--only", nargs="+", choices=words, default=())
    main(**vars(parser.parse_args()))
