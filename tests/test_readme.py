"""The README's blocks: each python block runs, and prints the text block that follows it."""

from __future__ import annotations

import configparser
import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .scripts import run_scripts

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


# Commands of console blocks that other tests run, or that install: by how they begin.
ELSEWHERE = ("./scripts/", "pip install", "python scripts/", "torchrun ")


def run_console(block: str, folder: Path) -> int:
    """Run the commands of a console block and compare what they print; return their number."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    transcript = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    commands = [(line, said) for line, said in transcript if not line.startswith(ELSEWHERE)]
    for command, said in commands:
        run = subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert run.stdout == said, command
    return len(commands)


def test_blocks_print_what_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "readme"}
    compared = commands = 0
    for (kind, code), following in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if kind == "console":
            commands += run_console(code, tmp_path)
        if kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), namespace)
        expected = following[1] if following[0] == "text" else ""
        assert printed.getvalue() == expected
        compared += 1
    assert compared >= 10
    assert commands >= 8


def test_every_kind_of_block_is_run_by_some_test() -> None:
    assert {kind for kind, _ in BLOCKS} == {"python", "text", "console"}


def test_the_extra_of_the_tests_holds_what_every_script_needs() -> None:
    """So that no script installs anything where the tests' environment is made."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = config["options.extras_require"]
    needed = {
        extra
        for script in (ROOT / "scripts").iterdir()
        if script.is_file() and script.suffix in ("", ".sh")
        for extra in re.findall(
            r"^make_environment (\w+)$", script.read_text("utf-8"), re.MULTILINE
        )
    }
    assert {"examples", "test"} <= needed
    held = set(extras["test"].splitlines())
    assert all(set(extras[extra].splitlines()) <= held for extra in needed)


def test_every_script_has_a_help_and_does_nothing_else_then(tmp_path: Path) -> None:
    pytest.importorskip("triton")  # which some import
    scripts = [*(ROOT / "scripts").glob("*.py")]
    scripts = [path for path in scripts if "__main__" in path.read_text("utf-8")]
    assert len(scripts) >= 10
    ends = run_scripts([[path.name, "--help"] for path in scripts], tmp_path)
    assert [end.code for end in ends] == [0] * len(scripts)
    assert all(end.out.lower().count("usage: ") == 1 for end in ends)
    for name in ("gpu_check", "test_torch"):  # others pass their arguments on
        told = subprocess.check_output([ROOT / "scripts" / name, "--help"], text=True, timeout=20)
        assert told.startswith("Test")
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_does_not_time_nothing_and_call_it_done() -> None:
    settings = [["--batch", "60"], ["--ranks", "0"], ["--ranks", "65"]]
    for end, setting in zip(
        run_scripts([["bench.py", "--no-tests", *setting] for setting in settings]),
        settings,
        strict=True,
    ):
        assert end.code == 2
        assert end.err.splitlines()[-1].startswith("Error: ")
        assert setting[0] in end.err.splitlines()[-1]


def test_the_benchmark_of_checkpoints_ends_where_a_variant_fails(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/bench_checkpoint.py", "--variant", "load_file + save_file"]
    run = subprocess.run(
        [*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    assert "No such file" in run.stderr


@pytest.mark.slow
def test_quickstart_trains_converts_back_and_prints_equal_accuracies(tmp_path: Path) -> None:
    """`./scripts/test` itself is the other command: it is what runs this."""
    run = subprocess.run(
        [ROOT / "scripts" / "quickstart", "--epochs", "1", "--output", "checkpoints"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    accuracies = re.findall(r"accuracy .*: +([\d.]+) %", run.stdout)
    assert len(accuracies) == 2
    assert accuracies[0] == accuracies[1]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "plain.pth",
        "virtual.pth",
    ]
