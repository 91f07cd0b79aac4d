"""Which keys of a state dict are the statistics of a BatchNorm: names and shapes, no tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from .words import and_more

__all__ = [
    "PLAIN",
    "Group",
    "KeyPath",
    "LookAlike",
    "Selection",
    "Specs",
    "TensorSpec",
    "describe",
    "dotted",
    "find_groups",
    "key_name",
]

KeyPath = tuple[Any, ...]  # the keys that lead from the top of a file to what is in it
PLAIN = (str, bytes, int, float, complex, type(None))  # equal if they look it
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_NOT_PLAIN = (
    "its running_mean or running_var is no plain tensor (but a NumPy array, say), or in a Python "
    "object; save it as a tensor"
)
_NAMES = frozenset(("weight", "bias", *STATISTICS))


@dataclass(frozen=True)
class TensorSpec:
    """What the recognition needs to know of one tensor.

    Attributes:
        dtype: torch's name without the prefix, ``"float32"``.
        shape: its sizes.
        floating: whether it holds real floating-point numbers.
        refusal: why its values cannot be handled (``"is a DTensor, ..."``); None if they can.
    """

    dtype: str
    shape: tuple[int, ...]
    floating: bool
    refusal: str | None = None


# What a mapping holds, described; None for what is no tensor.
Specs = Mapping[Any, TensorSpec | None]


@dataclass(frozen=True)
class Named:
    """Where running statistics are.

    Attributes:
        path: keys that lead from the top of the file to the mapping, ``("model",)``.
        prefix: what stands before ``running_mean``, ``"layer1.0.bn1."``.
    """

    path: KeyPath
    prefix: str

    @property
    def name(self) -> str:
        """The prefix without its separator; ``""`` for a BatchNorm saved by itself."""
        return self.prefix[:-1]

    @property
    def full_name(self) -> str:
        """The path and the name, as messages show them."""
        return dotted((*self.path, self.name)) if self.name else dotted(self.path) or "(top level)"

    def is_called(self, glob: str) -> bool:
        """Whether a pattern matches its name in its state dict, or as messages show it.

        The latter only if the pattern begins with the first key of the path, else ``*.bn`` would
        match a ``bn`` at the top of each state dict.
        """
        if fnmatchcase(self.name, glob):
            return True
        named = bool(self.path) and f"{glob}.".startswith(key_name(self.path[0]) + ".")
        return named and fnmatchcase(self.full_name, glob)


@dataclass(frozen=True)
class Group(Named):
    """The statistics of one BatchNorm.

    Attributes:
        channels: C.
        dtype: of the running statistics.
        ranks: V of virtual statistics ``(V, C)``; None for plain ones ``(C,)``.
        counted: whether there is a ``num_batches_tracked``.
        underscore: whether it is an MMCV copy, whose names are joined by underscores.
        problem: what is wrong with it, for a group that must not be touched.
        refusal: why its tensors cannot be handled.
    """

    channels: int
    dtype: str
    ranks: int | None
    counted: bool
    underscore: bool = False
    problem: str | None = None
    refusal: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of running_mean, running_var and, if there is one, num_batches_tracked."""
        return tuple(self.prefix + name for name in STATISTICS[: 3 if self.counted else 2])


@dataclass(frozen=True)
class LookAlike(Named):
    """Keys that resemble a BatchNorm and are left alone."""

    reason: str


@dataclass(frozen=True)
class Selection:
    """Which groups the caller wants.

    Attributes:
        include: glob patterns on the names of groups, short or full; empty takes all.
        exclude: glob patterns of groups to leave out.
        state: dotted path of the sub-tree to look in; None is the whole file.
        ema_underscore: whether MMCV's underscore copies are wanted.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    state: str | None = None
    ema_underscore: bool = False

    def why_not(self, group: Named) -> str | None:
        """Return why a group, or what resembles one, is left out; None if it is wanted."""
        path = dotted(group.path)
        if self.state is not None and path != self.state and not path.startswith(self.state + "."):
            return f"outside --state {self.state}"
        if self.include and not any(group.is_called(glob) for glob in self.include):
            return "not matched by --include"
        if any(group.is_called(glob) for glob in self.exclude):
            return "matched by --exclude"
        if isinstance(group, Group) and group.underscore and not self.ema_underscore:
            return "an MMCV EMA copy; --ema-underscore takes it"
        return None

    def unmatched(self, groups: Iterable[Named]) -> list[str]:
        """Return one warning for each pattern that matches none of these."""
        groups = list(groups)
        options = [("include", glob) for glob in self.include]
        options += [("exclude", glob) for glob in self.exclude]
        return [
            f"--{option} {glob} matches no BatchNorm; inspect lists their names."
            for option, glob in options
            if not any(group.is_called(glob) for group in groups)
        ]


def dotted(path: Iterable[Any]) -> str:
    """Join the keys of a path with dots."""
    return ".".join(map(key_name, path))


def key_name(key: Any) -> str:
    """Name a key of a mapping; ``<Tensor>`` where its text may be its data."""
    parts = key if isinstance(key, tuple) else (key,)
    return str(key) if all(isinstance(part, PLAIN) for part in parts) else f"<{type(key).__name__}>"


def find_groups(specs: Specs, path: KeyPath = ()) -> list[Group | LookAlike]:
    """Recognise the BatchNorms of one mapping.

    A prefix P is a BatchNorm if ``P + running_mean`` and ``P + running_var`` are floating tensors
    of one shape, ``(C,)`` or ``(V, C)``, a weight and a bias have shape ``(C,)``, and P has no
    direct children but BatchNorm's five.

    Args:
        specs: what the mapping holds, described.
        path: where the mapping is in its file, passed on to the groups.

    Returns:
        The groups and what resembles one, in the order of the keys.
    """
    children: dict[str, set[str]] = defaultdict(set)
    for key in specs:
        if isinstance(key, str):
            prefix, dot, name = key.rpartition(".")
            children[prefix + dot].add(name)
    found: dict[str, Group | LookAlike] = {}
    for prefix, names in children.items():
        named = {"running_mean", "running_var"} <= names <= _NAMES
        if named or isinstance(specs.get(prefix + "running_mean"), TensorSpec):
            found[prefix] = _judge(specs, path, prefix, names)
    copies = set(_underscore_prefixes(found))
    for key in specs:
        if isinstance(key, str) and _is_underscore_copy(key):
            prefix = key.removesuffix("running_mean")
            found[prefix] = _judge_copy(specs, path, prefix, prefix in copies)
    return list(found.values())


def _judge(specs: Specs, path: KeyPath, prefix: str, names: set[str]) -> Group | LookAlike:
    strangers = sorted(names - _NAMES)
    if strangers:
        also = and_more([f'"{name}"' for name in strangers], 3)
        return LookAlike(path, prefix, f"has running_mean but also {also}: not BatchNorm")
    if None in [specs[prefix + name] for name in ("running_mean", "running_var") if name in names]:
        return LookAlike(path, prefix, _NOT_PLAIN)
    return _group(specs, path, prefix)


def _judge_copy(specs: Specs, path: KeyPath, prefix: str, known: bool) -> Group | LookAlike:
    if not known:
        return LookAlike(path, prefix, "looks like an MMCV EMA copy, but its BatchNorm is missing")
    return _group(specs, path, prefix, underscore=True)


def _group(
    specs: Specs,
    path: KeyPath,
    prefix: str,
    underscore: bool = False,
) -> Group | LookAlike:
    mean, var = specs[prefix + "running_mean"], specs.get(prefix + "running_var")
    count = specs.get(prefix + "num_batches_tracked")
    assert mean is not None
    if var is None:
        return LookAlike(path, prefix, "has running_mean but no running_var: not BatchNorm")
    reason = _why_no_batch_norm(mean, var, [specs.get(prefix + n) for n in ("weight", "bias")])
    if reason is not None:
        return LookAlike(path, prefix, reason)
    ranks = mean.shape[0] if len(mean.shape) == 2 else None
    return Group(
        path=path,
        prefix=prefix,
        channels=mean.shape[-1],
        dtype=mean.dtype,
        ranks=ranks,
        counted=count is not None,
        underscore=underscore,
        problem=_problem(mean, var, count),
        refusal=_refusal(mean, var, count),
    )


def _refusal(mean: TensorSpec, var: TensorSpec, count: TensorSpec | None) -> str | None:
    """Say why the tensors of a BatchNorm cannot be handled, None if they can."""
    for spec in (mean, var, count):
        if spec is not None and spec.refusal is not None:
            return spec.refusal
    for spec in (mean, var):
        if spec.dtype not in _DTYPES:
            return f"is {spec.dtype}, too coarse to average; save it as float32"
    return None


def _why_no_batch_norm(
    mean: TensorSpec, var: TensorSpec, affine: list[TensorSpec | None]
) -> str | None:
    if not (mean.floating and var.floating):
        return "its running statistics are not floating-point: not BatchNorm"
    if len(mean.shape) not in (1, 2) or len(var.shape) not in (1, 2):
        return f"its running_mean has shape {mean.shape}: not BatchNorm"
    channels = mean.shape[-1]
    if var.shape[-1] != channels:
        return f"its running_mean has shape {mean.shape}, its running_var {var.shape}: no BatchNorm"
    if any(spec is not None and spec.shape != (channels,) for spec in affine):
        return f"its weight or bias is not of shape ({channels},): not BatchNorm"
    return None


def _problem(mean: TensorSpec, var: TensorSpec, count: TensorSpec | None) -> str | None:
    """Say how the shapes of a BatchNorm contradict each other, None if they do not."""
    if mean.shape != var.shape:
        has = [f"{s.shape[0]} ranks" if len(s.shape) == 2 else "no ranks" for s in (mean, var)]
        return f"running_mean has {has[0]} but running_var has {has[1]}"
    if 0 in mean.shape[:-1]:
        return "its statistics have no ranks at all"
    # A counter of shape (1,) is what some exporters make of a scalar.
    allowed: tuple[tuple[int, ...], ...] = ((), (1,))
    if len(mean.shape) == 2:
        allowed = ((mean.shape[0],), (mean.shape[0], 1))
    if count is not None and count.shape not in allowed:
        return f"num_batches_tracked has shape {count.shape} where {allowed[0]} was expected"
    return None


def _is_underscore_copy(key: str) -> bool:
    return key.endswith("_running_mean") and key.rpartition(".")[2].startswith("ema_")


def _underscore_prefixes(found: Mapping[str, Group | LookAlike]) -> Iterator[str]:
    """Yield the prefixes that MMCV's EMA hook gives to copies of the groups found.

    The hook registers ``ema_`` + name.replace(".", "_") on the model, which may be wrapped:
    any number of leading names can stand before it.
    """
    for prefix, group in found.items():
        if isinstance(group, Group):
            parts = prefix.split(".")
            for wrapped in range(len(parts)):
                head = "".join(part + "." for part in parts[:wrapped])
                yield head + "ema_" + "_".join(parts[wrapped:])


def describe(look_alikes: Sequence[LookAlike]) -> list[str]:
    """Return one warning for each reason, with the number of groups and the first names."""
    names: dict[str, list[str]] = defaultdict(list)
    for item in look_alikes:
        names[item.reason].append(item.full_name)
    return [f"{and_more(where)} left alone: {reason}." for reason, where in names.items()]
