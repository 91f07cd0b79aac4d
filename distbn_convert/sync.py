"""Give every process and every rank the same running statistics, before saving or evaluating."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import STATISTICS
from .processes import gather_rows, group_place
from .replicas import check_reduction, reduce_rows

__all__ = ["sync_running_stats"]

MEAN, COUNT = STATISTICS[0], STATISTICS[2]


@torch.no_grad()
def sync_running_stats(
    model: nn.Module, reduction: str = "mean", rank: int = 0, *, process_group: Any = None
) -> None:
    """Reduce the running statistics over all real and virtual ranks, in place.

    Afterwards every row of every process holds the reduced statistics, so that it no longer
    matters which process saves which tensor, and a plain ``revert_model`` gives the same model
    in all of them. Call it in every process of the group, before saving and before evaluating:

    - ``torch.distributed.checkpoint`` keeps each buffer from whichever process has least to
      write, so that without this call the ``running_mean`` and ``running_var`` of one layer may
      come from different processes (FSDP2; DDP with its broadcast of buffers off).
    - Evaluation in R processes would use R different models.

    Args:
        model: **nn.Module**, with virtual ranks or plain BatchNorm (one row), also wrapped in DDP
            or ``fully_shard``; the same in every process.
        reduction: **str**, ``"mean"``, ``"select"`` or ``"pooled"``, over the K = R * V rows of
            all processes. Default: ``"mean"``
        rank: **int**, the row that ``"select"`` takes, 0 to K - 1; process r holds rows rV to
            rV + V - 1. Of a plain layer it is process ``rank // V``. Default: 0
        process_group: **ProcessGroup**; in a pipeline that of the processes with the same stage.
            Default: None, the default group, or this process alone if there is none

    Raises:
        ConfigurationError: unknown reduction, rank out of range, a process not in the group, or
            layers that differ between the processes, an error in all of them.
        ConversionError: a reduced statistic is too large for its dtype.

    Note:
        Sums are in float64 and one collective takes the whole model. Training may go on:
        it never reads the statistics, and they go on moving from the common value. Each row's
        counter becomes the largest that a process has for that row, so ``accumulation_steps``
        goes on where it was.

    Example::

        >>> sync_running_stats(model)
        >>> import torch.distributed.checkpoint as dcp
        >>> dcp.save(model.state_dict(), checkpoint_id=folder)
    """
    processes, _ = group_place(process_group)
    layers = [buffers for module in model.modules() if (buffers := running_statistics(module))]
    own = [_rows(buffer, name != COUNT) for buffers in layers for name, buffer in buffers.items()]
    gathered = iter(gather_rows(own, process_group))
    # Not before: a process that raises alone leaves the others waiting for it.
    ranks = processes * max((len(_rows(layer[MEAN], 1)) for layer in layers), default=1)
    check_reduction(reduction, rank, ranks)
    new = []
    for buffers in layers:
        rows = {name: next(gathered) for name in buffers}
        # A plain layer's row stands for all ranks of its process.
        new.append(reduce_rows(rows, reduction, rank * len(rows[MEAN]) // ranks))
        if COUNT in rows:
            new[-1][COUNT] = rows[COUNT].view(processes, *buffers[COUNT].shape).amax(0)
    for buffers, statistics in zip(layers, new, strict=True):
        for name, buffer in buffers.items():
            buffer.copy_(statistics[name])


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a batch norm layer by name; none if it keeps no statistics."""
    if not isinstance(module, _BatchNorm) or module.running_mean is None:
        return {}
    buffers = {name: getattr(module, name) for name in STATISTICS}
    return {name: buffer for name, buffer in buffers.items() if isinstance(buffer, Tensor)}


def _rows(buffer: Tensor, dims: int) -> Tensor:
    """Return ``buffer`` with its axis of ranks; a plain layer's has one row."""
    return buffer if buffer.dim() > dims else buffer[None]
