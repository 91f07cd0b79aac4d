"""How far virtual ranks disagree: plain Python, so that inspecting a file needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from .report import Spread

__all__ = ["count_nonfinite", "largest_count", "measure_spread"]

Rows = Sequence[Sequence[float]]


def measure_spread(means: Rows, variances: Rows) -> Spread | None:
    """Measure the disagreement of the ranks of one layer.

    Args:
        means: running_mean, V rows of C numbers.
        variances: running_var, V rows of C numbers.

    Returns:
        Spread: over the channels whose numbers are finite and whose variance is positive; None
        if there are none.
    """
    of_means, of_variances = [], []
    for mean, var in zip(zip(*means, strict=True), zip(*variances, strict=True), strict=True):
        average = _average(var)
        if average > 0 and all(map(math.isfinite, var + mean)):
            of_means.append(_deviation(mean) / math.sqrt(average))
            of_variances.append(_deviation(var) / average)
    if not of_means:
        return None
    return Spread(median(of_means), max(of_means), median(of_variances), max(of_variances))


def count_nonfinite(*tensors: Rows) -> int:
    """Count the NaN and infinite numbers."""
    return sum(len(row) - sum(map(math.isfinite, row)) for rows in tensors for row in rows)


def largest_count(counters: Sequence[Any]) -> int | None:
    """Return the largest counter; None if one is no finite number, as float16 makes of 65520."""
    if any(isinstance(count, complex) or not math.isfinite(count) for count in counters):
        return None
    return int(max(counters))


def _average(values: Sequence[float]) -> float:
    return sum(value / len(values) for value in values)  # divided first: no overflow


def _deviation(values: Sequence[float]) -> float:
    average = _average(values)
    return math.hypot(*(value - average for value in values)) / math.sqrt(len(values))
