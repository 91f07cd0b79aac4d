from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from distbn_convert.errors import ConfigurationError, InputError
from distbn_convert.functional import dist_batch_norm

from .oracle import loop_batch_norm

pytestmark = pytest.mark.usefixtures("backend")

PARTITIONS = ("contiguous", "interleaved")
SHAPES = [(12, 5), (12, 5, 7), (12, 5, 4, 3), (12, 5, 2, 3, 2), (14, 5, 4, 3), (13, 5), (3, 5, 4)]


def make_case(
    shape: tuple[int, ...], ranks: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Random input, weight and bias (leaves), running statistics, upstream gradient."""
    channels = shape[1]
    statistics_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    input = (torch.randn(shape, dtype=torch.float64) * 3 + 2).to(dtype).requires_grad_()
    weight = torch.rand(channels, dtype=statistics_dtype).requires_grad_()
    bias = torch.randn(channels, dtype=statistics_dtype).requires_grad_()
    mean = torch.randn(ranks, channels, dtype=statistics_dtype)
    var = torch.rand(ranks, channels, dtype=statistics_dtype)
    return input, weight, bias, mean, var, torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("ranks", [1, 4, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_loop_of_batch_norms(shape: tuple[int, ...], ranks: int, partition: str) -> None:
    input, weight, bias, mean, var, upstream = make_case(shape, ranks)
    settings: Any = {"vt_world_size": ranks, "partition": partition, "momentum": 0.3, "eps": 1e-3}
    mean_2, var_2 = mean.clone(), var.clone()
    ours = dist_batch_norm(input, mean, var, weight, bias, **settings)
    loop = loop_batch_norm(input, mean_2, var_2, weight, bias, **settings)
    torch.testing.assert_close(ours, loop, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, mean_2, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(var, var_2, rtol=1e-13, atol=1e-14)
    gradients = torch.autograd.grad(ours, (input, weight, bias), upstream)
    expected = torch.autograd.grad(loop, (input, weight, bias), upstream)
    torch.testing.assert_close(gradients, expected, rtol=1e-11, atol=1e-12)


def test_ranks_are_not_synchronised() -> None:
    input, *_ = make_case((8, 5, 4), 1)
    plain = F.batch_norm(input, None, None, training=True)
    assert (dist_batch_norm(input, vt_world_size=4) - plain).abs().max() > 0.1


@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "none"])
def test_weight_and_bias_are_each_optional(affine: str) -> None:
    input, weight, bias, _, _, upstream = make_case((8, 5, 3), 4)
    leaves = [leaf for leaf, name in ((weight, "weight"), (bias, "bias")) if name in affine]
    pair = [weight if "weight" in affine else None, bias if "bias" in affine else None]
    ours = dist_batch_norm(input, None, None, *pair, vt_world_size=4)
    loop = loop_batch_norm(input, None, None, *pair, vt_world_size=4)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (input, *leaves), upstream),
        torch.autograd.grad(loop, (input, *leaves), upstream),
    )


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_error_is_at_most_twice_that_of_torch(
    dtype: torch.dtype, layout: str, partition: str, backend: str
) -> None:
    # Torch's own code for channels_last is less exact, and the loop's indexing loses the layout.
    rounding = 32 if backend == "native" and layout == "channels_last" else 1
    shape = (32, 6, 8, 16)
    input, weight, bias, mean, var, upstream = make_case(shape, 8, dtype)
    with torch.no_grad():
        if layout == "channels_last":
            input = input.contiguous(memory_format=torch.channels_last)
        elif layout == "strided":
            input = torch.stack([input, input], -1)[..., 0]
    input.requires_grad_()
    settings: Any = {"vt_world_size": 8, "partition": partition}

    def run(function: Any, wide: bool) -> list[Tensor]:
        cast = [t.detach().to(torch.float64) if wide else t for t in (input, weight, bias)]
        cast = [leaf.detach().requires_grad_() for leaf in cast]
        rows = [t.to(torch.float64) if wide else t.clone() for t in (mean, var)]
        output = function(cast[0], *rows, *cast[1:], **settings)
        gradients = torch.autograd.grad(output, cast, upstream.to(output.dtype))
        return [output.detach(), *rows, *gradients]

    exact = run(loop_batch_norm, True)
    torchs = run(loop_batch_norm, False)
    ours = run(dist_batch_norm, False)
    for result, peer, truth in zip(ours, torchs, exact, strict=True):
        assert result.dtype == peer.dtype
        error, allowed = ((value.double() - truth).abs().max() for value in (result, peer))
        eps = rounding * torch.finfo(result.dtype).eps
        assert error <= 2 * allowed + eps * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_means_do_not_spoil_the_variance(dtype: torch.dtype) -> None:
    exact = 1000 + torch.randn(16, 3, 28, 28, dtype=torch.float64)
    var = torch.zeros(8, 3, dtype=dtype)
    mean = torch.zeros(8, 3, dtype=dtype)
    input = exact.to(dtype)
    dist_batch_norm(input, mean, var, vt_world_size=8, momentum=1.0)
    truth = input.double().reshape(8, 2, 3, -1).var(dim=(1, 3))
    assert ((var.double() - truth).abs() / truth).max() < 1e-5


@pytest.mark.parametrize(
    ("dims", "memory_format"), [(4, torch.channels_last), (5, torch.channels_last_3d)]
)
def test_memory_format_is_kept_forward_and_backward(
    dims: int, memory_format: torch.memory_format
) -> None:
    input = torch.randn(4, 6, *(3,) * (dims - 2)).contiguous(memory_format=memory_format)
    input.requires_grad_()
    output = dist_batch_norm(input, vt_world_size=2)
    assert output.is_contiguous(memory_format=memory_format)
    (gradient,) = torch.autograd.grad(output.sin().sum(), input)
    assert gradient.is_contiguous(memory_format=memory_format)


def test_counter_moves_for_each_rank_that_saw_samples() -> None:
    mean, var = torch.zeros(4, 3), torch.ones(4, 3)
    counts = torch.zeros(4, dtype=torch.long)
    for samples in (8, 2, 3):
        dist_batch_norm(torch.randn(samples, 3, 4), mean, var, None, None, counts, vt_world_size=4)
    assert counts.tolist() == [3, 3, 2, 1]


def test_rank_without_samples_keeps_its_statistics() -> None:
    mean, var = torch.randn(4, 3), torch.rand(4, 3)
    before = mean.clone(), var.clone()
    dist_batch_norm(torch.randn(2, 3, 4), mean, var, vt_world_size=4)
    assert torch.equal(mean[2:], before[0][2:])
    assert torch.equal(var[2:], before[1][2:])
    assert not (mean[:2] == before[0][:2]).any()


@pytest.mark.usefixtures("backend")
def test_cumulative_average_is_taken_for_each_rank() -> None:
    mean, var = torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    counts = torch.zeros(2, dtype=torch.long)
    batches = [torch.randn(size, 3, 5, dtype=torch.float64) for size in (4, 1, 6)]
    for batch in batches:
        dist_batch_norm(batch, mean, var, None, None, counts, vt_world_size=2, momentum=None)
    shares = [batch.tensor_split(2) for batch in batches]
    for rank in range(2):
        moments = [
            (s[rank].mean((0, 2)), s[rank].transpose(0, 1).flatten(1).var(1))
            for s in shares
            if len(s[rank])
        ]
        expected = [torch.stack(moment).mean(0) for moment in zip(*moments, strict=True)]
        torch.testing.assert_close([mean[rank], var[rank]], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 3, 0), (0, 3)], ids=str)
def test_empty_batch_is_counted_and_changes_nothing_as_in_torch(shape: tuple[int, ...]) -> None:
    plain = torch.nn.BatchNorm1d(3)
    plain(torch.empty(shape))
    input = torch.empty(shape, requires_grad=True)
    mean, var, counts = torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, dtype=torch.long)
    weight = torch.ones(3, requires_grad=True)
    output = dist_batch_norm(input, mean, var, weight, None, counts, vt_world_size=2)
    gradients = torch.autograd.grad(output.sum(), (input, weight))
    assert output.shape == gradients[0].shape == shape
    assert torch.equal(gradients[1], torch.zeros(3))
    assert torch.equal(mean, plain.running_mean.expand(2, 3))
    assert torch.equal(var, plain.running_var.expand(2, 3))
    assert counts.tolist() == [int(plain.num_batches_tracked)] * 2


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("samples", [6, 7, 2])
def test_gradcheck_and_gradgradcheck(samples: int, partition: str) -> None:
    input, weight, bias, *_ = make_case((samples, 2, 3), 3)

    def function(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dist_batch_norm(
            input, None, None, weight, bias, vt_world_size=3, partition=partition
        )

    assert gradcheck(function, (input, weight, bias), check_forward_ad=True)
    assert gradgradcheck(function, (input, weight, bias))


def test_func_grad_and_its_own_gradient_equal_autograd() -> None:
    input, weight, *_ = make_case((6, 3, 4), 3)

    def loss(input: Tensor) -> Tensor:
        return dist_batch_norm(input, None, None, weight, vt_world_size=3).sin().sum()

    (first,) = torch.autograd.grad(loss(input), input, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), input)
    detached = input.detach()
    torch.testing.assert_close(grad(loss)(detached), first)
    torch.testing.assert_close(grad(lambda x: grad(loss)(x).sin().sum())(detached), second)


def in_plain_operations(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Three ranks' batch norm of a batch of six, which torch can differentiate in every way.

    Not the loop of F.batch_norm: torch's own second derivatives of that are wrong.
    """
    shares = input.reshape(3, 2, *input.shape[1:])
    var, mean = torch.var_mean(shares, (1, 3), correction=0, keepdim=True)
    normalized = (shares - mean) / (var + 1e-5).sqrt()
    return (normalized * weight[:, None] + bias[:, None]).sin().sum()


def ours(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return dist_batch_norm(input, None, None, weight, bias, vt_world_size=3).sin().sum()


def test_func_forward_mode_and_hessian_equal_those_of_plain_operations() -> None:
    point = tuple(case.detach() for case in make_case((6, 2, 3), 3)[:3])
    tangents = tuple(torch.randn_like(value) for value in point)
    results = [
        (jvp(function, point, tangents), hessian(function, (0, 1, 2))(*point))
        for function in (ours, in_plain_operations)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("inner", [jacfwd, jacrev])
@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("enabled", [True, False])
def test_second_derivatives_are_right_in_every_order(enabled: bool, outer: Any, inner: Any) -> None:
    point = tuple(case.detach() for case in make_case((6, 2, 3), 3)[:3])
    with torch.set_grad_enabled(enabled):
        found, expected = (outer(inner(f))(*point) for f in (ours, in_plain_operations))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reverse_first", [True, False])
def test_dual_numbers_give_second_derivatives(reverse_first: bool) -> None:
    input, weight, bias = make_case((6, 2, 3), 3)[:3]
    tangent, found = torch.randn_like(input), []
    for function in (ours, in_plain_operations):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(input, tangent)
            output = function(dual, weight, bias)
            if reverse_first:
                (gradient,) = torch.autograd.grad(output, dual)
                found.append(forward_ad.unpack_dual(gradient).tangent)
            else:
                pushed = forward_ad.unpack_dual(output).tangent
                found += torch.autograd.grad(pushed, input)
    torch.testing.assert_close(found[0], found[1])


def test_vmap_equals_a_loop_and_updates_each_models_rows() -> None:
    inputs = torch.randn(3, 6, 4, 5)
    means, variances = torch.zeros(3, 2, 4), torch.ones(3, 2, 4)
    counts = torch.zeros(3, 2, dtype=torch.long)
    means_2, variances_2 = means.clone(), variances.clone()

    def function(input: Tensor, mean: Tensor, var: Tensor, count: Tensor) -> Tensor:
        return dist_batch_norm(input, mean, var, None, None, count, vt_world_size=2)

    output = vmap(function)(inputs, means, variances, counts)
    for model in range(3):
        expected = dist_batch_norm(
            inputs[model], means_2[model], variances_2[model], vt_world_size=2
        )
        torch.testing.assert_close(output[model], expected)
    torch.testing.assert_close(means, means_2)
    torch.testing.assert_close(variances, variances_2)
    assert counts.tolist() == [[1, 1]] * 3


def test_vmap_over_weights_alone_updates_shared_rows_once() -> None:
    input, weights = torch.randn(8, 4), torch.rand(3, 4)
    rows = [torch.zeros(2, 4), torch.ones(2, 4)]
    once = [row.clone() for row in rows]
    expected = dist_batch_norm(input, *once, vt_world_size=2)
    output = vmap(lambda w: dist_batch_norm(input, *rows, w, vt_world_size=2))(weights)
    torch.testing.assert_close(output, expected * weights[:, None])
    torch.testing.assert_close(rows, once)


def test_vmap_refuses_to_write_rows_that_are_not_batched() -> None:
    mean, var = torch.zeros(2, 4), torch.ones(2, 4)
    with pytest.raises(ConfigurationError, match="map over the buffers too"):
        vmap(lambda x: dist_batch_norm(x, mean, var, vt_world_size=2))(torch.randn(3, 6, 4, 5))


@pytest.mark.parametrize("momentum", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), 1])
def test_momentum_may_be_any_kind_of_number(momentum: Any) -> None:
    input = torch.randn(8, 3, 2)
    rows = [(torch.zeros(2, 3), torch.ones(2, 3)) for _ in range(2)]
    dist_batch_norm(input, *rows[0], vt_world_size=2, momentum=momentum)
    dist_batch_norm(input, *rows[1], vt_world_size=2, momentum=float(momentum))
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=0)


@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True, None])
def test_vt_world_size_must_be_a_positive_int(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="vt_world_size must be a positive int, but got"):
        dist_batch_norm(torch.randn(8, 3), vt_world_size=value)


@pytest.mark.parametrize(
    ("shape", "ranks", "rank"),
    [((8, 3), 8, 0), ((9, 3), 8, 1), ((5, 3, 1, 1), 8, 0), ((1, 3), 1, 0)],
)
def test_one_value_per_channel_names_the_batch_the_ranks_and_the_rank(
    shape: tuple[int, ...], ranks: int, rank: int
) -> None:
    counts, mean, var = (
        torch.zeros(ranks, dtype=torch.long),
        torch.zeros(ranks, 3),
        torch.ones(ranks, 3),
    )
    with pytest.raises(InputError) as caught:
        dist_batch_norm(torch.randn(shape), mean, var, None, None, counts, vt_world_size=ranks)
    message = str(caught.value)
    assert f"N={shape[0]} over V={ranks} ranks, so that rank {rank} has one" in message
    assert f"give at least {2 * ranks} samples" in message
    assert counts.sum() == 0
    assert mean.sum() == 0


def test_two_values_per_channel_are_enough() -> None:
    assert dist_batch_norm(torch.randn(16, 3), vt_world_size=8).isfinite().all()
    assert dist_batch_norm(torch.randn(8, 3, 2), vt_world_size=8).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"partition": "random"}, "partition must be one of 'contiguous', 'interleaved'"),
        ({"eps": 0.0}, "eps must be positive during training, but got 0.0"),
        ({"eps": -1.0}, "eps must be positive"),
        (
            {"momentum": None, "running_mean": torch.zeros(2, 3), "running_var": torch.ones(2, 3)},
            "needs num_batches_tracked",
        ),
        (
            {"running_mean": torch.zeros(2, 3)},
            "both be given or both be None, .* running_mean",
        ),
        ({"momentum": "0.1"}, "momentum must be a number or None, but got '0.1'"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        dist_batch_norm(torch.randn(8, 3), vt_world_size=2, **arguments)


class _Image(Tensor):
    """Carries what a loader knows of an image; with a method of torch's in its own form."""

    def new_empty(self, size: Any, dtype: Any = None) -> Any:
        return torch.empty(size, dtype=dtype or self.dtype).as_subclass(type(self))


def test_a_subclass_of_tensor_may_have_methods_of_its_own() -> None:
    # As MONAI's MetaTensor, in which all of its loaders' batches come.
    input, weight, bias, mean, var, upstream = make_case((8, 5, 4), 2, torch.float32)
    settings: Any = {"vt_world_size": 2, "activation": "relu"}
    outputs, gradients, rows = [], [], []
    for kind in (Tensor, _Image):
        mean_2, var_2 = mean.clone(), var.clone()
        image = input.detach().as_subclass(kind).requires_grad_()
        output = dist_batch_norm(image, mean_2, var_2, weight, bias, **settings)
        assert type(output) is kind
        found = torch.autograd.grad(output, (image, weight, bias), upstream.as_subclass(kind))
        outputs.append(output.as_subclass(Tensor))
        gradients.append([gradient.as_subclass(Tensor) for gradient in found])
        rows.append((mean_2, var_2))
    for pair in (outputs, gradients, rows):
        torch.testing.assert_close(*pair, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"input": torch.randn(3)}, "at least 2 dimensions"),
        ({"weight": torch.ones(4)}, r"expected weight of shape \(3,\)"),
        ({"bias": torch.ones(4)}, r"expected bias of shape \(3,\)"),
        ({"running_mean": torch.zeros(3)}, r"expected running_mean of shape \(2, 3\)"),
        ({"running_var": torch.zeros(4, 3)}, r"expected running_var of shape .* over 2 virtual r"),
        ({"num_batches_tracked": torch.zeros(4).long()}, r"num_batches_tracked of shape \(2,\)"),
        ({"num_batches_tracked": torch.zeros(2)}, "expected num_batches_tracked of torch.int64"),
        ({"input": torch.ones(8, 3, dtype=torch.long)}, "of float16, .* but got torch.int64; conv"),
        ({"input": torch.randn(8, 3, dtype=torch.cfloat)}, "but got torch.complex64"),
        ({"weight": torch.ones(3).double()}, "weight of torch.float32 for .* got torch.float64"),
        ({"bias": torch.ones(3).half()}, "bias of torch.float32 for an input of torch.float32"),
        ({"input": torch.randn(8, 3).double()}, "running_mean of torch.float64 .* torch.float32"),
        ({"running_var": torch.ones(2, 3, device="meta")}, "running_var on cpu .* it is on meta"),
    ],
)
def test_wrong_shapes_dtypes_and_devices_are_refused(arguments: dict[str, Any], match: str) -> None:
    rows = {"running_mean": torch.zeros(2, 3), "running_var": torch.ones(2, 3)}
    with pytest.raises(InputError, match=match):
        dist_batch_norm(**{"input": torch.randn(8, 3), "vt_world_size": 2, **rows, **arguments})
