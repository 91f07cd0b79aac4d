"""Virtual ranks against real ones: DistributedDataParallel in several processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distbn_convert import convert_model

from . import ddp

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ddp")]
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module", params=[2, 4], ids=lambda n: f"{n} processes")
def replicas(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["broadcast", "no broadcast"])
def real(
    request: pytest.FixtureRequest, replicas: int, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, list[ddp.State]]:
    folder = tmp_path_factory.mktemp("ddp")
    return request.param, ddp.train_ddp(replicas, folder, broadcast=request.param)


def largest_difference(model: nn.Module, state: ddp.State) -> float:
    """Largest absolute difference of the learnable parameters."""
    pairs = ((value.detach(), state[name]) for name, value in model.named_parameters())
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs)


@pytest.mark.parametrize("partition", ["interleaved", "contiguous"])
def test_one_process_with_virtual_ranks_equals_ddp(
    real: tuple[bool, list[ddp.State]], replicas: int, partition: str
) -> None:
    broadcast, states = real
    model = convert_model(ddp.make_model(), replicas, partition=partition)
    interleaved = partition == "interleaved"
    batches = ddp.dealt_batches(replicas) if interleaved else ddp.rank_major_batches(replicas)
    assert len(batches) >= 6
    ddp.train(model, batches)

    assert largest_difference(model, states[0]) < 1e-12
    ours = {name: value for name, value in model.state_dict().items() if name.endswith(BUFFERS)}
    assert len(ours) == 9
    for name, rows in ours.items():
        torch.testing.assert_close(rows[0], states[0][name], rtol=1e-12, atol=1e-13)
        if not broadcast:  # then the ranks are independent chains, like the rows
            real_rows = torch.stack([state[name] for state in states])
            torch.testing.assert_close(rows, real_rows, rtol=1e-12, atol=1e-13)
        if name.endswith("running_mean"):
            assert (rows[0] - rows[1]).abs().max() > 1e-3  # not synchronised


def test_plain_batch_norm_and_the_wrong_partition_differ(
    real: tuple[bool, list[ddp.State]], replicas: int
) -> None:
    """Without this the test above could pass for any normalisation."""
    _, states = real
    plain = ddp.make_model()
    ddp.train(plain, ddp.dealt_batches(replicas))
    assert largest_difference(plain, states[0]) > 1e-2
    wrong = convert_model(ddp.make_model(), replicas, partition="contiguous")
    ddp.train(wrong, ddp.dealt_batches(replicas))
    assert largest_difference(wrong, states[0]) > 1e-2


def test_microbatches_of_a_pipeline_are_micro_steps(tmp_path: Path) -> None:
    model = convert_model(ddp.make_model(), 4)
    ddp.train(model, ddp.rank_major_batches(4))
    first, second = ddp.train_pipeline(2, tmp_path)
    torch.testing.assert_close({**first, **second}, dict(model.state_dict()), rtol=0, atol=1e-12)
