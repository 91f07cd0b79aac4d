"""What each real process does in tests/test_sync.py; apart, so that processes can import it."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from distbn_convert import convert_model, revert_model, sync_running_stats
from distbn_convert.errors import ConfigurationError

from . import ddp, loaders

WORDS = [("mean", 0), ("pooled", 0), ("select", 1)]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def trained(ranks: int) -> nn.Module:
    """A model with statistics of its own in each process, of several dtypes; one layer plain."""
    model = convert_model(ddp.make_model(), ranks, filter_fn=lambda _, name: name != "4")
    torch.manual_seed(dist.get_rank())
    for steps in range(dist.get_rank() + 1):
        model(torch.randn(2 * ranks, 3, 8, 8, dtype=torch.float64) * (steps + 1))
    model[1].float()
    return model


def statistics(model: nn.Module) -> ddp.State:
    return {k: v.clone() for k, v in model.state_dict().items() if k.endswith(STATISTICS)}


def reduce_in_every_way(ranks: int) -> dict[str, Any]:
    """Synchronise and revert copies of one model by each word; count the collectives.

    One takes the rows, and two what they are: torch gathers an object's size first.
    """
    model = trained(ranks)
    result: dict[str, Any] = {"before": statistics(model)}
    for reduction, rank in WORDS:
        synced, reverted = copy.deepcopy(model), copy.deepcopy(model)
        with CommDebugMode() as counter:
            sync_running_stats(synced, reduction=reduction, rank=rank)
        assert counter.get_total_counts() == 3, counter.get_comm_counts()
        with CommDebugMode() as counter:
            revert_model(reverted, reduction, rank, process_group=dist.group.WORLD)
        assert counter.get_total_counts() == 3, counter.get_comm_counts()
        result[f"{reduction} {rank}"] = statistics(synced), statistics(reverted)
    last = revert_model(
        copy.deepcopy(model), "select", 2 * ranks - 1, process_group=dist.group.WORLD
    )
    result["last"] = statistics(last)
    with CommDebugMode() as counter:
        revert_model(copy.deepcopy(model))
    assert counter.get_total_counts() == 0
    result["groups"] = groups(model)
    result["differing"] = differing()
    return result


def groups(model: nn.Module) -> list[str]:
    """A group of one process reduces alone; a process outside it is told so."""
    alone = dist.new_group([0])
    messages = []
    for function in (sync_running_stats, revert_model):
        mine = copy.deepcopy(model)
        try:
            function(mine, process_group=alone)
        except ConfigurationError as error:
            messages.append(str(error))
    return messages


def differing() -> list[str]:
    """What is said of models that are others in the second process."""
    here = dist.get_rank()
    messages = []
    last = partial(sync_running_stats, reduction="select", rank=4)  # which the second one has
    revert = partial(revert_model, process_group=dist.group.WORLD)
    select = partial(revert, reduction="select", rank=4)
    for function, model in (
        (sync_running_stats, convert_model(nn.BatchNorm1d(3), 2 + here)),
        (
            sync_running_stats,
            nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(5) if here else nn.Identity()),
        ),
        (sync_running_stats, nn.BatchNorm1d(3, track_running_stats=not here)),
        (last, convert_model(nn.BatchNorm1d(3), 2 + here)),
        (select, convert_model(nn.BatchNorm1d(3), 2 + here)),
        (revert, convert_model(nn.BatchNorm1d(3), 2) if here else nn.BatchNorm1d(3)),
    ):
        before = copy.deepcopy(model.state_dict())
        try:
            function(model)
        except ConfigurationError as error:
            messages.append(str(error))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return messages


def save_sharded(folder: str, sync: bool) -> tuple[ddp.State, ddp.State]:
    """Save with torch.distributed.checkpoint under FSDP2; return own and loaded statistics."""
    model = convert_model(ddp.make_model(), 2)
    torch.manual_seed(dist.get_rank())
    model(torch.randn(8, 3, 8, 8, dtype=torch.float64))
    loaders.shard(model)
    if sync:
        sync_running_stats(model)
    dcp.save(model.state_dict(), checkpoint_id=folder)
    own = statistics(model)
    loaded = model.state_dict()
    dcp.load(loaded, checkpoint_id=folder)
    return own, {name: loaded[name].clone() for name in own}
