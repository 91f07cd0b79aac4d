"""Time evaluation of converted models beside plain ones: ``python scripts/bench_evaluate.py``.

On the CPU, V=8; needs torchvision. The models take turns, and medians are compared. Reducing the
ranks costs the same whatever the batch, so that it shows most in small models and with one image.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
import torchvision
from bench import environment

from distbn_convert import convert_model

TURNS, RANKS = 25, 8
# Model, images, side.
CASES = [
    ("resnet18", 1, 32),
    ("mobilenet_v3_small", 1, 224),
    ("resnet50", 1, 224),
    ("resnet50", 8, 224),
]
REDUCTIONS = ("mean", "pooled", "select")


@torch.inference_mode()
def measure(name: str, images: int, side: int) -> list[float]:
    """Median seconds of a call of the plain model, and of it converted with each reduction."""
    plain = torchvision.models.get_model(name, weights=None).eval()
    models = [plain]
    models += [convert_model(copy.deepcopy(plain), RANKS, eval_reduction=r) for r in REDUCTIONS]
    input = torch.randn(images, 3, side, side)
    seconds: list[list[float]] = [[] for _ in models]
    for turn in range(TURNS + 3):
        for model, taken in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(input)
            if turn >= 3:  # the first warm up
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def main() -> None:
    print(environment("cpu"))
    print(f"{'':32}{'plain':>10}" + "".join(f"{reduction:>10}" for reduction in REDUCTIONS))
    for name, images, side in CASES:
        plain, *converted = measure(name, images, side)
        ratios = "".join(f"{seconds / plain:10.2f}" for seconds in converted)
        case = f"{name}, {images}x3x{side}x{side}"
        print(f"{case:32}{1e3 * plain:7.1f} ms{ratios}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    main()
