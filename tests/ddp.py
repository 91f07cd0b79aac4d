"""A training run that is the same under real DistributedDataParallel and in one process."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from distbn_convert import convert_model

SAMPLES, EPOCHS, SHARE = 48, 2, 4  # SHARE: samples of one rank in one batch
State = dict[str, Tensor]
PRELOAD = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch.utils.data"]


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.BatchNorm2d(6, momentum=0.3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 10),
        nn.BatchNorm1d(10, eps=1e-3),
        nn.Linear(10, 5),
    ).double()


def make_data(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(samples, 3, 8, 8, generator=generator, dtype=torch.float64)
    scales = torch.rand(samples, 1, 1, 1, generator=generator, dtype=torch.float64) * 3
    return images * scales + scales, torch.randint(0, 5, (samples,), generator=generator)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)


def sampled(epoch: int, replicas: int, rank: int) -> list[int]:
    """The indices that DistributedSampler deals to one rank in one epoch."""
    sampler: Any = DistributedSampler(range(SAMPLES), replicas, rank, shuffle=True, seed=3)
    sampler.set_epoch(epoch)
    return list(sampler)


def train(model: nn.Module, batches: list[Tensor]) -> None:
    images, labels = make_data()
    optimizer = make_optimizer(model)
    for batch in batches:
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def wrap(model: nn.Module, *, broadcast: bool = False) -> nn.Module:
    """Wrap in DDP; without broadcast each process keeps statistics of its own."""
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, **{option: broadcast})


def spawn(function: Callable[..., Any], processes: int, folder: Path, *args: Any) -> list[Any]:
    """Call ``function(*args)`` in real processes over gloo; return what each one returned."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    arguments = (processes, str(folder), function, args)
    # A server that has imported torch once forks the processes: seconds instead of a minute.
    get_context("forkserver").set_forkserver_preload(PRELOAD)
    mp.start_processes(_worker, arguments, nprocs=processes, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pth") for rank in range(processes)]


def _worker(
    rank: int, processes: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
    )
    try:
        torch.save(function(*args), Path(folder) / f"{rank}.pth")
    finally:
        dist.destroy_process_group()


def _train_ddp(broadcast: bool) -> State:
    model = make_model()
    batches = [
        batch
        for epoch in range(EPOCHS)
        for batch in torch.tensor(sampled(epoch, dist.get_world_size(), dist.get_rank())).split(
            SHARE
        )
    ]
    train(wrap(model, broadcast=broadcast), batches)
    return model.state_dict()


def train_ddp(replicas: int, folder: Path, *, broadcast: bool) -> list[State]:
    """Train in real processes over gloo; return the state of each rank's model."""
    return spawn(_train_ddp, replicas, folder, broadcast)


def _train_pipeline(microbatches: int) -> State:
    model = convert_model(make_model(), 2, accumulation_steps=microbatches)
    here, images_and_labels = dist.get_rank(), make_data()
    part = (model[:4], model[4:])[here]
    stage = PipelineStage(part, here, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, microbatches, loss_fn=F.cross_entropy)
    optimizer = make_optimizer(part)
    for batch in rank_major_batches(2 * microbatches):
        images, labels = (tensor[batch] for tensor in images_and_labels)
        if here == 0:
            schedule.step(images)
        else:
            schedule.step(target=labels)
        optimizer.step()
        optimizer.zero_grad()
    return part.state_dict()


def train_pipeline(microbatches: int, folder: Path) -> list[State]:
    """Train in a pipeline of two processes, two virtual ranks to a microbatch."""
    return spawn(_train_pipeline, 2, folder, microbatches)


def dealt_batches(replicas: int) -> list[Tensor]:
    """The global batches in the order of the permutation, sample p for rank p mod replicas."""
    return [
        batch
        for epoch in range(EPOCHS)
        for batch in torch.tensor(sampled(epoch, 1, 0)).split(SHARE * replicas)
    ]


def rank_major_batches(replicas: int) -> list[Tensor]:
    """The same batches laid out rank after rank."""
    return [
        torch.cat(shares)
        for epoch in range(EPOCHS)
        for shares in zip(
            *(torch.tensor(sampled(epoch, replicas, r)).split(SHARE) for r in range(replicas)),
            strict=True,
        )
    ]
