"""Converted models under torch's own tools: SWA, func, checkpoints, fusion."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

from distbn_convert import DistBatchNorm2d, convert_model, revert_model

from .oracle import rank_indices
from .stepped import (
    RANKS,
    assert_equal,
    make_batch,
    make_converted,
    make_plain,
    norms,
    statistics,
    train_step,
)

PARTITIONS = ("contiguous", "interleaved")


# torch.optim.swa_utils


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("sizes", [(8, 8, 8), (8, 9, 11), (12, 3, 8)], ids=str)
def test_update_bn_gives_each_rank_what_its_own_process_would_find(
    sizes: tuple[int, ...], partition: str
) -> None:
    plain, loader = make_plain(), [make_batch(size) for size in sizes]
    ours = convert_model(copy.deepcopy(plain), RANKS, partition=partition).eval()
    update_bn([(batch, None) for batch in loader], ours)
    assert not ours.training
    assert [norm.momentum for norm in norms(ours)] == [0.1, 0.1]
    for rank in range(RANKS):
        process = copy.deepcopy(plain)
        shares = [batch[rank_indices(len(batch), RANKS, partition)[rank]] for batch in loader]
        update_bn([share for share in shares if len(share)], process)
        rows = [statistic[rank] for statistic in statistics(ours)]
        torch.testing.assert_close(rows, statistics(process), rtol=1e-11, atol=1e-13)


def test_update_bn_of_float32_averages_each_ranks_batches_as_computed_by_hand() -> None:
    sizes = (8, 3, 12)  # rank 3 sees nothing of the second batch
    ours = convert_model(make_plain(torch.float32), RANKS)
    loader = [make_batch(size, torch.float32) for size in sizes]
    update_bn(loader, ours)
    conv = copy.deepcopy(ours[0]).double()
    for rank in range(RANKS):
        moments = []
        for batch in loader:
            share = conv(batch.double())[rank_indices(len(batch), RANKS, "contiguous")[rank]]
            values = share.detach().movedim(1, 0).flatten(1)
            if values.numel():
                mean = values.sum(1) / values.shape[1]
                squares = (values - mean[:, None]).square().sum(1)
                moments.append(torch.stack([mean, squares / (values.shape[1] - 1)]))
        assert len(moments) == (2 if rank == 3 else 3)
        expected = torch.stack(moments).mean(0).float()
        found = torch.stack([ours[1].running_mean[rank], ours[1].running_var[rank]])
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)
        assert ours[1].num_batches_tracked[rank] == len(moments)


@pytest.mark.parametrize("ema", [False, True], ids=["swa", "ema"])
@pytest.mark.parametrize("updates", [1, 4])
def test_averaged_model_averages_the_rows_of_every_rank(updates: int, ema: bool) -> None:
    ours = make_converted()
    function = get_ema_multi_avg_fn(0.75) if ema else None
    averaged = AveragedModel(ours, multi_avg_fn=function, use_buffers=True)
    optimizer, expected = torch.optim.SGD(ours.parameters(), 0.05), {}
    for update in range(updates):
        optimizer.zero_grad()
        ours(make_batch()).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(ours)
        share = 1.0 if update == 0 else 0.25 if ema else 1 / (update + 1)
        for name, value in ours.state_dict().items():
            if value.is_floating_point():  # the counters are the next test's
                previous = expected.get(name, torch.zeros_like(value))
                expected[name] = previous * (1 - share) + value * share
    state = averaged.module.state_dict()
    found = {name: value for name, value in state.items() if value.is_floating_point()}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    input = make_batch(5)
    fresh = convert_model(make_plain(), RANKS)
    fresh.load_state_dict(state, strict=True)
    assert_equal(averaged.eval()(input), fresh.eval()(input))
    assert_equal(revert_model(averaged).eval()(input), fresh(input))


@pytest.mark.parametrize("ema", [False, True], ids=["swa", "ema"])
def test_averaged_counters_are_those_of_a_plain_model(ema: bool) -> None:
    plain = make_plain()
    models = [convert_model(copy.deepcopy(plain), RANKS), plain]
    function = get_ema_multi_avg_fn(0.5) if ema else None
    averages = [AveragedModel(m, multi_avg_fn=function, use_buffers=True) for m in models]
    for _ in range(4):
        for model, average in zip(models, averages, strict=True):
            model(make_batch())
            average.update_parameters(model)
    ours, expected = (norms(average)[0].num_batches_tracked for average in averages)
    assert_equal(ours, expected.expand(RANKS))


# torch.func


@pytest.mark.parametrize("momentum", [0.1, None])
def test_functional_call_updates_the_buffers_it_is_given_and_no_others(
    momentum: float | None,
) -> None:
    ours = make_converted(momentum=momentum)
    twin, other = copy.deepcopy(ours), make_converted(momentum=momentum)
    passed = {k: v.clone() for k, v in other.named_buffers()}
    parameters = dict(other.named_parameters())
    input = make_batch()
    upstream = torch.randn(12, 5).double()
    found = torch.autograd.grad(
        functional_call(ours, {**parameters, **passed}, (input,)), [*parameters.values()], upstream
    )
    expected = torch.autograd.grad(other(input), [*other.parameters()], upstream)
    assert_equal(found, expected)
    assert_equal(passed, dict(other.named_buffers()))
    assert_equal(ours.state_dict(), twin.state_dict())
    assert all(parameter.grad is None for parameter in ours.parameters())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_vmap_over_stacked_models_trains_each_with_its_own_statistics(
    momentum: float | None,
) -> None:
    models = [make_converted(momentum=momentum) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    batches, upstreams = torch.stack([make_batch() for _ in models]), torch.randn(3, 12, 5).double()
    skeleton = copy.deepcopy(models[0]).to("meta")

    def loss(params: Any, buffers: Any, input: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        output = functional_call(skeleton, (params, buffers), (input,))
        return (output * upstream).sum(), output

    gradients, outputs = vmap(grad(loss, has_aux=True))(parameters, buffers, batches, upstreams)
    for index, model in enumerate(models):
        expected = train_step(model, model, batches[index], upstreams[index])
        torch.testing.assert_close(outputs[index], expected[0], rtol=1e-11, atol=1e-12)
        for (name, _), value in zip(model.named_parameters(), expected[2:], strict=True):
            torch.testing.assert_close(gradients[name][index], value, rtol=1e-10, atol=1e-11)
        for name, value in model.named_buffers():
            torch.testing.assert_close(buffers[name][index], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("impl", ["op", "decomposed"])
def test_vmap_over_stacked_models_runs_each(impl: str, training: bool, compiled: bool) -> None:
    models = [make_converted().train(training) for _ in range(3)]
    for norm in norms(models[0]):
        norm.impl = impl
    parameters, buffers = stack_module_state(models)
    input = make_batch(5)

    def call(params: Any, buffers: Any) -> Any:
        return functional_call(models[0], (params, buffers), (input,))

    mapped = vmap(call)
    if compiled:
        torch._dynamo.reset()
        mapped = torch.compile(mapped, backend="aot_eager")
    found = mapped(parameters, buffers)
    expected = torch.stack([model(input) for model in models])
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    for index, model in enumerate(models):
        for name, value in model.named_buffers():
            torch.testing.assert_close(buffers[name][index], value, rtol=1e-12, atol=1e-13)


# Checkpointing, autocast, copies, fusion


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("stages", [slice(1, 2), slice(0, 3), slice(0, 6)], ids=str)
def test_checkpointing_updates_the_statistics_twice_as_the_plain_model_does(
    stages: slice, reentrant: bool
) -> None:
    plain, input = make_plain()[stages], make_batch()
    if stages.start == 1:
        input = torch.randn(12, 4, 6, 6).double()
    ours = convert_model(copy.deepcopy(plain), RANKS)
    processes = [copy.deepcopy(plain) for _ in range(RANKS)]
    upstream = torch.randn_like(copy.deepcopy(plain)(input))

    def run(model: nn.Module, index: Tensor) -> list[Tensor]:
        def call(input: Tensor) -> Any:
            return checkpoint(model, input, use_reentrant=reentrant)

        leaf = input[index].requires_grad_()
        output = call(leaf)
        output.backward(upstream[index])  # the reentrant form does not support autograd.grad
        assert leaf.grad is not None
        return [output.detach(), leaf.grad]

    found = run(ours, torch.arange(12))
    shares = [run(processes[r], index) for r, index in enumerate(torch.arange(12).split(3))]
    expected = [torch.cat(column) for column in zip(*shares, strict=True)]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    for parameter, parts in zip(
        ours.parameters(), zip(*(p.parameters() for p in processes), strict=True), strict=True
    ):
        summed = torch.stack([part.grad for part in parts]).sum(0)
        torch.testing.assert_close(parameter.grad, summed, rtol=1e-10, atol=1e-11)
    for index, statistic in enumerate(statistics(ours)):
        rows = torch.stack([statistics(process)[index] for process in processes])
        torch.testing.assert_close(statistic, rows, rtol=1e-12, atol=1e-13)
    assert norms(ours)[0].num_batches_tracked.tolist() == [2] * RANKS


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast_gives_the_dtypes_of_the_plain_model(training: bool) -> None:
    plain = make_plain(torch.float32).train(training)
    ours = convert_model(copy.deepcopy(plain), RANKS)
    exact = convert_model(copy.deepcopy(plain).double(), RANKS)
    seen: dict[str, list[torch.dtype]] = {"ours": [], "plain": []}
    for name, model in (("ours", ours), ("plain", plain)):
        for norm in norms(model):
            norm.register_forward_hook(
                lambda _, args, out, name=name: seen[name].extend([args[0].dtype, out.dtype])
            )
    input = make_batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = ours(input), plain(input)
    output.float().square().mean().backward()
    assert seen["ours"] == seen["plain"]
    assert torch.bfloat16 in seen["ours"]
    assert all(b.dtype in (torch.float32, torch.int64) for b in ours.buffers())
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in norms(ours)[0].parameters())
    torch.testing.assert_close(output.double(), exact(input.double()), rtol=0, atol=0.08)
    for found, expected in zip(statistics(ours), statistics(exact), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_converted_model_train_on_alike_and_apart(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    ours = make_converted(partition="interleaved", accumulation_steps=2)
    before, twin = copy.deepcopy(ours.state_dict()), duplicate(ours)
    input, upstream = make_batch(), torch.randn(12, 5).double()
    found = train_step(twin, twin, input, upstream)
    assert_equal(ours.state_dict(), before)
    assert_equal(found, train_step(ours, ours, input, upstream))
    assert_equal(twin.state_dict(), ours.state_dict())
    assert repr(twin) == repr(ours)
    assert {type(norm) for norm in norms(twin)} == {DistBatchNorm2d}


@pytest.mark.parametrize("reduction", ["mean", "select", "pooled"])
def test_reverted_convolutions_and_norms_can_be_fused(reduction: str) -> None:
    ours = make_converted(eval_reduction=reduction).eval()
    reverted = revert_model(copy.deepcopy(ours), reduction)
    input = make_batch(5)
    fused = nn.Sequential(
        fuse_conv_bn_eval(reverted[0], reverted[1]),
        reverted[2],
        fuse_conv_bn_eval(reverted[3], reverted[4]),
        *reverted[5:],
    )
    assert not norms(fused)
    torch.testing.assert_close(fused(input), ours(input), rtol=1e-11, atol=1e-12)
