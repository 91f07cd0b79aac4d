from __future__ import annotations

import copy
import weakref
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from distbn_convert import DistBatchNorm1d, VirtualDistributedSampler
from distbn_convert.errors import ConfigurationError


def real_batches(
    length: int, batch_size: int, ranks: int, epoch: int, drop_last_batch: bool, **options: Any
) -> list[list[list[int]]]:
    """What each real process sees, batch by batch: [rank][batch][sample]."""
    seen = []
    for rank in range(ranks):
        sampler: Any = DistributedSampler(range(length), ranks, rank, **options)
        sampler.set_epoch(epoch)
        seen.append(list(BatchSampler(sampler, batch_size, drop_last_batch)))
    return seen


@given(
    length=st.integers(0, 90),
    batch_size=st.integers(1, 9),
    ranks=st.integers(1, 5),
    steps=st.integers(1, 3),
    replicas=st.integers(1, 3),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 99),
    flags=st.tuples(*[st.booleans()] * 4),
)
@settings(max_examples=400)
def test_every_rank_gets_what_its_own_process_would_get(
    length: int,
    batch_size: int,
    ranks: int,
    steps: int,
    replicas: int,
    epoch: int,
    seed: int,
    flags: tuple[bool, ...],
) -> None:
    shuffle, drop_last, drop_last_batch, interleaved = flags
    options = {"shuffle": shuffle, "seed": seed, "drop_last": drop_last}
    own = ranks * steps
    real = real_batches(length, batch_size, own * replicas, epoch, drop_last_batch, **options)
    for replica in range(replicas):
        sampler = VirtualDistributedSampler(
            range(length),
            batch_size,
            ranks,
            num_replicas=replicas,
            rank=replica,
            drop_last_batch=drop_last_batch,
            partition="interleaved" if interleaved else "contiguous",
            accumulation_steps=steps,
            **options,
        )
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(sampler) == len(batches) == steps * len(real[0])
        for index, batch in enumerate(batches):
            step, micro = divmod(index, steps)
            for rank in range(ranks):
                expected = real[replica * own + micro * ranks + rank][step]
                if interleaved:
                    assert batch[rank::ranks] == expected
                else:  # the layer cuts a contiguous batch as tensor_split does
                    share = torch.tensor(batch).tensor_split(ranks)[rank]
                    assert share.tolist() == expected


def test_an_interleaved_epoch_is_the_permutation_itself() -> None:
    sampler = VirtualDistributedSampler(range(50), 4, 3, seed=7, partition="interleaved")
    sampler.set_epoch(2)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(9)).tolist()
    assert [index for batch in sampler for index in batch] == order + order[:1]


@pytest.mark.parametrize("replicas", [1, 2])
def test_fewer_processes_with_larger_batches_deal_in_turn_to_interleaved_ranks(
    replicas: int,
) -> None:
    ranks = 3
    real = real_batches(54, 4, replicas * ranks, 1, False)
    fewer = real_batches(54, 4 * ranks, replicas, 1, False)
    for place, batches in enumerate(real):
        row, process = divmod(place, replicas)
        assert [batch[row::ranks] for batch in fewer[process]] == batches


def test_every_epoch_has_a_permutation_of_its_own() -> None:
    sampler = VirtualDistributedSampler(range(40), 5, 4)
    first = list(sampler)
    real = real_batches(40, 5, 4, 0, False)  # of the same defaults
    assert first == [list(chain(*shares)) for shares in zip(*real, strict=True)]
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_it_drives_a_data_loader() -> None:
    sampler = VirtualDistributedSampler(range(10), 2, 2, shuffle=False)
    loader = DataLoader(list(range(10)), batch_sampler=sampler)
    assert [batch.tolist() for batch in loader] == [[0, 2, 1, 3], [4, 6, 5, 7], [8, 9]]
    assert len(loader) == 3


@pytest.mark.parametrize("shuffle", [False, True])
def test_it_deals_alike_whatever_the_default_device(shuffle: bool) -> None:
    sampler = VirtualDistributedSampler(range(20), 2, 2, shuffle=shuffle)
    expected = list(sampler)
    with torch.device("meta"):
        assert list(sampler) == expected


def test_it_is_freed_at_once_and_a_copy_is_told_the_epoch() -> None:
    """With the data set, which may fill the memory."""
    sampler = VirtualDistributedSampler(range(40), 5, 4)
    copied: Any = copy.copy(sampler)
    assert copied.sampler is copied
    freed = weakref.ref(sampler)
    del sampler
    assert freed() is None


def test_one_made_before_the_processes_are_joined_finds_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by a script for Lightning's Trainer; each process dealt all that one alone would."""
    monkeypatch.setenv("WORLD_SIZE", "")  # tells of none
    early = VirtualDistributedSampler(range(40), 5, 2)
    assert (early.num_replicas, early.rank, len(early)) == (1, 0, 4)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        given = VirtualDistributedSampler(range(40), 5, 2, num_replicas=2, rank=1)
        assert (early.num_replicas, early.rank, len(early)) == (2, 1, 2)
        assert list(early) == list(given)
        late = VirtualDistributedSampler(range(40), 5, 2)
    finally:
        dist.destroy_process_group()
    assert list(early) == list(late) == list(given)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="WORLD_SIZE=2 .* call init_process_group first"):
        list(VirtualDistributedSampler(range(40), 5, 2))


def test_a_framework_tells_it_the_epoch() -> None:
    from lightning.fabric import Fabric

    sampler = VirtualDistributedSampler(range(40), 5, 4)
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(DataLoader(list(range(40)), batch_sampler=sampler))
    for epoch in range(2):
        seen = [batch.tolist() for batch in loader]
        sampler.set_epoch(epoch)
        assert seen == list(sampler)


def test_accelerate_loses_no_sample_of_the_last_batch() -> None:
    from accelerate import Accelerator

    accelerator, data = Accelerator(cpu=True), list(range(103))
    sampler = VirtualDistributedSampler(data, 4, 4, shuffle=False)
    loader = accelerator.prepare(DataLoader(data, batch_sampler=sampler))
    sizes = [len(accelerator.gather_for_metrics(batch)) for batch in loader]
    assert sizes == [16] * 6 + [7]  # of the last 8 one fills up, which it leaves out


def test_a_last_batch_too_small_for_batch_norm_is_refused_by_the_layer_as_ddp_refuses_it() -> None:
    sampler = VirtualDistributedSampler(range(18), 4, 2)
    sizes = [len(batch) for batch in sampler]
    assert sizes == [8, 8, 2]
    layer = DistBatchNorm1d(3, vt_world_size=2)
    with pytest.raises(ValueError, match="drop the last incomplete batch"):
        layer(torch.randn(sizes[-1], 3))
    sampler = VirtualDistributedSampler(range(18), 4, 2, drop_last_batch=True)
    assert [len(batch) for batch in sampler] == [8, 8]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 0}, "batch_size must be a positive int, but got 0; give the samples of on"),
        ({"batch_size": 2.0}, "batch_size must be a positive int, but got 2.0"),
        ({"vt_world_size": 0}, "vt_world_size must be a positive int, but got 0"),
        ({"accumulation_steps": 0}, "accumulation_steps must be .* 0; give the number of micro-s"),
        ({"num_replicas": 0}, "num_replicas must be a .* got 0; give the number of processes"),
        ({"partition": "chunk"}, "partition must be one of 'contiguous', 'interleaved', but got"),
        ({"rank": 1}, r"rank must be an int from 0 to 0 \(there are 1 processes\), but got 1"),
        ({"num_replicas": 2}, "expected a rank beside num_replicas=2, .* got None; pass both, or"),
        ({"num_replicas": 2, "rank": -1}, "rank must be an int from 0 to 1"),
        ({"num_replicas": 2, "rank": True}, "but got True"),
    ],
)
def test_arguments_outside_their_values_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        VirtualDistributedSampler(
            **{"dataset": range(9), "batch_size": 1, "vt_world_size": 2, **arguments}
        )
