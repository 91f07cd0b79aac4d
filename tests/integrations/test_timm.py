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
