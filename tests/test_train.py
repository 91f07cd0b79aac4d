"""scripts/train.py, run as a user runs it."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image

from distbn_convert import DistBatchNorm2d, models

from .scripts import run_scripts

ROOT = Path(__file__).parent.parent
SCRIPT = "scripts/train.py"
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp")]


def run(*command: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def load(folder: Path, name: str = "checkpoint.pth") -> Any:
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("val", 6)):
        for label in range(2):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return root


def test_short_epochs_are_averaged_too(image_folder: Path, tmp_path: Path) -> None:
    options = ["--data-path", str(image_folder), "--epochs", "2", "--vt-world-size", "4", "-b", "4"]
    options += ["-j", "1", "--train-crop-size", "32", "--val-resize-size", "36", "--model-ema"]
    run(sys.executable, SCRIPT, *options, "--val-crop-size", "32", "--output-dir", str(tmp_path))
    averaged = [load(tmp_path, f"model_{epoch}.pth")["model_ema"]["n_averaged"] for epoch in (0, 1)]
    assert averaged == [1, 2]  # the first batch of each, as in torchvision
    parts = load(tmp_path, "model_0.pth")
    assert parts["model_ema"]["module.bn1.num_batches_tracked"].tolist() == [1] * 4


def test_norms_of_every_kind_have_the_weight_decay_of_norms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    building = importlib.import_module("building")
    model = models.get_model("maxvit_t", 2, num_classes=2)
    args = building.Args(opt="sgd", lr=0.1, momentum=0.9, weight_decay=0.1, norm_weight_decay=0.0)
    others, norms = building.make_optimizer(model, args).param_groups
    kinds = torch.nn.LayerNorm, DistBatchNorm2d
    expected = [p for m in model.modules() if isinstance(m, kinds) for p in m.parameters()]
    assert {id(p) for p in norms["params"]} == {id(p) for p in expected}
    assert (others["weight_decay"], norms["weight_decay"]) == (0.1, 0.0)


def test_batches_that_the_data_cannot_fill_are_refused() -> None:
    command = [sys.executable, SCRIPT, "--epochs", "1", "--batch-size", "256"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "for a batch of 256 on each of 8 GPUs, but there are 1437; lower" in done.stderr


def test_counts_below_one_are_usage_errors() -> None:
    options = "--model-ema-steps", "--epochs", "--batch-size", "--vt-world-size"
    for end, option in zip(
        run_scripts([["train.py", option, "0"] for option in options]), options, strict=True
    ):
        assert end.code == 2
        assert f"{option}': 0 is not in the range x>=1" in end.err


def test_a_resumed_run_equals_an_uninterrupted_one(image_folder: Path, tmp_path: Path) -> None:
    options = ["--data-path", str(image_folder), "--epochs", "2", "--lr-warmup-epochs", "1"]
    options += ["--vt-world-size", "4", "-b", "4", "-j", "1", "--train-crop-size", "32"]
    options += ["--val-resize-size", "36", "--val-crop-size", "32", "--partition", "interleaved"]
    options += ["--amp", "--channels-last", "--model-ema", "--model-ema-steps", "1"]
    options += ["--norm-weight-decay", "0", "--label-smoothing", "0.1", "--clip-grad-norm", "1"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    printed = run(sys.executable, SCRIPT, *options, "--output-dir", str(whole))
    again = run(
        *(sys.executable, SCRIPT, *options, "--output-dir", str(resumed)),
        *("--resume", str(whole / "model_0.pth")),
    )
    pattern = r"epoch (\d): loss [\d.]+, accuracy ([\d.]+) %, EMA accuracy ([\d.]+) %, \d+ img/s"
    assert [match[0] for match in re.findall(pattern, printed)] == ["1", "2"]
    assert re.findall(pattern, again) == re.findall(pattern, printed)[1:]
    assert sorted(path.name for path in whole.iterdir()) == [
        "checkpoint.pth",
        "model_0.pth",
        "model_1.pth",
    ]
    first, expected, result = load(whole, "model_0.pth"), load(whole), load(resumed)
    assert expected["epoch"] == 1
    for part in ("model", "model_ema"):
        for name, value in expected[part].items():
            assert torch.equal(value, result[part][name]), name
        assert not torch.equal(
            expected[part][[*expected[part]][-2]], first[part][[*first[part]][-2]]
        )
    assert expected["lr_scheduler"] == result["lr_scheduler"]
    assert expected["model"]["bn1.running_mean"].shape == (4, 64)
    models.get_model("resnet18", 4, num_classes=2).load_state_dict(expected["model"])

    revert = "import sys; from distbn_convert.cli import main; sys.argv[0] = 'x'; main()"
    plain = tmp_path / "plain.pth"
    run(sys.executable, "-c", revert, "revert", str(whole / "checkpoint.pth"), str(plain))
    reverted = load(tmp_path, "plain.pth")
    model = torchvision.models.resnet18(num_classes=2)
    model.load_state_dict(reverted["model"])
    assert reverted["model_ema"]["module.bn1.running_mean"].shape == (64,)

    tested = run(
        *(sys.executable, SCRIPT, *options, "--test-only"),
        *("--resume", str(whole / "checkpoint.pth")),
    )
    assert tuple(re.findall(r"accuracy ([\d.]+) %", tested)) == re.findall(pattern, printed)[1][1:]


def test_torchrun_with_two_ranks_each_equals_one_process_with_four(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step on the digits, which are not augmented; more would amplify float32's rounding.

    This network does so in a single step: an input that differs by 1e-7 gives gradients that differ
    by 0.7 %. So both sides compute with plain operations, which add up a share of samples in one
    order whatever the batch around it; the native kernel's order depends on the batch, and its
    equality with DDP is tested layer by layer.
    """
    monkeypatch.setenv("DISTBN_CPU_KERNEL", "off")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    commands = {
        "four": [sys.executable, SCRIPT, "--vt-world-size", "4", "-b", "300"],
        "two": [*torchrun, "--nproc-per-node=2", SCRIPT, "--vt-world-size", "2", "-b", "300"],
        "plain": [sys.executable, SCRIPT, "--vt-world-size", "1", "-b", "1200"],
    }
    options = ["--epochs", "1", "--model", "shufflenet_v2_x0_5", "--output-dir"]
    states, losses = {}, {}
    for name, command in commands.items():
        printed = run(*command, *options, str(tmp_path / name))
        assert len(re.findall(r"accuracy ([\d.]+)", printed)) == 1  # process 0 alone talks
        losses[name] = float(re.findall(r"loss ([\d.]+)", printed)[0])
        states[name] = load(tmp_path / name)["model"]

    tested = run(*commands["two"], *options, str(tmp_path), "--test-only")
    assert len(re.findall(r"accuracy ([\d.]+)", tested)) == 1

    torch.manual_seed(0)
    initial = models.get_model("shufflenet_v2_x0_5", 4, num_classes=10).state_dict()

    def moved(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        pairs = [(state[k], other[k]) for k in state if k.endswith(("weight", "bias"))]
        return float(torch.cat([(a - b).flatten() for a, b in pairs]).norm())

    assert losses["two"] == pytest.approx(losses["four"], abs=2e-4)  # of all, not of process 0
    whole = moved(states["four"], initial)
    assert moved(states["two"], states["four"]) < 1e-3 * whole
    assert moved(states["plain"], states["four"]) > 1e-1 * whole
    for name in ("conv1.1.running_mean", "conv1.1.running_var"):
        average = states["four"][name].mean(0)  # synchronised: every row is the average
        torch.testing.assert_close(states["two"][name], average.expand(2, -1))
    assert states["two"]["conv1.1.num_batches_tracked"].tolist() == [1, 1]


def test_compiled_training_runs(image_folder: Path) -> None:
    """With a backend that needs no minutes; inductor itself is tested with the layers."""
    options = ["--data-path", str(image_folder), "--epochs", "1", "--vt-world-size", "2", "-b", "8"]
    options += ["--train-crop-size", "32", "--val-resize-size", "32", "--val-crop-size", "32"]
    printed = run(
        sys.executable, SCRIPT, *options, "--compile", "aot_eager", "--opt", "adamw", "--lr", "1e-3"
    )
    assert re.search(r"epoch 1: loss [0-9.]+, accuracy [0-9.]+ %", printed)
