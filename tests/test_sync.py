"""Statistics over real and virtual ranks together, in one process and in several."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distbn_convert import convert_model, revert_model, sync_running_stats
from distbn_convert.errors import ConfigurationError, ConversionError
from distbn_convert.replicas import reduce_count, reduce_statistics

from . import ddp, synced

PROCESSES, RANKS = 2, 2


def one_model() -> nn.Module:
    model = convert_model(ddp.make_model(), 3, filter_fn=lambda _, name: name != "4")
    for _ in range(2):
        model(torch.randn(9, 3, 8, 8, dtype=torch.float64))
    return model


@pytest.mark.parametrize("reduction", ["mean", "pooled", "select"])
def test_one_process_gives_every_rank_what_revert_would_keep(reduction: str) -> None:
    model = one_model()
    reverted = revert_model(copy.deepcopy(model), reduction, 1)
    buffers = dict(model.named_buffers())
    plain = copy.deepcopy(model[4].state_dict())
    sync_running_stats(model, reduction, 1)  # in the order of revert_model
    for name, value in reverted.named_buffers():
        assert torch.equal(buffers[name], value.expand_as(buffers[name]))  # the same tensors
    assert all(torch.equal(value, plain[name]) for name, value in model[4].state_dict().items())
    assert torch.equal(
        revert_model(model)[1].running_var, reverted[1].running_var
    )  # whatever is asked for later


def test_training_goes_on_with_the_same_weights() -> None:
    model, twin = one_model(), one_model()
    twin.load_state_dict(model.state_dict())
    sync_running_stats(model)
    for net in (model, twin):
        torch.manual_seed(5)
        ddp.train(net, [torch.randint(0, 48, (12,)) for _ in range(3)])
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_sync_between_micro_steps_does_not_lose_the_micro_step() -> None:
    layer = convert_model(nn.BatchNorm2d(3), 2, accumulation_steps=2)
    layer(torch.randn(4, 3, 2, 2))
    sync_running_stats(layer)
    assert layer.num_batches_tracked.tolist() == [1, 1, 0, 0]
    layer(torch.randn(4, 3, 2, 2))
    assert layer.num_batches_tracked.tolist() == [1, 1, 1, 1]


def test_layers_that_count_no_batches_are_reduced() -> None:
    layer = convert_model(nn.BatchNorm2d(3), 2)
    layer.num_batches_tracked = None
    layer(torch.randn(4, 3, 2, 2))
    mean = layer.running_mean.mean(0)
    sync_running_stats(layer)
    torch.testing.assert_close(layer.running_mean, mean.expand(2, 3))
    assert layer.num_batches_tracked is None


def test_a_model_without_statistics_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.GroupNorm(1, 3))
    model.append(convert_model(nn.BatchNorm1d(3, track_running_stats=False), 2))
    sync_running_stats(model)


def test_what_cannot_be_reduced_is_refused_and_nothing_changes() -> None:
    model = one_model()
    before = copy.deepcopy(model.state_dict())
    for any_model in (model, nn.Linear(2, 2)):
        with pytest.raises(ConfigurationError, match="reduction must be one of"):
            sync_running_stats(any_model, "average")
    with pytest.raises(ConfigurationError, match=r"rank must be an int from 0 to 0 .*but got 1"):
        sync_running_stats(nn.BatchNorm1d(2), reduction="select", rank=1)
    model[1].half().running_mean[0] = 6e4
    model[1].running_mean[1] = -6e4
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConversionError, match="the pooled running_var of the ranks is too large"):
        sync_running_stats(model, reduction="pooled")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sync")
    return ddp.spawn(synced.reduce_in_every_way, PROCESSES, folder, RANKS)


def stacked(processes: list[dict[str, Any]], name: str) -> torch.Tensor:
    """The rows of all processes; one of each for a plain layer."""
    rows = [process["before"][name] for process in processes]
    converted = not name.startswith("4.")
    return torch.cat(rows) if converted else torch.stack(rows)


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize(("reduction", "rank"), synced.WORDS)
def test_processes_and_ranks_are_reduced_as_one_stack_of_rows(
    processes: list[dict[str, Any]], reduction: str, rank: int
) -> None:
    for layer in ("1", "4", "8"):
        mean, var, count = (stacked(processes, f"{layer}.{name}") for name in synced.STATISTICS)
        assert len(mean) == (PROCESSES if layer == "4" else PROCESSES * RANKS)
        assert (mean[0] - mean[-1]).abs().max() > 1e-3
        row = rank // RANKS if layer == "4" else rank
        expected = reduce_statistics(mean, var, reduction, row)
        for process in processes:
            now, reverted = process[f"{reduction} {rank}"]
            for name, value in zip(synced.STATISTICS, expected, strict=False):
                key = f"{layer}.{name}"
                assert torch.equal(now[key], value.expand_as(now[key]))
                if layer != "4":
                    assert torch.equal(reverted[key], value)
            assert now[f"{layer}.num_batches_tracked"].unique().item() == PROCESSES
            if layer != "4":
                kept = reverted[f"{layer}.num_batches_tracked"]
                assert kept == reduce_count(count, reduction, rank)


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
def test_select_counts_ranks_through_the_processes(processes: list[dict[str, Any]]) -> None:
    for process in processes:
        for layer in ("1", "8"):
            for name in synced.STATISTICS:
                key = f"{layer}.{name}"
                assert torch.equal(process["last"][key], stacked(processes, key)[-1])


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
def test_a_process_outside_the_group_is_told_so(processes: list[dict[str, Any]]) -> None:
    assert processes[0]["groups"] == []
    assert len(processes[1]["groups"]) == 2
    assert "expected a process_group that this process belongs to" in processes[1]["groups"][0]


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
def test_models_that_differ_are_refused_in_every_process(processes: list[dict[str, Any]]) -> None:
    """Their numbers were mixed, or the processes waited for each other without end."""
    assert processes[0]["differing"] == processes[1]["differing"]
    where = "tensor {} is {} in process 0 and {} in process 1; make the same model"
    ranks = where.format(0, "(2, 3) of torch.float32", "(3, 3) of torch.float32")
    expected = [
        ranks,
        where.format(3, "missing", "(1, 5) of torch.float32"),
        where.format(0, "(1, 3) of torch.float32", "missing"),
        ranks,
        ranks,
        where.format(0, "missing", "(2, 3) of torch.float32"),
    ]
    for message, text in zip(processes[0]["differing"], expected, strict=True):
        assert text in message


@pytest.mark.slow
@pytest.mark.xdist_group("ddp")
@pytest.mark.parametrize("sync", [False, True], ids=["alone", "synchronised"])
def test_sharded_checkpoints_mix_the_statistics_of_processes_unless_synchronised(
    tmp_path: Path, sync: bool
) -> None:
    """Without the call a layer's mean and variance come from different processes."""
    folder = tmp_path / "dcp"
    results = ddp.spawn(synced.save_sharded, 3, tmp_path, str(folder), sync)
    owns, loaded = [own for own, _ in results], results[0][1]
    sources = {
        name: {rank for rank, own in enumerate(owns) if torch.equal(own[name], value)}
        for name, value in loaded.items()
    }
    assert all(sources.values())
    if sync:
        assert set(map(frozenset, sources.values())) == {frozenset(range(3))}
    else:
        layers = [(sources[f"{n}.running_mean"], sources[f"{n}.running_var"]) for n in (1, 4, 8)]
        assert any(mean.isdisjoint(var) for mean, var in layers), layers
