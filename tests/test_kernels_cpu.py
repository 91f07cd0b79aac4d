from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distbn_convert.kernels import cpu, reference

from .resnet import check_step

pytestmark = pytest.mark.skipif(
    not cpu.load(torch.float32), reason="the CPU kernel cannot be built here; its log line says why"
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Whole and part vectors, runs shorter than one, several chunks, a split reduction, one channel,
# more channels than go together, few samples to a rank.
SHAPES = [
    (9, 70),
    (40, 3),
    (9, 5, 1, 1),
    (9, 33, 2),
    (9, 5, 15),
    (9, 7, 7, 7),
    (9, 37, 6, 7),
    (17, 40, 6, 5),
    (8, 1, 9, 11),
    (5, 3, 130, 140),
    (2, 2, 40000),
    (9, 3, 4, 5, 6),
    (600, 17, 3, 3),
    (4, 40, 3, 4),
]


def lay_out(values: Tensor, layout: str) -> Tensor:
    """Give values a memory layout: channels before or after the positions, strided, permuted."""
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return torch.stack([values, values * float("nan")], -1)[..., 0]
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    return values


def make_case(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    input = torch.randn(shape, dtype=torch.float64) * 3 + 2
    return (
        lay_out(input.to(dtype), layout),
        lay_out(torch.randn(shape, dtype=torch.float64).to(dtype), layout),
    )


def assert_equal_to_reference(
    input: Tensor,
    upstream: Tensor,
    ranks: int,
    interleaved: bool = False,
    momentum: float | None = 0.3,
    parameters: torch.dtype | None = torch.float32,
    running: torch.dtype = torch.float32,
) -> None:
    """Run both backends, forward and backward, and compare with the reference in float64."""
    channels = input.shape[1]
    weight, bias = torch.randn(2, channels).to(parameters or torch.float32).unbind()
    affine = (weight, bias) if parameters else (None, None)
    rows = torch.randn(ranks, channels).to(running), torch.rand(ranks, channels).to(running)
    counts = torch.arange(1, ranks + 1)

    def run(backend: Any, wide: bool) -> list[Tensor]:
        def cast(tensor: Any) -> Any:
            return tensor.double() if wide and tensor is not None else tensor

        buffers = [cast(row).clone() for row in rows]
        seen = counts.clone()
        x, w, b = cast(input), *map(cast, affine)
        output, mean, rstd = backend.forward(
            x, w, b, None, *buffers, seen, momentum, 1e-3, ranks, interleaved, False
        )
        gradients = backend.backward(
            cast(upstream), x, w, b, None, mean, rstd, ranks, interleaved, False
        )
        assert seen.tolist() == [v + 1 + (v < len(input)) for v in range(ranks)]
        return [output, mean, rstd, *buffers, *gradients[:3]]

    assert cpu.supports(input)
    names = ["output", "mean", "rstd", "running_mean", "running_var", "dx", "dweight", "dbias"]
    results = [run(cpu, False), run(reference, False), run(reference, True)]
    for name, ours, peer, truth in zip(names, *results, strict=True):
        assert (ours.dtype, ours.shape) == (peer.dtype, peer.shape)
        if name in ("output", "dx"):
            assert ours.stride() == peer.stride()
        error, allowed = ((value.double() - truth).abs().max() for value in (ours, peer))
        # In float64 the truth is no more exact than what it judges.
        rounding = 1e-12 if ours.dtype == torch.float64 else 4 * torch.finfo(ours.dtype).eps
        assert error <= 2 * allowed + rounding * truth.abs().max(), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    input, upstream = make_case(shape, dtype, layout)
    for ranks in (1, 2):
        for interleaved in (False, True):
            assert_equal_to_reference(input, upstream, ranks, interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "transposed"])
@pytest.mark.parametrize("ranks", [4, 12])
def test_uneven_shares_and_ranks_without_samples(
    ranks: int, layout: str, interleaved: bool
) -> None:
    input, upstream = make_case((9, 6, 5, 7), torch.float32, layout)
    assert_equal_to_reference(input, upstream, ranks, interleaved)


@pytest.mark.parametrize("shape", [(8, 6, 4), (8, 20)], ids=str)
@pytest.mark.parametrize("parameters", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("running", DTYPES, ids=str)
def test_parameters_and_running_statistics_of_any_dtype(
    shape: tuple[int, ...], parameters: torch.dtype | None, running: torch.dtype
) -> None:
    input, upstream = make_case(shape, torch.float32, "contiguous")
    assert_equal_to_reference(input, upstream, 4, False, None, parameters, running)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(shape: tuple[int, ...], layout: str) -> None:
    threads = torch.get_num_threads()
    input, upstream = make_case(shape, torch.float32, layout)
    results = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            for ranks in (1, 2, 3):
                output, mean, rstd = cpu.forward(
                    input, *(None,) * 6, 0.1, 1e-5, ranks, False, False
                )
                gradients = cpu.backward(
                    upstream, input, None, None, None, mean, rstd, ranks, False, False
                )
                results.append([output, mean, rstd, *gradients[:3]])
    finally:
        torch.set_num_threads(threads)
    for index, result in enumerate(results):
        for ours, single in zip(result, results[index % 3], strict=True):
            assert torch.equal(ours, single)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_large_means_spoil_neither_variance_nor_output(scale: float, layout: str) -> None:
    input = lay_out((scale + torch.randn(8, 20, 60, 60)), layout)
    output, mean, rstd = cpu.forward(input, *(None,) * 6, 0.1, 1e-5, 2, False, False)
    ranks = input.double().reshape(2, 4, 20, -1).movedim(1, 2).flatten(2)
    var = 1 / rstd.double() ** 2 - 1e-5
    assert ((var - ranks.var(-1, correction=0)).abs() / var).max() < 1e-6
    assert (mean - ranks.mean(-1)).abs().max() <= scale * 1e-7
    # Not so near if the mean that is taken from the values were rounded to float32.
    found = output.double().reshape(2, 4, 20, -1).movedim(1, 2).flatten(2)
    deviations = ranks - ranks.mean(-1, keepdim=True)
    expected = deviations * (ranks.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    assert (found - expected).abs().max() < 4e-6


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_steps_between_images_do_not_spoil_the_variance(layout: str) -> None:
    """The shift of a chunk, taken from its first values, is then far from its mean."""
    input = torch.randn(64, 20, 16, 16)
    input[1:] += 1000
    input[0] = 0
    _, _, rstd = cpu.forward(lay_out(input, layout), *(None,) * 6, 0.1, 1e-5, 1, False, False)
    var = input.double().movedim(1, 0).flatten(1).var(-1, correction=0)
    assert ((1 / rstd[0].double() ** 2 - 1e-5 - var).abs() / var).max() < 1e-5


@pytest.mark.parametrize("shape", [(64, 4096), (8, 4096, 7), (64, 512, 3)], ids=str)
def test_a_few_values_to_a_rank_keep_their_digits(shape: tuple[int, ...]) -> None:
    """One of eight may be far from the others; as a shift it would cost digits."""
    input = torch.randn(shape)
    _, _, rstd = cpu.forward(input, *(None,) * 6, 0.1, 1e-5, 8, False, False)
    shares = input.double().reshape(8, -1, shape[1], *shape[2:]).movedim(2, 1).flatten(2)
    expected = (shares.var(-1, correction=0) + 1e-5).rsqrt()
    assert ((rstd - expected).abs() / expected).max() < 3e-7


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_bad_value_spoils_its_rank_and_channel_alone(layout: str, value: float) -> None:
    input = torch.randn(8, 20, 9, 9)
    input[5, 3, 2, 2] = value
    rows = torch.zeros(4, 20), torch.ones(4, 20)
    output, _, _ = cpu.forward(
        lay_out(input, layout), None, None, None, *rows, None, 0.1, 1e-5, 4, False, False
    )
    spoilt = torch.zeros(4, 20, dtype=torch.bool)
    spoilt[2, 3] = True
    assert torch.equal(rows[1].isnan(), spoilt)
    found = output.reshape(4, 2, 20, -1).isnan().all(-1).all(1)
    assert torch.equal(found, spoilt)
    assert torch.equal(output.reshape(4, 2, 20, -1).isnan().any(-1).any(1), spoilt)


@pytest.mark.parametrize("shape", [(2, -1), (2, -1, 3), (2, -1, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_converted_bit_for_bit_as_torch_does(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Zeros are normalised to the bias, and the mean of equal values is their value."""
    bits = torch.randint(-(2**31), 2**31, (2**16,), dtype=torch.int32)
    edges = [0.0, float("inf"), -float("inf"), float("nan"), 65504, 65520, 6e-8, 3e-8, 1e-40]
    bias = torch.cat([bits.view(torch.float32), torch.randn(2**12), torch.tensor(edges)])
    zeros = bias.new_zeros((2, len(bias), *shape[2:]), dtype=dtype)
    output, *_ = cpu.forward(zeros, None, bias, *(None,) * 4, 0.1, 1e-5, 1, False, False)
    expected = bias.to(dtype).reshape(1, -1, *(1,) * len(shape[2:])).expand_as(output)
    nan = expected.isnan()
    assert torch.equal(output.isnan(), nan)
    assert torch.equal(output.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])

    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.abs() < 1e38]
    input = values.reshape(1, -1, *(1,) * len(shape[2:])).expand(2, -1, *shape[2:])
    _, mean, _ = cpu.forward(input, *(None,) * 6, 0.1, 1e-5, 1, False, False)
    assert torch.equal(mean[0], values.float())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory_around_the_tensors_is_neither_read_nor_written(
    shape: tuple[int, ...], layout: str
) -> None:
    def fenced(tensor: Tensor, fill: float) -> tuple[Tensor, Tensor]:
        fence = torch.full((tensor.numel() + 256,), fill)
        inner = fence[128:-128].as_strided(tensor.shape, tensor.stride(), 128).copy_(tensor)
        return inner, fence

    plain, upstream = make_case(shape, torch.float32, layout)
    input, _ = fenced(plain, float("nan"))
    gradient, _ = fenced(upstream, float("nan"))
    rows = [fenced(torch.rand(2, shape[1]), 7.0) for _ in range(2)]
    output, mean, rstd = cpu.forward(
        input, None, None, None, rows[0][0], rows[1][0], None, 0.1, 1e-5, 2, False, False
    )
    gradients = cpu.backward(gradient, input, None, None, None, mean, rstd, 2, False, False)
    results = [output, mean, rstd, *gradients[:3]]
    assert not any(result.isnan().any() for result in results)
    assert all((fence[:128] == 7).all() and (fence[-128:] == 7).all() for _, fence in rows)


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("side", [64, 63])
def test_large_outputs_are_written_past_the_caches_to_any_address(
    side: int, layout: str, dtype: torch.dtype, offset: int
) -> None:
    """From 16 MiB on; runs of 64 x 64 positions are whole cache lines, those of 63 x 63 are not."""
    channels = 32 * (2**24 // (4 * side**2 * dtype.itemsize * 32) + 1)
    input, upstream = make_case((4, channels, side, side), dtype, layout)
    assert input.nbytes >= 2**24
    mean, rstd = torch.empty(2, 2, channels)
    sums = torch.empty(2, channels).unbind()

    def written(call: Any, *arguments: Any) -> Tensor:
        memory = torch.full((input.numel() + 64,), 7.0, dtype=dtype)
        output = memory.as_strided(input.shape, input.stride(), offset)
        call(output, *arguments, False, layout == "channels_last")
        assert (memory[:offset] == 7).all()
        assert (memory[offset + input.numel() :] == 7).all()
        return output

    ops = cpu.load(dtype)
    assert ops is not None
    output = written(ops.forward, mean, rstd, input, *(None,) * 5, False, 0.1, 1e-5)
    gradient = written(ops.backward, *sums, upstream, input, None, mean, rstd)
    expected = reference.forward(input, *(None,) * 6, 0.1, 1e-5, 2, False, False)[0]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    expected = reference.backward(upstream, input, None, None, None, mean, rstd, 2, False, False)[0]
    torch.testing.assert_close(gradient, expected, atol=tolerance, rtol=tolerance)


def test_running_statistics_that_are_views_are_updated_in_place() -> None:
    input = torch.randn(8, 6, 3)
    rows = torch.zeros(6, 8)[:, ::2].T, torch.ones(4, 6)
    expected = torch.zeros(4, 6), torch.ones(4, 6)
    for backend, (mean, var) in ((cpu, rows), (reference, expected)):
        version = mean._version
        backend.forward(input, *(None,) * 3, mean, var, None, 0.1, 1e-5, 4, False, False)
        assert mean._version > version
    torch.testing.assert_close(rows, expected)


def test_gradients_of_another_layout_or_broadcast() -> None:
    input, _ = make_case((8, 6, 5, 5), torch.float32, "channels_last")
    _, mean, rstd = cpu.forward(input, *(None,) * 6, 0.1, 1e-5, 4, False, False)
    saved = input, None, None, None, mean, rstd
    for upstream in (torch.randn(8, 6, 5, 5), torch.randn(6, 1, 1).expand(8, 6, 5, 5)):
        ours = cpu.backward(upstream, *saved, 4, False, False)
        expected = reference.backward(upstream, *saved, 4, False, False)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_a_resnet50_step_agrees_with_the_definition(channels_last: bool) -> None:
    check_step("cpu", channels_last)


def test_a_second_backward_takes_no_new_memory() -> None:
    """Of rows for each rank, whose pages would cost more than the arithmetic."""
    resource = pytest.importorskip("resource")
    operators = cpu.load(torch.float32)
    assert operators is not None
    input = torch.zeros(64, 2**17)
    mean, rstd = torch.zeros(2, 32, 2**17)
    results = torch.zeros_like(input), *torch.zeros(2, 2**17)
    faults = []
    for _ in range(2):
        operators.backward(*results, input, input, None, mean, rstd, False, True)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    rows = 2 * 8 * mean.numel()
    assert (faults[1] - faults[0]) * resource.getpagesize() < rows / 4


def test_operators_of_one_dtype_refuse_another() -> None:
    operators = cpu.load(torch.float32)
    assert operators is not None
    input = torch.randn(4, 3, dtype=torch.float64)
    mean, rstd = torch.empty(2, 2, 3)
    with pytest.raises(RuntimeError, match="float32 was given another dtype"):
        operators.forward(input, mean, rstd, input, *(None,) * 5, False, 0.1, 1e-5, False, True)
