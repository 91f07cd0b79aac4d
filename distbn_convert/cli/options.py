"""Options that several commands share; their names are the library's, with hyphens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = [
    "Writing",
    "in_place_options",
    "json_option",
    "no_color",
    "output_options",
    "ratio_option",
    "reading_options",
    "selecting_options",
    "talking_options",
]

Command = Callable[..., Any]


class Writing(click.Command):
    """A command with an output DST, which an error must leave stdout to if it is ``-``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note DST before click looks at what may be wrong."""
        known = {"--", *(name for param in self.get_params(ctx) for name in param.opts)}
        words = [word for word in args if not word.startswith("--") or word in known]
        try:
            ctx.obj["dst"] = self.make_parser(ctx).parse_args([*words])[0].get("dst")
        except click.UsageError:  # such as a value that is missing: "-" may be DST if not SRC
            ctx.obj["dst"] = "-" if "-" in words[1:] else None
        return super().parse_args(ctx, args)


def _together(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


selecting_options = _together(
    click.option(
        "--include",
        multiple=True,
        metavar="GLOB",
        help="Take only BatchNorms whose name matches, in their state dict or as inspect prints "
        "it; may be repeated.",
    ),
    click.option(
        "--exclude",
        multiple=True,
        metavar="GLOB",
        help="Leave BatchNorms whose name matches alone; may be repeated.",
    ),
    click.option(
        "--state",
        metavar="PATH",
        help="Look in this part of the file alone, for example model_ema.",
    ),
    click.option(
        "--ema-underscore", is_flag=True, help="Take MMCV's EMA copies (ema_..._running_mean) too."
    ),
    click.option("--strict", is_flag=True, help="Make an error of what may be wrong in the input."),
)

output_options = _together(
    click.option(
        "--format",
        type=click.Choice(["auto", "torch", "safetensors"]),
        default="auto",
        show_default=True,
        help="Format of the output; auto keeps the input's, another one with --state writes that "
        "part alone.",
    ),
    click.option(
        "--max-shard-size",
        metavar="SIZE",
        help="Write safetensors as a folder DST of shards of at most SIZE (5GB, 500MB) and an "
        "index, as Hugging Face does.",
    ),
    click.option(
        "-f", "--force", is_flag=True, help="Replace an existing DST; accept any compression ratio."
    ),
    click.option("-n", "--dry-run", is_flag=True, help="Do everything but write."),
    click.option(
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Check what is saved anew against its checksums, and read the output back.",
    ),
    click.option(
        "--fsync/--no-fsync",
        default=True,
        show_default=True,
        help="Wait until the disk holds the output.",
    ),
)

# Of commands with one input.
in_place_options = _together(
    click.option("--in-place", is_flag=True, help="Replace SRC by the output; give no DST."),
    click.option(
        "--backup/--no-backup",
        default=True,
        show_default=True,
        help="With --in-place, keep SRC as SRC.bak.",
    ),
)

reading_options = _together(
    click.option(
        "--opaque", is_flag=True, help="Carry unknown Python objects through, unexecuted."
    ),
    click.option(
        "--allow-global",
        "allow_globals",
        multiple=True,
        metavar="NAME",
        help="Let the file make objects of this class, for example mypackage.Config; may be "
        "repeated.",
    ),
    click.option(
        "--sha256",
        is_flag=True,
        help="Report the SHA-256 of input and output; not of folders.",
    ),
    click.option(
        "--check-input", is_flag=True, help="First check all of each input against its checksums."
    ),
)

# Of commands that only read; those that write have --force for more.
ratio_option = click.option(
    "-f", "--force", "allow_compressed", is_flag=True, help="Accept any compression ratio."
)

# Not passed on: main() looks for it, so that it works for every error.
no_color = click.option(
    "--no-color", is_flag=True, expose_value=False, help="No colours, as with NO_COLOR set."
)

json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON document on stdout, or on stderr if the output goes to stdout.",
)

talking_options = _together(
    json_option,
    click.option("-q", "--quiet", is_flag=True, help="Print only errors."),
    click.option("-v", "--verbose", is_flag=True, help="Print each BatchNorm, and tracebacks."),
    no_color,
)
