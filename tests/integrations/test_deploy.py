"""From a trained model with virtual ranks to ONNX, and timm's and fvcore's tools on the way."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

from distbn_convert import convert_model, recalibrate, revert_model

from .. import ddp
from . import timm_processes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts functions when imported
    from fvcore.nn.precise_bn import update_bn_stats

BATCHES = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(4)]


def trained(ranks: int = 4) -> nn.Module:
    model = convert_model(ddp.make_model().float(), ranks)
    for batch in BATCHES:
        model(batch * 2 + 1)
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the exporter's own
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reduction", ["mean", "select", "pooled"])
@pytest.mark.parametrize("reverted", [True, False], ids=["reverted", "converted"])
def test_onnx_computes_what_the_model_computes(reduction: str, reverted: bool) -> None:
    model = trained()
    for module in model.modules():
        if hasattr(module, "eval_reduction"):
            module.eval_reduction = reduction
    expected = revert_model(copy.deepcopy(model), reduction).eval()(BATCHES[0])
    if reverted:
        revert_model(model, reduction)
    buffer = io.BytesIO()
    samples = torch.export.Dim("samples", min=2, max=64)
    program = torch.onnx.export(
        model.eval(), (BATCHES[1][:3],), dynamo=True, dynamic_shapes=({0: samples},), verbose=False
    )
    program.save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = (node.name for node in session.get_inputs())
    (output,) = session.run(None, {name: BATCHES[0].numpy()})
    np.testing.assert_allclose(output, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_timms_moving_average_follows_the_rows() -> None:
    model = convert_model(timm.create_model("resnet18", num_classes=5), 4)
    ema = ModelEmaV3(model, decay=0.9)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for batch in BATCHES[:2]:
        model(batch.repeat(1, 1, 4, 4))
        ema.update(model)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name].lerp_(value, 0.1)
    assert ema.module.bn1.running_mean.shape == (4, 64)
    for name, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected[name])
    input = BATCHES[3].repeat(1, 1, 4, 4)
    evaluated = ema.module.eval()(input)
    assert torch.equal(revert_model(ema.module).eval()(input), evaluated)


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
def test_timms_distribute_bn_and_revert_equal_one_reduction_over_the_group(tmp_path: Path) -> None:
    for distributed, grouped in ddp.spawn(timm_processes.distribute, 2, tmp_path):
        for name, value in grouped.items():
            torch.testing.assert_close(distributed[name], value)


def test_fvcores_precise_bn_of_a_plain_model_equals_recalibrate() -> None:
    model = revert_model(trained()).train()
    theirs = copy.deepcopy(model)
    update_bn_stats(theirs, BATCHES, num_iters=4, progress=None)
    recalibrate(model, BATCHES)
    compare(model, theirs, 1e-4)


def test_fvcores_precise_bn_finds_every_row() -> None:
    """It takes a rank's variance for that of the whole batch when it undoes Bessel's correction."""
    model = trained(2).train()
    theirs = copy.deepcopy(model)
    update_bn_stats(theirs, BATCHES, num_iters=4, progress=None)
    recalibrate(model, BATCHES)
    compare(model, theirs, 0.2)
    assert theirs[1].running_mean.shape == (2, 8)
    torch.testing.assert_close(theirs[1].running_mean, model[1].running_mean)


def compare(ours: Any, theirs: Any, tolerance: float) -> None:
    for name, value in ours.named_buffers():
        if value.is_floating_point():
            other = theirs.get_buffer(name)
            torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance)
