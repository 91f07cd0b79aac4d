"""The options of the public functions as keywords, for type checkers, editors and ``help``.

:class:`~.options.Options` says what each means and has the defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from inspect import Parameter, signature
from typing import Any, TypedDict, TypeVar

from .options import Options
from .stream import Progress

if sys.version_info >= (3, 11):
    from typing import Unpack
else:
    from typing_extensions import Unpack  # torch brings it

__all__ = ["InPlaceKeywords", "ReadingKeywords", "Unpack", "WritingKeywords", "shows_options"]

F = TypeVar("F", bound=Callable[..., Any])


class ReadingKeywords(TypedDict, total=False):
    """Options of the functions that only read."""

    include: Sequence[str]
    exclude: Sequence[str]
    state: str | None
    ema_underscore: bool
    strict: bool
    opaque: bool
    allow_globals: Sequence[str]
    allow_compressed: bool
    check_input: bool
    sha256: bool


class WritingKeywords(ReadingKeywords, total=False):
    """Options of the functions that write."""

    format: str
    max_shard_size: int | str | None
    overwrite: bool
    dry_run: bool
    verify: bool
    fsync: bool
    progress: Progress | None


class InPlaceKeywords(WritingKeywords, total=False):
    """Options of those with one input, which may put the output in its place."""

    in_place: bool
    backup: bool


def shows_options(keywords: type) -> Callable[[F], F]:
    """Have ``help`` and ``inspect.signature`` name the options that a function takes.

    Args:
        keywords: those that its ``**options`` are.
    """
    options = [
        Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(Options)
        if each.name in keywords.__annotations__
    ]

    def decorate(function: F) -> F:
        shown = signature(function)
        own = [part for part in shown.parameters.values() if part.kind is not Parameter.VAR_KEYWORD]
        function.__signature__ = shown.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
        return function

    return decorate
