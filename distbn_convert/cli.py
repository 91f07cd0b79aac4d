"""The command line: each command calls one public function. Only this file imports click."""

from __future__ import annotations

import sys

import click

from . import __version__
from .errors import DistBNError

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distbn-convert")
def cli() -> None:
    """Train on one GPU as if it were many: tools for models with virtual ranks."""


@cli.command()
@click.argument("names", nargs=-1)
def models(names: tuple[str, ...]) -> None:
    """Print how many BatchNorm layers torchvision's models hold.

    NAMES are torchvision's names or patterns with *; without any, all models are listed.

    \b
    Example:
        $ distbn-convert models resnet18
        resnet18  20
    """
    try:
        from .models import count_batch_norms, list_models
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"this command needs {error.name}; install it with: pip install distbn_convert[models]"
        ) from error
    matched = list_models(include=list(names) or None)
    if not matched:
        raise click.ClickException(
            f"expected names of torchvision models, but none matches {', '.join(names)}; "
            "run the command without names to see them all."
        )
    width = max(map(len, matched))
    for name in matched:
        click.echo(f"{name:{width}}  {count_batch_norms(name)}")


def main() -> None:
    """Run the command line; errors of this package become one line and exit status 1."""
    try:
        cli(prog_name="distbn-convert")
    except DistBNError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
