"""The operation behind every layer: batch norm with the statistics of virtual ranks.

What users call; :mod:`.operators` computes and differentiates it.
"""

from __future__ import annotations

from torch import Tensor

from .checks import (
    check_activation,
    check_count,
    check_impl,
    check_numbers,
    check_partition,
    check_residual,
    check_statistics,
    check_tensors,
    check_values,
)
from .operators import batch_norm

__all__ = ["dist_batch_norm"]


def dist_batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    vt_world_size: int,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    partition: str = "contiguous",
    activation: str | None = None,
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Normalise each virtual rank's share of a batch with that share's own statistics.

    .. math::

        y = \mathrm{activation}\left(
            \frac{x - \mu_v}{\sqrt{\sigma_v^2 + \epsilon}} \gamma + \beta + \mathrm{residual}\right)

    where :math:`\mu_v` and the biased :math:`\sigma_v^2` are those of the samples of rank
    :math:`v` alone: nothing is synchronised between the ranks. This is the training
    computation; in evaluation a layer is a plain :func:`torch.nn.functional.batch_norm`.
    See :class:`~distbn_convert.DistBatchNorm2d`.

    Args:
        input: ``Tensor[N, C, *]``, float16, bfloat16, float32 or float64.
        running_mean: ``Tensor[V, C]``, updated in place. Default: None
        running_var: ``Tensor[V, C]``, updated in place with the unbiased variances. Default: None
        weight: ``Tensor[C]``, :math:`\gamma`. Default: None, ones
        bias: ``Tensor[C]``, :math:`\beta`. Default: None, zeros
        num_batches_tracked: ``int64 Tensor[V]``, incremented in place for each rank that has
            samples. Default: None
        vt_world_size: number of virtual ranks ``V``.
        momentum: weight of the new batch in the running statistics; None for the cumulative
            average, which needs ``num_batches_tracked``. Default: 0.1
        eps: added to the variance. Default: 1e-5
        partition: ``"contiguous"`` (rank v takes block v of the batch) or ``"interleaved"``
            (sample p belongs to rank p mod V). Shares differ by at most one sample.
            Default: ``"contiguous"``
        activation: ``"relu"``, taken last, or None. One pass over memory with the normalisation
            where the backend can, forward and backward. Default: None
        residual: ``Tensor[N, C, *]``, added before the activation; shape, dtype and device of
            ``input`` (autocast casts neither, as with torch's batch norm). Default: None
        impl: ``"op"`` computes with the kernels, which ``torch.compile`` cannot look into;
            ``"decomposed"`` with plain torch operations, which it can fuse with what comes after;
            ``"auto"`` with the kernels where there are some for the input's device and dtype, and
            under ``torch.compile`` with plain operations elsewhere, under ``torch.export`` with
            them always (a program that holds the operator runs only where this package is
            imported). Whatever it is, derivatives in forward mode, ``torch.jit.trace`` and
            transforms of ``torch.func`` under ``torch.compile`` take plain operations.
            Default: ``"auto"``

    Returns:
        ``Tensor[N, C, *]`` with the dtype of ``input``, channels_last if that is, else contiguous,
        as torch's. Statistics are computed in float32, for float64 input in float64.

    Raises:
        ConfigurationError: ``vt_world_size``, ``momentum``, ``eps``, ``partition``,
            ``activation`` or ``impl`` is not allowed, or running statistics are incomplete.
        InputError: a shape, dtype or device is wrong (weight, bias and statistics have the dtype
            of the input, or float32 for a float16 or bfloat16 input; residual is like the input),
            or a rank has a single value per channel.

    Note:
        A rank with no samples (N < V) keeps its statistics and its counter. An empty batch
        changes no statistics and is counted, as torch's batch norm does.

    Example::

        >>> x = torch.randn(16, 3, 8, 8)
        >>> mean, var = torch.zeros(8, 3), torch.ones(8, 3)
        >>> dist_batch_norm(x, mean, var, vt_world_size=8).shape
        torch.Size([16, 3, 8, 8])

    References:
        Ioffe and Szegedy, "Batch Normalization", 2015; Hoffer, Hubara and Soudry, "Train
        longer, generalize better", 2017 (ghost batch norm).
    """
    check_count(vt_world_size)
    check_partition(partition)
    check_activation(activation)
    check_impl(impl)
    momentum = check_numbers(momentum, eps)
    check_statistics(momentum, running_mean, running_var, num_batches_tracked)
    check_tensors(
        input,
        vt_world_size,
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=num_batches_tracked,
        weight=weight,
        bias=bias,
    )
    if residual is not None:
        check_residual(residual, input)
    check_values(input, vt_world_size)
    return batch_norm(
        impl,
        input,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        num_batches_tracked,
        momentum,
        eps,
        vt_world_size,
        partition == "interleaved",
        activation is not None,
    )
