"""ResNet-50 in plain torch, so that a GPU machine needs nothing else, and how it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distbn_convert import convert_model, kernels
from distbn_convert.kernels import reference

Activation = Callable[[], nn.Module]
RELU: Activation = partial(nn.ReLU, inplace=True)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation()
        outputs = 4 * width
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            activation(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            activation(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.activation(self.layers(input) + self.shortcut(input))
        return output


def resnet50(num_classes: int = 1000, activation: Activation = RELU) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        activation(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1, activation))
            inputs = 4 * width
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes)]
    return nn.Sequential(*layers, *head)


def check_step(device: str, channels_last: bool) -> None:
    """A step of training is as near to float64's as the definition's in float32 is.

    53 batch norms amplify rounding, so that neither is near to the other. Without ReLUs: one that
    rounding turns on or off is an error of another size, in the last layers more than all others.
    """
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = convert_model(resnet50(activation=nn.SiLU), 4).to(device).to(memory_format=layout)
    images = torch.randn(16, 3, 64, 64, device=device).to(memory_format=layout)
    labels = torch.randint(0, 1000, (16,), device=device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours = _step(model, images, labels)
        backends, kernels._BACKENDS = kernels._BACKENDS, (reference,)
        try:
            theirs = _step(model, images, labels)
            truth = _step(copy.deepcopy(model).double(), images.double(), labels)
        finally:
            kernels._BACKENDS = backends
    for name, exact in truth.items():
        error, allowed = ((step[name] - exact).norm() for step in (ours, theirs))
        assert error <= 3 * allowed + 1e-3 * exact.norm() + 1e-6, name


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Everything that a step computes and writes, by name; the model stays as it was."""
    twin = copy.deepcopy(model)
    loss = F.cross_entropy(twin(images), labels)
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in twin.named_parameters()}
    results = {"loss": loss.detach(), **gradients, **dict(twin.named_buffers())}
    return {name: result.double() for name, result in results.items() if result is not None}


def check_autocast(device: str) -> None:
    """Some steps in bfloat16 autocast learn a batch by heart."""
    torch.manual_seed(0)
    model = convert_model(resnet50(10), 4).to(device).to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 64, 64, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (16,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    losses = []
    for _ in range(10):
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
