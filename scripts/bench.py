"""Time virtual-rank batch norm against torch's own and what people write by hand."""

from __future__ import annotations

import itertools
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from bench_providers import PROVIDERS, SHAPES, Case, check
from outputs import check_file

from distbn_convert.kernels import select_backend

COUNT = click.IntRange(min=1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "backward", "both")


class Clock:
    """Seconds between calls of :meth:`mark`, on the device's own clock."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        pairs = list(itertools.pairwise(self.marks))
        if self.cuda:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in pairs]
        return [b - a for a, b in pairs]


def backend_name(device: str) -> str:
    """The backend that is measured: "cpu", "gpu", "native" or "reference"."""
    backend: Any = select_backend(torch.zeros(2, 2, device=device))
    return str(backend.__name__.rpartition(".")[2])


def require_green_tests(device: str) -> None:
    """Run the tests of the backend that is measured; no speed is reported without correctness."""
    name = f"kernels_{backend_name(device)}" if device == "cpu" else "kernels_gpu_device"
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"tests/test_{name}.py"], cwd=root, capture_output=True, text=True
    )
    if done.returncode:
        raise click.ClickException(
            f"expected the backend's tests to pass, but tests/test_{name}.py did not, so no time "
            f"is reported; mend what it found:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


def measure(case: Case, providers: Iterable[str], repetitions: int) -> Iterator[dict[str, Any]]:
    """Time all providers of a case in turns; yield a record for each provider and pass."""
    modules = {name: PROVIDERS[name](case) for name in providers}
    times: dict[str, list[list[float]]] = {name: [] for name in modules}
    input, upstream = case.tensor().requires_grad_(), case.tensor()
    calls = max(1, min(50, 2_000_000 // input.numel()))  # a turn, so that short ones are seen
    for turn in range(repetitions + 1):
        for name, module in modules.items():
            leaves = (input, *module.parameters())
            # Untimed: it finds what memory the provider before it left, which differs by a factor.
            torch.autograd.grad(module(input), leaves, upstream)
            clock = Clock(case.device)
            for _ in range(calls):
                clock.mark()
                output = module(input)
                clock.mark()
                gradients = torch.autograd.grad(output, leaves, upstream)
                clock.mark()
                del output, gradients
                clock.mark()
            spans = clock.intervals()
            forward, backward = (sum(spans[i::4]) / calls for i in (0, 1))
            if turn:  # the first warms up, and compiles
                times[name].append([forward, backward, forward + backward])
    for name, values in times.items():
        for kind, column in zip(PASSES, zip(*values, strict=True), strict=True):
            yield record(case, name, kind, sorted(column))


def record(case: Case, provider: str, kind: str, seconds: list[float]) -> dict[str, Any]:
    p20, p50, p80 = (seconds[round(q * (len(seconds) - 1))] for q in (0.2, 0.5, 0.8))
    return {
        "op": "batch_norm",
        "provider": provider,
        "pass": kind,
        "set": case.set,
        "shape": list(case.shape),
        "layout": case.layout,
        "dtype": str(case.dtype).removeprefix("torch."),
        "ranks": case.ranks,
        "p20": p20,
        "p50": p50,
        "p80": p80,
    }


def environment(device: str) -> dict[str, Any]:
    """What a number means nothing without."""
    name = torch.cuda.get_device_name(device) if device != "cpu" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": backend_name(device),
        "command": " ".join(["python", *sys.argv]),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def ratios(records: list[dict[str, Any]], numerator: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """p50 of one provider over each other one, by case and pass."""
    by_case: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in records:
        key = (row["set"], row["layout"], row["dtype"], row["ranks"], row["pass"])
        by_case.setdefault((*key, tuple(row["shape"])), {})[row["provider"]] = row["p50"]
    return {
        key: {name: times[numerator] / value for name, value in times.items()}
        for key, times in by_case.items()
        if numerator in times
    }


def print_table(records: list[dict[str, Any]]) -> None:
    """Milliseconds of each case, then the geometric mean and the worst of ours over the others."""
    names = list(dict.fromkeys(row["provider"] for row in records))
    title = f"{'milliseconds (p50)':58}" + "".join(f"{name:>10}" for name in names)
    for key, group in itertools.groupby(
        records, lambda r: (r["set"], r["layout"], r["dtype"], r["ranks"])
    ):
        rows = list(group)
        print("\n" + "  ".join(map(str, key[:3])) + f"  V={key[3]}\n" + title)
        for shape, kind in dict.fromkeys((tuple(r["shape"]), r["pass"]) for r in rows):
            found = {
                r["provider"]: r["p50"]
                for r in rows
                if tuple(r["shape"]) == shape and r["pass"] == kind
            }
            cells = "".join(
                f"{found[name] * 1e3:10.3f}" if name in found else " " * 10 for name in names
            )
            print(f"  {'x'.join(map(str, shape)):40}{kind:16}{cells}")
    others = [name for name in names if name != "ours"]
    print(f"\n{'ours / provider: geometric mean (worst)':44}" + "".join(f"{n:>16}" for n in others))
    grouped: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for (*key, _), row in ratios(records, "ours").items():
        for name, value in row.items():
            grouped.setdefault(tuple(key), {}).setdefault(name, []).append(value)
    for (set_, layout, dtype, ranks, kind), columns in grouped.items():
        cells = "".join(f"{summary(columns.get(name)):>16}" for name in others)
        print(f"  {set_:13}{layout:14}{dtype:9}V={ranks:<3}{kind:9}{cells}")


def summary(values: list[float] | None) -> str:
    if not values:
        return ""
    mean = math.exp(sum(map(math.log, values)) / len(values))
    return f"{mean:.2f} ({max(values):.2f})"


def draw(records: list[dict[str, Any]], path: str) -> None:
    """Draw the time of forward and backward of each provider over plain BatchNorm's."""
    import matplotlib.pyplot as plt

    panels: dict[tuple[Any, ...], dict[str, dict[str, float]]] = {}
    for (*key, kind, shape), row in ratios(records, "plain").items():
        if kind == "both":
            label = "x".join(map(str, shape))
            panels.setdefault(tuple(key), {})[label] = {k: 1 / v for k, v in row.items()}
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(12, 3.6 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, ((set_, layout, dtype, ranks), shapes) in zip(
        axes[:, 0], panels.items(), strict=True
    ):
        names = [
            name for name in PROVIDERS if name != "plain" and name in next(iter(shapes.values()))
        ]
        for index, name in enumerate(names):
            at = [i + (index - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(shapes))]
            values = [shape.get(name, math.nan) for shape in shapes.values()]
            axis.bar(at, values, 0.8 / len(names), label=name)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.set_xticks(range(len(shapes)), shapes, rotation=20, ha="right", fontsize=8)
        axis.set_ylabel("time / BatchNorm's")
        axis.set_title(f"{set_}, {layout}, {dtype}, V={ranks}: forward and backward")
        axis.legend(ncols=len(names), fontsize=8)
    figure.savefig(path, dpi=110)


def make_cases(**choice: Any) -> Iterator[Case]:
    keys = ("sets", "layouts", "dtypes", "ranks")
    for set_, layout, dtype, ranks in itertools.product(*(choice[key] for key in keys)):
        for sample in SHAPES[set_]:
            shape = (choice["batch"], *sample)
            case = Case(set_, shape, layout, DTYPES[dtype], ranks, choice["device"])
            if case.is_possible() and not (layout == "channels_last" and len(sample) == 1):
                yield case


@click.command()
@click.option("--set", "sets", multiple=True, type=click.Choice(list(SHAPES)), default=["resnet50"])
@click.option("--batch", type=COUNT, default=64, show_default=True, help="Batch size N.")
@click.option("--ranks", multiple=True, type=COUNT, default=[8], help="Virtual ranks V.")
@click.option(
    "--layout",
    "layouts",
    multiple=True,
    type=click.Choice(["contiguous", "channels_last"]),
    default=["contiguous", "channels_last"],
)
@click.option(
    "--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)), default=["float32"]
)
@click.option(
    "--provider",
    "providers",
    multiple=True,
    type=click.Choice(list(PROVIDERS)),
    default=list(PROVIDERS),
)
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda.")
@click.option("--threads", type=COUNT, help="Threads of torch. Default: torch's own number.")
@click.option(
    "--repetitions", type=COUNT, default=7, show_default=True, help="Turns; medians are reported."
)
@click.option("--tests/--no-tests", default=True, help="Run the backend's tests first. Default: on")
@click.option("--json", "json_path", help="Write long-format records here.")
@click.option("--plot", "plot_path", help="Draw a picture (needs the extra 'plot').")
def main(
    providers: tuple[str, ...],
    device: str,
    threads: int | None,
    repetitions: int,
    tests: bool,
    json_path: str | None,
    plot_path: str | None,
    **choice: Any,
) -> None:
    """Time virtual-rank batch norm against torch's own and what people write by hand.

    Providers take turns in one process: plain (torch's BatchNorm), loop (a batch norm for each
    share, then cat), view (the interleaved view trick), compile (torch.compile of plain
    arithmetic), ours, clone (the floor). Options marked multiple may be repeated. The backend's
    tests run first (half a minute; they need the extra 'test'), then the results of ours are
    checked against the loop in float64; if either fails, nothing is timed and the exit code is 1.

    \b
    Example, the table in the README:
        python scripts/bench.py --set resnet50 --set small --dtype float32 --dtype bfloat16
    """
    torch.manual_seed(0)
    if threads:
        torch.set_num_threads(threads)
    cases = list(make_cases(device=device, **choice))
    if not cases:
        raise click.UsageError(
            "expected ranks that divide the batch and get more than one value each, but no shape "
            f"is left for a batch of {choice['batch']}; change --batch or --ranks."
        )
    if plot_path and "plain" not in providers:
        raise click.UsageError(
            "expected --provider plain beside --plot, which draws ratios to it, but it is left out."
        )
    for path in filter(None, (json_path, plot_path)):
        check_file(path)
    if tests:
        require_green_tests(device)
    for case in cases:
        sample = (case.shape[0], min(case.shape[1], 40), *(min(s, 20) for s in case.shape[2:]))
        fault = check(Case(case.set, sample, case.layout, case.dtype, case.ranks, device))
        if fault:
            raise click.ClickException(f"the results are wrong, so no time is reported: {fault}.")
    found = environment(device)
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    records: list[dict[str, Any]] = []
    with click.progressbar(cases, label="measuring", file=sys.stderr) as bar:
        for case in bar:
            records += [row | found for row in measure(case, providers, repetitions)]
    if json_path:
        with open(json_path, "w") as file:
            json.dump(records, file, indent=1)
    print_table(records)
    if plot_path:
        draw(records, plot_path)


if __name__ == "__main__":
    main()
