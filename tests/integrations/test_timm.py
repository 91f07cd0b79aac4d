from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from distbn_convert import DistBatchNorm2d, convert_model, revert_model
from distbn_convert.integrations.timm import DistBatchNormAct2d


class Halve(nn.Module):
    """Stands for a drop layer, without chance."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def test_drop_and_activation_follow_the_ranks() -> None:
    layer = BatchNormAct2d(3, act_layer=nn.SiLU, drop_layer=Halve)
    plain = nn.BatchNorm2d(3)
    input = torch.randn(8, 3, 4, 4)
    expected = nn.functional.silu(convert_model(plain, 4)(input) / 2)
    convert_model(layer, 4)
    assert type(layer) is DistBatchNormAct2d
    assert isinstance(layer, BatchNormAct2d)
    torch.testing.assert_close(layer(input), expected)
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin.eval()(input), layer.eval()(input))
    evaluated = layer(input)
    assert type(revert_model(layer)) is BatchNormAct2d
    assert torch.equal(layer(input), evaluated)


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "mobilenetv3_small_100", "densenet121", "regnety_002", "resnet18"]
)
def test_models_keep_their_output_bit_for_bit_and_train(name: str) -> None:
    model = timm.create_model(name, num_classes=7).eval()
    before = copy.deepcopy(model.state_dict())
    types = [type(module) for module in model.modules()]
    input = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(input)
        convert_model(model, 4)
        assert torch.equal(model(input), expected)
        model.train()(torch.randn(8, 3, 64, 64))
        revert_model(convert_model(model.eval(), 4))
        assert not torch.equal(model(input), expected)
        model.load_state_dict(before)
        assert torch.equal(model(input), expected)
    assert [type(module) for module in model.modules()] == types


def test_a_plain_batch_norm_of_timm_is_the_ordinary_layer() -> None:
    assert type(convert_model(timm.create_model("resnet18"), 2).bn1) is DistBatchNorm2d


def test_timm_is_imported_only_if_the_user_has_imported_it() -> None:
    code = (
        "import sys, torch, distbn_convert as d; d.convert_model(torch.nn.BatchNorm2d(3), 2);"
        "assert 'timm' not in sys.modules; import timm;"
        "from timm.layers import BatchNormAct2d;"
        "assert type(d.convert_model(BatchNormAct2d(3), 2)).__name__ == 'DistBatchNormAct2d'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def is_fused(layer: nn.Module) -> bool:
    """Whether the norm's own operation took the ReLU, and not one after it."""
    output = layer(torch.randn(8, 3, 4, 4))
    return type(output.grad_fn).__name__ == "_BatchNormBackward" and bool((output >= 0).all())


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_relu_in_the_norms_operation_gives_the_same_bits(
    inplace: bool, dtype: torch.dtype, channels_last: bool
) -> None:
    fused = convert_model(BatchNormAct2d(3, inplace=inplace), 4)
    apart = copy.deepcopy(fused)
    apart.act.register_forward_hook(lambda *_: None)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    input = torch.randn(9, 3, 4, 4).to(dtype).to(memory_format=layout)
    upstream = torch.randn(9, 3, 4, 4).to(dtype)
    results = []
    for layer in (fused, apart):
        leaf = input.clone().requires_grad_()
        output = layer(leaf)
        gradients = torch.autograd.grad(output, (leaf, *layer.parameters()), upstream)
        results.append([output, *gradients, *layer.buffers()])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert torch.equal(fused.eval()(input.float()), apart.eval()(input.float()))
    assert is_fused(fused.train())
    assert not is_fused(apart.train())


def test_activations_that_are_not_a_plain_relu_are_called() -> None:
    class MyReLU(nn.ReLU):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    for layer in (
        BatchNormAct2d(3, apply_act=False),
        BatchNormAct2d(3, act_layer=nn.ReLU6),
        BatchNormAct2d(3, act_layer=MyReLU),
        BatchNormAct2d(3, drop_layer=Halve),
    ):
        assert not is_fused(convert_model(layer, 4))
    replaced = convert_model(BatchNormAct2d(3), 4)
    assert is_fused(replaced)
    replaced.act.forward = torch.sigmoid
    assert not is_fused(replaced)


@pytest.mark.parametrize("name", ["act", "drop"])
@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_on_activation_and_drop_still_fire(kind: str, name: str) -> None:
    layer, calls = convert_model(BatchNormAct2d(3, inplace=False), 4), []
    handle = getattr(getattr(layer, name), f"register_{kind}")(lambda *args: calls.append(args))
    layer(torch.randn(8, 3, 4, 4)).sum().backward()
    assert len(calls) == 1
    handle.remove()
    assert is_fused(layer)


def test_hooks_on_every_module_still_fire() -> None:
    layer, seen = convert_model(BatchNormAct2d(3), 4), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module))
    )
    try:
        layer(torch.randn(8, 3, 4, 4))
    finally:
        handle.remove()
    assert seen == [nn.Identity, nn.ReLU, DistBatchNormAct2d]


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    layer = convert_model(BatchNormAct2d(3), 4)
    twin, input = copy.deepcopy(layer), torch.randn(8, 3, 4, 4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(input), twin(input))
    assert torch.equal(layer.running_var, twin.running_var)
