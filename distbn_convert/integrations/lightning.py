"""A Lightning callback: one device of the Trainer stands for V."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.strategies import launchers
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from ..convert import convert_model, revert_model
from ..errors import ConfigurationError
from ..layers import DistBatchNormMixin, RankSettings
from ..plan import plan_conversion
from ..samplers import VirtualDistributedSampler
from ..sync import running_statistics

__all__ = ["VirtualRanks"]


class VirtualRanks(Callback):
    """Train a LightningModule as V devices under Lightning's DDP would.

    At setup the module is converted. When fitting starts, each ``DataLoader`` for training that
    counts samples (no batch sampler of yours), also in a dict, a list or a ``CombinedLoader``, is
    dealt by :class:`~distbn_convert.VirtualDistributedSampler`, as Lightning gives loaders a
    ``DistributedSampler`` under DDP: ``batch_size`` is then that of one virtual rank, so that a
    script for V devices runs unchanged on one. Checkpoints hold the rows of all ranks.

    Args:
        vt_world_size: **int**, number of virtual ranks V.
        sampler: **bool**, deal the training data; else the loader's batches are cut into V as
            they are. Default: True
        **options: for :func:`~distbn_convert.convert_model`.

    Raises:
        ConfigurationError: a training loader has a sampler whose order cannot be dealt, or a
            ``VirtualDistributedSampler`` for other ranks; the Trainer steps before all
            ``accumulation_steps`` are done; or it forks or spawns processes to fit a module that is
            not converted.
        ConversionError: as :func:`~distbn_convert.convert_model`, when the Trainer starts.

    Note:
        Build the layers in the module's ``__init__``: ``configure_model`` runs after the
        conversion. The seed is Lightning's (``seed_everything``), else 0, as under its DDP.
        With several processes pass ``use_distributed_sampler=False`` to the Trainer; where it forks
        or spawns them, as in a notebook, call :func:`~distbn_convert.convert_model` yourself before
        ``fit``. ``load_from_checkpoint`` makes a plain module: give it what ``distbn-convert
        revert`` makes of the checkpoint. Lightning's ``WeightAveraging`` may come before or after;
        put this callback before one of yours that copies the module in its ``setup``.

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
        forking = getattr(launchers, "_MultiProcessingLauncher", ())  # a private name
        if stage == "fit" and isinstance(trainer.strategy.launcher, forking):
            self._raise_unless_converted(pl_module)
        convert_model(pl_module, self.vt_world_size, **self.options)
        averaging = getattr(callbacks, "WeightAveraging", ())  # older Lightnings have none
        others: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in takewhile(lambda other: other is not self, others):
            if isinstance(callback, averaging):  # it has copied the module without ranks
                callback.setup(trainer, pl_module, stage)
        if self.sampler:
            self._deal_for(trainer)

    def _raise_unless_converted(self, pl_module: LightningModule) -> None:
        """Refuse to convert a copy of the module, which the first process is to have the state of.

        Lightning loads it there after training, into what is still plain.
        """
        if plan_conversion(pl_module, self.vt_world_size, **self.options).of("convert"):
            raise ConfigurationError(
                "expected a module with virtual ranks, as this Trainer forks or spawns processes "
                "and loads what they trained into the module that it was given, but got one with "
                f"plain BatchNorm; call convert_model(module, {self.vt_world_size}), with the "
                "options of VirtualRanks, before you call fit."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuse steps of fewer ranks than the layers have; a scheduler may set it by epoch."""
        steps = self.options.get("accumulation_steps", 1)
        given = trainer.accumulate_grad_batches
        # Lightning's StochasticWeightAveraging has an epoch without steps, for the statistics.
        whole_epoch = given == trainer.num_training_batches
        if pl_module.automatic_optimization and given % steps and not whole_epoch:
            raise ConfigurationError(
                f"expected a Trainer that accumulates the gradients of {steps} batches, as "
                f"accumulation_steps={steps} says, but it has accumulate_grad_batches={given}; "
                f"pass accumulate_grad_batches={steps} to the Trainer."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer's loaders to it."""
        vars(trainer.strategy).pop("process_dataloader", None)

    def _deal_for(self, trainer: Any) -> None:
        """Deal each loader when the strategy gets it: whatever held it, and not to be shuffled."""
        process = trainer.strategy.process_dataloader

        def deal(loader: object) -> object:
            if trainer.training and isinstance(loader, DataLoader):
                # Lightning's word for it: a Trainer may be alone where WORLD_SIZE tells of others,
                # and processes that hold one model together take the same samples.
                place = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
                loader = self.deal(loader, **place)
                if trainer.overfit_batches:  # wants the same batches in each epoch
                    batches = copy.copy(loader.batch_sampler)
                    vars(batches)["set_epoch"] = None
                    loader = _with_batches(loader, batches)
            return process(loader)

        trainer.strategy.process_dataloader = deal

    def deal(
        self, loader: DataLoader[Any], num_replicas: int | None = None, rank: int | None = None
    ) -> DataLoader[Any]:
        """Return a copy of the loader, with all that it has, whose batches are those of V ranks."""
        batches = loader.batch_sampler
        ranks = {
            "vt_world_size": self.vt_world_size,
            "partition": self.options.get("partition", "contiguous"),
            "accumulation_steps": self.options.get("accumulation_steps", 1),
        }
        if isinstance(batches, VirtualDistributedSampler):
            given = {name: getattr(batches, name) for name in ranks}
            if given != ranks:
                raise ConfigurationError(
                    f"expected a VirtualDistributedSampler for the ranks of the layers, {ranks}, "
                    f"but got one for {given}; make the loader anew for the former."
                )
            return loader
        _raise_unless_dealable(loader)
        sampler: Any = VirtualDistributedSampler(
            loader.dataset,  # type: ignore[arg-type]
            loader.batch_size,  # type: ignore[arg-type]
            num_replicas=num_replicas,
            rank=rank,
            shuffle=type(loader.sampler) is RandomSampler,
            seed=int(os.getenv("PL_GLOBAL_SEED", "0")),
            drop_last_batch=loader.drop_last,
            **ranks,
        )
        return _with_batches(
            loader,
            sampler,
            sampler=SequentialSampler(loader.dataset),  # type: ignore[arg-type]
            batch_size=None,
            drop_last=False,
        )

    @contextmanager
    def reverted(
        self, pl_module: LightningModule, reduction: str = "mean", rank: int = 0
    ) -> Iterator[LightningModule]:
        """Make the module plain for an export; afterwards it has its ranks again.

        All layers with virtual ranks are reverted and restored, whatever converted them.

        Args:
            pl_module: **LightningModule**, converted.
            reduction: as in :func:`~distbn_convert.revert_model`. Default: ``"mean"``
            rank: as there. Default: 0
        """
        modules = list(pl_module.modules())
        layers = [module for module in modules if isinstance(module, DistBatchNormMixin)]
        kinds = [type(layer) for layer in layers]
        settings = [
            {name: getattr(layer, name) for name in RankSettings.__dataclass_fields__}
            for layer in layers
        ]
        statistics = [running_statistics(layer) for layer in layers]
        hooks = [module._load_state_dict_pre_hooks.copy() for module in modules]
        revert_model(pl_module, reduction, rank)
        for module, before in zip(modules, hooks, strict=True):
            for key in module._load_state_dict_pre_hooks:
                del before[key]  # what is left is what reverting took away
        try:
            yield pl_module
        finally:
            for layer, kind, values, rows in zip(layers, kinds, settings, statistics, strict=True):
                layer.__class__ = kind
                vars(layer).update(values)
                for name, buffer in rows.items():
                    # To where, and the dtype in which, the export has left the layer.
                    layer._buffers[name] = buffer.to(layer._buffers[name])
            for module, removed in zip(modules, hooks, strict=True):
                module._load_state_dict_pre_hooks.update(removed)


def _with_batches(loader: DataLoader[Any], batches: Any, **others: Any) -> DataLoader[Any]:
    """Return a copy of the loader, with other batches."""
    # A new one would need the arguments of a class of yours, which it need not have kept.
    copied = copy.copy(loader)
    vars(copied).update(batch_sampler=batches, _iterator=None, **others)
    return copied


def _raise_unless_dealable(loader: DataLoader[Any]) -> None:
    """Refuse a loader whose batches come from elsewhere than the order of a plain one."""
    instead = "give the loader a VirtualDistributedSampler as batch_sampler, or pass sampler=False"
    order, batches = type(loader.sampler), type(loader.batch_sampler)
    plain = batches is torch.utils.data.BatchSampler
    if not plain or order not in (RandomSampler, SequentialSampler):
        if issubclass(order, DistributedSampler):
            instead = (
                f"pass use_distributed_sampler=False to the Trainer if it is not yours; {instead}"
            )
        raise ConfigurationError(
            "expected a DataLoader with shuffle=True or False, but its samples come from "
            f"{(order if plain else batches).__name__}, whose order cannot be dealt to virtual "
            f"ranks; {instead}."
        )
    for name, value in vars(loader).items():
        if name not in ("dataset", "_iterator") and isinstance(value, Iterator):
            raise ConfigurationError(
                "expected a DataLoader that makes its batches when iterated, but "
                f"{type(loader).__name__} has begun with them in {name!r}; {instead}."
            )
