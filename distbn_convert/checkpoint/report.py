"""What was done to a checkpoint, and what is in it: typed, and as JSON of schema 1."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["SCHEMA", "CheckpointReport", "FileInfo", "GroupReport", "Spread", "VerifyReport"]

SCHEMA = 1  # of every JSON document of the command line


@dataclass(frozen=True)
class FileInfo:
    """A file or folder.

    Attributes:
        path: as it was given.
        format: ``"torch"``, ``"torch-legacy"``, ``"safetensors"``, ``"sharded"``, ``"accelerate"``
            or ``"dcp"``.
        bytes: its size, of a folder the sum of its files.
        sha256: its SHA-256 in hexadecimal, if that was asked for; None for a folder.
    """

    path: str
    format: str
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Spread:
    """How far the virtual ranks of one layer disagree, over its channels.

    A channel's means are measured in standard deviations of that channel, its variances as a part
    of their average; both are the standard deviation over the ranks.

    Attributes:
        mean_median: of the running means, at the median channel.
        mean_max: at the channel where they disagree most.
        var_median: of the running variances, at the median channel.
        var_max: at the channel where they disagree most.
    """

    mean_median: float
    mean_max: float
    var_median: float
    var_max: float


@dataclass(frozen=True)
class GroupReport:
    """One BatchNorm.

    Attributes:
        path: keys that lead to its state dict, as text.
        prefix: what stands before ``running_mean``.
        channels: C.
        dtype: of its running statistics.
        tracked: the largest ``num_batches_tracked``; None without a counter, or if that is no
            finite number.
        ranks: V before the command; None for plain statistics.
        state: before the command, ``"plain"`` or ``"virtual"``.
        action: ``"converted"``, ``"reverted"``, ``"gathered"``, ``"found"`` or ``"skipped"``.
        reason: why it was skipped.
        nonfinite: how many of its statistics are NaN or infinite.
        spread: how far its ranks disagree; of ``inspect`` alone.
    """

    path: tuple[str, ...]
    prefix: str
    channels: int
    dtype: str
    tracked: int | None
    ranks: int | None
    state: str
    action: str
    reason: str | None = None
    nonfinite: int = 0
    spread: Spread | None = None

    @property
    def name(self) -> str:
        """Path and prefix joined by dots, ``"model.layer1.0.bn1"``."""
        return ".".join([*self.path, self.prefix[:-1]] if self.prefix else self.path)


@dataclass
class CheckpointReport:
    """What a command did or found.

    Attributes:
        command: ``"convert"``, ``"revert"``, ``"gather"`` or ``"inspect"``.
        source: the input; of ``gather`` the first.
        output: what was written; None after ``inspect`` and a dry run.
        virtual_ranks: V of what was written or read; None where layers differ or have none.
        reduction: how ranks were reduced, if they were.
        groups: the BatchNorms.
        tensors: how many tensors the source holds.
        opaque_globals: the names of Python objects carried through unexecuted.
        warnings: what the user should know.
        dry_run: whether nothing was written.
        elapsed_s: seconds.
    """

    command: str
    source: FileInfo
    output: FileInfo | None = None
    virtual_ranks: int | None = None
    reduction: str | None = None
    groups: tuple[GroupReport, ...] = ()
    tensors: int = 0
    opaque_globals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    dry_run: bool = False
    elapsed_s: float = 0.0

    @property
    def counts(self) -> dict[str, int]:
        """How many groups had each action."""
        return dict(Counter(group.action for group in self.groups))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON's types, with ``"schema": 1``."""
        return {"schema": SCHEMA, **asdict(self), "counts": self.counts}


@dataclass
class VerifyReport:
    """Whether a checkpoint is sound, or holds the same as another.

    Attributes:
        source: the file.
        against: the other; None if only the file itself was checked.
        checksums: how many parts of the file had a checksum, which matched; 0 for formats
            without any.
        groups: how many BatchNorms were found, or compared.
        largest_difference: of any statistic between the two files.
        warnings: what the user should know.
    """

    source: FileInfo
    against: FileInfo | None = None
    checksums: int = 0
    groups: int = 0
    largest_difference: float = 0.0
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON's types, with ``"schema": 1``."""
        return {"schema": SCHEMA, "command": "verify", **asdict(self)}
