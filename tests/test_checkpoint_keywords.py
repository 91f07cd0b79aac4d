"""The options of the public functions, as signatures and type checkers know them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from distbn_convert import checkpoint
from distbn_convert.checkpoint import Options
from distbn_convert.cli import checkpoints as commands


@pytest.mark.parametrize(
    ("command", "function", "args"),
    [
        (commands.convert, checkpoint.convert_checkpoint, ["a", "b", "--vt-world-size", "2"]),
        (commands.revert, checkpoint.revert_checkpoint, ["a", "b"]),
        (commands.inspect, checkpoint.inspect_checkpoint, ["a"]),
        (commands.gather, checkpoint.gather_checkpoints, ["a", "b", "c"]),
        (commands.verify, checkpoint.verify_checkpoint, ["a"]),
    ],
)
def test_signatures_show_the_options_of_the_commands(
    command: Any, function: Any, args: list[str]
) -> None:
    """With their defaults, as ``help`` and editors do; and a type checker knows the same types."""
    shown = inspect.signature(function).parameters
    given = command.make_context("x", args, obj={}).params
    options = {name: value for name, value in given.items() if name in vars(Options)}
    assert len(options) > 5
    otherwise = {"overwrite", "allow_compressed", "progress"}  # --force, and a bar
    assert shown.keys() & vars(Options) <= options.keys() | otherwise
    assert {name: shown[name].default for name in options} == options
    assert all(shown[name].kind is inspect.Parameter.KEYWORD_ONLY for name in options)
    known = get_args(get_type_hints(function)["options"])[0]
    assert get_type_hints(known).items() <= get_type_hints(Options).items()
    assert get_type_hints(known).keys() == shown.keys() & vars(Options)


def test_a_type_checker_refuses_wrong_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mypy = pytest.importorskip("mypy.api", reason="mypy is not installed")
    monkeypatch.setenv("MYPYPATH", str(Path(checkpoint.__file__).parents[2]))
    (tmp_path / "use.py").write_text(
        "from distbn_convert.checkpoint import convert_checkpoint, inspect_checkpoint\n"
        "convert_checkpoint('a', None, 2, include=['layer1.*'], in_place=True)\n"
        "convert_checkpoint('a', 'b', 2, overwrit=True)\n"
        "convert_checkpoint('a', 'b', 2, overwrite='yes')\n"
        "inspect_checkpoint('a', in_place=True)\n"
    )
    # Torch's own types, which take a while to read, are not looked at.
    quick = ["--config-file=", "--cache-dir=/dev/null", "--no-site-packages"]
    quick += ["--ignore-missing-imports", "--follow-imports=silent", "--hide-error-codes"]
    out, _, _ = mypy.run([*quick, str(tmp_path / "use.py")])
    assert re.findall(r":(\d): error: (?:Unexpected keyword a|A)rgument \"(\w+)\"", out) == [
        ("3", "overwrit"),
        ("4", "overwrite"),
        ("5", "in_place"),
    ], out
