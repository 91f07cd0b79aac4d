"""Checkpoints of ``torch.save``: loaded without executing anything, saved deterministically."""

from __future__ import annotations

import io
import mmap
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ReadError, RefusedError
from .allowed import allowed_globals, is_ordinary
from .opaque import opaque_pickle, scan_globals
from .places import access_error, is_refusal
from .stores import ReadOptions
from .zips import reading_zip, starts_as_zip

__all__ = ["TorchFile", "load_torch", "save_torch", "unknown_globals"]

_LEGACY_PICKLES = 4  # magic number, protocol, system, and then the checkpoint
_MAX_RATIO = 100  # weights hardly compress; more than this is a bomb, or all zeros


@dataclass
class TorchFile:
    """A loaded checkpoint.

    Attributes:
        tree: what was saved.
        protocol: of the pickle, kept when it is saved again.
        pickle_module: what writes inert objects; None if there are none.
        opaque_globals: the names carried through unexecuted.
        warnings: what the user should know.
        mapped: the file that its storages are mapped from; None if they are in memory.
        zipped: the zip that it comes from; None if it is of the older format, or new.
    """

    tree: Any
    protocol: int = 2
    pickle_module: Any = None
    opaque_globals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    mapped: Path | None = None
    zipped: Path | None = None


def load_torch(path: Path, options: ReadOptions) -> TorchFile:
    """Load a checkpoint onto the CPU, mapped into memory where the format permits.

    Args:
        path: a torch zip or a legacy file.
        options: how; with ``opaque`` unknown objects are carried through as inert stand-ins.

    Raises:
        RefusedError: unknown Python objects, or a compression ratio above 100.
        ReadError: the file is damaged.
        FileAccessError: the system cannot read it.
    """
    zipped = starts_as_zip(path)
    stored = zipped and _check_members(path, options.allow_compressed)
    result = TorchFile(None, _protocol(path, zipped), zipped=path if zipped else None)
    extra = allowed_globals(options.allow_globals)
    loading: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    if options.opaque:
        # torch gives every name in the file to this module, whose stand-ins run nothing.
        result.pickle_module = opaque_pickle()
        loading.update(weights_only=False, pickle_module=result.pickle_module)
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals(extra),
            _mapping_privately(),
        ):
            warnings.simplefilter("ignore")
            # torch takes *.safetensors for that, whatever is in it, and maps by the UTF-8 name.
            if stored and path.suffix != ".safetensors" and _is_utf8(path):
                result.tree = torch.load(str(path), mmap=True, **loading)
                result.mapped = path
            else:
                with open(path, "rb") as file:
                    result.tree = torch.load(file, **loading)
    except (MemoryError, CheckpointError):
        raise
    except Exception as error:
        raise _explain(path, error, options.opaque, {name for _, name in extra}) from error
    if options.opaque:
        names = result.pickle_module.globals()
        result.opaque_globals = [name for name in names if not is_ordinary(name)]
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        result.warnings.append(
            f"torch {torch.__version__} has a known flaw in its safe loader (CVE-2026-24747); "
            "use 2.10 or newer for files that you do not trust."
        )
    return result


@contextmanager
def _mapping_privately() -> Iterator[None]:
    """Map privately even if torch was told to share: it swaps bytes in memory, thus in the file."""
    shared = getattr(mmap, "MAP_SHARED", None)  # Windows has none
    if shared is None or torch.serialization.get_default_mmap_options() != shared:
        yield
        return
    with torch.serialization.set_default_mmap_options(mmap.MAP_PRIVATE):
        yield


def save_torch(result: TorchFile, file: Any) -> None:
    """Write ``result.tree``; the same content gives the same bytes, whatever the file's name.

    Raises:
        RefusedError: it holds what cannot be saved.
        OSError: the file's own, which torch hides.
    """
    options = {} if result.pickle_module is None else {"pickle_module": result.pickle_module}
    try:
        torch.save(result.tree, file, pickle_protocol=result.protocol, **options)
    except RecursionError as error:
        raise RefusedError(
            "the checkpoint is nested too deeply to be saved again; save its state dict alone."
        ) from error
    except Exception as error:
        hidden = _hidden(error)
        if hidden is not None:
            raise hidden from error
        raise


def unknown_globals(path: Path) -> list[str]:
    """List the names in a checkpoint's pickle that are not ordinary; nothing is imported."""
    if starts_as_zip(path):
        with reading_zip(path) as archive:
            data = archive.read(_data_pkl(path, archive))
        names = scan_globals(io.BytesIO(data))
    else:
        with open(path, "rb") as file:
            names = scan_globals(file, _LEGACY_PICKLES)
    return [name for name in names if not is_ordinary(name)]


def _is_utf8(path: Path) -> bool:
    """Whether the name on the disk is UTF-8: the locale may have another encoding."""
    try:
        return str(path).encode() == os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _data_pkl(path: Path, archive: zipfile.ZipFile) -> str:
    for name in archive.namelist():
        if name.rpartition("/")[2] == "data.pkl":
            return name
    raise ReadError(f"{path} is a zip but no torch checkpoint: it has no data.pkl.")


def _check_members(path: Path, allow_compressed: bool) -> bool:
    """Return whether all members are stored uncompressed, which mapping relies on."""
    with reading_zip(path) as archive:
        infos = archive.infolist()
    size = sum(info.file_size for info in infos)
    packed = sum(info.compress_size for info in infos)
    if size > _MAX_RATIO * max(packed, 1) and not allow_compressed:
        raise RefusedError(
            f"{path} unpacks from {packed:,} to {size:,} bytes, as weights never do. "
            "If you trust it, use --force."
        )
    return all(info.compress_type == zipfile.ZIP_STORED for info in infos)


def _protocol(path: Path, zipped: bool) -> int:
    """Return the protocol of the pickle, in legacy files that of the first."""
    if zipped:
        with (
            reading_zip(path, fault="its data.pkl cannot be read") as archive,
            archive.open(_data_pkl(path, archive)) as member,
        ):
            start = member.read(2)
    else:
        with open(path, "rb") as file:
            start = file.read(2)
    return start[1] if len(start) == 2 and start[0] == 0x80 and start[1] in range(2, 6) else 2


def _explain(path: Path, error: Exception, opaque: bool, allowed: set[str]) -> CheckpointError:
    """Turn whatever torch makes of a file into one sentence."""
    if is_refusal(error):
        return access_error(f"cannot read {path}", error)
    text = (str(error).strip().splitlines() or [""])[0][:200]
    damaged = ReadError(
        f"{path} is damaged or no torch checkpoint ({type(error).__name__}"
        f"{': ' + text if text else ''}). Download or save it again."
    )
    if opaque:
        return damaged
    try:
        unknown = [name for name in unknown_globals(path) if name not in allowed]
    except Exception:
        return damaged
    named = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))  # torch's own, not accepted
    if not unknown and named:
        unknown = [named[1]]
    if unknown:
        return RefusedError(_refusal(path, unknown))
    if "weights_only" in str(error) or "Weights only" in str(error):
        return RefusedError(
            f"{path} holds Python objects that the safe loader cannot make. Nothing was executed. "
            "Use --opaque to carry them over unchanged."
        )
    return damaged


def _refusal(path: Path, unknown: list[str]) -> str:
    more = f" ({len(unknown) - 1} more)" if len(unknown) > 1 else ""
    modules = [n for n in unknown if n.startswith(("torch.nn.modules.", "ultralytics.nn."))]
    if modules:
        return (
            f"{path} is or holds a whole pickled nn.Module ({modules[0]}), which only its own code "
            "can open. Nothing was executed. Save model.state_dict() instead; --opaque carries it "
            "over unchanged, for the state dicts beside it."
        )
    return (
        f"{path} holds Python objects that the safe loader does not accept: {unknown[0]}{more}. "
        "Nothing was executed. Use --opaque to carry them over unchanged."
    )


def _hidden(error: BaseException) -> BaseException | None:
    """Find the interruption, or the error of the system, that torch covered with its own."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, (OSError, MemoryError)) or not isinstance(chain, Exception):
            return chain
        chain = chain.__context__
    return None
