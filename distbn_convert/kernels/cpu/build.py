"""Compile the CPU kernel on first use and load it; say why where that cannot be.

Each dtype has a library of its own, as most runs need one. It goes to
``distbn_convert`` in ``$TORCH_EXTENSIONS_DIR``, ``$XDG_CACHE_HOME`` or ``~/.cache``, the first that
is set, under a name that hashes all it depends on: sources, flags, compiler, torch. It is compiled
beside its place and renamed into it, so that a reader sees all of it or nothing whatever is
interrupted; the lock only spares concurrent processes the same work and the same failure, and the
kernel of the operating system drops it when its holder dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["SWITCH", "VALUES", "Operators", "load"]

SWITCH = "DISTBN_CPU_KERNEL"
VALUES = {  # of an input, and their type in C++
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
}
_FLAGS = "DISTBN_CPU_FLAGS"  # for the compiler, behind all others
_SOURCES = Path(__file__).parent
_TORCH = Path(torch.__file__).parent
_TIMEOUT = 300  # seconds; a library compiles in three to ten
# What torch itself found this machine to have; so a cache shared by machines holds one each.
_CAPABILITY_FLAGS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": (
        *("-mavx2", "-mfma", "-mf16c"),
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    ),
}
_LOCK = threading.Lock()

logger = logging.getLogger(__name__)


class Operators(NamedTuple):
    """The kernel's two operators for one dtype; they write into tensors that they are given."""

    forward: Callable[..., None]
    backward: Callable[..., None]


_loaded: dict[torch.dtype, Operators | None] = {}


class _UnavailableError(Exception):
    """The kernel cannot be had here; the message says why."""


def load(dtype: torch.dtype) -> Operators | None:
    """Return the operators for inputs of ``dtype``, compiled if needed, once a process.

    They are ``torch.ops.distbn_convert_cpu.forward_float32``, ``backward_float32`` and so on.

    Args:
        dtype: One of :data:`VALUES`.

    Returns:
        The operators, None where they cannot be had. One log line has said why: at level INFO
        where that is to be expected, WARNING where a compiler failed. No other dtype is tried then.
    """
    if dtype not in _loaded:  # each forward and backward asks
        with _LOCK:
            if dtype not in _loaded:
                _loaded[dtype] = None if None in _loaded.values() else _load(dtype)
    return _loaded[dtype]


def _load(dtype: torch.dtype) -> Operators | None:
    try:
        torch.ops.load_library(_build(dtype))
        return _operators(dtype)
    except _UnavailableError as error:
        logger.info("the CPU kernel is not used, torch's batch norm is: %s", error)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        # What a compiler said, or why torch could not load what it made.
        details = str(getattr(error, "stderr", None) or error.__cause__ or "")[-2000:]
        logger.warning(
            "the CPU kernel could not be built, torch's batch norm is used instead (set "
            "TORCH_EXTENSIONS_DIR to build it in another folder, %s=off to silence this): %s\n%s",
            SWITCH,
            error,
            details,
        )
    return None


_NAMESPACE = "distbn_convert_cpu"
# Kept alive, for as long as the registrations that it holds are wanted.
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


def _operators(dtype: torch.dtype) -> Operators:
    """Find them, and let them go straight to the kernel: autograd's functions differentiate."""
    names = [f"{direction}_{_name(dtype)}" for direction in Operators._fields]
    for name in names:
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return Operators(*(getattr(getattr(torch.ops, _NAMESPACE), name).default for name in names))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _build(dtype: torch.dtype) -> Path:
    """Return the compiled library for ``dtype``, from the cache if it is there."""
    if os.environ.get(SWITCH, "").lower() == "off":
        raise _UnavailableError(f"{SWITCH}=off")
    header = _TORCH / "include/torch/csrc/stable/ops.h"
    if not header.exists() or "parallel_for" not in header.read_text():
        raise _UnavailableError(f"torch {torch.__version__} has no stable ABI with parallel_for")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    found = shutil.which(compiler[0]) if compiler else None
    if found is None:
        raise _UnavailableError(f"there is no C++ compiler {shlex.join(compiler)!r}; set CXX")
    command = [found, *compiler[1:], *_flags(dtype), *shlex.split(os.environ.get(_FLAGS, ""))]
    library = _cache() / f"batch_norm-{_key(command)}.so"
    if not _is_whole(library):
        library.parent.mkdir(parents=True, exist_ok=True)
        logger.info(
            "compiling the CPU kernel for %s, or waiting for a process that does, which takes some "
            "ten seconds, once: %s",
            _name(dtype),
            library,
        )
        with _one_at_a_time(library.with_suffix(".lock")):
            if not _is_whole(library):
                _compile(command, library)
    return library


def _flags(dtype: torch.dtype) -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    libraries = _TORCH / "lib"
    return [
        *("-O3", "-std=c++20", "-fPIC", "-shared", "-w", "-fvisibility=hidden"),
        "-fno-math-errno",  # or square roots do not become vectors
        *_CAPABILITY_FLAGS.get(capability, ()),
        *(f"-DDISTBN_VALUE={VALUES[dtype]}", f'-DDISTBN_DTYPE="{_name(dtype)}"'),
        f"-I{_TORCH / 'include'}",
        str(_SOURCES / "batch_norm.cpp"),
        # -Wl would cut a path at its commas.
        *(f"-L{libraries}", "-Xlinker", "-rpath", "-Xlinker", str(libraries), "-ltorch_cpu"),
    ]


def _cache() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "distbn_convert"


def _key(command: list[str]) -> str:
    compiler = Path(command[0]).resolve()
    status = compiler.stat()
    parts = [*command, str(compiler), str(status.st_size), str(status.st_mtime_ns)]
    parts += [torch.__version__, str(torch.version.git_version), sys.platform]
    digest = hashlib.sha256("\0".join(parts).encode())
    for source in sorted(_SOURCES.glob("*.[ch]*")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: list[str], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        output = Path(folder) / library.name
        _run([*command, "-o", str(output)])
        with output.open("ab") as file:
            file.write(hashlib.sha256(output.read_bytes()).digest())
        os.replace(output, library)


def _run(command: list[str]) -> None:
    """Run a compiler to its end, or to that of all that it has started."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",  # it may speak in any encoding
        start_new_session=True,
    ) as process:
        try:
            _, told = process.communicate(timeout=_TIMEOUT)
        except BaseException:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=told)


def _is_whole(library: Path) -> bool:
    """Whether the library ends in the digest of the rest; loading a damaged one kills."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # not POSIX: several processes may compile the same
        yield
        return
    with path.open("a+") as file:
        waited = False
        with contextlib.suppress(OSError):  # a file system without locks: the same
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        failure = file.read()
        if waited and failure:
            raise RuntimeError(failure)
        file.truncate(0)
        try:
            yield
        except Exception as error:
            file.write(f"another process could not: {error}")
            raise
