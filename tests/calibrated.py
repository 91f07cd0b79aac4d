"""What each real process does in tests/test_population.py, and its data."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distbn_convert import convert_model, recalibrate

from . import ddp

SIZES = [8, 12, 9, 3]


def make_batches(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(n, 3, 2, 2, generator=generator, dtype=torch.float64) for n in SIZES]
    return [draw * (index + 1) + index for index, draw in enumerate(draws)]


def recalibrate_here() -> dict[str, Any]:
    """Recalibrate under DDP, with more batches in process 0 than in process 1."""
    batches = make_batches(dist.get_rank())[: None if dist.get_rank() == 0 else 2]
    plain = nn.BatchNorm2d(3).double()
    rows = convert_model(nn.BatchNorm2d(3).double(), 2)
    for layer in (plain, rows):
        recalibrate(ddp.wrap(layer, broadcast=True), batches)
    return {
        "plain": (plain.running_mean, plain.running_var),
        "rows": (rows.running_mean, rows.running_var),
    }
