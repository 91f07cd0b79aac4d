"""Checkpoints as training loops really write them, and the command line, for the tests."""

from __future__ import annotations

import argparse
import io
import json
import signal
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from distbn_convert import convert_model
from distbn_convert.checkpoint import convert_checkpoint, revert_checkpoint
from distbn_convert.checkpoint.allowed import allowed_globals
from distbn_convert.cli import main

from .zygote import STOPPING


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
    """By Lightning's own Trainer with EMAWeightAveraging: both sets of weights."""
    fit_lightning(path)
    return path


def fit_lightning(path: Path, resume: Path | None = None, ranks: int = 0) -> nn.Module:
    """Train with Lightning to the end of epoch 0, or epoch 1 when resumed, and save."""
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging
    from torch.utils.data import DataLoader, TensorDataset

    class Module(lightning.LightningModule):
        def __init__(self, lr: float = 0.05) -> None:
            super().__init__()
            self.save_hyperparameters()
            torch.manual_seed(1)
            self.model = convert_model(Net(), ranks) if ranks else Net()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    generator = torch.Generator().manual_seed(2)
    images = torch.randn(24, 3, 6, 6, generator=generator)
    data = TensorDataset(images, torch.arange(24) % 4)
    module = Module()
    with warnings.catch_warnings():  # Lightning's own, about torch's pytrees and the loader
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu",
            callbacks=[EMAWeightAveraging(decay=0.9)],
            default_root_dir=path.parent,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            logger=False,
            max_epochs=1 if resume is None else 2,
        )
        trainer.fit(module, DataLoader(data, batch_size=8), ckpt_path=resume, weights_only=True)
        trainer.save_checkpoint(path)
    return module.model


def run_accelerate(folder: Path, resume: Path | None = None, ranks: int = 0) -> nn.Module:
    """Train with accelerate and save its state; goes on from a state when resumed."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(1)
    model: Any = convert_model(Net(), ranks) if ranks else Net()
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    if resume is not None:
        accelerator.load_state(str(resume))
    train(model, optimizer, seed=1 if resume is None else 2)
    accelerator.save_state(str(folder))
    return model  # type: ignore[no-any-return]


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


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of each file in a folder and below."""
    files = path.rglob("*") if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


def resaved(path: Path) -> bytes:
    """What torch.load and torch.save alone make of a file, for byte-for-byte comparison."""
    file = io.BytesIO()
    with torch.serialization.safe_globals(allowed_globals()):
        torch.save(torch.load(path, map_location="cpu", weights_only=True), file)
    return file.getvalue()


def load(path: Path) -> Any:
    """Load a checkpoint that the tests made themselves."""
    return torch.load(path, map_location="cpu", weights_only=False)


def bn_state(channels: int = 3, **entries: Any) -> dict[str, torch.Tensor]:
    """The state dict of one BatchNorm under ``bn.``, with entries replaced or added."""
    state = {
        "bn.weight": torch.rand(channels),
        "bn.bias": torch.randn(channels),
        "bn.running_mean": torch.randn(channels),
        "bn.running_var": torch.rand(channels) + 0.1,
        "bn.num_batches_tracked": torch.tensor(7),
    }
    return state | entries


def save(tmp_path: Path, content: Any, name: str = "in.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def repickled(path: Path, old: bytes, new: bytes) -> Path:
    """Another file of torch.save, with bytes of its pickle replaced."""
    changed = path.with_name(f"repickled_{path.name}")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(changed, "w") as out:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            out.writestr(info.filename, data)
    return changed


def header_bytes(header: object, data: bytes = b"") -> bytes:
    """A file of safetensors with that header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: object = "U8", shape: object = (2,), offsets: object = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_index(
    folder: Path, weight_map: object, name: str = "model.safetensors.index.json", **more: object
) -> Path:
    """An index for shards that need not be there."""
    (folder / name).write_text(json.dumps({**more, "weight_map": weight_map}))
    return folder / name


def round_trip(path: Path, ranks: int = 8, **options: Any) -> Path:
    """Convert, revert; the results are beside the file, as virtual and back."""
    convert_checkpoint(path, path.with_name("virtual"), ranks, fsync=False, **options)
    revert_checkpoint(path.with_name("virtual"), path.with_name("back"), fsync=False, **options)
    return path.with_name("back")


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_cli(capsys: Any, *args: object) -> Result:
    """Run the command line in this process."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert isinstance(ended.value.code, int)
    captured = capsys.readouterr()
    return Result(ended.value.code, captured.out, captured.err)
