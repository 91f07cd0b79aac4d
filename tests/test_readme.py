"""The README's blocks: each python block runs, and prints the text block that follows it."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def test_python_blocks_print_what_the_readme_says() -> None:
    namespace: dict[str, Any] = {"__name__": "readme"}
    compared = 0
    for (kind, code), following in zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True):
        if kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), namespace)
        expected = following[1] if following[0] == "text" else ""
        assert printed.getvalue() == expected
        compared += 1
    assert compared >= 6


def test_every_kind_of_block_is_run_by_some_test() -> None:
    assert {kind for kind, _ in BLOCKS} == {"python", "text", "console"}


@pytest.mark.slow
def test_quickstart_trains_converts_back_and_prints_equal_accuracies(tmp_path: Path) -> None:
    """`./scripts/test` itself is the other command: it is what runs this."""
    output = tmp_path / "checkpoints"
    run = subprocess.run(
        ["./scripts/quickstart", "--epochs", "1", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    accuracies = re.findall(r"accuracy .*: +([\d.]+) %", run.stdout)
    assert len(accuracies) == 2
    assert accuracies[0] == accuracies[1]
    assert sorted(path.name for path in output.iterdir()) == ["plain.pth", "virtual.pth"]
