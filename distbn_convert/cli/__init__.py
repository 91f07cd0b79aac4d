"""The command line: each command calls one public function. Only this package imports click."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import traceback

import click

from .. import __version__
from ..checkpoint.report import SCHEMA
from ..errors import (
    CheckpointError,
    ConfigurationError,
    DistBNError,
    NothingToConvertError,
    UnsupportedModuleError,
)
from .checkpoints import convert, gather, inspect, revert, verify
from .models import models
from .render import one_line
from .streams import (
    StdoutError,
    Terminated,
    allow_color,
    as_given,
    catch_signals,
    check_streams,
    echo_json,
    ignore_signals,
    label,
    stop_behind,
    to_stdout,
)

__all__ = ["main"]

_EXIT_CODES = """\b
Exit status:
    0  done, or a dry run that would be
    1  unexpected failure    2  wrong usage
    3  nothing to do: no BatchNorm, or already in the wanted form
    4  refused: unsafe, or of a kind that is not handled
    5  unreadable: damaged, truncated, not a checkpoint
    6  the output exists, or is the input
    7  not found, no permission, no space
    8  verification failed
    130, 143  interrupted, terminated"""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXIT_CODES,
)
@click.version_option(__version__, prog_name="distbn-convert")
def cli() -> None:
    """Train on one GPU as if it were many: checkpoints and models with virtual ranks.

    \b
    Example:
        $ distbn-convert convert plain.pth virtual.pth --vt-world-size 8
        $ distbn-convert revert virtual.pth plain.pth --reduction mean
    """


for _command in (convert, revert, inspect, gather, verify, models):
    cli.add_command(_command)


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its status; errors of this package become one line."""
    args = sys.argv[1:] if args is None else args
    catch_signals()
    told: dict[str, str | None] = {}  # what a command says about itself, for an error
    try:
        check_streams()
        asked = {"-h", "--help", "--version"} & set(args)  # then click does nothing but print
        with to_stdout() if asked else contextlib.nullcontext():
            cli.main(
                args,
                prog_name="distbn-convert",
                standalone_mode=False,
                obj=told,
                color=allow_color(args),
            )
        ignore_signals()
        status = 0
    except BaseException as error:
        ignore_signals()
        status = _end(stop_behind(error), args, told)
    sys.exit(status)


def _end(error: BaseException, args: list[str], told: dict[str, str | None]) -> int:
    """Tell about an error and return the exit status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):  # the reader of our output had enough
        if sys.stderr is not None:
            sys.stderr.close()
        return 1
    code, status, message = _describe(error)
    if isinstance(error, StdoutError):
        with contextlib.suppress(OSError):  # which else comes again when Python ends
            sys.stdout.close()
    on_stderr = told.get("dst") == "-"
    stream = sys.stderr if on_stderr else sys.stdout
    if "--json" in args and stream is not None and not stream.closed:
        hint = re.split(r"[;.] ", message)[-1] if re.search(r"[;.] ", message) else None
        document = {"code": code, "message": message, "hint": hint, "path": told.get("path")}
        echo_json({"schema": SCHEMA, "error": {**document, "exit_code": status}}, err=on_stderr)
    elif isinstance(error, click.UsageError):
        text = io.StringIO()
        error.show(text)
        usage = re.sub("^Error:", label("Error"), text.getvalue(), count=1, flags=re.MULTILINE)
        click.echo(usage, err=True, nl=False, color=allow_color(args))
    else:
        click.echo(f"{label('Error')} {message}", err=True, color=allow_color(args))
    if status == 1 and not isinstance(error, (DistBNError, click.ClickException)):
        if {"-v", "--verbose"} & set(args):
            traceback.print_exception(error)
        else:
            click.echo("This is a bug; please report it with what -v shows.", err=True)
    return status


def _describe(error: BaseException) -> tuple[str, int, str]:
    """Return the word, the exit status and the sentence for an error."""
    if isinstance(error, CheckpointError):
        return _WORDS[error.exit_code], error.exit_code, one_line(as_given(error))
    if isinstance(error, ConfigurationError):
        return "usage", 2, one_line(as_given(error))
    if isinstance(error, click.ClickException):
        return (
            "usage" if error.exit_code == 2 else "failed",
            error.exit_code,
            one_line(error.format_message()),
        )
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return "interrupted", 130, "interrupted; the output is as it was, or complete."
    if isinstance(error, Terminated):
        return "terminated", 143, "terminated; the output is as it was, or complete."
    for kind, status in ((NothingToConvertError, 3), (UnsupportedModuleError, 4)):
        if isinstance(error, kind):
            return _WORDS[status], status, one_line(error)
    if isinstance(error, DistBNError):
        return "failed", 1, one_line(error)
    if isinstance(error, MemoryError):
        return "memory", 1, "not enough memory. Nothing was written."
    return "unexpected", 1, f"{type(error).__name__}: {one_line(error)}"


_WORDS = {
    1: "failed",
    3: "nothing-to-do",
    4: "refused",
    5: "unreadable",
    6: "exists",
    7: "io",
    8: "verification",
}
