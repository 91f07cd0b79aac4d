"""Compile the CPU kernel on first use and load it; say why where that cannot be.

The library goes to ``$TORCH_EXTENSIONS_DIR/distbn_convert``, else ``~/.cache/distbn_convert``,
under a name that hashes all it depends on: sources, flags, compiler, torch. It is compiled beside
its place and renamed into it, so that a reader sees all of it or nothing whatever is interrupted;
the lock only spares concurrent processes the same work, and the kernel of the operating system
drops it when its holder dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["SWITCH", "load"]

SWITCH = "DISTBN_CPU_KERNEL"
_FLAGS = "DISTBN_CPU_FLAGS"  # for the compiler, behind all others
_SOURCES = Path(__file__).parent
_TORCH = Path(torch.__file__).parent
_TIMEOUT = 300  # seconds; the kernel compiles in four to twenty
# What torch itself found this machine to have; so a cache shared by machines holds one each.
_CAPABILITY_FLAGS = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": (
        *("-mavx2", "-mfma", "-mf16c"),
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    ),
}
_LOCK = threading.Lock()
_loaded: list[bool] = []

logger = logging.getLogger(__name__)


class _UnavailableError(Exception):
    """The kernel cannot be had here; the message says why."""


def load() -> bool:
    """Make ``torch.ops.distbn_convert_cpu`` available, compiling it if needed, once a process.

    Returns:
        Whether the operators exist. If not, one log line has said why: at level INFO where
        that is to be expected, WARNING where a compiler failed.
    """
    if _loaded:  # each forward and backward asks
        return _loaded[0]
    with _LOCK:
        if not _loaded:
            _loaded.append(_load())
    return _loaded[0]


def _load() -> bool:
    try:
        torch.ops.load_library(_build())
        _pass_autograd_by()
    except _UnavailableError as error:
        logger.info("the CPU kernel is not used, torch's batch norm is: %s", error)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        details = str(getattr(error, "stderr", None) or "")[-2000:]
        logger.warning(
            "the CPU kernel could not be built, torch's batch norm is used instead (set %s=off to "
            "silence this): %s\n%s",
            SWITCH,
            error,
            details,
        )
    else:
        return True
    return False


# Kept alive, for as long as the registrations that it holds are wanted.
_LIBRARY = torch.library.Library("distbn_convert_cpu", "FRAGMENT")


def _pass_autograd_by() -> None:
    """Let the operators go straight to the kernel: autograd's functions differentiate, not they."""
    for name in ("forward", "backward"):
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")


def _build() -> Path:
    """Return the compiled library, from the cache if it is there."""
    if os.environ.get(SWITCH, "").lower() == "off":
        raise _UnavailableError(f"{SWITCH}=off")
    header = _TORCH / "include/torch/csrc/stable/ops.h"
    if not header.exists() or "parallel_for" not in header.read_text():
        raise _UnavailableError(f"torch {torch.__version__} has no stable ABI with parallel_for")
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    found = shutil.which(compiler[0]) if compiler else None
    if found is None:
        raise _UnavailableError(f"there is no C++ compiler {shlex.join(compiler)!r}; set CXX")
    command = [found, *compiler[1:], *_flags(), *shlex.split(os.environ.get(_FLAGS, ""))]
    library = _cache() / f"batch_norm-{_key(command)}.so"
    if not _is_whole(library):
        library.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(library.with_suffix(".lock")):
            if not _is_whole(library):
                _compile(command, library)
    return library


def _flags() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    libraries = _TORCH / "lib"
    return [
        *("-O3", "-std=c++20", "-fPIC", "-shared", "-w", "-fvisibility=hidden"),
        "-fno-math-errno",  # or square roots do not become vectors
        *_CAPABILITY_FLAGS.get(capability, ()),
        f"-I{_TORCH / 'include'}",
        str(_SOURCES / "batch_norm.cpp"),
        *(f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu"),
    ]


def _cache() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
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
        subprocess.run(
            [*command, "-o", str(output)],
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            stdin=subprocess.DEVNULL,
        )
        with output.open("ab") as file:
            file.write(hashlib.sha256(output.read_bytes()).digest())
        os.replace(output, library)


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
    with path.open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: the same
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
