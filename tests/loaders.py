"""Whole epochs through DataLoader: R real processes with V virtual ranks, A micro-steps each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from distbn_convert import VirtualDistributedSampler, convert_model

from . import ddp

# Not a multiple of any number of ranks here: padding, and a last batch of 3 (4 ranks) or 2 (8).
SAMPLES = 42


def make_loader(sampler: Any, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*ddp.make_data(SAMPLES)), batch_sampler=sampler, **options)


def real_loader(share: int) -> DataLoader[Any]:
    """What a user of DDP writes."""
    dataset = TensorDataset(*ddp.make_data(SAMPLES))
    sampler: Any = DistributedSampler(dataset, seed=3)
    return DataLoader(dataset, share, sampler=sampler)


def train(model: nn.Module, loader: DataLoader[Any], sampler: Any, steps: int = 1) -> None:
    """Train whole epochs, ``steps`` micro-steps to a step."""
    optimizer = ddp.make_optimizer(model)
    for epoch in range(ddp.EPOCHS):
        sampler.set_epoch(epoch)
        for index, (images, labels) in enumerate(loader):
            (F.cross_entropy(model(images), labels) / steps).backward()
            if (index + 1) % steps == 0:
                optimizer.step()
                optimizer.zero_grad()


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in model:
        if list(child.parameters()):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_process(engine: str, ranks: int, share: int) -> ddp.State:
    """Train in this process: plain layers and DistributedSampler, or V virtual ranks and ours."""
    model = ddp.make_model()
    if ranks:
        convert_model(model, ranks)
        sampler: Any = VirtualDistributedSampler(range(SAMPLES), share, ranks, seed=3)
        loader = make_loader(sampler)
    else:
        loader = real_loader(share)
        sampler = loader.sampler
    train(ddp.wrap(model) if engine == "ddp" else shard(model), loader, sampler)
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    )


def train_processes(
    processes: int, folder: Path, *, engine: str = "ddp", ranks: int = 0, share: int = ddp.SHARE
) -> list[ddp.State]:
    """Train in real processes; ranks 0 means plain BatchNorm, for the reference."""
    return ddp.spawn(train_process, processes, folder, engine, ranks, share)
