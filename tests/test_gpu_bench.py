"""scripts/gpu_bench.py and gpu_check without a GPU: every path of them, and their verdicts."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield
    for name in ("gpu_bench", "gpu_predict", "gpu_table"):
        sys.modules.pop(name, None)


def once_ms(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


@pytest.fixture
def bench(scripts: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark with a batch of four, one layer and the CPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    module = importlib.import_module("gpu_bench")
    small = {"DEVICE": "cpu", "SAMPLES": 4, "RANKS": 2, "SIDE": 32, "STEPS": 1}
    small |= {"LAYERS": {(8, 3): 53}, "COPIED": 2**10, "median_ms": once_ms}
    small["predictions"] = lambda: {(*bar[:3], "8", "3"): 1.5 for bar in module.BARS}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    return module


class Clock:
    """A host that asks, and a device that follows in order, in seconds; in place of torch.cuda."""

    def __init__(self, cycles_per_second: float) -> None:
        self.now, self.idle_from = 0.0, 0.0
        self.cycles_per_second = cycles_per_second

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        """Ask for something that takes the device so long."""
        self.idle_from = max(self.idle_from, self.now) + seconds

    def _sleep(self, cycles: int) -> None:
        self.work(cycles / self.cycles_per_second)

    def synchronize(self) -> None:
        self.now = max(self.now, self.idle_from)

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        assert enable_timing
        clock = self

        class Event:
            def record(self) -> None:
                self.at = max(clock.idle_from, clock.now)

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) * 1e3

        return Event()


@pytest.mark.parametrize("cycles_per_second", [1.2e9, 1.98e9])
@pytest.mark.parametrize("host_ms", [0.05, 0.4, 30.0])
def test_a_slow_host_is_not_timed(
    host_ms: float, cycles_per_second: float, scripts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    module: Any = importlib.import_module("gpu_bench")
    clock = Clock(cycles_per_second)
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "CLEARED", 8)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(torch, "cuda", clock)

    def call() -> None:
        for _ in range(2):  # two launches
            clock.now += host_ms / 2 / 1e3
            clock.work(0.1 / 1e3)

    assert module.median_ms(call) == pytest.approx(0.2)


def test_every_bar_is_measured_and_kept_as_data(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs" / "results.json"  # a folder that a checkout does not have
    bench.main(str(path))
    results, table = json.loads(path.read_text()), capsys.readouterr().out.splitlines()
    assert len(results["summary"]) == len(bench.BARS) == 10
    assert all(row["ms"] > 0 and row["plain_ms"] > 0 for row in results["summary"])
    measured = {(row["dtype"], row["layout"], row["pass"]) for row in results["layers"]}
    assert measured == {bar[:3] for bar in bench.BARS}
    assert all(row["off_ms"] > 0 for row in results["summary"])
    assert all(row["unsized_ms"] > 0 for row in results["layers"])
    assert all(row["copy_ms"] > 0 for row in results["layers"])
    assert results["machine"].keys() >= {"device", "l2_bytes", "torch", "triton", "commit"}
    assert [line.split("  ")[0] for line in table[2:-1]] == [bar.name for bar in bench.BARS]
    assert table[-1].startswith("ResNet-50 step")
    assert all(("met" in line) != ("MISSED" in line) for line in table[-1:])


def test_what_was_measured_before_an_interruption_is_kept(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(norm: str) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "time_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.main(str(tmp_path / "results.json"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["layers"]) == len(bench.BARS)
    assert "summary" not in results


def test_a_step_that_does_not_fit_in_memory_hides_no_layer(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def overflow(norm: str) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "time_step", overflow)
    bench.main(str(tmp_path / "results.json"))
    assert json.loads((tmp_path / "results.json").read_text())["step"] is None
    *_, layer, step = capsys.readouterr().out.splitlines()
    assert layer.startswith(bench.BARS[-1].name)
    assert step.endswith("channels_last: not timed, it does not fit in the device's memory")


def test_a_copy_without_a_history_is_measured_all_the_same(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert bench.machine()["commit"] == "unknown"


def test_switch_is_put_back(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "on"):
        monkeypatch.delenv(bench.SWITCH, raising=False)
        if before:
            monkeypatch.setenv(bench.SWITCH, before)
        with bench.switched_off():
            assert os.environ[bench.SWITCH] == "off"
        assert os.environ.get(bench.SWITCH) == before


def test_the_host_is_timed_with_both_dispatches() -> None:
    pytest.importorskip("triton")
    code = "import bench_host as b; b.TURNS, b.CALLS = 1, 2; b.main()"
    path = os.pathsep.join(map(str, (SCRIPTS.parent, SCRIPTS)))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    _, _, *lines = run.stdout.splitlines()
    assert [int(line[28:].split()[0]) for line in lines] == [1, 2, 3, 3, 3, 6]  # launches
    assert all(0 < float(line.split()[-1]) < 10 for line in lines)


def test_kernels_for_every_size_are_timed_beside_others(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = bench.launch
    monkeypatch.setattr(launch, "_sizes", {9, 25})
    most, x = launch._MOST_SIZES, torch.randn(4, 8, 3, 3)
    assert launch.describe(x, False, 2, False).sized
    with bench.unsized():
        assert not launch.describe(x, False, 2, False).sized
    assert launch.describe(x, False, 2, False).sized
    assert (launch._sizes, launch._MOST_SIZES) == ({9, 25}, most)


def test_kernels_that_wait_are_timed_beside_others_and_put_back(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bench.rule.ENABLED
    with bench.only_enabled(frozenset({"ticketed"})):
        assert set(bench.rule.ENABLED) == {"ticketed"}
    assert bench.rule.ENABLED is before
    x = torch.randn(64, 2, 64, 64)
    monkeypatch.setattr(bench, "RANKS", 2)
    rows = {row["pass"]: row for row in bench.time_layer(x, {"relu forward"}, 1.0)}
    assert rows.keys() == {"forward", "backward", "relu forward"}
    for row in rows.values():
        kernels = row["kernel"], row["ticketed_kernel"], row["unaided_kernel"]
        assert kernels == ("cooperative", "ticketed", "split")
        assert len({row["ms"], row["ticketed_ms"], row["unaided_ms"]}) == 3


def test_staged_loops_are_timed_beside_others(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RANKS", 128)
    x = torch.randn(128, 2, 182, 182)
    rows = {row["pass"]: row for row in bench.time_layer(x, set(), 1.0)}
    assert rows["backward"]["staged_kernel"] == rows["backward"]["kernel"] == "loop"
    assert rows["backward"]["staged_ms"] != rows["backward"]["ms"]


STUB = """#!/bin/sh
case "$*" in
    *sanitized*) echo "sanitized, caching $PYTORCH_NO_CUDA_MEMORY_CACHING"; exit 0;;
    *"-m pytest"*) echo "tests ran"; exit $TESTS;;
    *gpu_bench*) echo "the table"; exit 0;;
esac
"""


@pytest.mark.parametrize("status", [0, 1])
def test_the_check_shows_all_it_can_and_fails_if_a_part_does(tmp_path: Path, status: int) -> None:
    sanitizer = '#!/bin/sh\nwhile [ "${1##*/}" != stub ]; do shift; done\nexec "$@"\n'
    for name, text in (("stub", STUB), ("compute-sanitizer", sanitizer)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "stub")}
    run = subprocess.run(
        [SCRIPTS / "gpu_check", tmp_path / "results.json"],
        env={**environment, "TESTS": str(status)},
        capture_output=True,
        text=True,
    )
    said = [line for line in run.stdout.splitlines() if not line.startswith("==")]
    assert said == ["tests ran", "sanitized, caching 1", "sanitized, caching ", "the table"]
    assert run.returncode == status
    assert run.stderr.startswith("Error: failed: tests (1), see above" if status else "")


@pytest.mark.slow
def test_compiled_steps_are_timed(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 1000)
    monkeypatch.setattr(bench, "resnet50", lambda: torch.nn.Sequential(*net, *head))
    torch._dynamo.reset()
    bench.main(str(tmp_path / "results.json"), "compiled")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["compiled_step_ms"].keys() == {"plain", "op", "decomposed"}


@pytest.mark.usefixtures("scripts")
def test_table_says_of_each_bar_whether_it_is_met() -> None:
    table = importlib.import_module("gpu_table")
    rows = [
        {"dtype": bar.dtype, "layout": bar.layout, "pass": bar.what, "count": count}
        | {"ms": 1.0, "plain_ms": 2.0, "ticketed_ms": 1.25, "unaided_ms": 1.5}
        | {"staged_ms": 0.75, "swept_ms": 0.25, "pipelined_ms": 0.5}
        | {"off_ms": 2.5, "floor_ms": 0.75, "predicted": 1.1}
        for bar in table.BARS
        for count in (50, 3)
    ]
    text = table.render(table.summarize(rows), {"converted_ms": 11.0, "plain_ms": 10.0}, "title")
    lines = text.splitlines()
    times = "     53.00     39.75     13.25     26.50     66.25     79.50    132.50    106.00"
    first = f"{times}    0.50 <= 0.60 met       1.33 <= 1.25 MISSED       1.10"
    assert lines[2] == f"{'bf16 contiguous forward':34}{first}"
    last = f"      11.0{'':60}      10.0    1.10 <= 1.00 MISSED"
    assert lines[-1] == f"ResNet-50 step, bf16 channels_last{last}"


@pytest.mark.slow
def test_predictions_are_of_the_kernels_as_they_are(scripts: None) -> None:
    """Of one layer for each kind of kernel; with another compiler they would be others."""
    triton = pytest.importorskip("triton")
    predict, table = (importlib.import_module(name) for name in ("gpu_predict", "gpu_table"))
    with table.PREDICTIONS.open(encoding="utf-8") as file:
        kept = list(csv.DictReader(file))
    assert len(kept) == len(table.BARS) * len(predict.RESNET50)
    assert len(table.predictions()) == len(kept)
    if kept[0]["triton"] != triton.__version__:
        pytest.skip(f"predicted with Triton {kept[0]['triton']}, this is {triton.__version__}")
    bars = {bar[:3]: bar for bar in table.BARS}
    first = {row["kernel"]: row for row in kept}
    assert first.keys() == {"resident", "planes", "cooperative", "loop", "split", "ticketed"}
    assert all(row["layout"] == "channels_last" for row in kept if row["pipelined"])
    for row in first.values():
        bar = bars[row["dtype"], row["layout"], row["pass"]]
        layer = int(row["channels"]), int(row["side"])
        again = predict.predict(bar, *layer) | {"pipelined": predict.predict_pipelined(bar, *layer)}
        assert {name: "" if value is None else str(value) for name, value in again.items()} == row


def test_what_machine_code_executes_is_told_from_what_it_holds(scripts: None) -> None:
    pytest.importorskip("triton")
    predict = importlib.import_module("gpu_predict")
    lines = [
        "FADD R1, R2, R3", "FCHK P0, R1, R2", "@!P0 BRA 0x50", "MOV R5, R6", "CALL.REL 0xf0",
        "LDG.E.EF.128 R4, [R2.64]", *["FADD R8, R4, R8"] * 6, "@P1 BRA 0x50", "FADD R9, R7, R9",
        "EXIT", "MUFU.RCP R1, R1", "NOP",
    ]  # fmt: skip
    text = "\n".join(f"        /*{16 * at:04x}*/   {line} ;" for at, line in enumerate(lines))
    code = predict.read(text)
    assert [line for _, line in code.body] == [*lines[:3], *lines[5:-2]]
    assert code.loops == []  # too short to be more than a wait
    latency = predict.latency(predict.Program(code.part(0, 1 << 12), 1))
    assert latency > predict.FROM_MEMORY
    fast = predict.Program(code.part(0, 1 << 12), 1, predict.FROM_L2)
    assert latency - predict.latency(fast) == predict.FROM_MEMORY - predict.FROM_L2
