"""The command line on odd input: names, text from files, options that contradict each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distbn_convert.checkpoint import convert_checkpoint

from .checkpoints import Net, load, run_cli

BELL = "\x1b]0;owned\x07\x1b[2J\r\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow UTF-8 names alone")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", [b"\xff", b"-x", b"%s {0}", b"line\nbreak", b"\x1b[31m", b" "])
def test_a_file_may_have_any_name(capsys: Any, tmp_path: Path, name: bytes, suffix: str) -> None:
    plain, virtual, back = (
        tmp_path / (start + os.fsdecode(name) + suffix) for start in ("", "v", "b")
    )
    made = tmp_path / "made"
    torch.save(Net().state_dict(), made)
    convert_checkpoint(
        made, tmp_path / f"made{suffix}", 2, format="auto" if suffix == ".pth" else "safetensors"
    )
    os.replace(tmp_path / f"made{suffix}", virtual)
    done = run_cli(capsys, "revert", "--", virtual, plain)
    assert (done.code, done.err) == (0, "")
    assert len(done.out.splitlines()) == 1
    assert done.out.rstrip("\n").isprintable()
    assert run_cli(capsys, "convert", "--vt-world-size", 2, "--", plain, back).code == 0
    assert run_cli(capsys, "convert", "-f", "--vt-world-size", 2, "--", plain, back).code == 0
    assert back.read_bytes() == virtual.read_bytes()


CONVERT_ALL = """
import sys
from distbn_convert.checkpoint import convert_checkpoint
for name in sys.argv[1:]:
    convert_checkpoint(name, name + "v", 2, fsync=False)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow UTF-8 names alone")
@pytest.mark.parametrize("locale", ["C", "latin-1"])
def test_a_name_need_not_be_of_the_encoding_of_the_locale(tmp_path: Path, locale: str) -> None:
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    if locale == "latin-1":
        made = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / "locale")]
        if not shutil.which("localedef") or subprocess.run(made, capture_output=True).returncode:
            pytest.skip("this system cannot make a locale with ISO-8859-1")
        env |= {"LOCPATH": str(tmp_path), "LC_ALL": "locale"}
    names = [os.fsencode(tmp_path) + b"/" + name for name in (b"gr\xf6\xdfe", "日本".encode())]
    for name in names:
        torch.save(Net().state_dict(), os.fsdecode(name))
    done = subprocess.run([sys.executable, "-c", CONVERT_ALL, *names], env=env, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert {name + b"v" for name in names} <= {
        entry.path for entry in os.scandir(os.fsencode(tmp_path))
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "", "o", "--vt-world-size", "2"),
        ("convert", "in.pth", "", "--vt-world-size", "2"),
        ("convert", "in.pth", "", "--vt-world-size", "2", "--in-place"),
        ("revert", "", "o"),
        ("revert", "v.pth", ""),
        ("inspect", ""),
        ("inspect", "v.pth", "--plot", ""),
        ("gather", "", "in.pth", "o"),
        ("gather", "in.pth", "", "o"),
        ("gather", "in.pth", "in.pth", ""),
        ("verify", ""),
        ("verify", "in.pth", "--against", ""),
        ("models", "export", "resnet18", "", "--vt-world-size", "2"),
    ],
)
def test_an_empty_path_is_told_as_one(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    """It is not the current folder, in which a checkpoint may well be."""
    monkeypatch.chdir(tmp_path)
    torch.save(Net().state_dict(), "in.pth")
    convert_checkpoint("in.pth", "v.pth", 2)
    before = sorted(os.listdir())
    done = run_cli(capsys, *arguments)
    assert done.code == 2
    assert done.err == "Error: expected a path, but got an empty one; name a file or a folder.\n"
    assert sorted(os.listdir()) == before
    assert run_cli(capsys, *arguments, "--json").json["error"]["code"] == "usage"


def test_text_from_a_file_cannot_steer_the_terminal(capsys: Any, tmp_path: Path) -> None:
    statistics = {f"{BELL}bn.running_mean": torch.ones(3), f"{BELL}bn.running_var": torch.ones(3)}
    torch.save({BELL: statistics}, tmp_path / "in.pth")
    virtual = tmp_path / "v.pth"
    for args in (
        ("inspect", tmp_path / "in.pth"),
        ("convert", tmp_path / "in.pth", virtual, "--vt-world-size", 2, "-v"),
        ("convert", virtual, tmp_path / "w.pth", "--vt-world-size", 2),
        ("verify", virtual, "--against", tmp_path / "in.pth"),
        ("inspect", virtual),
    ):
        done = run_cli(capsys, *args)
        assert "owned" in done.out + done.err or args[0] == "verify"
        assert all(line.isprintable() for line in (done.out + done.err).split("\n")), args


def test_the_table_of_inspect_tells_all_that_it_knows(capsys: Any, tmp_path: Path) -> None:
    virtual = {"running_mean": torch.tensor([[1.0], [3.0]]), "running_var": torch.ones(2, 1)}
    plain = {"running_mean": torch.zeros(12), "running_var": torch.full((12,), float("inf"))}
    tree = {"a": virtual, "long.name": plain, "other": dict(plain), "object": Net}
    torch.save(tree, tmp_path / "in.pth")
    done = run_cli(capsys, "inspect", tmp_path / "in.pth", "--opaque", "--exclude", "other")
    assert done.out.splitlines()[1:] == [
        "layer       C    dtype  batches  V          means    variances",
        "a           1  float32        -  2  1.000 (1.000)  0.0% (0.0%)",
        "long.name  12  float32        -  -              -            -  12 not finite",
        "other      12  float32        -  -              -            -  "
        "skipped: matched by --exclude  12 not finite",
        "means, variances: standard deviation over the ranks, at the median (worst) channel;",
        "of means in standard deviations of the channel, of variances relative to it",
        "Python objects, not executed: tests.checkpoints.Net",
    ]
    paths = tmp_path / "in.pth", tmp_path / "out.pth"
    done = run_cli(capsys, "convert", *paths, "--vt-world-size", 2, "--opaque")
    assert done.out.splitlines()[1:] == ["carried through, not executed: tests.checkpoints.Net"]


def test_a_rank_without_select_is_a_usage_error(capsys: Any, tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "in.pth")
    convert_checkpoint(tmp_path / "in.pth", tmp_path / "v.pth", 4)
    done = run_cli(capsys, "revert", tmp_path / "v.pth", tmp_path / "o.pth", "--rank", 3)
    assert done.code == 2
    assert "--rank 3 goes with --reduction select, not mean." in done.err
    assert not (tmp_path / "o.pth").exists()
    done = run_cli(
        capsys,
        *("revert", tmp_path / "v.pth", tmp_path / "o.pth", "--rank", 3, "--reduction", "select"),
    )
    assert done.code == 0
    assert load(tmp_path / "o.pth").keys() == load(tmp_path / "in.pth").keys()


def test_several_numbers_of_ranks_are_told_as_such(capsys: Any, tmp_path: Path) -> None:
    state = {
        f"{v}.{key}": torch.ones(v, 3) for v in (2, 4) for key in ("running_mean", "running_var")
    }
    torch.save(state, tmp_path / "in.pth")
    done = run_cli(capsys, "revert", tmp_path / "in.pth", tmp_path / "out")
    assert "reverted 2 BatchNorms from several numbers of virtual ranks by mean: " in done.out
