"""Standard streams, signals and progress of the command line."""

from __future__ import annotations

import _thread
import contextlib
import errno
import io
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from ..checkpoint.places import access_error, as_path, find_disk_full
from ..errors import FileAccessError

__all__ = [
    "ProgressBar",
    "StdoutError",
    "Terminated",
    "allow_color",
    "as_given",
    "catch_signals",
    "check_streams",
    "echo_json",
    "input_paths",
    "label",
    "output_path",
    "say",
    "to_stdout",
]

_SIGHUP = getattr(signal, "SIGHUP", None)  # Windows has none
_STOPPING = [number for number in (signal.SIGINT, signal.SIGTERM, _SIGHUP) if number is not None]
_COLORS = {"Error": "red", "Warning": "yellow"}
_spools: list[str] = []  # paths of copies of the standard streams


class Terminated(BaseException):
    """SIGTERM came, or the terminal was closed; raised so that what was begun is cleaned up."""


_stopped_by: list[BaseException] = []
_ended: list[bool] = []  # set before the signals are ignored, which takes a moment


def stop_behind(error: BaseException) -> BaseException:
    """Return the signal that came, else the error.

    C code that imports something can swallow the signal, and then fails with an error of its own.
    """
    return _stopped_by[-1] if _stopped_by else error


def catch_signals() -> None:
    """Turn signals to stop into exceptions, the first one alone: cleaning up must finish.

    SIGHUP stays ignored if it is, as ``nohup`` wants.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if _ended:
            return
        ignore_signals()
        _stopped_by.append(KeyboardInterrupt() if number == signal.SIGINT else Terminated())
        _raise_or_wait(number, frame)

    _ended.clear()
    _stopped_by.clear()
    with contextlib.suppress(ValueError):  # not in the main thread: signals are someone else's
        for number in _STOPPING:
            if number != _SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, stop)
        sys.unraisablehook = _raise_later


def _raise_or_wait(_number: int, frame: FrameType | None) -> None:
    """Raise the signal that came, once nothing is being imported: torch aborts on exceptions there.

    An import that this program itself runs in does not count.
    """
    while frame is not None and frame.f_globals.get("__name__") != __package__:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            _wait()
            return
        frame = frame.f_back
    raise _stopped_by[-1]


def _raise_later(lost: Any) -> None:
    """Raise a signal again that came where Python cannot raise, such as in a weakref's callback."""
    if any(lost.exc_value is stop for stop in _stopped_by):
        _wait()
    else:
        sys.__unraisablehook__(lost)


def _wait() -> None:
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _raise_or_wait)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:  # Windows
        signal.signal(signal.SIGINT, _raise_or_wait)
        threading.Timer(0.01, _thread.interrupt_main).start()


def ignore_signals() -> None:
    """Ignore the signals to stop from here: what is left to do must finish."""
    _ended.append(True)
    with contextlib.suppress(ValueError):
        for number in _STOPPING:
            signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
            signal.setitimer(signal.ITIMER_REAL, 0)


def allow_color(args: Sequence[str]) -> bool | None:
    """Return False if colours are unwanted; None leaves it to click, which colours terminals alone.

    ``NO_COLOR`` is an agreement of many programs (no-color.org): any value but an empty one.
    """
    unwanted = {"--no-color", "--json"} & set(args) or os.environ.get("NO_COLOR")
    return False if unwanted or os.environ.get("TERM") == "dumb" else None


def label(word: str) -> str:
    """Return ``Error:`` or ``Warning:``, coloured; click takes the colour away where none goes."""
    return click.style(f"{word}:", fg=_COLORS[word], bold=True)


def check_streams() -> None:
    """Refuse to begin without a standard output, and let it take any text, as stderr does.

    Raises:
        FileAccessError: it is closed.
    """
    _spools.clear()
    if sys.stdout is None:
        raise _closed("stdout")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _closed(name: str) -> FileAccessError:
    error = FileAccessError(f"{name} is closed; give it a file, or /dev/null.")
    error.errno = errno.EBADF
    return error


def as_given(text: object) -> str:
    """Return a text in which copies of standard streams are called ``-``, as the user did."""
    text = str(text)
    for spool in _spools:
        text = text.replace(spool, "-")
    return text


class StdoutError(FileAccessError):
    """The system refuses to write to stdout."""


@contextmanager
def to_stdout() -> Iterator[None]:
    """Call it an error of stdout if the system refuses to write in the block."""
    try:
        yield
    except BrokenPipeError:  # the reader had enough
        raise
    except OSError as error:
        told = access_error("cannot write to stdout", error)
        raise StdoutError(*told.args) from error


def say(text: str, err: bool = False) -> None:
    """Print a text on stdout or stderr."""
    if err:
        click.echo(as_given(text), err=True)
        return
    with to_stdout():
        click.echo(as_given(text))


def echo_json(document: Any, err: bool = False) -> None:
    """Print one JSON document on stdout or stderr, in ASCII, which every encoding has.

    What is not finite, which JSON lacks, becomes null.
    """
    say(json.dumps(_for_json(document), indent=2), err)


def _for_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _for_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(item) for item in value]
    if isinstance(value, str):
        return as_given(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def input_paths(*srcs: str) -> Iterator[list[Path]]:
    """Yield the paths of inputs; ``-`` is copied to a file, since formats need to seek.

    Raises:
        click.UsageError: more than one is ``-``.
        FileAccessError: stdin is closed, or the disk has no room for it.
        ConfigurationError: a path is empty.
    """
    if srcs.count("-") > 1:
        raise click.UsageError(
            f"one input can be - (stdin), but got {srcs.count('-')}; name files."
        )
    if "-" not in srcs:
        yield list(map(as_path, srcs))
        return
    if sys.stdin is None:
        raise _closed("stdin")
    with _spool("stdin") as path:
        try:
            with open(path, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file, 1 << 24)
        except OSError as error:
            where = f"cannot copy stdin to {path.parent.parent} ($TMPDIR can name another folder)"
            raise access_error(where, error, folder=path.parent) from error
        yield [path if src == "-" else as_path(src) for src in srcs]


@contextmanager
def _spool(name: str) -> Iterator[Path]:
    """Yield a path for a copy of a standard stream."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="distbn-convert-")
    except OSError as error:
        raise access_error("cannot make a temporary folder ($TMPDIR names where)", error) from error
    with folder as place:
        path = Path(place, name)
        _spools.append(str(path))
        yield path


@contextmanager
def output_path(dst: str | None) -> Iterator[Path | None]:
    """Yield the path of the output; what is written for ``-`` goes to stdout once it is complete.

    Raises:
        click.UsageError: ``-``, but stdout is a terminal.
        ConfigurationError: the path is empty.
    """
    if dst != "-":
        yield None if dst is None else as_path(dst)
        return
    if sys.stdout.isatty():
        raise click.UsageError("a checkpoint is not for the terminal; redirect stdout to a file.")
    with _spool("stdout") as path:
        try:
            yield path
        except FileAccessError as error:
            if find_disk_full(error) is not None:
                error.args = (f"{error} $TMPDIR can name another folder for what goes to stdout.",)
            raise
        if path.is_dir():
            raise click.UsageError("a folder cannot go to stdout; name one as DST.")
        if path.exists():
            with open(path, "rb") as file, to_stdout():
                shutil.copyfileobj(file, sys.stdout.buffer, 1 << 24)
                sys.stdout.buffer.flush()


class ProgressBar:
    """A bar on stderr for writing that takes more than a second; nothing if that is no terminal."""

    def __init__(self, enabled: bool) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._enabled = enabled and terminal and os.environ.get("TERM") != "dumb"
        self._started: float | None = None  # when the first bytes were written
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.render_finish()

    def __call__(self, done: int, expected: int) -> None:
        """Show how many bytes of those expected are written."""
        now = time.monotonic()
        if self._started is None:
            self._started = now
        if not self._enabled or now - self._started < 1:
            return
        if self._bar is None:
            self._bar = click.progressbar(length=expected, label="writing", file=sys.stderr)
        self._bar.update(min(done, expected) - self._bar.pos)
