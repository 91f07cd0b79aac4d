"""A Lightning callback: one device of the Trainer stands for V."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from ..convert import convert_model, revert_model
from ..errors import ConfigurationError
from ..layers import DistBatchNormMixin
from ..samplers import VirtualDistributedSampler
from ..sync import running_statistics

__all__ = ["VirtualRanks"]


class VirtualRanks(Callback):
    """Train a LightningModule as V devices under Lightning's DDP would.

    At setup the module is converted. When fitting starts, each ``DataLoader`` for training that
    counts samples (no batch sampler of yours) is dealt by
    :class:`~distbn_convert.VirtualDistributedSampler`, as Lightning gives loaders a
    ``DistributedSampler`` under DDP: ``batch_size`` is then that of one virtual rank, so that a
    script for V devices runs unchanged on one. Checkpoints hold the rows of all ranks.

    Args:
        vt_world_size: **int**, number of virtual ranks V.
        sampler: **bool**, deal the training data; else the loader's batches are cut into V as
            they are. Default: True
        **options: for :func:`~distbn_convert.convert_model`.

    Raises:
        ConfigurationError: a training loader has a sampler whose order cannot be dealt.
        ConversionError: as :func:`~distbn_convert.convert_model`, when the Trainer starts.

    Note:
        Build the layers in the module's ``__init__``: ``configure_model`` runs after the
        conversion. The seed is Lightning's (``seed_everything``), else 0, as under its DDP.
        With several processes pass ``use_distributed_sampler=False`` to the Trainer.

    Example::

        >>> ranks = VirtualRanks(8)
        >>> Trainer(devices=1, callbacks=[ranks]).fit(module, DataLoader(data, 32, shuffle=True))
        >>> with ranks.reverted(module):
        ...     module.to_onnx("model.onnx", sample)
    """

    def __init__(self, vt_world_size: int, *, sampler: bool = True, **options: Any) -> None:
        self.vt_world_size, self.sampler, self.options = vt_world_size, sampler, options

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the module before checkpoints are loaded and before it is wrapped."""
        convert_model(pl_module, self.vt_world_size, **self.options)
        if stage == "fit" and self.sampler:
            source = trainer.fit_loop._data_source
            loaders = source.dataloader
            source.dataloader = lambda: tree_map_only(DataLoader, self.deal, loaders())  # type: ignore[method-assign]

    def deal(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """Return the same loader with the batches of V ranks."""
        batches = loader.batch_sampler
        if isinstance(batches, VirtualDistributedSampler):
            return loader
        order = type(loader.sampler)
        plain = type(batches) is torch.utils.data.BatchSampler
        if not plain or order not in (RandomSampler, SequentialSampler):
            name = order.__name__ if plain else type(batches).__name__
            raise ConfigurationError(
                "expected a DataLoader with shuffle=True or False, but its samples come from "
                f"{name}, whose order cannot be dealt to virtual ranks; give the loader a "
                "VirtualDistributedSampler as batch_sampler, or pass sampler=False."
            )
        sampler: Any = VirtualDistributedSampler(
            loader.dataset,  # type: ignore[arg-type]
            loader.batch_size,  # type: ignore[arg-type]
            self.vt_world_size,
            shuffle=order is RandomSampler,
            seed=int(os.getenv("PL_GLOBAL_SEED", "0")),
            drop_last_batch=loader.drop_last,
            partition=self.options.get("partition", "contiguous"),
            accumulation_steps=self.options.get("accumulation_steps", 1),
        )
        sampler.sampler = sampler  # Lightning looks for set_epoch at batch_sampler.sampler
        return DataLoader(
            loader.dataset,
            batch_sampler=sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    @contextmanager
    def reverted(
        self, pl_module: LightningModule, reduction: str = "mean", rank: int = 0
    ) -> Iterator[LightningModule]:
        """Make the module plain for an export; afterwards it has its ranks again.

        Args:
            pl_module: **LightningModule**, converted.
            reduction: as in :func:`~distbn_convert.revert_model`. Default: ``"mean"``
            rank: as there. Default: 0
        """
        rows = {
            module: {name: buffer.clone() for name, buffer in running_statistics(module).items()}
            for module in pl_module.modules()
            if isinstance(module, DistBatchNormMixin)
        }
        revert_model(pl_module, reduction, rank)
        try:
            yield pl_module
        finally:
            convert_model(pl_module, self.vt_world_size, **self.options)
            for module, saved in rows.items():
                for name, buffer in saved.items():
                    getattr(module, name).copy_(buffer)
