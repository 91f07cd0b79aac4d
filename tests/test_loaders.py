"""Whole epochs, data loading included: one process against real DDP, and R x V against R * V."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distbn_convert import VirtualDistributedSampler, convert_model

from . import ddp, loaders

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp")]
ROWS = ("running_mean", "running_var", "num_batches_tracked")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def train_here(ranks: int, *, steps: int = 1, share: int = ddp.SHARE, **options: Any) -> nn.Module:
    """Train in this process with worker processes that load the data."""
    model = convert_model(ddp.make_model(), ranks, accumulation_steps=steps, **options)
    sampler = VirtualDistributedSampler(
        range(loaders.SAMPLES), share, ranks, seed=3, accumulation_steps=steps, **options
    )
    loader = loaders.make_loader(
        sampler, num_workers=2, persistent_workers=True, multiprocessing_context="forkserver"
    )
    loaders.train(model, loader, sampler, steps)
    return model


def assert_same(ours: ddp.State, theirs: list[ddp.State]) -> None:
    """Compare the weights, and each of our rows with the rows of the processes in order."""
    compared = 0
    for name, value in ours.items():
        if name.endswith(ROWS):
            rows = [state[name] for state in theirs]
            expected = torch.cat(rows) if rows[0].dim() == value.dim() else torch.stack(rows)
            if name.endswith("running_var"):
                assert (value[0] - value[-1]).abs().max() > 1e-3  # not synchronised
            torch.testing.assert_close(value, expected, **CLOSE)
            compared += 1
        else:
            for state in theirs:
                torch.testing.assert_close(value, state[name], **CLOSE)
    assert compared == 9


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory: pytest.TempPathFactory) -> list[ddp.State]:
    return loaders.train_processes(4, tmp_path_factory.mktemp("real"))


@pytest.mark.parametrize("partition", ["contiguous", "interleaved"])
def test_one_process_equals_ddp_over_whole_epochs(
    four_processes: list[ddp.State], partition: str
) -> None:
    assert_same(train_here(4, partition=partition).state_dict(), four_processes)


def test_two_micro_steps_of_two_ranks_equal_four_processes(
    four_processes: list[ddp.State],
) -> None:
    assert_same(train_here(2, steps=2).state_dict(), four_processes)


NEEDS_GPU = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of this torch needs a GPU"
)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=NEEDS_GPU)])
def test_two_processes_with_two_ranks_each_equal_four_processes_and_one(
    four_processes: list[ddp.State], engine: str, tmp_path: Any
) -> None:
    two = loaders.train_processes(2, tmp_path, engine=engine, ranks=2)
    for name, value in train_here(4).state_dict().items():
        joined = torch.cat([state[name] for state in two]) if name.endswith(ROWS) else two[1][name]
        torch.testing.assert_close(joined, value, **CLOSE)
    real = {
        name: torch.stack([state[name] for state in four_processes])
        if name.endswith(ROWS)
        else value
        for name, value in four_processes[0].items()
    }
    split = [
        {n: v.tensor_split(2)[r] if n.endswith(ROWS) else v for n, v in real.items()}
        for r in range(2)
    ]
    for ours, expected in zip(two, split, strict=True):
        torch.testing.assert_close(dict(ours), expected, **CLOSE)


def test_four_micro_steps_of_two_ranks_equal_eight_processes(tmp_path: Any) -> None:
    eight = loaders.train_processes(8, tmp_path, share=2)
    assert_same(train_here(2, steps=4, share=2).state_dict(), eight)
