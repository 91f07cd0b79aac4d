"""Time batch norm and what follows it under torch.compile: the op, decomposed, and torch's own.

``python scripts/bench_compile.py [RESULTS.json]``, N=64, V=8, float32 on the CPU, one thread as
set by OMP_NUM_THREADS. ``fused`` is ``activation="relu"``. ``impl="auto"`` takes the op under a
compiler on a CPU by such figures, one core, op / decomposed, forward and backward:

* with AVX2: 0.3 to 1.0 in 28 of the 30 rows; contiguous before a SiLU 1.04 at 256x56x56 and 1.44 at
  2048x7x7. ``fused`` took 0.13 to 0.63 of the op with a compiled ReLU after it;
* with AVX-512 and an earlier kernel: 0.4 to 0.9 at 64x56x56, 512x28x28 and 256x14x14, but for 1.1
  before a SiLU at 256x14x14; at 2048x7x7 1.6, 0.8 and 0.9 before nothing, ReLU and SiLU; at
  256x56x56 (205 MB a tensor) 2.2, 1.1 and 1.7 contiguous, but alone in a process 0.33, 0.7 and 0.7.

One run of each; of the second, channels_last was cut short.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench import environment
from outputs import check_file
from torch import Tensor, nn

from distbn_convert import DistBatchNorm2d

SAMPLES, RANKS, TURNS = 64, 8, 5
SHAPES = [(64, 56), (256, 56), (512, 28), (256, 14), (2048, 7)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NORMS = ("plain", "op", "decomposed")
FOLLOWERS: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda output: output,
    "relu": F.relu,
    "silu": F.silu,
}


def make_step(norm: str, follower: str, channels: int) -> tuple[Any, list[nn.Parameter]]:
    """Compile a batch norm and its follower; also return the parameters."""
    torch._dynamo.reset()
    layer: nn.Module = nn.BatchNorm2d(channels)
    if norm != "plain":
        layer = DistBatchNorm2d(channels, vt_world_size=RANKS)
        layer.impl = norm
    fused = norm == "fused"
    if fused:
        layer.impl = "op"

    def forward(input: Tensor) -> Tensor:
        if fused:
            return layer.normalize(input, "relu")
        return FOLLOWERS[follower](layer(input))

    return torch.compile(forward, fullgraph=True, dynamic=False), list(layer.parameters())


def measure(input: Tensor, follower: str) -> dict[str, tuple[float, float]]:
    """Median milliseconds of forward and backward of each norm; they take turns."""
    norms = (*NORMS, "fused") if follower == "relu" else NORMS
    steps = {norm: make_step(norm, follower, input.shape[1]) for norm in norms}
    upstream = torch.randn_like(input)
    times: dict[str, list[tuple[float, float]]] = {norm: [] for norm in norms}
    for turn in range(TURNS + 1):
        for norm, (step, parameters) in steps.items():
            start = time.perf_counter()
            output = step(input)
            middle = time.perf_counter()
            gradients = torch.autograd.grad(output, (input, *parameters), upstream)
            end = time.perf_counter()
            del output, gradients
            if turn:  # the first compiles
                times[norm].append((middle - start, end - middle))
    return {
        norm: tuple(1e3 * statistics.median(column) for column in zip(*spans, strict=True))
        for norm, spans in times.items()
    }


def main(path: str | None) -> None:
    if path:
        check_file(path)
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    rows = []
    print(f"{'ms, forward + backward':40}" + "".join(f"{n:>12}" for n in (*NORMS, "fused")))
    for layout, memory_format in LAYOUTS.items():
        for channels, side in SHAPES:
            input = torch.randn(SAMPLES, channels, side, side).to(memory_format=memory_format)
            input.requires_grad_()
            for follower in FOLLOWERS:
                found = measure(input, follower)
                what = {"layout": layout, "channels": channels, "side": side, "then": follower}
                rows += [
                    {**what, "norm": norm, "forward_ms": times[0], "backward_ms": times[1]}
                    for norm, times in found.items()
                ]
                name = f"{layout} {channels}x{side}x{side}, then {follower}"
                print(f"{name:40}" + "".join(f"{sum(t):12.1f}" for t in found.values()), flush=True)
    if path:
        results = {"machine": environment("cpu"), "rows": rows}
        Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", metavar="RESULTS.json")
    main(**vars(parser.parse_args()))
