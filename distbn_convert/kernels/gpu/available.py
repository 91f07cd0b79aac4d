"""Whether the kernels run on a device, and a line in the log where they do not."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch

__all__ = ["LEAST_TRITON", "SWITCH", "runs_on"]

logger = logging.getLogger(__name__)

SWITCH = "DISTBN_GPU_KERNEL"
# Of torch 2.8. Older ones take no named tuples as arguments.
LEAST_TRITON = (3, 4)
_LEAST_CAPABILITY = (8, 0)


@cache
def runs_on(device: torch.device) -> bool:
    """Say whether Triton compiles the kernels for ``device`` and launches them; kept.

    Where not, one log line says why: at level INFO where that is to be expected, WARNING where
    Triton fails, as it does on a machine without a C compiler.
    """
    obstacle = _obstacle(device)
    if obstacle is not None:
        logger.info("the GPU kernels are not used, torch's batch norm is: %s", obstacle)
        return False
    from triton.runtime import driver

    try:
        driver.active.get_current_target()  # compiles what Triton asks devices with
    except Exception as error:  # Triton's, the compiler's, or the file system's
        logger.warning(
            "the GPU kernels are not used, torch's batch norm is, which is slower: Triton, which "
            "needs a C compiler and Python's headers (gcc and python3-dev), failed with "
            "%s: %s (set %s=off to silence this)",
            type(error).__name__,
            error,
            SWITCH,
        )
        return False
    return True


def _obstacle(device: torch.device) -> str | None:
    """Return what is missing, None if nothing is."""
    if torch.version.cuda is None:
        return "the device is not NVIDIA's"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return (
            f"they need compute capability 8.0, and {device} has {'.'.join(map(str, capability))}"
        )
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < LEAST_TRITON:
        return f"they need Triton 3.4, and {triton.__version__} is installed"
    return None
