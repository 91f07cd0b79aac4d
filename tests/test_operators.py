"""The operators by name, as compilers, their caches and exported programs call them."""

from __future__ import annotations

import copy
import io
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters
from torch.autograd import forward_ad
from torch.func import grad, jvp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from distbn_convert import DistBatchNorm2d, operators
from distbn_convert.functional import dist_batch_norm
from distbn_convert.kernels import reference

from .versions import since_torch

pytestmark = pytest.mark.usefixtures("_compiler")
EACH_BACKEND = pytest.mark.usefixtures("backend")
FORWARD = torch.ops.distbn_convert.batch_norm.default
DECOMPOSED = torch.ops.distbn_convert.batch_norm_decomposed.default
BACKWARD = torch.ops.distbn_convert.batch_norm_backward.default
EPILOGUE = pytest.mark.parametrize(
    ("added", "relu"), [(False, False), (True, False), (False, True), (True, True)]
)


def make_case(added: bool, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Input, weight, bias and residual (or None) for three ranks, leaves that take gradients."""
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    input, residual = torch.randn(2, 7, 5, 4, 4, dtype=torch.float64).to(dtype)
    leaves = [input, torch.rand(5, dtype=parameters), torch.randn(5, dtype=parameters)]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, residual)]
    return leaves if added else [*leaves[:3], None]


def make_rows(dtype: torch.dtype) -> list[Tensor]:
    """Running statistics and counters of three ranks that have seen a batch."""
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = torch.randn(3, 5, dtype=parameters), torch.rand(3, 5, dtype=parameters)
    return [mean, var, torch.ones(3, dtype=torch.long)]


@EACH_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
@EPILOGUE
def test_opcheck(momentum: float | None, dtype: torch.dtype, added: bool, relu: bool) -> None:
    case, rows = make_case(added, dtype), make_rows(dtype)
    settings = 3, False, relu
    for operator in (FORWARD, DECOMPOSED):
        torch.library.opcheck(operator, (*case, *rows, momentum, 1e-5, *settings))
    input, weight, bias, residual = [leaf if leaf is None else leaf.detach() for leaf in case]
    torch.library.opcheck(
        FORWARD, (input, weight, bias, residual, *rows, momentum, 1e-5, *settings)
    )
    output, *moments = FORWARD(input, weight, bias, residual, *rows, momentum, 1e-5, *settings)
    upstream = torch.randn_like(input)
    for kept in (output, None)[not relu : 1 + (not added)]:
        torch.library.opcheck(BACKWARD, (upstream, input, weight, bias, kept, *moments, *settings))


@EACH_BACKEND
@EPILOGUE
@pytest.mark.parametrize("operator", [FORWARD, DECOMPOSED], ids=["op", "decomposed"])
def test_operator_called_by_name_has_all_derivatives(
    operator: Any, added: bool, relu: bool
) -> None:
    case, rows = make_case(added), make_rows(torch.float64)
    leaves = [leaf for leaf in case if leaf is not None]
    theirs = [row.clone() for row in rows]

    def by_name(input: Tensor, rows: Any = (None,) * 3) -> Any:
        return operator(input, *case[1:], *rows, 0.1, 1e-5, 3, False, relu)[0].sin()

    def called(input: Tensor, rows: Any = (None,) * 3) -> Tensor:
        mean, var, counts = rows
        return dist_batch_norm(
            *(input, mean, var, *case[1:3], counts),
            residual=case[3],
            vt_world_size=3,
            activation="relu" if relu else None,
        ).sin()

    results = []
    versions = [row._version for row in rows]
    for function, buffers in ((by_name, rows), (called, theirs)):
        output = function(case[0], buffers)
        upstream = torch.ones_like(output)
        first = torch.autograd.grad(output, leaves, upstream, create_graph=True)
        second = torch.autograd.grad(first[0].sin().sum(), leaves, retain_graph=True)
        results.append([output, *first, *second, *buffers])
    torch.testing.assert_close(*results)
    assert all(row._version > old for row, old in zip(rows, versions, strict=True))

    results, input, tangent = [], case[0].detach(), torch.randn_like(case[0])
    for function in (by_name, called):
        with forward_ad.dual_level():
            pushed = forward_ad.unpack_dual(function(forward_ad.make_dual(input, tangent)))
        slope = grad(lambda x, f=function: f(x).sum())
        twice = grad(lambda x, f=slope: f(x).sin().sum())(input)
        results.append([*pushed, *jvp(function, (input,), (tangent,)), slope(input), twice])
    torch.testing.assert_close(*results)


@EACH_BACKEND
# Torch's own loader of programs gives this before 2.12.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exported_operator_is_saved_and_trains(dtype: torch.dtype, strict: bool) -> None:
    layer = DistBatchNorm2d(5, vt_world_size=3)
    layer.impl = "op"
    input = torch.randn(7, 5, 4, 3, dtype=dtype)
    file = io.BytesIO()
    torch.export.save(torch.export.export(copy.deepcopy(layer), (input,), strict=strict), file)
    file.seek(0)
    program = torch.export.load(file).module()
    assert any(node.target is FORWARD for node in program.graph.nodes)
    results = []
    for model in (layer, program):
        leaves = [input.clone().requires_grad_(), *model.parameters()]
        output = model(leaves[0])
        gradients = torch.autograd.grad(output.sin().sum(), leaves)
        results.append([output, *gradients, *model.buffers()])
    torch.testing.assert_close(*results)


@since_torch(2, 8, "the compiler warns of its own cache, or keeps none")
@pytest.mark.parametrize("impl", ["op", "decomposed"])
def test_a_compilers_cache_keeps_a_step_until_the_code_differs(
    impl: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case, upstream = make_case(False, torch.float32)[:3], torch.randn(7, 5, 4, 4)

    def function(input: Tensor, weight: Tensor, bias: Tensor, *rows: Tensor) -> Tensor:
        mean, var, counts = rows
        settings: Any = {"vt_world_size": 3, "activation": "relu", "impl": impl}
        return dist_batch_norm(input, mean, var, weight, bias, counts, **settings).sin()

    def step(function: Any) -> Any:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(1)
        rows = make_rows(torch.float32)
        output = function(*case, *rows)
        return [output, *torch.autograd.grad(output, case, upstream), *rows]

    def events() -> list[str]:
        return [name for name in counters["aot_autograd"] if name.startswith("autograd_cache")]

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    expected = step(function)
    missed = ["autograd_cache_miss", "autograd_cache_saved"]
    for found in (missed, ["autograd_cache_hit"]):
        torch.testing.assert_close(step(torch.compile(function)), expected)
        assert events() == found
    for name in ("_FORWARD", "_DECOMPOSED", "_BACKWARD"):
        operator = partial(getattr(operators, name).func, code="another")
        monkeypatch.setattr(operators, name, operator)
    torch.testing.assert_close(step(torch.compile(function)), expected)
    assert events() == missed
    # What the operators do is not in their graphs; of plain operations there is nothing else.
    assert bool(counters["inductor"]["fxgraph_cache_hit"]) == (impl == "decomposed")


@EPILOGUE
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("interleaved", [False, True])
def test_no_other_code_makes_graphs(
    interleaved: bool, momentum: float | None, added: bool, relu: bool
) -> None:
    def trace(operator: Any, case: list[Any]) -> Any:
        leaves = [leaf for leaf in case if leaf is not None]
        rows = make_rows(torch.float64)
        output, *_ = operator(*case, *rows, momentum, 1e-5, 3, interleaved, relu)
        return torch.autograd.grad(output.sum(), leaves)

    ran = set()
    sys.setprofile(lambda frame, event, argument: ran.add(frame.f_code.co_filename))
    try:
        for operator in (FORWARD, DECOMPOSED):
            make_fx(lambda *case, f=operator: trace(f, [*case]), tracing_mode="fake")(
                *make_case(added)
            )
    finally:
        sys.setprofile(None)
    folder = Path(operators.__file__).parent
    ours = {file for file in ran if Path(file).is_relative_to(folder)}
    assert reference.__file__ in ours
    assert ours <= {module.__file__ for module in (operators, *operators._GRAPH_MODULES)}


@pytest.mark.parametrize("module", ["operators.py", "kernels/reference.py"])
def test_code_that_differs_is_told_from_this(module: str, tmp_path: Path) -> None:
    folder = Path(operators.__file__).parent
    copied = tmp_path / folder.name
    shutil.copytree(folder, copied, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", "from distbn_convert import operators as o; print(o._CODE)"]
    seen = [operators._CODE]
    for added in ("", "# another\n"):
        with (copied / module).open("a", encoding="utf-8") as file:
            file.write(added)
        found = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True
        )
        assert found.returncode == 0, found.stderr
        seen.append(found.stdout.decode().strip())
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.filterwarnings("ignore:Skipping serialization:UserWarning")  # 2.6 of its own cache
@pytest.mark.parametrize("impl", ["op", "decomposed"])
def test_a_compiled_checkpoint_computes_again_and_updates_as_often_as_a_plain_one(
    impl: str,
) -> None:
    """Once; in older torch twice, as the compiler updates in the recomputation too."""
    layer, plain = DistBatchNorm2d(5, vt_world_size=3), nn.BatchNorm2d(5)
    layer.impl = impl
    twin, input = copy.deepcopy(layer), torch.randn(7, 5, 4, 3)
    leaves = [input.clone().requires_grad_() for _ in range(3)]
    for norm, leaf in zip((plain, layer), leaves, strict=False):

        def checkpointed(input: Tensor, norm: nn.Module = norm) -> Any:
            return checkpoint(lambda x: norm(x.cos()).sin(), input, use_reentrant=False).exp()

        torch.compile(checkpointed, fullgraph=True)(leaf).sum().backward()
    for _ in range(int(plain.num_batches_tracked)):
        output = twin(leaves[2].cos()).sin().exp()
    output.sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[2].grad)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


@EPILOGUE
def test_compiled_autograd_takes_the_backward_of_an_eager_layer_whole(
    added: bool, relu: bool
) -> None:
    case = make_case(added)
    leaves = [leaf for leaf in case if leaf is not None]
    settings: Any = {"vt_world_size": 3, "activation": "relu" if relu else None}
    output = dist_batch_norm(case[0], None, None, *case[1:3], residual=case[3], **settings).sin()
    upstream = torch.randn_like(output)
    expected = torch.autograd.grad(output, leaves, upstream, retain_graph=True)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        output.backward(upstream)
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))
