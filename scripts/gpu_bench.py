"""Time the GPU kernels over ResNet-50's batch norms against torch's and against memory.

``python scripts/gpu_bench.py RESULTS.json``, N=256, V=8. For each memory layout and dtype that has
a bar (``gpu_table.py``) and each pass: the sum over the 53 layers of the median time of a call,
ours and ``F.batch_norm``'s, and of the bytes that must be moved (forward: read x, write y;
backward: read x and dy, write dx) at the bandwidth of a copy measured in the same run. The same
for a forward with its ReLU. Each layer is also timed with fewer of the kernels that wait
(``ENABLED``), with those that are for every size (``unsized_ms``), and with ours switched off
(``off_ms``); ``copy_ms`` is a copy that moves as many
bytes, which takes a launch as they do. Then a ResNet-50 training step. A table comes last, each bar
met or missed, beside what ``gpu_predict.py`` predicted. What was measured before an interruption is
kept.

``python scripts/gpu_bench.py RESULTS.json compiled`` times that step under ``torch.compile``
instead, plain and with each ``impl``: it decides what ``impl="auto"`` should be on a GPU. It is
not part of gpu_check, as compiling takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from gpu_table import BARS, Row, predictions, render, render_compiled, summarize
from outputs import check_file
from torch import Tensor, nn

from distbn_convert import DistBatchNorm2d, convert_model
from distbn_convert.functional import dist_batch_norm
from distbn_convert.kernels.gpu import SWITCH, launch, rule
from distbn_convert.kernels.gpu.launch import describe
from distbn_convert.kernels.gpu.rule import Choice
from distbn_convert.kernels.layout import arrange
from tests.aot import RESNET50
from tests.resnet import resnet50

# A test without a GPU makes these small.
DEVICE, SAMPLES, RANKS, SIDE, STEPS = "cuda", 256, 8, 224, 10
LAYERS = RESNET50
# Bytes that the copy moves which the floor is taken from.
COPIED = 2**30
# Bytes written before each call, so that it finds nothing in L2.
CLEARED = 256 * 2**20
# Some half a millisecond at least, in which the host gets ahead of the device; else twice the time
# in which it asked for the call before, at 2 GHz.
SLEPT_CYCLES = 1_000_000
CYCLES_PER_SECOND = 4_000_000_000
REPEATS = 30
# Times of a layer, and which kernels that wait may be chosen for each, and whether staged loops.
ENABLED = {
    "ms": rule.ENABLED,
    "staged_ms": rule.ENABLED | {"staged"},
    "swept_ms": rule.ENABLED | {"staged", "swept"},
    "pipelined_ms": rule.ENABLED | {"pipelined"},
    "ticketed_ms": frozenset({"ticketed"}),
    "unaided_ms": frozenset(),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def median_ms(function: Callable[[], Any]) -> float:
    """Milliseconds that the device takes for a call, the median, with nothing in its caches.

    It sleeps before each, until the host has asked for the whole call: else small layers would be
    timed as Python runs.
    """
    cleared = torch.empty(CLEARED, dtype=torch.int8, device=DEVICE)
    for _ in range(3):  # compiles, and fills the allocator
        start = time.perf_counter()
        function()
        asked = time.perf_counter() - start
    cycles = max(SLEPT_CYCLES, int(asked * CYCLES_PER_SECOND))
    events = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cleared.zero_()
        torch.cuda._sleep(cycles)
        begin.record()
        function()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def copy_ms(nbytes: int) -> float:
    """Milliseconds of a copy that moves that many bytes, half of them read and half written."""
    source = torch.empty(nbytes // 4, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return median_ms(lambda: target.copy_(source))


def time_layer(x: Tensor, passes: set[str], bandwidth: float) -> list[Row]:
    """Time those passes of one layer, ours and torch's."""
    channels = x.shape[1]
    weight, bias = (torch.ones(channels, device=DEVICE).requires_grad_() for _ in range(2))
    means, variances = (torch.ones(RANKS, channels, device=DEVICE) for _ in range(2))
    leaves = x.requires_grad_(), weight, bias

    def ours(activation: str | None = None) -> Tensor:
        return dist_batch_norm(
            x, means, variances, weight, bias, vt_world_size=RANKS, activation=activation, impl="op"
        )

    def plain() -> Tensor:
        return F.batch_norm(x, means[0], variances[0], weight, bias, True)

    def measure() -> dict[str, float]:
        times = dict(zip(("forward", "backward"), time_passes(ours, leaves), strict=True))
        if "relu forward" in passes:
            times["relu forward"] = time_forward(lambda: ours("relu"))
        return times

    def choose() -> dict[str, Choice]:
        return {name: share.choose(name == "backward") for name in ("forward", "backward")}

    share = describe(*arrange(x.detach()), RANKS, False)
    choices: list[dict[str, Choice]] = []
    times: list[dict[str, float]] = []
    for enabled in ENABLED.values():
        with only_enabled(enabled):
            found = choose()
            times.append(times[choices.index(found)] if found in choices else measure())
            choices.append(found)
    with unsized():
        unsized_ms = times[0] if share.last else measure()
    with switched_off():
        off_ms = measure()
    plain_ms = dict(zip(("forward", "backward"), time_passes(plain, leaves), strict=True))
    if "relu forward" in passes:
        plain_ms["relu forward"] = time_forward(lambda: plain().relu_())
    rows = []
    for name in times[0]:
        row: Row = {"pass": name, "off_ms": off_ms[name], "plain_ms": plain_ms[name]}
        row["unsized_ms"] = unsized_ms[name]
        for what, choice, ms in zip(ENABLED, choices, times, strict=True):
            row |= {what: ms[name], what.replace("ms", "kernel"): choice[name.split()[-1]].kind}
        moved = (3 if name == "backward" else 2) * x.nbytes
        row |= {"floor_ms": moved / bandwidth, "copy_ms": copy_ms(moved)}
        rows.append(row)
    return rows


@contextmanager
def only_enabled(kinds: frozenset[str]) -> Iterator[None]:
    """Let the rule choose those of the kernels that wait, and no others."""
    before, rule.ENABLED = rule.ENABLED, kinds
    try:
        yield
    finally:
        rule.ENABLED = before


@contextmanager
def unsized() -> Iterator[None]:
    """Let no kernel be compiled for its number of positions."""
    before, launch._MOST_SIZES = launch._MOST_SIZES, 0
    sizes = set(launch._sizes)
    launch._sizes.clear()
    try:
        yield
    finally:
        launch._MOST_SIZES = before
        launch._sizes.update(sizes)


@contextmanager
def switched_off() -> Iterator[None]:
    """Let CUDA tensors be normalised as they are without the switch."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "off"
    try:
        yield
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before


def time_forward(function: Callable[[], Tensor]) -> float:
    with torch.no_grad():
        return median_ms(function)


def time_passes(function: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward."""
    forward = time_forward(function)
    output = function()
    upstream = torch.randn_like(output)
    backward = median_ms(lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True))
    return forward, backward


def time_layers(bandwidth: float) -> Iterator[Row]:
    """Time what the bars ask for."""
    wanted: dict[tuple[str, str], set[str]] = {}
    for bar in BARS:
        wanted.setdefault((bar.dtype, bar.layout), set()).add(bar.what)
    predicted = predictions()
    for (dtype, layout), passes in wanted.items():
        for (channels, side), count in LAYERS.items():
            x = torch.randn(SAMPLES, channels, side, side, device=DEVICE, dtype=DTYPES[dtype])
            x = x.to(memory_format=LAYOUTS[layout])
            what = {"layout": layout, "dtype": dtype, "channels": channels, "side": side}
            for row in time_layer(x, passes, bandwidth):
                key = dtype, layout, row["pass"], str(channels), str(side)
                yield {**what, "count": count, **row, "predicted": predicted[key]}


def make_model(norm: str) -> nn.Module:
    """ResNet-50 with torch's batch norm ("plain"), or with ours and that ``impl``."""
    torch.manual_seed(0)
    model: nn.Module = resnet50()
    if norm != "plain":
        model = convert_model(model, RANKS)
        for module in model.modules():
            if isinstance(module, DistBatchNorm2d):
                module.impl = norm
    return model.to(DEVICE).to(memory_format=torch.channels_last)


def time_step(norm: str, compiled: bool = False) -> float:
    """Milliseconds of a bf16 autocast, channels_last training step of ResNet-50."""
    model = make_model(norm)
    call: Any = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(SAMPLES, 3, SIDE, SIDE, device=DEVICE)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (SAMPLES,), device=DEVICE)

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = F.cross_entropy(call(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3 / steps

    run(3)  # compiles, and fills the allocator
    return run(STEPS)


def time_steps() -> Row | None:
    """Time the step with ours and with torch's; None if either does not fit in memory."""
    try:
        return {"converted_ms": time_step("op"), "plain_ms": time_step("plain")}
    except torch.OutOfMemoryError:
        return None


def machine() -> Row:
    """What a number means nothing without."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without a history
        commit = "unknown"
    multiprocessors, l2_bytes = launch.resources_of(torch.device(DEVICE))
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine(),
        "multiprocessors": multiprocessors,
        "l2_bytes": l2_bytes,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def run_layers(results: Row) -> str:
    """Time the layers and the step; the table."""
    bandwidth = results["copy_bytes_per_ms"] = COPIED / copy_ms(COPIED)
    layers = results["layers"] = []
    for row in time_layers(bandwidth):
        layers.append(row)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    steps = results["step"] = time_steps()
    summary = results["summary"] = summarize(layers)
    where = results["machine"]
    title = (
        f"{where['device']}, torch {where['torch']}, triton {where['triton']}, "
        f"copy {bandwidth / 1e9:.2f} TB/s, N={SAMPLES}, V={RANKS}, sum over 53 layers"
    )
    return render(summary, steps, title)


def run_compiled(results: Row) -> str:
    """Time the step under torch.compile; the table."""
    steps = results["compiled_step_ms"] = {}
    for norm in ("plain", "op", "decomposed"):
        steps[norm] = time_step(norm, compiled=True)
    return render_compiled(steps)


def main(path: str, what: str = "layers") -> None:
    check_file(path)
    results: Row = {"machine": machine(), "samples": SAMPLES, "ranks": RANKS}
    try:
        table = (run_compiled if what == "compiled" else run_layers)(results)
    finally:
        Path(path).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="RESULTS.json")
    parser.add_argument("what", nargs="?", default="layers", choices=["layers", "compiled"])
    main(**vars(parser.parse_args()))
