"""What every command on checkpoints understands; the command line has the same words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import ConfigurationError
from .groups import Selection
from .stores import ReadOptions
from .stream import Progress

__all__ = ["FORMATS", "Options", "parse_size"]

FORMATS = ("auto", "torch", "safetensors")

_UNITS = {unit: 1000**power for power, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
_UNITS |= {unit: 1024**power for power, unit in enumerate(("", "KIB", "MIB", "GIB", "TIB"))}


def parse_size(size: int | str) -> int:
    """Return a number of bytes that is written ``5GB``, ``1.5 GiB`` or ``500000``.

    Raises:
        ConfigurationError: it is none, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    unit = _UNITS.get(found[2].upper()) if found else None
    count = round(float(found[1]) * unit) if found and unit else 0
    if count < 1 or not isinstance(size, int | str) or isinstance(size, bool):
        raise ConfigurationError(
            f"expected a size such as '5GB', '500MB' or a number of bytes, but got {size!r}; the "
            "units are B, kB, MB, GB, TB (of 1000) and KiB, MiB, GiB, TiB (of 1024)."
        )
    return count


@dataclass(frozen=True)
class Options:
    """Options of :func:`convert_checkpoint` and its siblings, given as keywords.

    Attributes:
        include: glob patterns on the names of BatchNorms, in their state dict or as ``inspect``
            prints them, ``("layer1.*", "model_ema.*")``; only those are taken. Default: all
        exclude: glob patterns of BatchNorms to leave alone. Default: none
        state: dotted path of the sub-tree to look in, ``"model_ema"``; with ``format``, that
            alone is written. Default: the whole file
        ema_underscore: take MMCV's EMA copies, whose names are joined by underscores, too.
            Default: False
        format: of the output, ``"auto"`` (the input's, with all else in it), ``"torch"`` or
            ``"safetensors"`` (a file of one state dict). Default: ``"auto"``
        max_shard_size: write safetensors as a folder of shards of at most so many bytes, an int or
            ``"5GB"``, ``"500MB"``, with an index; as ``model.safetensors`` in the folder if all
            fits in one. A larger tensor gets a shard of its own. Default: None, one file
        overwrite: replace an existing output. Default: False
        in_place: the output is the input; ``dst`` is None or the same file. Default: False
        backup: with ``in_place``, keep the input as ``SRC.bak``, which shares no file with the
            output. Default: True
        dry_run: do everything but write. Default: False
        strict: refuse an input in which something was left alone or not looked into, or is not
            finite, and a pattern that matches nothing; else warnings tell. Default: False
        opaque: carry unknown Python objects through, unexecuted. Default: False
        allow_globals: full names of classes that the file may make. Default: none
        allow_compressed: accept any compression ratio. Default: False
        check_input: compare all of each input with its checksums first. Default: False
        sha256: report the SHA-256 of input and output; not of folders. Default: False
        verify: compare what is read or saved anew with the input's checksums, read the output back
            and compare before it appears. Default: True
        fsync: wait until the disk holds the output. Default: True
        progress: called with (bytes written, bytes expected) now and then. Default: None
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    state: str | None = None
    ema_underscore: bool = False
    format: str = "auto"
    max_shard_size: int | str | None = None
    overwrite: bool = False
    in_place: bool = False
    backup: bool = True
    dry_run: bool = False
    strict: bool = False
    opaque: bool = False
    allow_globals: Sequence[str] = ()
    allow_compressed: bool = False
    check_input: bool = False
    sha256: bool = False
    verify: bool = True
    fsync: bool = True
    progress: Progress | None = None

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "allow_globals"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise ConfigurationError(
                    f"{name} must be a sequence of str, but got {value!r}; write ({value!r},)."
                )
            object.__setattr__(self, name, tuple(value))
        if self.format not in FORMATS:
            raise ConfigurationError(
                f"format must be one of {', '.join(map(repr, FORMATS))}, but got {self.format!r}; "
                "'auto' keeps the input's."
            )
        if self.max_shard_size is not None:
            object.__setattr__(self, "max_shard_size", parse_size(self.max_shard_size))

    @property
    def selection(self) -> Selection:
        """The part that chooses BatchNorms."""
        return Selection(self.include, self.exclude, self.state, self.ema_underscore)

    @property
    def reading(self) -> ReadOptions:
        """The part that opens files."""
        return ReadOptions(self.state, self.opaque, self.allow_globals, self.allow_compressed)
