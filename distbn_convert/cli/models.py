"""``distbn-convert models``: torchvision's zoo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click

from ..checkpoint.report import SCHEMA
from ..errors import FileAccessError
from .options import Writing, json_option, no_color
from .streams import echo_json, output_path, say

__all__ = ["models"]


class _ModelsGroup(click.Group):
    """A group whose arguments are names of models, unless there is a command among them.

    All options are the commands'; it has some of its own for the sake of its help.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = [word for word in args if not word.startswith("-")]
        if words or not set(args) & set(ctx.help_option_names):
            command = next((word for word in words if word in self.commands), None)
            if command is not None:
                args.remove(command)
            args = [command or "list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_ModelsGroup, subcommand_metavar="[NAMES]... | export")
@click.option("--json", is_flag=True, expose_value=False, help="Print one JSON document on stdout.")
@no_color
def models() -> None:
    """Count the BatchNorms of torchvision's models, or export one.

    NAMES are torchvision's names or patterns with *; without any, all models are listed.

    \b
    Example:
        $ distbn-convert models resnet18
        resnet18  20
    """


@models.command("list", hidden=True)
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@no_color
def list_(names: tuple[str, ...], as_json: bool) -> None:
    """Count the BatchNorms of torchvision's models.

    \b
    Example:
        $ distbn-convert models resnet18
        resnet18  20
    """
    from ..models import count_batch_norms, list_models

    with _needs_torchvision():
        matched = list_models(include=list(names) or None)
    if not matched:
        raise click.UsageError(
            f"expected names of torchvision models, but none matches {', '.join(names)}; "
            "run the command without names to see them all."
        )
    if as_json:
        counts = {name: count_batch_norms(name) for name in matched}
        echo_json({"schema": SCHEMA, "command": "models", "batch_norms": counts})
        return
    width = max(map(len, matched))
    for name in matched:  # one by one, as they all take a while
        say(f"{name:{width}}  {count_batch_norms(name)}")


@models.command(cls=Writing)
@click.argument("name")
@click.argument("dst")
@click.option("--vt-world-size", type=int, required=True, help="Number of virtual ranks V.")
@click.option("--weights", help="torchvision's pretrained weights, for example DEFAULT.")
@click.option("-f", "--force", is_flag=True, help="Replace an existing DST.")
@json_option
@no_color
def export(
    name: str, dst: str, vt_world_size: int, weights: str | None, force: bool, as_json: bool
) -> None:
    """Write the state dict of a torchvision model with virtual ranks. DST may be - for stdout.

    \b
    Example:
        $ distbn-convert models export resnet18 resnet18.pth --vt-world-size 8
        wrote resnet18 with 8 virtual ranks to resnet18.pth
    """
    from ..checkpoint import inspect_checkpoint, save_state_dict
    from ..models import get_model

    try:
        with _needs_torchvision():
            model = get_model(name, vt_world_size, weights)
    except OSError as error:
        raise FileAccessError(
            f"cannot fetch the weights {weights} of {name}: {getattr(error, 'reason', error)}; "
            "check the network, or leave --weights out."
        ) from error
    with output_path(dst) as out:
        assert out is not None  # DST is required
        save_state_dict(model.state_dict(), out, overwrite=force)
        output = asdict(inspect_checkpoint(out).source) if as_json else None
    if as_json:
        document = {"schema": SCHEMA, "command": "models export", "model": name, "weights": weights}
        document |= {"virtual_ranks": vt_world_size, "output": output}
        echo_json(document, err=dst == "-")
        return
    say(f"wrote {name} with {vt_world_size} virtual ranks to {dst}", err=dst == "-")


@contextmanager
def _needs_torchvision() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise click.ClickException(str(error)) from error
