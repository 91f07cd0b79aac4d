"""Batch norm layers whose statistics are those of virtual ranks: shells over the functional op."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checks import check_activation, check_count, check_partition, check_residual
from .errors import ConfigurationError, InputError, StateDictError
from .functional import dist_batch_norm
from .replicas import check_reduction, evaluation_statistics, replicate

__all__ = [
    "ADDED_NAMES",
    "DistBatchNorm1d",
    "DistBatchNorm2d",
    "DistBatchNorm3d",
    "DistBatchNormMixin",
]

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class RankSettings:
    """What a layer with virtual ranks has beside BatchNorm's options; checked when it is made.

    Attributes and errors: see :class:`DistBatchNorm2d`.
    """

    vt_world_size: int
    partition: str = "contiguous"
    eval_reduction: str = "mean"
    eval_rank: int = 0
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        check_count(self.vt_world_size)
        check_count(self.accumulation_steps, "accumulation_steps")
        check_partition(self.partition)
        check_reduction(self.eval_reduction, self.eval_rank, self.num_ranks, "eval_")

    @property
    def num_ranks(self) -> int:
        """Rows of the statistics: ``vt_world_size * accumulation_steps``."""
        return self.vt_world_size * self.accumulation_steps

    def apply_to(self, module: nn.Module) -> None:
        """Make them attributes of a module."""
        for name, value in vars(self).items():
            setattr(module, name, value)


class DistBatchNormMixin(_BatchNorm):
    """What the three layers share, and what a subclass of yours needs to have virtual ranks.

    Name one of the three last among the bases: ``class DistMyNorm(MyNorm, DistBatchNorm2d)`` keeps
    ``MyNorm.forward``, which is enough if that calls ``super().forward``. A class that computes
    batch norm itself overrides ``forward`` and calls :meth:`normalize`. See
    :func:`~distbn_convert.register_pair`.
    """

    vt_world_size: int
    partition: str
    eval_reduction: str
    eval_rank: int
    accumulation_steps: int
    impl = "auto"
    input_dims: ClassVar[tuple[int, ...]] = ()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        vt_world_size: int,
        bias: bool = True,
        partition: str = "contiguous",
        eval_reduction: str = "mean",
        eval_rank: int = 0,
        accumulation_steps: int = 1,
    ) -> None:
        settings = RankSettings(
            vt_world_size, partition, eval_reduction, eval_rank, accumulation_steps
        )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        settings.apply_to(self)
        for name in STATISTICS:
            statistic = getattr(self, name)
            if statistic is not None:
                self.register_buffer(name, replicate(statistic, self.num_ranks))

    @property
    def num_ranks(self) -> int:
        """Rows of the statistics: ``vt_world_size * accumulation_steps``."""
        return self.vt_world_size * self.accumulation_steps

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``Tensor[N, C, *]``; see :class:`DistBatchNorm2d`."""
        return self.normalize(input)

    def normalize(
        self, input: Tensor, activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Normalise by virtual ranks in training, by the reduced statistics in evaluation.

        Args:
            input: ``Tensor[N, C, *]``.
            activation: ``"relu"``, taken last, or None. Default: None
            residual: ``Tensor[N, C, *]`` like the input, added before. Default: None

        Returns:
            ``Tensor[N, C, *]``; in training one operation computes it, see
            :func:`~distbn_convert.functional.dist_batch_norm`.

        Raises:
            ConfigurationError, InputError: as :func:`~distbn_convert.functional.dist_batch_norm`.
        """
        self._check_input_dim(input)
        if self.training:
            return self._normalize_ranks(input, activation, residual)
        check_activation(activation)
        output = self._evaluate(input)
        if residual is not None:
            check_residual(residual, input)
            output = output + residual
        return output if activation is None else output.relu()

    def _evaluate(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if mean is not None and var is not None:
            mean, var = evaluation_statistics(mean, var, self.eval_reduction, self.eval_rank)
        batch_statistics = mean is None and var is None
        parts: tuple[Tensor | None, ...] = (mean, var, self.weight, self.bias)
        if len({part.dtype for part in parts if part is not None}) > 1 and input.itemsize == 2:
            # As under FSDP2's mixed precision. Training takes each in its own dtype, torch not.
            parts = tuple(None if part is None else part.float() for part in parts)
        mean, var, weight, bias = parts
        return F.batch_norm(input, mean, var, weight, bias, batch_statistics, 0.0, self.eps)

    def _normalize_ranks(self, input: Tensor, *epilogue: Any) -> Tensor:
        statistics: Any = self.running_mean, self.running_var, self.num_batches_tracked
        mean, var, counts = statistics
        if not self.track_running_stats or mean is None:
            return self._dist_batch_norm(input, None, None, None, *epilogue)
        if self.accumulation_steps == 1:
            return self._dist_batch_norm(input, mean, var, counts, *epilogue)
        if counts is None or counts.shape != (self.num_ranks,):
            raise ConfigurationError(
                f"accumulation_steps={self.accumulation_steps} needs num_batches_tracked of shape "
                f"({self.num_ranks},), but got {None if counts is None else tuple(counts.shape)}; "
                "set it when you convert the model."
            )
        # The next V rows are those that have seen the fewest batches, so that the counters,
        # which are saved with the model, are the only record of the micro-step.
        block = counts[:: self.vt_world_size].argmin()
        rows = block * self.vt_world_size + torch.arange(self.vt_world_size, device=counts.device)
        parts = [statistic.index_select(0, rows) for statistic in (mean, var, counts)]
        output = self._dist_batch_norm(input, *parts, *epilogue)
        for statistic, part in zip((mean, var, counts), parts, strict=True):
            statistic.index_copy_(0, rows, part)
        return output

    def _dist_batch_norm(
        self,
        input: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        counts: Tensor | None,
        activation: str | None,
        residual: Tensor | None,
    ) -> Tensor:
        return dist_batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            counts,
            vt_world_size=self.vt_world_size,
            momentum=self.momentum,
            eps=self.eps,
            partition=self.partition,
            activation=activation,
            residual=residual,
            impl=self.impl,
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if self.input_dims and input.dim() not in self.input_dims:
            expected = " or ".join(f"{dims}D" for dims in self.input_dims)
            raise InputError(
                f"expected {expected} input (got {input.dim()}D input of shape "
                f"{tuple(input.shape)}); reshape it, or use the layer of that dimension."
            )
        # Tracing makes a tensor of the size and warns of comparing it.
        if torch._C._get_tracing_state() is None and input.shape[1] != self.num_features:
            raise InputError(
                f"expected {self.num_features} channels (dimension 1), but got an input of shape "
                f"{tuple(input.shape)}; check the layer before this one."
            )

    def extra_repr(self) -> str:
        """Torch's own words, then the virtual ranks."""
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        text = f"{plain}, vt_world_size={self.vt_world_size}"
        text += f", partition={self.partition!r}, eval_reduction={self.eval_reduction!r}"
        if self.eval_reduction == "select":
            text += f", eval_rank={self.eval_rank}"
        if self.accumulation_steps != 1:
            text += f", accumulation_steps={self.accumulation_steps}"
        return text

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Give the statistics of a plain checkpoint to every rank."""
        self.check_state_dict(state_dict, prefix)
        count, key = self.num_batches_tracked, prefix + "num_batches_tracked"
        if count is not None and count.is_meta and (local_metadata.get("version") or 1) < 2:
            # From before torch counted batches; torch would put one counter here, not one a rank.
            state_dict.setdefault(key, torch.zeros(self.num_ranks, dtype=torch.long))
        if self._is_plain_counter(state_dict, prefix):
            state_dict[key] = state_dict[key][0]
        for name in STATISTICS:
            own, value = getattr(self, name), state_dict.get(prefix + name)
            if own is not None and isinstance(value, Tensor) and value.dim() == own.dim() - 1:
                state_dict[prefix + name] = replicate(value, self.num_ranks)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def check_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Raise StateDictError if the layer's statistics there have another number of ranks."""
        for name in STATISTICS:
            own, value = getattr(self, name), state_dict.get(prefix + name)
            if own is None or not isinstance(value, Tensor) or value.dim() != own.dim():
                continue
            if name == "num_batches_tracked" and self._is_plain_counter(state_dict, prefix):
                continue
            if value.shape[0] != self.num_ranks:
                raise StateDictError(
                    f"{prefix}{name} in the checkpoint has {value.shape[0]} virtual ranks, but the "
                    f"layer has {self.num_ranks}; build the model with the checkpoint's number, or "
                    "revert the checkpoint to plain BatchNorm first, which loads with any number."
                )

    def _is_plain_counter(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether there is one counter in a vector, as torch takes it, beside plain statistics."""
        count = state_dict.get(prefix + "num_batches_tracked")
        mean = state_dict.get(prefix + "running_mean")
        one = isinstance(count, Tensor) and count.shape == (1,)
        return one and isinstance(mean, Tensor) and mean.dim() == 1


# What a layer with virtual ranks has that BatchNorm has not, but for what Python gives a class.
ADDED_NAMES = frozenset(
    name
    for name in (*dir(DistBatchNormMixin), *(one.name for one in fields(RankSettings)))
    if not (hasattr(_BatchNorm, name) or name.startswith("__"))
)


class DistBatchNorm1d(DistBatchNormMixin, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` with virtual ranks; see :class:`DistBatchNorm2d`.

    Shape: ``Tensor[N, C]`` or ``Tensor[N, C, L]``.
    """

    input_dims = (2, 3)


class DistBatchNorm2d(DistBatchNormMixin, nn.BatchNorm2d):
    r""":class:`torch.nn.BatchNorm2d` on one device, as V GPUs under DDP compute it.

    In training the batch is cut into V shares; each is normalised by its own mean and biased
    variance and updates its own row of the running statistics (ghost batch norm):

    .. math::

        y = \frac{x - \mu_v}{\sqrt{\sigma_v^2 + \epsilon}} \gamma + \beta

    In evaluation it is one plain batch norm with the statistics reduced over the ranks,
    whatever the batch size. ``weight`` and ``bias`` (``Tensor[C]``) are one pair for all ranks;
    ``running_mean`` and ``running_var`` are ``Tensor[V, C]``, ``num_batches_tracked`` is
    ``int64 Tensor[V]``. The keys of the state dict are BatchNorm's; a plain checkpoint loads
    strictly and gives every rank the same statistics. See
    :func:`~distbn_convert.functional.dist_batch_norm`.

    Args:
        num_features: **int**, channels C.
        eps: **float**, added to the variance. Default: 1e-5
        momentum: **float or None**, weight of the new batch in the running statistics; None for
            the cumulative average. Default: 0.1
        affine: **bool**, learn ``weight`` and ``bias``. Default: True
        track_running_stats: **bool**, keep running statistics; without them evaluation uses the
            statistics of the whole batch. Default: True
        device: **torch.device**, of parameters and buffers. Default: None
        dtype: **torch.dtype**, of parameters and buffers. Default: None
        vt_world_size: **int**, number of virtual ranks V.
        bias: **bool**, learn ``bias``; on every torch version. Default: True
        partition: **str**, ``"contiguous"`` (rank v takes block v) or ``"interleaved"`` (sample p
            belongs to rank p mod V, as ``DistributedSampler`` deals them).
            Default: ``"contiguous"``
        eval_reduction: **str**, ``"mean"``, ``"select"`` or ``"pooled"``. Default: ``"mean"``
        eval_rank: **int**, the rank that ``"select"`` takes. Default: 0
        accumulation_steps: **int**, A micro-steps stand for V * A ranks: the statistics have V * A
            rows and micro-step a trains rows aV to aV + V - 1. Default: 1

    Attributes:
        impl: **str**, how training computes: ``"auto"``, ``"op"`` or ``"decomposed"``, see
            :func:`~distbn_convert.functional.dist_batch_norm`; set it after construction.
            Default: ``"auto"``

    Shape: ``Tensor[N, C, H, W]``, output alike; channels_last if the input is, else contiguous.

    Raises:
        ConfigurationError: a setting has a value that is not allowed.
        InputError: wrong dimensions, channels, dtype or device, or one value per channel on a rank
            in training.
        StateDictError: a state dict with another number of ranks is loaded.

    Note:
        Under activation checkpointing the recomputation updates the statistics a second time, as
        with BatchNorm; with ``accumulation_steps > 1`` it would also take the next micro-step's
        rows, so do not combine the two. So would the second call of a layer that a forward calls
        twice (shared weights, siamese networks).

    Example::

        >>> layer = DistBatchNorm2d(3, vt_world_size=8)
        >>> layer(torch.randn(32, 3, 8, 8)).shape, layer.running_mean.shape
        (torch.Size([32, 3, 8, 8]), torch.Size([8, 3]))

    References:
        Hoffer, Hubara and Soudry, "Train longer, generalize better", 2017;
        PoonKinWang/Distributed-BatchNorm-PyTorch.
    """

    input_dims = (4,)


class DistBatchNorm3d(DistBatchNormMixin, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` with virtual ranks; see :class:`DistBatchNorm2d`.

    Shape: ``Tensor[N, C, D, H, W]``.
    """

    input_dims = (5,)
