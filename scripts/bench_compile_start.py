"""Time the first compiled step of new processes: ``python scripts/bench_compile_start.py``.

A ResNet-50 (or ``--model``) of torchvision on the CPU, 8 images of 64x64, V=4. A process fills the
compiler's caches; then the kinds take turns. Seconds from the call of the compiled model to the end
of its backward, medians, with what AOTAutograd's cache did.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torchvision
from bench import environment

from distbn_convert import DistBatchNorm2d, convert_model

TURNS, RANKS = 5, 4
KINDS = ("plain", "op", "decomposed")


def start(model_name: str, kind: str) -> None:
    """Print the seconds of the first step in this process, and what the cache did."""
    model = torchvision.models.get_model(model_name, weights=None)
    if kind != "plain":
        model = convert_model(model, RANKS)
        for layer in model.modules():
            if isinstance(layer, DistBatchNorm2d):
                layer.impl = kind
    compiled, images = torch.compile(model), torch.randn(8, 3, 64, 64)
    begin = time.perf_counter()
    compiled(images).sum().backward()
    seconds = time.perf_counter() - begin
    events = torch._dynamo.utils.counters["aot_autograd"]
    known = [event for event in ("hit", "miss", "bypass") if events[f"autograd_cache_{event}"]]
    print(seconds, *known)


def run(model_name: str, kind: str, cache: str) -> tuple[float, str]:
    """Do it in a new process with a folder for the compiler's caches."""
    command = [sys.executable, __file__, "--model", model_name, "--kind", kind]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    found = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    seconds, *events = found.stdout.split()
    return float(seconds), " ".join(events)


def main(model: str) -> None:
    print(environment("cpu"))
    with tempfile.TemporaryDirectory() as cache:
        cold = {kind: run(model, kind, cache) for kind in KINDS}
        warm: dict[str, list[tuple[float, str]]] = {kind: [] for kind in KINDS}
        for _ in range(TURNS):
            for kind, found in warm.items():
                found.append(run(model, kind, cache))
    medians = {kind: statistics.median(s for s, _ in found) for kind, found in warm.items()}
    print(f"{model:24}{'seconds':>10}{'/ plain':>10}  cache")
    for kind, seconds in medians.items():
        events = " ".join(sorted({event for _, event in warm[kind]}))
        print(f"{kind:24}{seconds:10.2f}{seconds / medians['plain']:10.2f}  {events}")
    print(
        "first, with no caches:", {kind: round(seconds, 1) for kind, (seconds, _) in cold.items()}
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="of torchvision")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        start(arguments.model, arguments.kind)
    else:
        main(arguments.model)
