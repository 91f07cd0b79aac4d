"""Converted models that torch traces: export, jit, compile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from distbn_convert import DistBatchNorm2d

from .stepped import (
    assert_equal,
    make_batch,
    make_converted,
    norms,
    statistics,
    train_step,
)
from .versions import since_torch

# torch.export, torch.jit


@pytest.mark.parametrize("reduction", ["mean", "select", "pooled"])
def test_exported_program_evaluates_any_batch_size(reduction: str) -> None:
    ours = make_converted(torch.float32, eval_reduction=reduction, eval_rank=0).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        ours, (make_batch(6, torch.float32),), dynamic_shapes=({0: batch},)
    )
    assert set(program.state_dict) == set(ours.state_dict())
    before = copy.deepcopy(ours.state_dict())
    for samples in (1, 2, 3, 4, 9, 33):
        input = make_batch(samples, torch.float32)
        assert_equal(program.module()(input), ours(input))
    assert_equal(dict(program.state_dict), dict(before))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("reduction", ["mean", "select", "pooled"])
def test_traced_evaluation_is_the_eager_one_at_any_batch_size(reduction: str) -> None:
    ours = make_converted(torch.float32, eval_reduction=reduction).eval()
    traced = torch.jit.trace(ours, make_batch(6, torch.float32))
    for samples in (1, 3, 9):
        input = make_batch(samples, torch.float32)
        torch.testing.assert_close(traced(input), ours(input))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("impl", ["auto", "op"])
def test_traced_training_is_the_eager_one(impl: str) -> None:
    ours = make_converted()
    for norm in norms(ours):
        norm.impl = impl
    traced = torch.jit.trace(ours, make_batch())
    twin = copy.deepcopy(ours)  # which has seen what tracing took
    for _ in range(2):
        batch, upstream = make_batch(), torch.randn(12, 5).double()
        found = train_step(traced, traced, batch, upstream)
        torch.testing.assert_close(found, train_step(twin, twin, batch, upstream))
        torch.testing.assert_close(statistics(ours), statistics(twin))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_training_takes_maps_of_other_sizes() -> None:
    layer = DistBatchNorm2d(3, vt_world_size=4).double()
    traced = torch.jit.trace(layer, torch.randn(8, 3, 4, 4).double())
    twin, input = copy.deepcopy(layer), torch.randn(8, 3, 2, 3).double()
    torch.testing.assert_close(traced(input), twin(input))
    torch.testing.assert_close([*layer.buffers()], [*twin.buffers()])


# torch.compile


def assert_compiled_training_equals_eager(
    model: nn.Module, sizes: tuple[int, ...], **options: Any
) -> None:
    dtype = next(model.parameters()).dtype
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, **options)
    for samples in sizes:
        input, upstream = make_batch(samples, dtype), torch.randn(samples, 5, dtype=dtype)
        found = train_step(compiled, model, input, upstream)
        expected = train_step(twin, twin, input, upstream)
        torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(statistics(model), statistics(twin), **tolerance)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("settings", [{}, {"partition": "interleaved", "accumulation_steps": 2}])
def test_compiled_training_is_one_graph_and_equals_eager(
    settings: dict[str, Any], momentum: float | None
) -> None:
    model = make_converted(momentum=momentum, **settings)
    assert_compiled_training_equals_eager(model, (12, 12, 12, 12), backend="aot_eager")


@since_torch(2, 10, "the compiler makes a second graph")
@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_training_takes_changing_batch_sizes_without_compiling_anew(
    momentum: float | None,
) -> None:
    model = make_converted(momentum=momentum)
    sizes = (12, 8, 9, 23, 16, 40)
    torch._dynamo.utils.counters.clear()
    assert_compiled_training_equals_eager(model, sizes, backend="aot_eager", dynamic=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("_compiler")
def test_compiled_training_leaves_ranks_without_samples_alone() -> None:
    model = make_converted()
    assert_compiled_training_equals_eager(model, (12, 3, 2, 7), backend="aot_eager", dynamic=True)
    assert model[1].num_batches_tracked.tolist() == [6, 6, 5, 4]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning")  # inductor of 2.6
@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_inductor_trains_as_eager_does(momentum: float | None) -> None:
    model = make_converted(torch.float32, momentum=momentum)
    assert_compiled_training_equals_eager(model, (12, 12, 9, 17), dynamic=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning")  # inductor of 2.6
@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(
    ("partition", "momentum", "layout"),
    [
        ("contiguous", 0.1, torch.channels_last),
        ("interleaved", None, torch.contiguous_format),
    ],
)
def test_inductor_trains_decomposed_layers_as_eager_does(
    partition: str, momentum: float | None, layout: torch.memory_format
) -> None:
    model = make_converted(torch.float32, momentum=momentum, partition=partition)
    model = model.to(memory_format=layout)
    for norm in norms(model):
        norm.impl = "decomposed"
    assert_compiled_training_equals_eager(model, (12, 10, 3, 18), dynamic=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning")  # inductor of 2.6
@pytest.mark.usefixtures("_compiler")
def test_inductor_evaluates_as_eager_does() -> None:
    model = make_converted(torch.float32, eval_reduction="pooled").eval()
    before, compiled = copy.deepcopy(model.state_dict()), torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for samples in (6, 6, 1, 9):
            input = make_batch(samples, torch.float32)
            torch.testing.assert_close(compiled(input), model(input), rtol=1e-4, atol=1e-4)
    assert_equal(model.state_dict(), before)
