"""Checkpoints as training loops really write them, and the command line, for the tests."""

from __future__ import annotations

import argparse
import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from distbn_convert.checkpoint.allowed import allowed_globals
from distbn_convert.cli import main


class Net(nn.Module):
    """A small residual network: BatchNorms with and without affine, a downsample, a 1d one."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv1_BN = nn.BatchNorm2d(width, eps=1e-3)
        self.downsample = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width, affine=False))
        self.norm = nn.GroupNorm(1, width)
        self.fc = nn.Linear(width, 4)
        self.head = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1_BN(self.conv1(x)) + self.downsample(x)
        return self.head(self.fc(self.norm(x.relu()).mean((2, 3))))


BATCH_NORMS = 3  # of Net


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 1
) -> list[float]:
    """A plain training loop on random images; returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    for _ in range(steps):
        images = torch.randn(8, 3, 6, 6, generator=generator)
        labels = torch.randint(0, 4, (8,), generator=generator)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def torchvision_style(path: Path) -> Path:
    """As references/classification/train.py saves."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    ema = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    for epoch in range(2):
        train(model, optimizer, seed=epoch)
        ema.update_parameters(model)
        scheduler.step()
    args = argparse.Namespace(model="net", lr=0.05, sync_bn=False, data_path=Path("data"))
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "epoch": 1,
        "args": args,
        "model_ema": ema.state_dict(),
        "scaler": torch.amp.GradScaler("cpu", enabled=False).state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(checkpoint, path)
    return path


def timm_style(path: Path) -> Path:
    """By timm's own CheckpointSaver, with an EMA and a metric that is a numpy scalar."""
    import numpy
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ema = ModelEmaV3(model)
    train(model, optimizer)
    ema.update(model)
    saver = CheckpointSaver(
        model,
        optimizer,
        args=argparse.Namespace(model="net", lr=0.05),
        model_ema=ema,
        checkpoint_dir=str(path.parent),
    )
    saver._save(str(path), epoch=1, metric=numpy.float64(71.5))
    return path


def lightning_style(path: Path) -> Path:
    """The layout of Lightning 2.6 with EMAWeightAveraging: both sets of weights."""
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer)
    live = model.state_dict()
    for key in list(live):
        live[f"model.{key}"] = live.pop(key)
    averaged = {key: value.clone() * 2 for key, value in live.items()}
    checkpoint = {
        "epoch": 0,
        "global_step": 3,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": averaged,
        "current_model_state": live,
        "averaging_state": {"n_averaged": torch.tensor(1)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "", "k": {}}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
    }
    torch.save(checkpoint, path)
    return path


def moco_style(path: Path) -> Path:
    """Two encoders in one state dict, under module."""
    state = nn.ModuleDict({"encoder_q": Net(), "encoder_k": Net()}).state_dict(prefix="module.")
    state["module.queue"] = torch.randn(4, 16)
    torch.save({"epoch": 3, "arch": "net", "state_dict": state}, path)
    return path


STYLES: dict[str, Callable[[Path], Path]] = {
    "torchvision": torchvision_style,
    "timm": timm_style,
    "lightning": lightning_style,
    "moco": moco_style,
}


def resaved(path: Path) -> bytes:
    """What torch.load and torch.save alone make of a file, for byte-for-byte comparison."""
    file = io.BytesIO()
    with torch.serialization.safe_globals(allowed_globals()):
        torch.save(torch.load(path, map_location="cpu", weights_only=True), file)
    return file.getvalue()


def load(path: Path) -> Any:
    """Load a checkpoint that the tests made themselves."""
    return torch.load(path, map_location="cpu", weights_only=False)


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_cli(capsys: Any, *args: object) -> Result:
    """Run the command line in this process."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert isinstance(ended.value.code, int)
    captured = capsys.readouterr()
    return Result(ended.value.code, captured.out, captured.err)
