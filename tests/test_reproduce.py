from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
def test_virtual_ranks_train_what_eight_processes_train(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/reproduce.py", "--seeds", "1", "--epochs", "1"]
    result = subprocess.run(
        [*command, "--output", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert [line.split("|")[1].strip() for line in result.stdout.splitlines()[2:]] == [
        "8 processes, DDP",
        "1 process, 8 virtual GPUs",
        "1 process, plain BatchNorm",
    ]
    data = json.loads((tmp_path / "reproduce.json").read_text(encoding="utf-8"))
    real, virtual, plain = data["runs"]
    assert len(real["losses"]) == 6
    assert virtual["losses"] == pytest.approx(real["losses"], rel=1e-12)
    assert plain["losses"] != pytest.approx(real["losses"], rel=1e-3)
    assert virtual["largest_weight_difference"] < 1e-12 < 1e-3 < plain["largest_weight_difference"]
    assert virtual["accuracy"] == real["accuracy"]
    assert (tmp_path / "reproduce.png").read_bytes().startswith(b"\x89PNG")
