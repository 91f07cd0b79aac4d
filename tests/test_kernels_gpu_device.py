"""The GPU backend on a CUDA device: ``python -m pytest -m gpu``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distbn_convert import DistBatchNorm2d, convert_model
from distbn_convert.functional import dist_batch_norm
from distbn_convert.kernels import gpu, native, reference, select_backend
from distbn_convert.kernels.gpu import rule

from .ddp import dealt_batches, make_data, make_model, train_ddp
from .kernel_cases import (
    CASES,
    DIVIDED,
    KINDS,
    WORDS,
    Case,
    check,
    check_nan,
    check_tiny,
    check_underflow,
    compute,
    force,
    make,
)
from .resnet import check_autocast, check_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
# Times the tolerance on a CPU: a definition whose sums on a device are nearly exact allows little,
# and for SHAPES our kernels need up to 3 roundings (on the emulated device), torch's own 17 times
# that tolerance (on a CPU). Of contiguous 16-bit inputs torch's CUDA kernel passes partial sums of
# the backward from thread to thread in 16 bits.
OURS, TORCHS = 3, 50
# Shapes for which the rule takes each kernel in one of the passes or layouts.
SHAPES = [
    ((64, 32, 14, 14), 8),
    ((61, 33, 7, 7), 8),
    ((64, 64, 56, 56), 2),
    ((16, 64, 112, 112), 4),
    ((32, 512, 24, 24), 8),
    ((12, 8, 112, 112), 4),
    ((64, 64, 56, 56), 8),
    ((64, 512), 8),
    ((30, 24, 5, 6, 7), 4),
]


@pytest.fixture(autouse=True)
def sizes() -> None:
    """What a test compiles does not depend on those before it."""
    from distbn_convert.kernels.gpu import launch

    launch._sizes.clear()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Under deterministic algorithms torch fills what it allocates with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def much_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any device the rule takes what it takes on one with as much L2 as an H100."""
    from distbn_convert.kernels.gpu import launch

    multiprocessors, _ = launch.resources_of(torch.device("cuda"))
    monkeypatch.setattr(launch, "resources_of", lambda _: (multiprocessors, rule.L2_BYTES))


def cuda(tensor: Tensor) -> Tensor:
    return tensor.cuda()


def test_cuda_tensors_go_to_this_backend() -> None:
    assert select_backend(torch.ones(2, 2, device="cuda")) is gpu
    assert select_backend(torch.ones(2, 2, device="cuda", dtype=torch.float64)) is native


def test_cuda_tensors_go_to_torchs_batch_norm_with_the_switch_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(gpu.SWITCH, "off")
    assert select_backend(torch.ones(2, 2, device="cuda")) is native


@pytest.mark.parametrize("large", [0, 2**62], ids=["each", "joined"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torchs_batch_norm_agrees_with_the_definition(
    case: Case, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(native._LARGE, "cuda", large)
    check(case, make(case, cuda), native, TORCHS, rounds_sums=True)


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("large", [0, 2**62], ids=["each", "joined"])
def test_torchs_batch_norm_agrees_with_the_definition_on_large_maps(
    large: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(native._LARGE, "cuda", large)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for relu in (False, True):
            case = Case((32, 64, 28, 28), 8, channels_last=channels_last, dtype=dtype, relu=relu)
            check(case, make(case, cuda), native, TORCHS, rounds_sums=True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16, "relu": True, "residual": True},
        {"dtype": torch.float32, "relu": True, "interleaved": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(("shape", "ranks"), SHAPES, ids=str)
def test_results_agree_with_the_definition(
    shape: tuple[int, ...], ranks: int, settings: dict[str, Any], channels_last: bool
) -> None:
    case = Case(shape, ranks, channels_last=channels_last, **settings)
    check(case, make(case, cuda), slack=OURS)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize(
    "enabled", [[], *([kind] for kind in sorted(rule.WAITING)), ["staged"]], ids=str
)
@pytest.mark.parametrize(("shape", "ranks"), SHAPES[2:5], ids=str)
def test_results_agree_whichever_kernels_are_left_out(
    shape: tuple[int, ...],
    ranks: int,
    enabled: list[str],
    channels_last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rule, "ENABLED", frozenset(enabled))
    case = Case(shape, ranks, channels_last=channels_last, dtype=torch.bfloat16)
    check(case, make(case, cuda), slack=OURS)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_kernel_agrees_with_the_definition(
    case: Case, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distbn_convert.kernels.gpu import launch

    monkeypatch.setattr(launch, "select_kernel", force(kind))
    if case.wide:
        monkeypatch.setattr(launch, "_NARROW", 0)
    check(case, make(case, cuda), slack=OURS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", DIVIDED[1::2], ids=str)  # the emulator takes all
def test_kernels_for_every_size_agree_with_the_definition(
    case: Case, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distbn_convert.kernels.gpu import launch

    monkeypatch.setattr(launch, "_MOST_SIZES", 0)
    monkeypatch.setattr(launch, "select_kernel", force(kind))
    if case.wide:
        monkeypatch.setattr(launch, "_NARROW", 0)
    check(case, make(case, cuda), slack=OURS)


@pytest.mark.parametrize("kind", KINDS)
def test_relu_treats_nan_and_underflow_as_torch_does(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distbn_convert.kernels.gpu import launch

    monkeypatch.setattr(launch, "select_kernel", force(kind))
    words = kind == "pipelined"
    check_nan(cuda, **(WORDS if words else {}))
    check_underflow(cuda, last=words)
    check_tiny(cuda)


def repeat(case: Case) -> int:
    """How many values a thousand repeats get otherwise than the first, beside other work.

    The counters must go up by one with each.

    The other work changes from step to step which programs run together.
    """
    tensors = make(case, cuda)
    first = {name: result.clone() for name, result in compute(gpu, case, tensors).items()}
    counted = first.pop("counts")
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    noise, side = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for step in range(1000):
        with torch.cuda.stream(side):
            torch.sin(noise[: 1 + 37 * step % 2048])
        results = compute(gpu, case, tensors)
        for name, result in first.items():
            differing += (results[name] != result).sum()
    differing += (tensors["counts"] != counted + 1000).sum()
    return int(differing.item())


# Poisoned: what the repeat before left in memory would hide a value read before it is written.
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_a_thousand_repeats_are_the_same_bits(
    kind: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distbn_convert.kernels.gpu import launch

    monkeypatch.setattr(launch, "select_kernel", force(kind))
    case = Case((37, 24, 9, 11), 8, channels_last=channels_last, momentum=0.0)
    case = replace(case, residual=channels_last, relu=channels_last)
    if kind == "pipelined":  # which takes but one layout, and no residual
        case = replace(case, residual=False, **WORDS)
    assert repeat(case) == 0


@pytest.mark.usefixtures("poisoned_memory", "much_l2")
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize(
    ("kind", "shape", "channels_last"),
    [
        ("cooperative", (64, 64, 56, 56), False),
        ("ticketed", (64, 1024, 18, 18), True),
        ("pipelined", (64, 1024, 18, 18), True),
        ("swept", (64, 128, 56, 56), False),
        ("ticketed", (64, 64, 56, 56), False),
    ],
    ids=str,
)
def test_a_thousand_repeats_of_programs_that_wait_are_the_same_bits(
    kind: str,
    shape: tuple[int, ...],
    channels_last: bool,
    relu: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rule, "ENABLED", frozenset({kind}))
    ranks = 8 if channels_last else 2
    case = Case(shape, ranks, channels_last=channels_last, dtype=torch.bfloat16, momentum=0.0)
    case = replace(case, relu=relu, residual=relu and kind != "pipelined")
    passes = [True] if kind == "swept" else [False, True]  # those that take it
    assert {choose(case, backward) for backward in passes} == {kind}
    assert repeat(case) == 0


@pytest.mark.usefixtures("poisoned_memory", "much_l2")
@pytest.mark.parametrize("kind", sorted(rule.WAITING))
def test_launches_that_wait_on_many_streams_at_once_all_end(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule, "ENABLED", frozenset({kind}))
    case = Case((32, 8, 112, 112), 2, dtype=torch.bfloat16, momentum=0.0)
    if kind == "pipelined":
        case = replace(case, shape=(32, 64, 28, 28), channels_last=True)
    if kind == "swept":
        case = replace(case, shape=(36, 128, 56, 56))
    assert choose(case, kind == "swept") == kind
    tensors = make(case, cuda)
    first = compute(gpu, case, tensors)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(8)]
    for _ in range(50):
        results = []
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(compute(gpu, case, tensors))
        torch.cuda.synchronize()
        for result in results:
            torch.testing.assert_close(result, first, rtol=0, atol=0)


def choose(case: Case, backward: bool) -> str:
    """The kind of kernel that the rule takes for a case."""
    from distbn_convert.kernels.gpu.launch import describe
    from distbn_convert.kernels.layout import arrange

    x, last = arrange(make(case)["x"])
    share = describe(x, last, case.vt_world_size, case.interleaved)
    return share.choose(backward, case.residual).kind


def test_work_is_ordered_by_the_current_stream() -> None:
    case = Case((64, 64, 28, 28), 8)
    tensors = make(case, cuda)
    expected = compute(gpu, case, {**tensors, "mean": None, "var": None})
    x = torch.zeros_like(tensors["x"])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(tensors["x"])
        late = compute(gpu, case, {**tensors, "x": x, "mean": None, "var": None})
    stream.synchronize()
    torch.testing.assert_close(late, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "channels_last", "pipelined"),
    [
        ((64, 32, 14, 14), False, False),
        ((16, 64, 112, 112), False, False),
        ((256, 8, 112, 112), False, False),
        ((32, 64, 28, 28), True, False),
        ((32, 64, 28, 28), True, True),
    ],
    ids=str,
)
def test_a_step_is_captured_in_a_cuda_graph(
    shape: tuple[int, ...], channels_last: bool, pipelined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float32
    if pipelined:
        monkeypatch.setattr(rule, "ENABLED", rule.WAITING)
        dtype = torch.bfloat16
        case = Case(shape, 4, channels_last=True, dtype=dtype)
        assert choose(case, False) == choose(case, True) == "pipelined"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    layer = DistBatchNorm2d(shape[1], vt_world_size=4).cuda()
    eager = copy.deepcopy(layer)
    x = torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=layout).requires_grad_()
    upstream = torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=layout)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.autograd.grad(copy.deepcopy(layer)(x), x, upstream)  # compiles and loads
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(x)
        gradients = torch.autograd.grad(output, (x, *layer.parameters()), upstream)
    for _ in range(3):
        with torch.no_grad():
            x.normal_()
        graph.replay()
        expected = eager(x)
        truth = torch.autograd.grad(expected, (x, *eager.parameters()), upstream)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
        torch.testing.assert_close(gradients, truth, rtol=0, atol=0)
        torch.testing.assert_close(dict(layer.state_dict()), dict(eager.state_dict()))


@pytest.mark.filterwarnings("default")
def test_a_network_compiles_as_one_graph() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, momentum=None), nn.ReLU())
    net = convert_model(net, vt_world_size=4).cuda()
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True)
    for _ in range(2):
        x = torch.randn(16, 3, 20, 20, device="cuda")
        expected, output = net(x), compiled(x)
        upstream = torch.randn_like(expected)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        truth = torch.autograd.grad(expected, list(net.parameters()), upstream)
        gradients = torch.autograd.grad(output, list(twin.parameters()), upstream)
        torch.testing.assert_close(gradients, truth, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(dict(twin.state_dict()), dict(net.state_dict()))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_residual_and_relu_compile_with_the_operation(channels_last: bool) -> None:
    case = Case((32, 64, 28, 28), 4, channels_last=channels_last, residual=True, relu=True)
    tensors = make(case, cuda)
    leaves = [tensors[name].requires_grad_() for name in ("x", "weight", "bias", "residual")]

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return dist_batch_norm(
            x, weight=weight, bias=bias, vt_world_size=4, activation="relu", residual=residual
        )

    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        output = call(*leaves)
        results.append((output, *torch.autograd.grad(output, leaves, tensors["dy"])))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def test_training_agrees_with_real_ddp(tmp_path: Path) -> None:
    replicas = 4
    states = train_ddp(replicas, tmp_path, broadcast=False)
    model = convert_model(make_model(), replicas, partition="interleaved").float().cuda()
    images, labels = make_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for batch in dealt_batches(replicas):
            loss = F.cross_entropy(model(images[batch].float().cuda()), labels[batch].cuda())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in model.state_dict().items():
        rows = [state[name] for state in states]
        truth = torch.stack(rows) if value.dim() > rows[0].dim() else rows[0]
        torch.testing.assert_close(value.cpu().to(truth.dtype), truth, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_a_resnet50_step_agrees_with_the_definition(channels_last: bool) -> None:
    check_step("cuda", channels_last)


def test_a_bf16_autocast_step_of_resnet50_trains() -> None:
    check_autocast("cuda")


@pytest.mark.parametrize("interleaved", [False, True], ids=["contiguous", "interleaved"])
@pytest.mark.parametrize(
    ("channels_last", "samples", "ranks"), [(False, 4, 2), (True, 4, 2), (True, 64, 32)], ids=str
)
def test_more_than_two_to_the_31_elements(
    channels_last: bool, samples: int, ranks: int, interleaved: bool
) -> None:
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("the device has less than 40 GB free")
    channels, positions = 4096 + 8, 2**19 // samples
    shape = (samples, positions, channels) if channels_last else (samples, channels, positions)
    x = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()
    x = x.movedim(-1, 1) if channels_last else x
    assert x.numel() > 2**31
    settings = (0.1, 1e-5, ranks, interleaved, False)
    y, mean, rstd = gpu.forward(x, *(None,) * 6, *settings)
    dx, dw, db, _ = gpu.backward(y, x, *(None,) * 3, mean, rstd, ranks, interleaved, False)
    some = torch.tensor([0, 1, channels // 2, channels - 1], device="cuda")
    part = x[:, some].float()
    truth = reference.forward(part, *(None,) * 6, *settings)
    torch.testing.assert_close(y[:, some].float(), truth[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(mean[:, some], truth[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rstd[:, some], truth[2], rtol=1e-4, atol=1e-5)
    upstream = y[:, some].float()
    exact = reference.backward(upstream, part, *(None,) * 3, *truth[1:], ranks, interleaved, False)
    torch.testing.assert_close(dx[:, some].float(), exact[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(dw[some], exact[1], rtol=1e-3, atol=1.0)
    torch.testing.assert_close(db[some], exact[2], rtol=1e-3, atol=1.0)


def test_a_device_that_is_not_current_is_used() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    x = torch.randn(16, 8, 5, 5)
    expected = dist_batch_norm(x, vt_world_size=4)
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):  # by Triton's dispatch, and ours
        output = dist_batch_norm(x.to(device), vt_world_size=4)
        assert output.device == torch.device(device)
        torch.testing.assert_close(output.cpu(), expected)


def test_double_backward_works_on_the_device() -> None:
    x = torch.randn(8, 3, 5, device="cuda").requires_grad_()
    output = dist_batch_norm(x, vt_world_size=2)
    (gradient,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    twin: Any = x.detach().cpu().double().requires_grad_()
    (gradient,) = torch.autograd.grad(
        dist_batch_norm(twin, vt_world_size=2).sin().sum(), twin, create_graph=True
    )
    (truth,) = torch.autograd.grad(gradient.square().sum(), twin)
    torch.testing.assert_close(second.cpu().double(), truth, rtol=1e-3, atol=1e-4)
