"""Whether the kernels run on a device, and a line in the log where they do not."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from functools import cache

import torch

__all__ = ["LEAST_TRITON", "SWITCH", "runs_on", "switch"]

logger = logging.getLogger(__name__)

# In the environment: "off" switches the kernels off, "on" tries them where they have never run.
SWITCH = "DISTBN_GPU_KERNEL"
# Of torch 2.8. Older ones take no named tuples as arguments.
LEAST_TRITON = (3, 4)
_LEAST_CAPABILITY = (8, 0)
# Tried only where the switch says so: compiled for and emulated, but never run on.
_UNTRIED_CAPABILITY = (7, 5)


def switch() -> str:
    """Return what the switch is set to, in lower case; empty where it is not."""
    return os.environ.get(SWITCH, "").lower()


@cache
def runs_on(device: torch.device) -> bool:
    """Say whether Triton compiles the kernels for ``device`` and launches them; kept.

    Where not, one log line says why: at level INFO where that is to be expected, WARNING where
    something can be done, as on a machine without a C compiler.
    """
    missing = _missing(device)
    if missing is not None:
        logger.info("the GPU kernels are not used, torch's batch norm is: %s", missing)
        return False
    try:
        missing = _set_up()
    except Exception as error:  # Triton's, the compiler's, or the file system's
        missing = (
            "Triton, which needs a C compiler and Python's headers (gcc and python3-dev), failed "
            f"with {type(error).__name__}: {error}"
        )
    if missing is not None:
        logger.warning(
            "the GPU kernels are not used, torch's batch norm is, which is slower: %s "
            "(set %s=off to silence this)",
            missing,
            SWITCH,
        )
    return missing is None


def _missing(device: torch.device) -> str | None:
    """Return what the device or the installation lacks, None if nothing."""
    if torch.version.cuda is None:
        return "the device is not NVIDIA's"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (_UNTRIED_CAPABILITY if switch() == "on" else _LEAST_CAPABILITY):
        return (
            f"they need compute capability 8.0 (or 7.5 with {SWITCH}=on), and {device} has "
            f"{'.'.join(map(str, capability))}"
        )
    return None


def _set_up() -> str | None:
    """Compile what Triton asks devices with; return why it cannot compile kernels, or None."""
    import triton

    release = tuple(map(int, triton.__version__.split(".")[:2]))
    if release < LEAST_TRITON:
        return (
            f"they need Triton 3.4, which torch 2.8 brings, and {triton.__version__} is installed"
        )
    triton.runtime.driver.active.get_current_target()
    # Before 3.8 each signature of a kernel has a launcher of its own, whatever is in the cache.
    compilers = os.environ.get("CC", ""), "gcc", "clang"
    if release < (3, 8) and os.name == "posix" and not any(map(shutil.which, compilers)):
        raise RuntimeError("no C compiler was found")
    return None
