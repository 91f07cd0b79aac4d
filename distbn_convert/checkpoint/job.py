"""One run of a command that writes: places checked, store opened, edited, written, reported."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigurationError, OutputExistsError, ReadError
from .backup import Backup
from .intact import check_checksums
from .options import Options
from .places import StrPath, access_error, as_path, output_place, same_file
from .report import CheckpointReport, FileInfo
from .sniff import Kind, sniff
from .stores import Store, WriteOptions, open_store
from .survey import Survey, survey
from .temporaries import is_temporary

if TYPE_CHECKING:
    from .edit import Replacements

__all__ = ["Job", "file_info"]

Compute = Callable[[Store, Survey], "Replacements"]
_Identity = tuple[int, ...]  # what shows that a file was written to or replaced


class _PreparedError(Exception):
    """A dry run has come to where it would write."""


class Job:
    """One command on one checkpoint.

    Args:
        command: its name, for the report.
        src: the input.
        dst: the output; None with ``in_place``.
        options: what the caller wants.

    Attributes:
        notes: what the user should know of the writing.

    Raises:
        ConfigurationError: no output, or one that contradicts the format.
        CheckpointError: the output exists or cannot be written; the input is not there.
    """

    def __init__(self, command: str, src: StrPath, dst: StrPath | None, options: Options) -> None:
        self.started = time.monotonic()
        self.command, self.options = command, options
        self.src = as_path(src)
        self._before: dict[Path, dict[Path, _Identity]] = {}  # of each input
        self._whole: set[Path] = set()  # inputs to which no file may be added either
        self.watch(self.src)
        self.kind = sniff(self.src)
        index = self.kind is Kind.SHARDED and self.src.is_file()
        self.root = self.src.parent if index else self.src  # what is written anew
        self.format = _new_format(self.kind, options.format, options.state)
        self._check_shards()
        self._backup = Backup(self.root) if options.in_place and options.backup else None
        self.dst = self._place(None if dst is None else as_path(dst))
        self.notes: list[str] = []

    def run(
        self,
        state: str,
        action: str,
        compute: Compute,
        virtual_ranks: int | None = None,
        reduction: str | None = None,
    ) -> CheckpointReport:
        """Open, survey, compute, write and read back.

        Args:
            state: what the command works on, ``"plain"``, ``"virtual"`` or ``"any"``.
            action: what it calls what it did, ``"converted"``.
            compute: makes the new statistics of the chosen groups; may add to what to tell.
            virtual_ranks: for the report.
            reduction: for the report.
        """
        options = self.options
        if options.check_input:
            check_checksums(self.src)
        store = open_store(self.src, options.reading)
        self.keep(store)
        if self.format is not None and options.max_shard_size is None:
            self.watch_read(self.src, store)
        found = survey(store, self.src, options.selection, state)
        groups = found.examine(store, self.src, options.strict, action)
        source = file_info(self.root, store.format, options.sha256)
        replacements = compute(store, found)
        if self.kind is Kind.TORCH_LEGACY and self.format != "safetensors":
            self.notes.append("a file in torch's format before 1.6 becomes one in today's, a zip.")
        output = self._write(store, replacements)
        if virtual_ranks is None:
            ranks = {group.ranks for group in found.chosen}
            virtual_ranks = ranks.pop() if len(ranks) == 1 else None
        return CheckpointReport(
            command=self.command,
            source=source,
            output=output,
            virtual_ranks=virtual_ranks,
            reduction=reduction,
            groups=groups,
            tensors=store.tensors,
            opaque_globals=tuple(store.opaque_globals),
            warnings=(*store.warnings, *found.concerns, *found.notes, *self.notes),
            dry_run=options.dry_run,
            elapsed_s=time.monotonic() - self.started,
        )

    def watch(self, path: Path) -> None:
        """Remember what an input is like before it is opened; it must be the same at the end.

        Of an index its whole folder is watched, as all of it may be carried over.
        """
        self._before[path] = _identities(path, _files_of(path))
        self._whole.add(path)

    def watch_read(self, path: Path, store: Store) -> None:
        """Watch only what is read of an input of which nothing else is carried over."""
        before, files = self._before[path], list(store.files())
        unseen = [file for file in files if file not in before]  # below a link to a folder
        before |= _identities(path, unseen)
        self._before[path] = {file: before[file] for file in files}
        self._whole.discard(path)

    def keep(self, store: Store) -> None:
        """Refuse an output that would replace a file of this input, or a folder that holds one.

        Raises:
            OutputExistsError: it would.
        """
        if self.options.in_place or not self.dst.exists():
            return
        target = Path(os.path.realpath(self.dst))
        for file in store.files():
            if same_file(file, target):
                raise OutputExistsError(
                    f"{self.dst} is the input {file}, which would be lost; use another name."
                )
            link = Path(os.path.realpath(file.parent), file.name)
            if target in (*link.parents, *Path(os.path.realpath(file)).parents):
                raise OutputExistsError(
                    f"{self.dst} holds the input {file}, which would be lost; use another name."
                )

    def _check_shards(self) -> None:
        """Refuse shards of what would be no safetensors."""
        if self.options.max_shard_size is None:
            return
        if self.options.in_place:
            raise ConfigurationError("max_shard_size makes a new folder; name an output instead.")
        own = self.kind is Kind.SAFETENSORS
        if self.kind is Kind.ACCELERATE:
            own = len(list(self.src.glob("*.safetensors"))) == 1
        if self.kind is Kind.SHARDED:
            index = self.src if self.src.is_file() else next(self.src.glob("*.index.json"))
            own = index.name.endswith(".safetensors.index.json")
        if self.format != "safetensors" and (self.format is not None or not own):
            becomes = self.format or self.kind
            raise ConfigurationError(
                f"max_shard_size is for safetensors, but the output would be {becomes}"
                "; use format='safetensors' (--format safetensors)."
            )

    def _place(self, dst: Path | None) -> Path:
        in_place = self.options.in_place
        if dst is None and not in_place:
            raise ConfigurationError(
                "expected an output, but got none; name it, or use in_place=True (--in-place)."
            )
        same = dst is None or same_file(self.root, dst) or same_file(self.src, dst)
        if same and not in_place:
            here = "" if self.command == "gather" else "in_place=True (--in-place), or "
            raise OutputExistsError(
                f"{self.src} and {dst} are the same file. Use {here}another name."
            )
        if in_place and not same:
            raise ConfigurationError(
                f"in_place writes to the input {self.src}, but the output is {dst}; leave one out."
            )
        if in_place and self.format is not None:
            raise ConfigurationError(
                "in_place keeps the format and all else; name an output, or leave the format out."
            )
        path = self.root if same or dst is None else dst
        if not in_place:
            _check_suffix(path, self.kind, self.format)
        if self.options.max_shard_size is not None and path.suffix == ".safetensors":
            raise ConfigurationError(
                f"max_shard_size makes a folder, but {path.name} is named as a file; leave its "
                "ending out."
            )
        sharded = self.options.max_shard_size is not None
        folder = sharded or (self.root.is_dir() and self.format is None)
        output_place(path, folder=folder, overwrite=self.options.overwrite or in_place)
        if self._backup is not None:
            self._backup.check()
        return path

    def _write(self, store: Store, replacements: Replacements) -> FileInfo | None:
        """Write the output; in a dry run do all that comes before, and return None."""
        try:
            self._write_with(store, replacements)
        except _PreparedError:
            return None
        except BaseException:
            if self._backup is not None:
                self._backup.drop()
            raise
        return file_info(self.dst, sniff(self.dst).value, self.options.sha256)

    def _write_with(self, store: Store, replacements: Replacements) -> None:
        options = self.options
        writing = WriteOptions(
            overwrite=options.overwrite or options.in_place,
            keep_old=self._backup is not None,
            fsync=options.fsync,
            verify=options.verify,
            progress=options.progress,
            before_writing=self._begin,
            before_publish=self._check_unchanged,
            note=self.notes.append,
        )
        if options.verify and (self.format is not None or options.max_shard_size is not None):
            store.check()  # all of it is saved anew
        if options.max_shard_size is not None:
            from .reshard import write_shards

            limit, state = int(options.max_shard_size), options.state
            write_shards(store, self.dst, replacements, limit, state, writing)
        elif self.format is None:
            store.write(self.dst, replacements, writing)
        else:
            from .crossformat import write_as

            state = options.state
            write_as(self.format, store, self.dst, replacements, state, writing)

    def _begin(self) -> None:
        """Stop a dry run here; keep the input that is about to be replaced as ``SRC.bak``."""
        if self.options.dry_run:
            self._check_unchanged()
            raise _PreparedError
        if self._backup is not None:
            self._backup.make()

    def _check_unchanged(self) -> None:
        for path, before in self._before.items():
            if _identities(path, _files_of(path) if path in self._whole else before) != before:
                raise ReadError(
                    f"{path} changed while it was being read. Nothing was written; run this again "
                    "when its writer has finished."
                )


def _new_format(kind: Kind, wanted: str, state: str | None) -> str | None:
    """Return the format in which one state dict is written; None keeps the input's and all else.

    With ``state`` it may be the input's own: then that state dict alone is taken out.
    """
    own = {Kind.TORCH_ZIP: "torch", Kind.TORCH_LEGACY: "torch", Kind.SAFETENSORS: "safetensors"}
    same = wanted == own.get(kind) and state is None
    return None if same or wanted == "auto" else wanted


def _check_suffix(path: Path, kind: Kind, format: str | None) -> None:
    """Refuse a name that promises another format than the file will have."""
    becomes = format or kind.value
    named = {".safetensors": "safetensors", ".pth": "torch", ".pt": "torch", ".ckpt": "torch"}
    promised = named.get(path.suffix)
    if promised is None or becomes.startswith(promised):
        return
    if (path.suffix, becomes) == (".ckpt", "dcp"):  # as Lightning names its folders
        return
    raise ConfigurationError(
        f"the output would be {becomes}, but {path.name} is named as a file of {promised}; "
        f"use format={promised!r} (--format {promised}), or another name."
    )


def file_info(path: Path, format: str, sha256: bool) -> FileInfo:
    """Describe a file, with its SHA-256 if wanted, or a folder with the files in it."""
    if path.is_dir():
        size = sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
        return FileInfo(str(path), format, size)
    digest = None
    if sha256:
        from .checksums import sha256_of

        digest = sha256_of(path)
    return FileInfo(str(path), format, path.stat().st_size, digest)


def _identities(path: Path, files: Iterable[Path]) -> dict[Path, _Identity]:
    """Return what shows that one of the files of an input was written to or replaced."""
    try:
        return {file: _identity(file) for file in files}
    except OSError as error:
        raise access_error(f"cannot read {path}", error) from error


def _files_of(path: Path) -> Iterable[Path]:
    """Return a file, or those in a folder and below; of an index those of its folder."""
    if path.name.endswith(".index.json") and path.is_file():
        path = path.parent
    return _files_below(path) if path.is_dir() else [path]


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files and links in a folder and below, but outputs on their way, as ours are."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_temporary(name)]
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        yield from (Path(place, name) for name in [*files, *links] if not is_temporary(name))


def _identity(file: Path) -> _Identity:
    status = os.stat(file) if file.is_file() else os.lstat(file)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
