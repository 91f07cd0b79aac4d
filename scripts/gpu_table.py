"""What gpu_bench.py prints: sums over the layers, and every bar that they must meet."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]


class Bar(NamedTuple):
    """The most that a sum over ResNet-50's 53 layers may be, over torch's and over the floor."""

    dtype: str
    layout: str
    what: str
    plain: float
    floor: float

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.layout} {self.what}"


# For ReLU, "plain" is torch's batch norm, then its ReLU in place.
BARS = [
    *(Bar("bf16", "contiguous", what, 0.6, 1.25) for what in ("forward", "backward")),
    *(Bar("fp32", "contiguous", what, 0.8, 1.25) for what in ("forward", "backward")),
    *(Bar("bf16", "channels_last", what, 0.8, 1.4) for what in ("forward", "backward")),
    *(Bar("fp16", "channels_last", what, 0.95, 1.4) for what in ("forward", "backward")),
    *(Bar("bf16", layout, "relu forward", 0.5, 1.3) for layout in ("contiguous", "channels_last")),
]
STEP_BAR = 1.0
# Columns, in milliseconds: ours as the rule is, and otherwise.
OTHERS = "staged", "swept", "pipelined", "ticketed", "unaided", "off", "plain"
TIMES = "ms", *(f"{name}_ms" for name in OTHERS)
# Written by gpu_predict.py, before anything was measured.
PREDICTIONS = Path(__file__).with_name("gpu_predictions.csv")


def predictions() -> dict[tuple[str, ...], float]:
    """The predicted time over the floor, by dtype, layout, pass, channels and side."""
    with PREDICTIONS.open(encoding="utf-8") as file:
        keys = "dtype", "layout", "pass", "channels", "side"
        return {
            tuple(row[key] for key in keys): float(row["predicted"]) for row in csv.DictReader(file)
        }


def summarize(rows: list[Row]) -> list[Row]:
    """Sum the layers of each bar, in the order of the bars."""
    names = *TIMES, "floor_ms"
    summary = []
    for bar in BARS:
        layers = [row for row in rows if (row["dtype"], row["layout"], row["pass"]) == bar[:3]]
        total = {name: math.fsum(row["count"] * row[name] for row in layers) for name in names}
        total["predicted"] = (
            math.fsum(row["count"] * row["floor_ms"] * row["predicted"] for row in layers)
            / total["floor_ms"]
        )
        summary.append({"dtype": bar.dtype, "layout": bar.layout, "pass": bar.what, **total})
    return summary


def verdict(value: float, bar: float) -> str:
    """A ratio, the most that it may be, and whether it is."""
    return f"{value:6.2f} <= {bar:4.2f} {'met' if value <= bar else 'MISSED':6}"


def render(summary: list[Row], steps: Row | None, title: str) -> str:
    """Draw the table; a ratio that is over its bar says MISSED, a step without times is too big."""
    heads = "".join(f"{name:>10}" for name in ("ms", *OTHERS))
    lines = [title, f"{'':34}{heads}  {'/ plain':22}{'/ floor':22}predicted"]
    for bar, row in zip(BARS, summary, strict=True):
        ratios = row["ms"] / row["plain_ms"], row["ms"] / row["floor_ms"]
        verdicts = verdict(ratios[0], bar.plain), verdict(ratios[1], bar.floor)
        times = "".join(f"{row[name]:10.2f}" for name in TIMES)
        lines.append(f"{bar.name:34}{times}  {verdicts[0]}  {verdicts[1]}{row['predicted']:11.2f}")
    name = "ResNet-50 step, bf16 channels_last"
    if steps is None:
        return "\n".join([*lines, f"{name}: not timed, it does not fit in the device's memory"])
    ours, plain = steps["converted_ms"], steps["plain_ms"]
    times = f"{ours:10.1f}{'':{10 * (len(TIMES) - 2)}}{plain:10.1f}"
    lines.append(f"{name:34}{times}  {verdict(ours / plain, STEP_BAR)}".rstrip())
    return "\n".join(lines)


def render_compiled(steps: Row) -> str:
    """Draw the compiled steps; there is no bar for them."""
    lines = ["ResNet-50 step under torch.compile, bf16 channels_last, ms"]
    lines += [f"  {name:12}{time:8.1f}" for name, time in steps.items()]
    return "\n".join(lines)
