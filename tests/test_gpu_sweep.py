"""scripts/gpu_sweep.py without a GPU: what it would time, and what it keeps."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distbn_convert.kernels.gpu.rule import Choice

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    bench, module = (importlib.import_module(name) for name in ("gpu_bench", "gpu_sweep"))
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    yield module
    for name in ("gpu_bench", "gpu_sweep", "gpu_table"):
        sys.modules.pop(name, None)


def test_candidates_are_the_rules_choice_and_others_that_cover_their_share(sweep: Any) -> None:
    kinds, staged = {False: set(), True: set()}, False
    for layer in sweep.layers():
        share, choices = layer.share(), sweep.candidates(layer)
        assert choices[0] == share.choose(layer.backward)
        assert len(choices) == len(set(choices)) > 5
        for choice in choices:
            kinds[share.last].add(choice.kind)
            covered = {"resident": choice.rows, "planes": choice.rows * share.positions}
            values = covered.get(choice.kind, choice.splits * choice.size or share.values)
            staged |= choice.stages > 1
            assert choice.stages == 1 or (layer.backward and choice.kind in ("loop", "swept"))
            assert values >= share.values
            assert choice.rows & (choice.rows - 1) == 0
            if choice.kind == "cooperative":
                assert 4 * choice.splits <= 132
            if choice.kind == "pipelined":  # one program of 8 warps on a multiprocessor, or two
                assert choice.groups * choice.splits * choice.warps <= 128 * max(choice.warps, 8)
                merged = 2 * choice.channels * sweep.power_of_two(choice.splits)
                assert merged <= 64 * 32 * choice.warps  # what a thread holds beside its tiles
    assert staged
    assert kinds[False] == {"resident", "planes", "loop", "swept", "cooperative"}
    assert kinds[True] == {"loop", "pipelined", "split", "ticketed"}


def test_layers_can_be_left_out(sweep: Any) -> None:
    layers = list(sweep.layers(["backward", "contiguous"]))
    assert {layer[:2] for layer in layers} == {("contiguous", "bf16"), ("contiguous", "fp32")}
    assert all(layer.backward for layer in layers)
    assert len(layers) == len(list(sweep.layers())) / 3
    assert not list(sweep.layers(["channels_last", "fp32"]))


def pretend(sweep: Any, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    """Two layers, whose candidates all give the same, but for one."""
    layers = [sweep.Layer("contiguous", "bf16", 256, 14, backward) for backward in (False, True)]
    bad = sweep.candidates(layers[1])[-1]

    def prepare(layer: Any, device: str) -> Callable[[Choice], list[Tensor]]:
        return lambda choice: [torch.ones(3) + (wrong if choice == bad else 0.0)]

    monkeypatch.setattr(sweep, "layers", lambda only=(): layers)
    monkeypatch.setattr(sweep, "prepare", prepare)
    monkeypatch.setattr(sweep, "compile_all", lambda only: None)
    times = iter(range(1000, 0, -1))
    monkeypatch.setattr(sweep.gpu_bench, "median_ms", lambda function: float(next(times)))


def test_all_are_kept_with_the_machine_the_fastest_first(
    sweep: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(sweep, monkeypatch, 0.0)
    sweep.main(str(tmp_path / "runs" / "sweep.json"))  # a folder that a checkout does not have
    kept = json.loads((tmp_path / "runs" / "sweep.json").read_text())
    assert kept["machine"].keys() >= {"device", "torch", "triton", "commit"}
    for layer in sweep.layers():
        found = [each for each in kept["candidates"] if each["layer"] == layer._asdict()]
        assert [Choice(**each["choice"]) for each in found] == sweep.candidates(layer)[::-1]
        assert [each["ms"] for each in found] == sorted(each["ms"] for each in found)
    assert capsys.readouterr().out.count("fastest") == 2


def test_wrong_results_end_it_and_what_was_timed_is_kept(
    sweep: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(sweep, monkeypatch, 1e-3)
    with pytest.raises(SystemExit, match="expected what .* gives, but .* 1.0e-03 off"):
        sweep.main(str(tmp_path / "sweep.json"))
    kept = json.loads((tmp_path / "sweep.json").read_text())
    assert {each["layer"]["backward"] for each in kept["candidates"]} == {False}


def test_the_rule_is_asked_again_after_a_candidate_has_run(sweep: Any) -> None:
    before = sweep.launch.select_kernel
    with sweep.forced(Choice("loop", 8, 1, 1)):
        assert sweep.launch.select_kernel(anything=1).kind == "loop"
    assert sweep.launch.select_kernel is before
