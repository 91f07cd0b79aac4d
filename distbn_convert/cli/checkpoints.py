"""``distbn-convert convert | revert | inspect | gather | verify``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import (
    Writing,
    in_place_options,
    output_options,
    ratio_option,
    reading_options,
    selecting_options,
    talking_options,
)
from .render import checksums, one_line, summary, table
from .streams import ProgressBar, echo_json, input_paths, label, output_path, say

if TYPE_CHECKING:
    from ..checkpoint.report import CheckpointReport

__all__ = ["convert", "gather", "inspect", "revert", "verify"]


@click.command(cls=Writing)
@click.argument("src")
@click.argument("dst", required=False)
@click.option("--vt-world-size", type=int, required=True, help="Number of virtual ranks V.")
@selecting_options
@output_options
@in_place_options
@reading_options
@talking_options
def convert(src: str, dst: str | None, vt_world_size: int, **options: Any) -> None:
    """Give every BatchNorm in a checkpoint virtual ranks.

    Its running statistics (C,) become (V, C), each rank with the same numbers; everything else is
    carried through bit for bit. SRC and DST may be - for the standard streams.

    \b
    Example:
        $ distbn-convert convert plain.pth virtual.pth --vt-world-size 8
        converted 20 BatchNorms to 8 virtual ranks: plain.pth -> virtual.pth (torch, 47.1 MB)
    """
    from ..checkpoint import convert_checkpoint

    def run(paths: list[Path], out: Path | None, **keywords: Any) -> CheckpointReport:
        return convert_checkpoint(paths[0], out, vt_world_size, **keywords)

    _write([src], dst, run, "converted", options)


@click.command(cls=Writing)
@click.argument("src")
@click.argument("dst", required=False)
@click.option(
    "--reduction",
    type=click.Choice(["mean", "select", "pooled"]),
    default="mean",
    show_default=True,
    help="How the ranks are reduced: averaged, one taken, or united (law of total variance).",
)
@click.option("--rank", type=int, default=0, show_default=True, help="The rank that select takes.")
@selecting_options
@output_options
@in_place_options
@reading_options
@talking_options
def revert(src: str, dst: str | None, reduction: str, rank: int, **options: Any) -> None:
    """Turn the virtual ranks in a checkpoint back into plain BatchNorm.

    \b
    Example:
        $ distbn-convert revert virtual.pth plain.pth --reduction select --rank 0
        reverted 20 BatchNorms from 8 virtual ranks by select: virtual.pth -> plain.pth (torch, ...)
    """
    from ..checkpoint import revert_checkpoint

    if rank and reduction != "select":
        raise click.UsageError(f"--rank {rank} goes with --reduction select, not {reduction}.")

    def run(paths: list[Path], out: Path | None, **keywords: Any) -> CheckpointReport:
        return revert_checkpoint(paths[0], out, reduction, rank, **keywords)

    _write([src], dst, run, "reverted", options)


@click.command()
@click.argument("src")
@click.option(
    "--plot",
    type=click.Path(),
    metavar="FILE",
    help="Draw how far the ranks disagree, layer by layer (.png, .svg or .html).",
)
@selecting_options
@reading_options
@ratio_option
@talking_options
def inspect(src: str, plot: str | None, **options: Any) -> None:
    """List the BatchNorms of a checkpoint and how their ranks differ.

    \b
    Example:
        $ distbn-convert inspect virtual.pth --plot spread.png
    """
    from ..checkpoint import inspect_checkpoint

    talk = _Talk(options, src)
    with input_paths(src) as paths:
        report = inspect_checkpoint(paths[0], **options)
    if plot is not None:
        from ..checkpoint import plot_spread

        plot_spread(report, plot)
    talk.warn(report.warnings)
    if talk.json:
        echo_json(report.to_dict())
        return
    if talk.quiet:
        return
    say(table(report))
    if report.opaque_globals:
        say(f"Python objects, not executed: {one_line(', '.join(report.opaque_globals))}")
    for line in checksums(report.source):
        say(line)


@click.command(cls=Writing)
@click.argument("srcs", nargs=-1, required=True)
@click.argument("dst")
@click.option(
    "--reduction",
    type=click.Choice(["stack", "mean", "pooled"]),
    default="stack",
    show_default=True,
    help="What becomes of the ranks: virtual ranks, their average, or their union.",
)
@selecting_options
@output_options
@reading_options
@talking_options
def gather(srcs: tuple[str, ...], dst: str, reduction: str, **options: Any) -> None:
    """Unite checkpoints saved by several real ranks into one.

    The statistics of file r become virtual rank r. All other tensors of the state dicts must be
    equal; what lies outside, such as random states, is taken from the first file.

    \b
    Example:
        $ distbn-convert gather rank0.pth rank1.pth all.pth
    """
    from ..checkpoint import gather_checkpoints

    def run(paths: list[Path], out: Path | None, **keywords: Any) -> CheckpointReport:
        return gather_checkpoints(paths, out, reduction, **keywords)

    _write(srcs, dst, run, "gathered", options)


@click.command()
@click.argument("src")
@click.option("--against", metavar="OTHER", help="Compare with this file, plain or virtual.")
@click.option(
    "--tolerance",
    type=float,
    default=0.0,
    show_default=True,
    help="Largest absolute difference of statistics that counts as equal.",
)
@selecting_options
@reading_options
@ratio_option
@talking_options
def verify(src: str, against: str | None, tolerance: float, **options: Any) -> None:
    """Check that a checkpoint is sound, or that two hold the same.

    Where one file is plain and the other virtual, the mean of the ranks is compared.

    \b
    Example:
        $ distbn-convert verify virtual.pth --against plain.pth
    """
    from ..checkpoint import verify_checkpoint

    talk = _Talk(options, src)
    with input_paths(*([src] if against is None else [src, against])) as paths:
        other = None if against is None else paths[1]
        report = verify_checkpoint(paths[0], other, tolerance, **options)
    talk.warn(report.warnings)
    if talk.json:
        echo_json(report.to_dict())
        return
    if talk.quiet:
        return
    if report.against is None:
        say(
            f"{one_line(src)} is sound: {report.groups} BatchNorms, "
            f"{report.checksums} checksums matched"
        )
    else:
        say(
            f"{one_line(src)} and {one_line(against)} hold the same: {report.groups} BatchNorms, "
            f"largest difference {report.largest_difference:g}"
        )
    for line in checksums(report.source, report.against):
        say(line)


class _Talk:
    """What the user wants to hear; takes its options out of those of the library.

    Errors under ``--json`` name the input.
    """

    def __init__(self, options: dict[str, Any], src: str) -> None:
        click.get_current_context().obj.update(path=src)
        self.json: bool = options.pop("as_json")
        self.quiet: bool = options.pop("quiet")
        self.verbose: bool = options.pop("verbose")

    def warn(self, warnings: tuple[str, ...]) -> None:
        """Print warnings on stderr."""
        if not self.quiet:
            for warning in warnings:
                say(f"{label('Warning')} {one_line(warning)}", err=True)


def _write(
    srcs: Sequence[str],
    dst: str | None,
    run: Callable[..., CheckpointReport],
    done: str,
    options: dict[str, Any],
) -> None:
    """Run a command that writes, with its streams, progress and report."""
    talk = _Talk(options, srcs[0])
    force = options.pop("force")
    options.update(overwrite=force, allow_compressed=force)
    in_place = options.get("in_place", False)
    if in_place and dst and not os.path.exists(dst):
        raise click.UsageError(f"--in-place writes to SRC; leave {dst} out.")
    if in_place and "-" in srcs:
        raise click.UsageError("--in-place writes to a file, not to - (stdin); name SRC, or DST.")
    bar = ProgressBar(not (talk.quiet or talk.json))
    with input_paths(*srcs) as paths, output_path(dst) as out, bar as progress:
        report = run(paths, out, progress=progress, **options)
    on_stderr = dst == "-"
    if not (talk.json and on_stderr):  # the document has them
        talk.warn(report.warnings)
    if talk.json:
        echo_json(report.to_dict(), err=on_stderr)
    elif not talk.quiet:
        say(summary(report, done), err=on_stderr)
        if report.opaque_globals:
            names = one_line(", ".join(report.opaque_globals))
            say(f"carried through, not executed: {names}", err=on_stderr)
        for line in checksums(report.source, report.output):
            say(line, err=on_stderr)
        if talk.verbose:
            say(table(report), err=on_stderr)
