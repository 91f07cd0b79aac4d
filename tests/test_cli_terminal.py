"""The command line on a real terminal: the bar and the colours are there alone.

Ctrl-C leaves nothing.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
# The disk is slow: each large write takes a while, so that the whole takes over a second.
SLOW = """
import sys, time
import distbn_convert.checkpoint.atomic as atomic
write = atomic._Raw.write
def slow(self, data):
    time.sleep(DELAY)
    return write(self, data)
DELAY = float(sys.argv.pop(1))
atomic._Raw.write = slow
from distbn_convert.cli import main
main()
"""
RED, YELLOW = b"\x1b[31m\x1b[1mError:\x1b[0m", b"\x1b[33m\x1b[1mWarning:\x1b[0m"
CONVERT = ("convert", "in.pth", "out.pth", "--vt-world-size", "2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    norm = torch.nn.BatchNorm1d(4).state_dict(prefix="bn.")
    weights = {f"w{number}": torch.randn(1_000_000) for number in range(8)}
    torch.save({**norm, **weights}, tmp_path / "in.pth")
    return tmp_path


@contextmanager
def on_terminal(
    folder: Path, delay: float, *args: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start a command with a terminal for stdin and stderr; stdout is a pipe."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(delay), *args],
        cwd=folder,
        env={
            **{name: value for name, value in os.environ.items() if name != "NO_COLOR"},
            **{"PYTHONPATH": str(ROOT), "TERM": "xterm", **environment},
        },
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: take_terminal(slave),
    )
    os.close(slave)
    try:
        yield process, master
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        os.close(master)


def take_terminal(slave: int) -> None:
    """Make it the terminal of the new session, whose Ctrl-C then reaches the command."""
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


def ended(process: subprocess.Popen[bytes]) -> bytes:
    """Wait for the command and return what it printed."""
    assert process.stdout is not None
    out = process.stdout.read()
    process.wait()
    return out


def read_until(master: int, wanted: bytes | None, seconds: float = 60) -> bytes:
    """Read what the terminal shows until that is in it, or until the command ended."""
    shown, end = b"", time.monotonic() + seconds
    while wanted is None or wanted not in shown:
        assert time.monotonic() < end, shown
        if not select.select([master], [], [], 1)[0]:
            continue
        try:
            data = os.read(master, 4096)
        except OSError:  # the other side is closed
            break
        shown += data
    return shown


def test_work_over_a_second_draws_a_bar_on_the_terminal(folder: Path) -> None:
    with on_terminal(folder, 0.3, *CONVERT) as (process, master):
        shown = read_until(master, None)
        out = ended(process)
    assert process.returncode == 0, shown
    assert b"writing" in shown
    assert b"100%" in shown
    assert out.startswith(b"converted 1 BatchNorm to 2 virtual ranks")
    assert b"writing" not in out


@pytest.mark.parametrize(
    ("delay", "more", "environment"),
    [
        (0.0, (), {}),
        (0.3, ("--quiet",), {}),
        (0.3, ("--json",), {}),
        (0.3, (), {"TERM": "dumb"}),
    ],
    ids=["short", "quiet", "json", "dumb"],
)
def test_no_bar_is_drawn_where_none_is_wanted(
    folder: Path, delay: float, more: tuple[str, ...], environment: dict[str, str]
) -> None:
    with on_terminal(folder, delay, *CONVERT, *more, **environment) as (process, master):
        assert read_until(master, None) == b""
        ended(process)
    assert process.returncode == 0


def test_no_bar_is_drawn_into_a_pipe(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SLOW, "0.3", *CONVERT],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        capture_output=True,
        check=True,
    )
    assert done.stderr == b""


@pytest.mark.parametrize("old", [None, b"an older output"], ids=["new", "force"])
def test_ctrl_c_on_the_terminal_leaves_what_was_there(folder: Path, old: Any) -> None:
    force = ()
    if old is not None:
        (folder / "out.pth").write_bytes(old)
        force = ("--force",)
    before = sorted(os.listdir(folder))
    with on_terminal(folder, 0.3, *CONVERT, *force) as (process, master):
        read_until(master, b"writing")
        os.write(master, b"\x03")
        shown = read_until(master, None)
        out = ended(process)
    assert process.returncode == 130
    assert RED + b" interrupted; the output is as it was, or complete." in shown
    assert b"Traceback" not in shown
    assert out == b""
    assert sorted(os.listdir(folder)) == before
    assert old is None or (folder / "out.pth").read_bytes() == old


def test_closing_the_terminal_leaves_what_was_there(folder: Path) -> None:
    (folder / "out.pth").write_bytes(b"an older output")
    with on_terminal(folder, 0.3, *CONVERT, "--force") as (process, master):
        read_until(master, b"writing")
        with open(os.devnull, "rb") as null:
            os.dup2(null.fileno(), master)
        ended(process)
    assert process.returncode > 0  # not killed; no one is there to be told
    assert sorted(os.listdir(folder)) == ["in.pth", "out.pth"]
    assert (folder / "out.pth").read_bytes() == b"an older output"


def test_a_background_job_that_is_told_to_stop_ends_likewise(folder: Path) -> None:
    with on_terminal(folder, 0.3, *CONVERT) as (process, master):
        read_until(master, b"writing")
        process.send_signal(signal.SIGTERM)
        read_until(master, None)
        ended(process)
    assert process.returncode == 143
    assert os.listdir(folder) == ["in.pth"]


# Arguments, and how what they print on a terminal begins, without and with colour.
TOLD = {
    "error": (("inspect", "none.pth"), b"Error:", RED),
    "usage": (("convert", "in.pth"), b"\r\nError:", b"\r\n" + RED),
    "no such command": (("konvert",), b"\r\nError:", b"\r\n" + RED),
    "warning": (("convert", "few.pth", "o", "--vt-world-size", "2"), b"Warning:", YELLOW),
}


def save_few(folder: Path) -> None:
    """A file with a warning in it: nothing counts its batches."""
    few = {"bn.running_mean": torch.zeros(2), "bn.running_var": torch.ones(2)}
    torch.save(few, folder / "few.pth")


def show(folder: Path, *args: str, **environment: str) -> bytes:
    """Return what a command shows on a terminal."""
    save_few(folder)
    with on_terminal(folder, 0.0, *args, **environment) as (process, master):
        shown = read_until(master, None)
        ended(process)
    return shown


@pytest.mark.parametrize("told", TOLD)
def test_errors_and_warnings_are_coloured_on_a_terminal(tmp_path: Path, told: str) -> None:
    arguments, _, coloured = TOLD[told]
    shown = show(tmp_path, *arguments)
    assert coloured in shown
    assert shown.count(b"\x1b[") == 3, "only the word"


@pytest.mark.parametrize(
    ("more", "environment"),
    [
        (("--no-color",), {}),
        ((), {"NO_COLOR": "1"}),
        ((), {"TERM": "dumb"}),
        (("--json",), {}),
    ],
    ids=["option", "NO_COLOR", "dumb", "json"],
)
@pytest.mark.parametrize("told", ["error", "usage"])
def test_no_colour_where_none_is_wanted(
    tmp_path: Path, told: str, more: tuple[str, ...], environment: dict[str, str]
) -> None:
    arguments, plain, _ = TOLD[told]
    shown = show(tmp_path, *arguments, *more, **environment)
    assert b"\x1b" not in shown
    if more != ("--json",):
        assert plain in shown


def test_no_colour_in_a_warning_where_none_is_wanted(tmp_path: Path) -> None:
    arguments, plain, _ = TOLD["warning"]
    assert show(tmp_path, *arguments, "--no-color").startswith(plain)


def test_an_empty_no_color_is_none(tmp_path: Path) -> None:
    assert RED in show(tmp_path, "inspect", "none.pth", NO_COLOR="")


@pytest.mark.parametrize("told", TOLD)
def test_no_colour_in_a_pipe(tmp_path: Path, told: str) -> None:
    arguments, plain, _ = TOLD[told]
    save_few(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SLOW, "0", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        capture_output=True,
    )
    assert plain.strip() in done.stderr
    assert b"\x1b" not in done.stderr + done.stdout
