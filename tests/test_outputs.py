"""Scripts refuse outputs that they could not write before they work for them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from .scripts import ROOT, run_scripts

SMALL = ["--set", "small", "--batch", "16", "--no-tests", "--repetitions", "1"]
WRITING = [
    ["train.py", "--epochs", "1", "--output-dir"],
    ["digits.py", "--epochs", "1", "--output"],
    ["reproduce.py", "--seeds", "1", "--epochs", "1", "--output"],
    ["bench.py", *SMALL, "--json"],
    ["bench.py", *SMALL, "--plot"],
    ["bench_compile.py"],
]
IN_TRITON = [["gpu_bench.py"], ["gpu_sweep.py"]]


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    commands = WRITING + (IN_TRITON if importlib.util.find_spec("triton") else [])
    ends = run_scripts([[*command, str(tmp_path / "file" / "out.png")] for command in commands])
    for command, end in zip(commands, ends, strict=True):
        assert end.code == 1, command
        assert end.err.startswith(f"Error: expected a folder to write in, but {tmp_path}/file")
        assert end.out == "", command


def test_a_file_keeps_what_is_in_it_until_there_is_something_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from outputs import check_file

    file, new = tmp_path / "old.json", tmp_path / "folder" / "new.json"
    file.write_text("kept")
    for path in (file, new):
        assert check_file(path) == path
    assert file.read_text() == "kept"
    assert [*new.parent.iterdir()] == []
    with pytest.raises(SystemExit, match=f"Error: expected a file to write, but {tmp_path}: "):
        check_file(tmp_path)


def test_a_plot_of_ratios_needs_what_they_are_ratios_to(tmp_path: Path) -> None:
    plot = ["--provider", "ours", "--plot", str(tmp_path / "x.png")]
    (end,) = run_scripts([["bench.py", *SMALL, *plot]])
    assert end.code == 2
    assert "expected --provider plain beside --plot" in end.err
