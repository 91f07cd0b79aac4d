"""Time what the GPU kernels cost the host: ``PYTHONPATH=. python scripts/bench_host.py``.

No GPU is needed: kernels are compiled for one that is not there, and nothing is launched. On a real
one a launch takes the driver some microseconds more. Each line is a layer with kernels of one
launch, or of several; microseconds of a call, the median of many turns, launched by Triton's own
dispatch and by ``kernels/gpu/dispatch.py``.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from distbn_convert import DistBatchNorm2d, kernels
from distbn_convert.kernels import gpu
from distbn_convert.kernels.gpu.dispatch import Kernel
from tests.dispatched import RecordingDevice

TURNS, CALLS, RANKS = 15, 100, 8
LAYERS = {"contiguous": (8, 64, 14, 14), "channels_last": (8, 32, 56, 56)}


class CountingDevice(RecordingDevice):
    """One that counts its launches, and keeps no tensors."""

    count = 0

    def launch(self, *arguments: Any) -> None:
        self.count += 1


@contextmanager
def triton_dispatch() -> Iterator[None]:
    """Launch as ``kernel[grid](...)`` does."""
    ours = Kernel.__call__

    def call(self: Kernel, device: int, *arguments: Any) -> None:
        self.function[self.grid](*arguments, **self.options)

    Kernel.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        Kernel.__call__ = ours  # type: ignore[method-assign]


def microseconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        function()
    return (time.perf_counter() - start) / CALLS * 1e6


def calls(name: str) -> dict[str, Callable[[], Any]]:
    """What is timed: both passes alone, then a training step of the layer."""
    shape = LAYERS[name]
    layout = getattr(torch, f"{name}_format", None) or getattr(torch, name)
    x = torch.randn(shape, dtype=torch.bfloat16).contiguous(memory_format=layout)
    layer = DistBatchNorm2d(shape[1], vt_world_size=RANKS)
    layer.impl = "op"
    leaf = x.clone().requires_grad_()
    rows = layer.running_mean, layer.running_var, layer.num_batches_tracked
    affine = layer.weight.detach(), layer.bias.detach()
    mean, rstd = torch.zeros(RANKS, shape[1]), torch.ones(RANKS, shape[1])

    def forward() -> None:
        gpu.forward(x, *affine, None, *rows, 0.1, 1e-5, RANKS, False, False)

    def backward() -> None:
        gpu.backward(x, x, *affine, None, mean, rstd, RANKS, False, False)

    def step() -> tuple[Tensor, ...]:
        output = layer(leaf)
        return torch.autograd.grad(output, (leaf, layer.weight, layer.bias), output)

    return {"forward": forward, "backward": backward, "layer, both": step}


def main() -> None:
    device = CountingDevice()
    driver.set_active(device)
    gpu.supports = lambda input: True
    kernels._BACKENDS = (gpu,)
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'':28}{'launches':>10}{'Triton, us':>12}{'ours, us':>10}{'ratio':>8}")
    for name in LAYERS:
        for what, function in calls(name).items():
            before = device.count
            function()
            launches = device.count - before
            taken: tuple[list[float], list[float]] = [], []
            for turn in range(TURNS + 1):
                ours = microseconds(function)
                with triton_dispatch():
                    theirs = microseconds(function)
                if turn:  # the first warms up
                    taken[0].append(theirs)
                    taken[1].append(ours)
            theirs, ours = map(statistics.median, taken)
            times = f"{theirs:12.0f}{ours:10.0f}{ours / theirs:8.2f}"
            print(f"{f'{name}, {what}':28}{launches:10}{times}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    main()
