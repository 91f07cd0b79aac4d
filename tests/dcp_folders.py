"""Folders of torch.distributed.checkpoint, as a training loop saves them."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata

from distbn_convert.checkpoint.dcp import read_dcp, write_dcp
from distbn_convert.checkpoint.stores import WriteOptions

BN_KEYS = ("model.1.running_mean", "model.1.running_var", "model.1.num_batches_tracked")


def training_state(ranks: int | None = None) -> dict[str, Any]:
    """What a training loop saves: a model, its optimizer after a step, an epoch, arguments."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    state = model.state_dict()
    if ranks is not None:
        for key in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
            state[key] = state[key].expand(ranks, *state[key].shape).contiguous()
    return {"model": state, "optimizer": optimizer.state_dict(), "epoch": 3, "args": {"lr": 0.1}}


def save(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it takes this for a single process
        dcp.save(state, checkpoint_id=folder)


def virtual(state: dict[str, Any], ranks: int = 4) -> dict[str, Tensor]:
    model = state["model"]
    plain = {key: model[key.removeprefix("model.")] for key in BN_KEYS}
    return {key: t.expand(ranks, *t.shape).contiguous() for key, t in plain.items()}


def convert(src: Path, dst: Path, new: dict[str, Tensor], **options: Any) -> None:
    with write_dcp(read_dcp(src), dst, new, WriteOptions(**options)):
        pass


def records(folder: Path) -> metadata.Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def overwrite_records(folder: Path, value: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(value))


class Payload:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call
