"""Scripts that run one after another in one process, which imports torch once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
_CODE = """
import contextlib, io, json, runpy, sys

ends = []
for sys.argv in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
    said = [code] if isinstance(code, str) else []
    ends.append([1 if said else code, out.getvalue(), "\\n".join([err.getvalue(), *said]).strip()])
print(json.dumps(ends))
"""


class End(NamedTuple):
    """What a script ended with, and what it wrote."""

    code: int
    out: str
    err: str


def run_scripts(commands: Sequence[Sequence[str]], cwd: Path = ROOT) -> list[End]:
    """Run scripts of the folder, each with its arguments; none may end with a traceback."""
    named = [[str(ROOT / "scripts" / name), *arguments] for name, *arguments in commands]
    done = subprocess.run(
        [sys.executable, "-c", _CODE],
        input=json.dumps(named),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return [End(*end) for end in json.loads(done.stdout)]
