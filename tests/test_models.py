from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from distbn_convert import DistBatchNorm2d, convert_model, models, plan_conversion, revert_model
from distbn_convert.errors import ConfigurationError, NothingToConvertError
from distbn_convert.models import _SkipInit

# torchvision's builders without a layer that could have virtual ranks: they normalise by layer or
# instance norm, or not at all.
NOTHING_TO_CONVERT = {
    "alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny", "mvit_v1_b",
    "mvit_v2_s", "raft_small", "squeezenet1_0", "squeezenet1_1", "ssd300_vgg16", "swin3d_b",
    "swin3d_s", "swin3d_t", "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t",
    "vgg11", "vgg13", "vgg16", "vgg19", "vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32",
}  # fmt: skip


def build(name: str) -> nn.Module:
    """The model with memory that is never written, so that the largest ones cost nothing."""
    builder = torchvision.models.get_model_builder(name)
    bare = {"weights_backbone": None, "init_weights": False}
    kwargs: Any = {key: bare[key] for key in bare if key in signature(builder).parameters}
    with _SkipInit():
        return builder(**kwargs)


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("name", torchvision.models.list_models())
def test_every_builder_converts_and_reverts_or_says_why_not(name: str) -> None:
    model = build(name)
    if name in NOTHING_TO_CONVERT:
        with pytest.raises(
            NothingToConvertError, match="some BatchNorm to convert, but found none"
        ):
            convert_model(model, 8)
        return
    types = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert len(layers) == models.count_batch_norms(name)
    plan = plan_conversion(model, 8)
    assert [entry.module for entry in plan.of("convert")] == layers
    assert not plan.of("refuse")
    convert_model(model, 8)
    assert all(type(layer).__name__.startswith("DistBatchNorm") for layer in layers)
    assert all(layer.running_mean.shape == (8, layer.num_features) for layer in layers)
    assert list(model.state_dict()) == keys
    revert_model(model)
    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("mobilenet_v3_small", 64),
        ("efficientnet_b0", 64),
        ("densenet121", 64),
        ("shufflenet_v2_x0_5", 64),
        ("mnasnet0_5", 64),
        ("regnet_y_400mf", 64),
        ("googlenet", 64),
        ("vgg11_bn", 64),
        ("quantized_resnet18", 64),
        ("lraspp_mobilenet_v3_large", 64),
        ("maxvit_t", 224),
    ],
)
def test_models_evaluate_bit_for_bit_and_train_with_ranks(name: str, size: int) -> None:
    backbone = {"weights_backbone": None} if "lraspp" in name else {}
    extra = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, **backbone, **extra).eval()
    input = torch.randn(2, 3, size, size)

    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            output = model(input)
        return list(output.values()) if isinstance(output, dict) else [output]

    expected = run()
    convert_model(model, 2)
    assert all(map(torch.equal, run(), expected))
    output = model.train()(torch.randn(4, 3, size, size))
    output = output[0] if isinstance(output, tuple) else output
    (output["out"] if isinstance(output, dict) else output).sin().sum().backward()
    converted = [layer for layer in model.modules() if isinstance(layer, DistBatchNorm2d)]
    seen = [layer for layer in converted if layer.num_batches_tracked.tolist() == [1, 1]]
    assert seen == converted
    assert all((layer.running_mean[0] != layer.running_mean[1]).any() for layer in seen)
    trained = [value.clone() for value in model.eval() and run()]
    revert_model(model)
    assert all(map(torch.equal, run(), trained))


def test_video_and_optical_flow_and_detection_models_train_with_ranks() -> None:
    video = models.get_model("r3d_18", 2)
    video(torch.randn(4, 3, 4, 32, 32)).sum().backward()
    assert video.stem[1].num_batches_tracked.tolist() == [1, 1]
    flow = models.get_model("raft_large", 2)
    flow(torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128), num_flow_updates=1)
    assert flow.context_encoder.convnormrelu[1].num_batches_tracked.tolist() == [1, 1]
    detector = models.get_model("ssdlite320_mobilenet_v3_large", 2, weights_backbone=None)
    box = {"boxes": torch.tensor([[0.0, 0.0, 9.0, 9.0]]), "labels": torch.tensor([1])}
    losses = detector([torch.randn(3, 64, 64) for _ in range(4)], [box] * 4)
    sum(losses.values()).backward()
    assert detector.backbone.features[0][0][1].num_batches_tracked.tolist() == [1, 1]


def test_get_model_takes_torchvisions_and_the_converters_arguments() -> None:
    options = {"partition": "interleaved", "eval_reduction": "select", "eval_rank": 3}
    options |= {"accumulation_steps": 2}
    model = models.get_model(
        "resnet18", 4, num_classes=7, filter_fn=lambda _, fqn: fqn != "bn1", **options
    )
    assert model.fc.out_features == 7
    assert type(model.bn1) is nn.BatchNorm2d
    layer = model.layer1[0].bn1
    assert (layer.vt_world_size, {name: getattr(layer, name) for name in options}) == (4, options)
    with pytest.raises(ConfigurationError, match="unsupported must be"):
        models.get_model("resnet18", unsupported="never")
    theirs, ours = signature(convert_model).parameters, signature(models.get_model).parameters
    for name in theirs.keys() - {"model", "vt_world_size"}:
        assert ours[name].default == theirs[name].default
    assert models.get_model("resnet18").bn1.vt_world_size == 8
    assert models.list_models() == torchvision.models.list_models()
    assert "resnet50" in models.list_models(include="resnet*")


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that was computed in memory."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.size = max(self.size, result.numel())
        return result


@pytest.mark.parametrize(
    ("name", "count"), [("vit_b_32", 0), ("quantized_googlenet", 59), ("regnet_y_400mf", 53)]
)
def test_counting_computes_no_weights_and_is_quiet(name: str, count: int) -> None:
    with Largest() as largest:
        assert models.count_batch_norms(name) == count
    assert largest.size < 100


@pytest.mark.parametrize("as_text", [True, False])
def test_pretrained_statistics_land_in_every_rank(
    as_text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained = torchvision.models.resnet18()
    pretrained(torch.randn(8, 3, 64, 64))
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(  # what the download would return
        type(weights), "get_state_dict", lambda self, *_, **__: pretrained.state_dict()
    )
    model = models.get_model("resnet18", 4, weights="IMAGENET1K_V1" if as_text else weights)
    expected = pretrained.layer1[0].bn1.running_mean.expand(4, -1)
    assert torch.equal(model.layer1[0].bn1.running_mean, expected)
    input = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(input), pretrained.eval()(input))


def test_layer_is_a_norm_layer_and_loads_a_plain_checkpoint() -> None:
    norm_layer = partial(DistBatchNorm2d, vt_world_size=8)
    model = torchvision.models.resnet18(norm_layer=norm_layer)
    plain = torchvision.models.resnet18()
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    input = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(input), plain.eval()(input))
    converted = convert_model(plain, 8)
    batch = torch.randn(16, 3, 64, 64)
    assert torch.equal(model.train()(batch), converted.train()(batch))
    assert type(revert_model(model).bn1) is nn.BatchNorm2d


def test_errors_are_torchvisions_and_ours() -> None:
    for function in (models.get_model, models.count_batch_norms):
        with pytest.raises(ConfigurationError, match="name of a torchvision model, .* 'resnet19'"):
            function("resnet19")
    with pytest.raises(
        ConfigurationError, match=r"weights of resnet18 \(IMAGENET1K_V1, DEFAULT\), but got 'X'"
    ):
        models.get_model("resnet18", weights="X")
    with pytest.raises(KeyError):  # not of the weights
        models.get_model("resnet18", norm_layer=lambda _: {}["absent"])
    with pytest.raises(ConfigurationError, match="vt_world_size must be a positive int"):
        models.get_model("resnet18", 0)
    with pytest.raises(NothingToConvertError):
        models.get_model("squeezenet1_1")
