"""The command ``models``: what the zoo has, and one of its models as a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch

from distbn_convert import models
from distbn_convert.checkpoint import inspect_checkpoint

from .checkpoints import run_cli


def test_models_lists_the_zoo_and_exports_one(capsys: Any, tmp_path: Path) -> None:
    assert run_cli(capsys, "models", "resnet18", "vgg11").out.split() == [
        *("resnet18", "20"),
        *("vgg11", "0"),
    ]
    for words in (
        ("--json", "resnet18"),
        ("resnet18", "--json"),
        ("--no-color", "--json", "res*18"),
    ):
        assert run_cli(capsys, "models", *words).json["batch_norms"] == {"resnet18": 20}
    for words in (("resnet18",), ("export",), ()):
        assert "--json" in run_cli(capsys, "models", *words, "--help").out
    for name in ("r.pth", "r.safetensors"):
        path = tmp_path / name
        done = run_cli(capsys, "models", "export", "resnet18", path, "--vt-world-size", 2)
        assert done.code == 0, done.err
        assert inspect_checkpoint(path).virtual_ranks == 2
        assert len(inspect_checkpoint(path).groups) == 20
    assert run_cli(capsys, "models", "export", "resnet18", path, "--vt-world-size", 2).code == 6


def test_each_model_is_listed_once_it_is_counted(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them take a while, in which nothing was to be seen."""

    def count(name: str) -> int:
        assert name != "resnet101"
        return 7

    monkeypatch.setattr(models, "count_batch_norms", count)
    assert run_cli(capsys, "models", "resnet101", "res*").out == ""
    assert run_cli(capsys, "models", "alexnet", "resnet101").out.split() == ["alexnet", "7"]


def test_weights_that_cannot_be_fetched_are_told(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no such host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    options = ["--vt-world-size", 2, "--weights", "DEFAULT"]
    done = run_cli(capsys, "models", "export", "resnet18", tmp_path / "o", *options)
    assert done.code == 7
    told = "Error: cannot fetch the weights DEFAULT of resnet18: no such host; check the network"
    assert done.err.splitlines()[-1].startswith(told)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("arguments", [[], ["export", "resnet18", "o", "--vt-world-size", "2"]])
def test_models_without_torchvision_say_what_to_install(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    done = run_cli(capsys, "models", *arguments)
    assert done.code == 1
    assert done.err.endswith("install it with: pip install 'distbn_convert[models]'\n")


@pytest.mark.parametrize(
    ("code", "arguments", "told"),
    [
        (2, ["no_such_model"], "none matches no_such_model; run the command without names"),
        (2, ["export", "nonsense", "o", "--vt-world-size", "2"], "but got 'nonsense'"),
        (2, ["export", "resnet18", "o", "--vt-world-size", "2", "--weights", "X"], "but got 'X'"),
        (2, ["export", "resnet18", "o", "--vt-world-size", "0"], "must be a positive int"),
        (3, ["export", "squeezenet1_1", "o", "--vt-world-size", "2"], "with some BatchNorm"),
    ],
)
def test_what_models_cannot_do_is_one_sentence(
    capsys: Any, code: int, arguments: list[str], told: str
) -> None:
    done = run_cli(capsys, "models", *arguments)
    assert (done.code, done.out) == (code, "")
    assert told in done.err.splitlines()[-1]
    assert "bug" not in done.err
    assert run_cli(capsys, "models", *arguments, "--json").json["error"]["exit_code"] == code
