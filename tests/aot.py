"""Compile the GPU kernels with no GPU, and read what the machine code needs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from distbn_convert.kernels.gpu.launch import Share

DTYPES = {2: "bf16", 4: "fp32"}
TENSORS = ("x", "y", "dx", "dy")
ROWS = ("mean_out", "rstd_out", "mean_in", "rstd_in", "sum_dy_out", "sum_dy_x_out")
VECTORS = (*ROWS, "weight", "bias", "running_mean", "running_var", "partials")
VECTORS += ("sum_dy_in", "sum_dy_x_in")
# Channels and side of ResNet-50's 53 batch norms at 224 x 224, and how many there are of each.
RESNET50 = {
    (64, 112): 1,
    (64, 56): 6,
    (256, 56): 4,
    (128, 56): 1,
    (128, 28): 7,
    (512, 28): 5,
    (256, 28): 1,
    (256, 14): 11,
    (1024, 14): 7,
    (512, 14): 1,
    (512, 7): 5,
    (2048, 7): 4,
}


class Resources(NamedTuple):
    """What one program of a kernel takes: registers a thread, bytes spilled, shared memory."""

    registers: int
    stack: int
    shared: int
    machine_code: str


def kernels_of(kind: str, backward: bool) -> list[Any]:
    """The kernels of that kind that run over the whole input."""
    from distbn_convert.kernels.gpu import loop, resident, split

    if kind == "split":
        if backward:
            return [split.split_gradients, split.split_backward]
        return [split.split_moments, split.split_forward]
    module = {"resident": resident, "loop": loop}[kind]
    return [getattr(module, f"{kind}_{'backward' if backward else 'forward'}")]


def configurations(share: Share, backward: bool) -> dict[Any, tuple[Any, dict[str, Any]]]:
    """Kernel and constants of each launch, under a key that says what differs.

    A loop that divides by another S is the same code.
    """
    choice = share.choose(backward)
    constants = share.constants(choice)
    ignored = "DIVISOR" if choice.kind != "resident" else ""
    key = tuple(item for item in sorted(constants.items()) if item[0] != ignored)
    kernels = kernels_of(choice.kind, backward)
    return {(kernel.__name__, share.itemsize, key): (kernel, constants) for kernel in kernels}


def compile_kernel(
    kernel: Any, itemsize: int, constants: dict[str, Any], capability: int, **types: str | None
) -> Resources:
    """Compile as a call with aligned tensors would; ``types`` overrides a parameter's type."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = kind = type_of(name, itemsize, constants, types)
        if kind == "constexpr":
            values[name] = constants.get(name)
        elif kind.startswith("*") or name == "channels":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": constants["num_warps"], "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return measure(compiled, tool, capability == 90)


def type_of(
    name: str, itemsize: int, constants: dict[str, Any], types: dict[str, str | None]
) -> str:
    if name in types:
        return types[name] or "constexpr"
    if name in constants or name == "counts":
        return "constexpr"
    if name in TENSORS:
        return f"*{DTYPES[itemsize]}"
    if name in VECTORS:
        return "*fp32"
    return "fp32" if name in ("momentum", "eps") else "i32"


def measure(compiled: Any, tool: Path, code: bool) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = [str(tool), "--dump-resource-usage", *(["-sass"] if code else []), file.name]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    numbers = [int(re.search(rf"{word}:(\d+)", text).group(1)) for word in ("REG", "STACK")]
    return Resources(*numbers, compiled.metadata.shared, text)
