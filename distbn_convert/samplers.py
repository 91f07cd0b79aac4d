"""The batches that many processes with DistributedSampler would see, for fewer processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sized

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from .checks import check_count, check_partition
from .errors import ConfigurationError

__all__ = ["VirtualDistributedSampler"]


class VirtualDistributedSampler(Sampler[list[int]]):
    """Deal a dataset to V virtual ranks as ``DistributedSampler`` deals it to V processes.

    A batch sampler: batch t holds, rank after rank, what each of the V processes would get as
    its batch t from ``DataLoader(dataset, batch_size, sampler=DistributedSampler(dataset, V,
    rank, shuffle, seed, drop_last), drop_last=drop_last_batch)``, in the same order. Under R
    processes each deals to its own V of the R * V ranks, process r to ranks rV to rV + V - 1.

    Args:
        dataset: **Sized**, the dataset or anything of its length.
        batch_size: **int**, samples of one virtual rank in one batch, as a process's own
            ``DataLoader`` counts them; a batch holds V times as many.
        vt_world_size: **int**, number of virtual ranks V.
        num_replicas: **int**, number of real processes R. Default: None, ``torch.distributed``'s
            world size, 1 if there is none; a sampler that is made before the processes are
            joined, as in a script for Lightning's Trainer, finds them when it is used
        rank: **int**, this process, 0 to R - 1. Default: None, ``torch.distributed``'s; needed
            beside ``num_replicas`` where there is none yet
        shuffle: **bool**, permute anew in each epoch. Default: True
        seed: **int**, of the permutation, the same in all processes. Default: 0
        drop_last: **bool**, ``DistributedSampler``'s: drop the tail of a dataset that does not
            divide by the ranks; else its first samples are repeated. Default: False
        drop_last_batch: **bool**, ``DataLoader``'s ``drop_last``: leave out a last batch of fewer
            than ``batch_size`` samples to a rank. Default: False
        partition: **str**, lay a batch out for layers with that partition: ``"contiguous"``
            (rank after rank) or ``"interleaved"`` (dealt in turn, which is the order of the
            permutation). Default: ``"contiguous"``
        accumulation_steps: **int**, A: each process stands for V * A ranks, and A batches in
            a row are one step, V ranks each. Default: 1

    Raises:
        ConfigurationError: an argument is outside its allowed values; or, in use, the environment
            tells of several processes (``WORLD_SIZE``) that ``torch.distributed`` has not joined.

    Note:
        Every rank gets the same number of samples in every batch, the last one too: it is
        smaller for all. So a mean over the batch is the mean of the ranks' means, which is what
        DDP's averaged gradients descend, and no loss needs weights.

        Call :meth:`set_epoch` before each epoch, as for ``DistributedSampler``. As in
        ``BatchSampler`` the attribute ``batch_size`` is the size of a whole batch.

        Leave the loader out of ``accelerate``'s ``prepare`` if there are several processes: it
        would deal each one's batches to all of them once more.

    Example::

        >>> sampler = VirtualDistributedSampler(range(10), 2, vt_world_size=2, shuffle=False)
        >>> list(sampler)
        [[0, 2, 1, 3], [4, 6, 5, 7], [8, 9]]
        >>> loader = DataLoader(dataset, batch_sampler=sampler, num_workers=8)
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        vt_world_size: int,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        drop_last_batch: bool = False,
        partition: str = "contiguous",
        accumulation_steps: int = 1,
    ) -> None:
        check_count(batch_size, "batch_size")
        check_count(vt_world_size)
        check_count(accumulation_steps, "accumulation_steps")
        check_partition(partition)
        self._place: tuple[int, int] | None = None
        if (num_replicas, rank) != (None, None) or _is_running():
            self._place = _replica(num_replicas, rank)
        self.dataset = dataset
        self.rank_batch_size = batch_size
        self.batch_size = batch_size * vt_world_size  # what frameworks take a batch to hold
        self.vt_world_size = vt_world_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.drop_last_batch = drop_last_batch
        self.partition = partition
        self.accumulation_steps = accumulation_steps
        self.epoch = 0

    @property
    def sampler(self) -> VirtualDistributedSampler:
        """Itself: where Lightning and others look for ``set_epoch``."""
        return self

    @property
    def num_replicas(self) -> int:
        """Real processes R."""
        return self._replica()[0]

    @property
    def rank(self) -> int:
        """This process, 0 to R - 1."""
        return self._replica()[1]

    @property
    def num_ranks(self) -> int:
        """All ranks of all processes: R * V * A."""
        return self.num_replicas * self.vt_world_size * self.accumulation_steps

    @property
    def num_samples(self) -> int:
        """Samples of one rank in one epoch."""
        whole, rest = divmod(len(self.dataset), self.num_ranks)
        return whole + bool(rest and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of that epoch, the same as in ``DistributedSampler``."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of one epoch."""
        whole, rest = divmod(self.num_samples, self.rank_batch_size)
        return (whole + bool(rest and not self.drop_last_batch)) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        rows, size = self._deal(), self.rank_batch_size
        for step in range(len(self) // self.accumulation_steps):
            samples = rows[:, step * size : (step + 1) * size]
            for share in samples.split(self.vt_world_size):
                yield (share.T if self.partition == "interleaved" else share).flatten().tolist()

    def _replica(self) -> tuple[int, int]:
        """Return R and r; there may have been no processes yet when this was made."""
        if self._place is not None:
            return self._place
        if _is_running():
            self._place = _replica(None, None)
            return self._place
        processes = os.getenv("WORLD_SIZE") or "1"
        if processes != "1":
            raise ConfigurationError(
                f"expected torch.distributed to be initialised, as WORLD_SIZE={processes} in the "
                "environment tells of several processes, but it is not; call init_process_group "
                "first, or pass num_replicas and rank."
            )
        return 1, 0

    def _deal(self) -> Tensor:
        """Return the samples of this process's ranks, ``int64 Tensor[V * A, num_samples]``."""
        order = torch.arange(len(self.dataset), device="cpu")
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.dataset), generator=generator, device="cpu")
        total = self.num_samples * self.num_ranks
        if total > len(order):
            order = order.repeat(-(-total // len(order)))
        dealt = order[:total].view(self.num_samples, self.num_ranks).T
        return dealt.tensor_split(self.num_replicas)[self.rank]


def _is_running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _replica(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """Return R and r, those of ``torch.distributed`` where None."""
    running = _is_running()
    if num_replicas is None:
        num_replicas = dist.get_world_size() if running else 1
    check_count(num_replicas, "num_replicas")
    if rank is None and not running and num_replicas > 1:
        raise ConfigurationError(
            f"expected a rank beside num_replicas={num_replicas}, as torch.distributed is not "
            "initialised to tell it, but got None; pass both, or leave both out to take "
            "torch.distributed's when the sampler is used."
        )
    if rank is None:
        rank = dist.get_rank() if running else 0
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < num_replicas:
        raise ConfigurationError(
            f"rank must be an int from 0 to {num_replicas - 1} (there are {num_replicas} "
            f"processes), but got {rank!r}; leave both out to take torch.distributed's."
        )
    return num_replicas, rank
