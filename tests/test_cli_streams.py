"""Standard streams: what comes and goes through them, what happens if they are full or closed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distbn_convert.checkpoint import convert_checkpoint, gather_checkpoints

from .checkpoints import Net, run_cli

PROGRAM = [sys.executable, "-c", "from distbn_convert.cli import main; main()"]
RANKS = ["--vt-world-size", "2", "--no-fsync"]

needs_full = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="this system has no /dev/full"
)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    torch.save({"model": Net().state_dict()}, tmp_path / "plain.pth")
    return tmp_path / "plain.pth"


def program(
    cwd: Path, *args: str, stdin: Path | None = None, shell: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a shell does, with its streams redirected."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **env}
    command = ["sh", "-c", f'"$@" {shell}', "sh", *PROGRAM, *args]
    with open(stdin or os.devnull, "rb") as source:
        return subprocess.run(
            command, stdin=source, capture_output=True, cwd=cwd, env=environment, errors="replace"
        )


def failed(done: subprocess.CompletedProcess[str], code: int, told: str) -> None:
    assert done.returncode == code, done
    assert done.stderr.startswith("Error: "), done
    assert len(done.stderr.splitlines()) == 1, done
    assert told in done.stderr


def test_a_system_without_the_signals_of_unix_runs_the_command(plain: Path) -> None:
    names = "SIGHUP SIGALRM setitimer ITIMER_REAL"
    code = f"import signal; [delattr(signal, name) for name in {names.split()}]; {PROGRAM[-1]}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [*PROGRAM[:-1], code, "convert", "plain.pth", "out.pth", *RANKS]
    done = subprocess.run(command, cwd=plain.parent, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@needs_full
@pytest.mark.parametrize("command", ["inspect plain.pth", "inspect plain.pth --json", "--help"])
def test_a_full_standard_output_is_told(plain: Path, command: str) -> None:
    done = program(plain.parent, *command.split(), shell=">/dev/full")
    failed(done, 7, "cannot write to stdout: no space left on device.")


@needs_full
def test_a_checkpoint_for_a_full_standard_output_is_told(plain: Path) -> None:
    done = program(plain.parent, "convert", "plain.pth", "-", *RANKS, shell=">/dev/full")
    failed(done, 7, "cannot write to stdout: no space left on device.")


@pytest.mark.parametrize("command", ["inspect plain.pth", "convert plain.pth out", "models -h"])
@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_closed_standard_output_is_told_first(
    plain: Path, command: str, option: list[str]
) -> None:
    words = command.split()
    ranks = RANKS if words[0] == "convert" else []
    done = program(plain.parent, *words, *ranks, *option, shell=">&-")
    failed(done, 7, "stdout is closed; give it a file, or /dev/null.")
    assert os.listdir(plain.parent) == ["plain.pth"]


def test_a_closed_standard_input_is_told_if_it_is_wanted(plain: Path) -> None:
    failed(program(plain.parent, "inspect", "-", shell="<&-"), 7, "stdin is closed; give it a file")
    assert program(plain.parent, "inspect", "plain.pth", shell="<&-").returncode == 0


def test_a_closed_standard_error_does_not_matter(plain: Path) -> None:
    done = program(plain.parent, "convert", "plain.pth", "out", *RANKS, shell="2>&-")
    assert done.returncode == 0
    assert program(plain.parent, "inspect", "absent", shell="2>&-").returncode == 7


def test_no_room_for_a_copy_of_the_standard_input_is_told(plain: Path) -> None:
    done = program(plain.parent, "inspect", "-", stdin=plain, shell="", TMPDIR=str(plain.parent))
    assert done.returncode == 0
    limited = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *PROGRAM, "inspect", "-"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(plain.parent)}
    with open(plain, "rb") as file:
        full = subprocess.run(limited, stdin=file, capture_output=True, text=True, env=env)
    told = f"cannot copy stdin to {plain.parent} ($TMPDIR can name another folder): file too large"
    failed(full, 7, told)
    assert os.listdir(plain.parent) == ["plain.pth"]


def test_no_room_for_a_copy_of_the_standard_output_is_told(
    plain: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    done = run_cli(capsys, "convert", plain, "-", *RANKS)
    assert done.code == 7
    assert "nothing was written. $TMPDIR can name another folder for what goes to" in done.err


@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_closed_terminal_ends_the_command_unless_that_is_ignored(
    plain: Path, tmp_path: Path, ignored: bool
) -> None:
    """It comes while stdin is copied, which leaves nothing in the temporary folder."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    handler = "SIG_IGN" if ignored else "SIG_DFL"
    code = f"import signal; signal.signal(signal.SIGHUP, signal.{handler}); {PROGRAM[-1]}"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(temporary)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "convert", "-", "out", *RANKS],
        cwd=tmp_path,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while not [*temporary.glob("distbn-convert-*/*")]:  # Python tries the folder before
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(plain.read_bytes() if ignored else None)
    assert process.returncode == (0 if ignored else 143), err
    assert os.listdir(temporary) == []
    assert (tmp_path / "out").exists() == ignored


@pytest.mark.parametrize(
    ("encoding", "shown"), [("latin-1", r"\u5c64"), ("cp1252", r"\u5c64"), ("utf-8", "層")]
)
def test_any_name_can_be_told_in_any_encoding(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str, shown: str
) -> None:
    torch.save({"層": Net().state_dict()}, tmp_path / "層")
    commands = [(0, ["convert", "層", "out", "-f", *RANKS]), (0, ["inspect", "層"])]
    monkeypatch.chdir(tmp_path)
    for code, command in (*commands, (7, ["inspect", "層層"])):
        for json_too in ([], ["--json"]):
            out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
            monkeypatch.setattr(sys, "stdout", out)
            done = run_cli(capsys, *command, *json_too)
            told = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
            assert done.code == code, done
            if json_too:
                assert json.loads(told).get("error", {"exit_code": 0})["exit_code"] == code
            assert ("\\u5c64" if json_too else shown) in told or code == 7


EXPORT = ["models", "export", "resnet18", "-", "--vt-world-size", "2"]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["convert", "plain.pth", "-", "--exclude", "odd", *RANKS], 0),
        (["gather", "plain.pth", "plain.pth", "-"], 0),
        (["revert", "plain.pth", "-"], 3),
        (EXPORT, 0),
        ([*EXPORT[:2], "no_such_model", *EXPORT[3:]], 2),
        (["convert", "plain.pth", "-", "--vt-world-size", "two"], 2),
        (["convert", "--vt-world-siez=2", "plain.pth", "-"], 2),
        (["convert", "plain.pth", "-", "-z"], 2),
        (["convert", "plain.pth", "-", "--quiet=yes"], 2),
        (["convert", "--vt-world-size=two", "--", "-x.pth", "-"], 2),
        (["gather", "plain.pth", "plain.pth", "-", "--reduction", "max"], 2),
        (EXPORT[:4], 2),
    ],
)
@pytest.mark.parametrize("json_too", [True, False])
def test_nothing_is_told_where_a_checkpoint_goes(
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    plain: Path,
    command: list[str],
    code: int,
    json_too: bool,
) -> None:
    monkeypatch.chdir(plain.parent)
    data = io.BytesIO()
    out = io.TextIOWrapper(data)
    monkeypatch.setattr(sys, "stdout", out)
    done = run_cli(capsys, *command, *(["--json"] if json_too else []))
    assert done.code == code, done
    assert os.listdir() == ["plain.pth"]
    if json_too:
        document = json.loads(done.err)
        assert document["error"]["exit_code"] == code if code else document["output"]["path"] == "-"
        assert ("--exclude odd" in done.err) == ("odd" in command)
    if code:
        assert data.getvalue() == b""
    else:
        data.seek(0)
        assert len(torch.load(data)) > 0
        assert json_too or done.err.splitlines()[-1].startswith(("converted", "gathered", "wrote"))


def test_wrong_usage_is_told_on_stdout_if_nothing_else_goes_there(capsys: Any) -> None:
    for command in (["convert", "-", "out"], ["revert", "a", "b", "c", "-"], ["inspect", "-", "a"]):
        assert run_cli(capsys, *command, "--json").json["error"]["exit_code"] == 2


def test_the_standard_input_cannot_be_written_in_place(capsys: Any) -> None:
    for command in (["convert", "-", *RANKS], ["revert", "-"]):
        done = run_cli(capsys, *command, "--in-place")
        assert done.code == 2
        assert "--in-place writes to a file, not to - (stdin)" in done.err


def test_only_one_input_can_be_the_standard_one(capsys: Any) -> None:
    for command in (["gather", "-", "-", "out"], ["verify", "-", "--against", "-"]):
        done = run_cli(capsys, *command)
        assert done.code == 2
        assert "one input can be - (stdin), but got 2; name files." in done.err


@pytest.mark.parametrize("srcs", [("-", "plain.pth"), ("plain.pth", "-")])
def test_one_gathered_file_may_come_from_the_standard_input(
    plain: Path, srcs: tuple[str, str]
) -> None:
    done = program(plain.parent, "gather", *srcs, "out", stdin=plain)
    assert done.returncode == 0, done
    assert done.stdout.startswith(f"gathered 3 BatchNorms by stack: {srcs[0]} -> out (")
    gather_checkpoints([plain, plain], plain.with_name("again"))
    assert plain.with_name("out").read_bytes() == plain.with_name("again").read_bytes()


def test_the_file_to_verify_against_may_come_from_the_standard_input(plain: Path) -> None:
    convert_checkpoint(plain, plain.with_name("virtual.pth"), 2)
    done = program(plain.parent, "verify", "virtual.pth", "--against", "-", stdin=plain)
    assert done.returncode == 0, done
    assert done.stdout.startswith("virtual.pth and - hold the same: 3 BatchNorms")
    arguments = ["verify", "virtual.pth", "--against", "-", "--json", "--sha256"]
    document = json.loads(program(plain.parent, *arguments, stdin=plain).stdout)
    assert (document["source"]["path"], document["against"]["path"]) == ("virtual.pth", "-")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("inspect -", "- (torch, "),
        ("convert - out --vt-world-size 2", "to 2 virtual ranks: - -> out (torch, "),
        ("convert - out --vt-world-size 2 --dry-run", "to 2 virtual ranks: - (torch, "),
        ("convert - out --vt-world-size 2 --sha256", "  -\n"),
    ],
)
def test_the_standard_input_is_called_as_the_user_did(
    plain: Path, command: str, shown: str
) -> None:
    done = program(plain.parent, *command.split(), stdin=plain)
    assert shown in done.stdout, done
    assert "distbn-convert-" not in done.stdout + done.stderr
    done = program(plain.parent, *command.split(), "--json", "--force", stdin=plain)
    assert json.loads(done.stdout)["source"]["path"] == "-"
    assert "distbn-convert-" not in done.stdout


def test_errors_call_the_standard_streams_as_the_user_did(plain: Path) -> None:
    done = program(plain.parent, "revert", "-", "-", stdin=plain)
    failed(done, 3, "Error: - has no virtual ranks")
    (plain.parent / "empty").write_bytes(b"")
    done = program(plain.parent, "inspect", "-", "--json", stdin=plain.parent / "empty")
    assert json.loads(done.stdout)["error"]["message"].startswith("- is empty (0 bytes)")
