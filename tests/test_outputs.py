"""Scripts refuse outputs that they could not write before they work for them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = ["--set", "small", "--batch", "16", "--no-tests", "--repetitions", "1"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("train.py", ["--epochs", "1", "--output-dir"]),
        ("digits.py", ["--epochs", "1", "--output"]),
        ("reproduce.py", ["--seeds", "1", "--epochs", "1", "--output"]),
        ("bench.py", [*SMALL, "--json"]),
        ("bench.py", [*SMALL, "--plot"]),
        ("bench_compile.py", []),
        ("gpu_sweep.py", []),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(
    script: str, options: list[str], tmp_path: Path
) -> None:
    if script == "gpu_sweep.py" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    (tmp_path / "file").write_text("kept")
    done = run(f"scripts/{script}", *options, str(tmp_path / "file" / "out.png"))
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: expected a folder to write in, but {tmp_path}/file")
    assert done.stdout == ""


def test_a_file_keeps_what_is_in_it_until_there_is_something_better(tmp_path: Path) -> None:
    code = "import sys; from outputs import check_file; check_file(sys.argv[1])"
    code = f"import sys; sys.path.insert(0, 'scripts'); {code}"
    file, new = tmp_path / "old.json", tmp_path / "folder" / "new.json"
    file.write_text("kept")
    for path in (file, new):
        assert run("-c", code, str(path)).returncode == 0
    assert file.read_text() == "kept"
    assert [*new.parent.iterdir()] == []
    done = run("-c", code, str(tmp_path))
    assert done.stderr.startswith(f"Error: expected a file to write, but {tmp_path}: ")


def test_a_plot_of_ratios_needs_what_they_are_ratios_to(tmp_path: Path) -> None:
    done = run("scripts/bench.py", *SMALL, "--provider", "ours", "--plot", str(tmp_path / "x.png"))
    assert done.returncode == 2
    assert "expected --provider plain beside --plot" in done.stderr
