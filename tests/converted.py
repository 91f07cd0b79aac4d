"""Models for the tests of conversion, and whether one was left alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Subclass(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )


def trained_net(steps: int = 2) -> nn.Sequential:
    model = small_net()
    for _ in range(steps):
        model(torch.randn(8, 3, 8, 8) * 2 + 1)
    return model


def snapshot(model: nn.Module) -> Any:
    """Everything that a refused conversion must leave alone."""
    return (
        [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()],
        [(name, id(parameter)) for name, parameter in model.named_parameters()],
        [(name, id(buffer), buffer.clone()) for name, buffer in model.named_buffers()],
    )


def assert_unchanged(model: nn.Module, before: Any) -> None:
    modules, parameters, buffers = snapshot(model)
    assert (modules, parameters) == before[:2]
    assert [entry[:2] for entry in buffers] == [entry[:2] for entry in before[2]]
    torch.testing.assert_close(
        [entry[2] for entry in buffers], [entry[2] for entry in before[2]], rtol=0, atol=0
    )
