"""Compile the GPU kernels with no GPU, and read what the machine code needs."""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from distbn_convert.kernels.gpu.launch import Share

DTYPES = {2: "bf16", 4: "fp32"}
TENSORS = ("x", "y", "dx", "dy", "output", "residual", "grad_residual")
ROWS = ("mean_in", "rstd_in", "sum_dy_out", "sum_dy_x_out", "sum_dy_in", "sum_dy_x_in")
VECTORS = (*ROWS, "weight", "bias", "partials", "dbias", "dweight")
# What is not given unless asked for; see EPILOGUES.
ABSENT = ("output", "residual", "grad_residual")
STATISTICS = {
    "mean": "*fp32",
    "rstd": "*fp32",
    "running_mean": "*fp32",
    "running_var": "*fp32",
    "counts": "*i64",
    "momentum": "fp32",
    "eps": "fp32",
}
# Whether there is a residual, and a ReLU.
EPILOGUES = {
    "none": (False, False),
    "relu": (False, True),
    "add+relu": (True, True),
}
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
    module = importlib.import_module(f"distbn_convert.kernels.gpu.{kind}")
    if kind == "split":
        if backward:
            return [module.split_gradients, module.split_backward]
        return [module.split_moments, module.split_forward]
    return [getattr(module, f"{kind}_{'backward' if backward else 'forward'}")]


def configurations(
    share: Share, backward: bool, epilogue: str = "none"
) -> dict[Any, tuple[Any, dict[str, Any], dict[str, str | None]]]:
    """Kernel, constants and types of each launch, under a key that says what differs.

    A loop that divides by another S is the same code.
    """
    residual, relu = EPILOGUES[epilogue]
    given: dict[str, str | None] = {}
    kind = f"*{DTYPES[share.itemsize]}"
    if residual and not backward:
        given = {"residual": kind}
    if residual and backward and relu:
        given, relu = {"output": kind, "grad_residual": kind}, False
    choice = share.choose(backward, residual)
    constants = share.constants(choice, relu)
    members = {field.name: member.value for field, member in members_of(constants["TILE"])}
    if choice.kind not in ("resident", "cooperative"):
        members["DIVISOR"] = bool(members["DIVISOR"])
    key = *members.values(), constants["num_warps"], constants.get("SPLITS"), *given
    kernels = kernels_of(choice.kind, backward)
    return {(k.__name__, share.itemsize, key): (k, constants, given) for k in kernels}


def members_of(tile: Any) -> list[tuple[Field[Any], Any]]:
    return [(field, getattr(tile, field.name)) for field in fields(tile)]


def compile_kernel(
    kernel: Any, itemsize: int, constants: dict[str, Any], capability: int, **types: str | None
) -> Resources:
    """Compile as a call with aligned tensors would; ``types`` overrides a parameter's type."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from distbn_convert.kernels.gpu.tiles import Statistics

    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name == "statistics":
            members = {n: types.get(n, kind) or "constexpr" for n, kind in STATISTICS.items()}
            signature[name] = Statistics(**members)
            paths = {(index, place): kind for place, kind in enumerate(members.values())}
        else:
            signature[name] = kind = type_of(name, itemsize, constants, types) or "constexpr"
            paths = {(index,): kind}
        values |= {path: constants.get(name) for path, kind in paths.items() if kind == "constexpr"}
        aligned = [path for path, kind in paths.items() if kind[0] == "*" or name == "channels"]
        attributes |= {path: [["tt.divisibility", 16]] for path in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {n: constants[n] for n in ("num_warps", "maxnreg") if n in constants}
    options["enable_fp_fusion"] = True
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return measure(compiled, tool, capability == 90)


def type_of(
    name: str, itemsize: int, constants: dict[str, Any], types: dict[str, str | None]
) -> str | None:
    if name in types:
        return types[name]
    if name in constants or name in ABSENT:
        return None
    if name == "sync":
        return "*i32"
    if name in TENSORS:
        return f"*{DTYPES[itemsize]}"
    return "*fp32" if name in VECTORS else "i32"


def measure(compiled: Any, tool: Path, code: bool) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = [str(tool), "--dump-resource-usage", *(["-sass"] if code else []), file.name]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    numbers = [int(re.search(rf"{word}:(\d+)", text).group(1)) for word in ("REG", "STACK")]
    return Resources(*numbers, compiled.metadata.shared, text)
