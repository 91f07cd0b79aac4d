"""Time the GPU kernels over ResNet-50's batch norms against torch's and against memory.

``python scripts/gpu_bench.py RESULTS.json``, N=256, V=8. For each memory layout, dtype and pass:
the sum over the 53 layers of the median time of a call, ours and ``F.batch_norm``'s, and of the
bytes that must be moved (forward: read x, write y; backward: read x and dy, write dx) at the
bandwidth of a copy measured in the same run. Layers that take the ticketed kernels are also timed
with the split ones (``split_ms``). Then a ResNet-50 training step. A table comes last.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from triton.testing import do_bench

from distbn_convert import convert_model
from distbn_convert.functional import dist_batch_norm
from distbn_convert.kernels.gpu import rule
from distbn_convert.kernels.gpu.launch import arrange, describe
from tests.aot import RESNET50
from tests.resnet import resnet50

SAMPLES, RANKS = 256, 8
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Row = dict[str, Any]


def median_ms(function: Callable[[], Any]) -> float:
    return float(do_bench(function, warmup=5, rep=30, return_mode="median"))


def copy_bandwidth() -> float:
    """Bytes per millisecond that a copy reads and writes."""
    source = torch.empty(256 * 2**20, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source))


def time_layer(x: Tensor, bandwidth: float) -> list[Row]:
    channels = x.shape[1]
    weight, bias = (torch.ones(channels, device="cuda").requires_grad_() for _ in range(2))
    rows = torch.zeros(RANKS, channels, device="cuda"), torch.ones(RANKS, channels, device="cuda")
    plain_rows = rows[0][0].clone(), rows[1][0].clone()
    x.requires_grad_()

    def ours() -> Tensor:
        return dist_batch_norm(x, *rows, weight, bias, vt_world_size=RANKS)

    def plain() -> Tensor:
        return F.batch_norm(x, *plain_rows, weight, bias, True)

    leaves = x, weight, bias
    times = {"ms": time_passes(ours, leaves), "plain_ms": time_passes(plain, leaves)}
    share = describe(*arrange(x.detach()), RANKS, False)
    kinds = [share.choose(backward).kind for backward in (False, True)]
    times["split_ms"] = times["ms"]
    if "ticketed" in kinds:
        times["split_ms"] = with_split_kernels(lambda: time_passes(ours, leaves))
    return [
        {
            "pass": "backward" if backward else "forward",
            "kernel": kinds[backward],
            **{name: both[backward] for name, both in times.items()},
            "floor_ms": (3 if backward else 2) * x.nbytes / bandwidth,
        }
        for backward in (False, True)
    ]


def time_passes(function: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward."""
    with torch.no_grad():
        forward = median_ms(function)
    output = function()
    upstream = torch.randn_like(output)
    backward = median_ms(lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True))
    return forward, backward


def with_split_kernels(measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """Measure with the split kernels in place of the ticketed ones."""
    before, rule.TICKETED = rule.TICKETED, False
    try:
        return measure()
    finally:
        rule.TICKETED = before


def time_layers(bandwidth: float) -> list[Row]:
    rows = []
    for layout, memory_format in LAYOUTS.items():
        for dtype, torch_dtype in DTYPES.items():
            for (channels, side), count in RESNET50.items():
                shape = SAMPLES, channels, side, side
                x = torch.randn(shape, device="cuda", dtype=torch_dtype)
                x = x.to(memory_format=memory_format)
                for row in time_layer(x, bandwidth):
                    what = {"layout": layout, "dtype": dtype, "channels": channels, "side": side}
                    rows.append({**what, "count": count, **row})
    return rows


def time_step(converted: bool) -> float:
    """Milliseconds of a bf16 autocast, channels_last training step of ResNet-50."""
    torch.manual_seed(0)
    model: nn.Module = resnet50()
    model = convert_model(model, RANKS) if converted else model
    model = model.cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(SAMPLES, 3, 224, 224, device="cuda")
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (SAMPLES,), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 100


def summarize(rows: list[Row]) -> list[Row]:
    """Sum the layers of each layout, dtype and pass."""
    table: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = row["dtype"], row["layout"], row["pass"]
        names = "ms", "plain_ms", "split_ms", "floor_ms"
        total = table.setdefault(key, dict.fromkeys(names, 0.0))
        for name in total:
            total[name] += row["count"] * row[name]
    return [
        {"dtype": key[0], "layout": key[1], "pass": key[2], **total} for key, total in table.items()
    ]


def machine() -> Row:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def render(summary: list[Row], steps: Row, bandwidth: float, where: Row) -> str:
    lines = [
        f"{where['device']}, torch {where['torch']}, triton {where['triton']}, "
        f"copy {bandwidth / 1e9:.2f} TB/s, N={SAMPLES}, V={RANKS}, sum over 53 layers",
        f"{'':32}{'ms':>8}{'split':>8}{'plain':>8}{'/ plain':>9}{'/ floor':>9}",
    ]
    for row in summary:
        name = f"{row['dtype']} {row['layout']} {row['pass']}"
        ratios = row["ms"] / row["plain_ms"], row["ms"] / row["floor_ms"]
        lines.append(
            f"{name:32}{row['ms']:8.2f}{row['split_ms']:8.2f}{row['plain_ms']:8.2f}"
            f"{ratios[0]:9.2f}{ratios[1]:9.2f}"
        )
    ours, plain = steps["converted_ms"], steps["plain_ms"]
    step = "ResNet-50 step, bf16 autocast"
    lines.append(f"{step:32}{ours:8.1f}{'':8}{plain:8.1f}{ours / plain:9.2f}")
    return "\n".join(lines)


def main(path: Path) -> None:
    bandwidth, where = copy_bandwidth(), machine()
    layers = time_layers(bandwidth)
    torch.cuda.empty_cache()
    steps = {"converted_ms": time_step(True), "plain_ms": time_step(False)}
    summary = summarize(layers)
    results = {"machine": where, "copy_bytes_per_ms": bandwidth, "samples": SAMPLES}
    results |= {"ranks": RANKS, "summary": summary, "step": steps, "layers": layers}
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(render(summary, steps, bandwidth, where))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
