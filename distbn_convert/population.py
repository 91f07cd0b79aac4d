"""Population statistics from data: what evaluation would like the running statistics to be."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigurationError, InputError, NothingToConvertError, UnsupportedModuleError
from .kernels.partition import share_sizes
from .layers import DistBatchNormMixin
from .processes import gather_rows, group_place
from .replicas import merge_moments, wide_dtype
from .sync import running_statistics

__all__ = ["recalibrate"]

Moments = tuple[Tensor, Tensor, Tensor]  # values [K, 1], mean [K, C], squared deviations [K, C]


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    max_batches: int | None = None,
    progress: bool = True,
    pooled: bool = False,
    process_group: Any = None,
) -> None:
    r"""Replace running statistics by those of the data, in place (precise BN).

    The averages that training leaves are biased: each batch's variance is taken about that
    batch's own mean. Here the batches :math:`b` of :math:`n_b` values to a channel are put
    together as parts of one population, in float64:

    .. math::

        \mu = \frac{\sum_b n_b \mu_b}{\sum_b n_b}, \qquad
        \sigma^2 = \frac{\sum_b n_b \left(\sigma_b^2 + (\mu_b - \mu)^2\right)}{\sum_b n_b}

    with the biased :math:`\sigma_b^2`. Each row gets the population of its own rank's
    samples; no parameter changes. Some thousand samples are enough.

    Args:
        model: **nn.Module**, with virtual ranks or plain, also wrapped or compiled.
        loader: **iterable** of ``Tensor[N, ...]`` or of tuples whose first item that is.
        device: **torch.device**, where the batches are moved. Default: None, the statistics'
        max_batches: **int**, stop after so many. Default: None, all
        progress: **bool**, show a line on stderr if that is a terminal. Default: True
        pooled: **bool**, put all ranks' samples into one population, so that every row
            is the same. Default: False
        process_group: **ProcessGroup**, whose processes' populations are put together, row by
            row; each calls this with its own part of the data. Default: None, the default group,
            or this process alone if there is none

    Raises:
        ConfigurationError: ``max_batches`` is no positive int, a process outside the group, or
            layers that differ between the processes.
        InputError: the loader gave no samples or no such batches, or one that a layer cannot
            normalise.
        NothingToConvertError: no layer keeps running statistics that are not frozen.
        UnsupportedModuleError: a SyncBatchNorm.

    Note:
        Batch norm layers normalise by batch statistics, as in training; all other modules run in
        evaluation mode, without dropout. A layer in evaluation mode in a model that trains
        is frozen and is left alone, as are layers and rows that see no samples. Counters and modes
        are what they were before; after an error the statistics are, too.

    Example::

        >>> recalibrate(model, train_loader, max_batches=100)
        >>> model = revert_model(model)

    References:
        Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021.
    """
    if max_batches is not None and (not isinstance(max_batches, int) or max_batches < 1):
        raise ConfigurationError(
            f"max_batches must be a positive int or None, but got {max_batches!r}; "
            "give the number of batches to look at."
        )
    _, place = group_place(process_group)
    layers = _layers(model)
    if device is None:
        device = next(iter(layers.values()))["running_mean"].device
    runnable = model.module if isinstance(model, _BROADCASTING) else model
    watchers = [_Watcher(layer, buffers) for layer, buffers in layers.items()]
    with _estimating(model, watchers):
        for batch in _show(
            islice(loader, max_batches), loader, max_batches, progress and not place
        ):
            runnable(_input_of(batch).to(device))
    own = [part for watcher in watchers for part in watcher.moments]
    gathered = iter(gather_rows([part[None] for part in own], process_group))
    merged = [merge_moments(next(gathered), next(gathered), next(gathered)) for _ in watchers]
    if not any(values.any() for values, _, _ in merged):
        raise InputError(
            "expected batches to recalibrate with, but the loader gave no samples; "
            "check its data set and its sampler."
        )
    for watcher, moments in zip(watchers, merged, strict=True):
        watcher.write(moments, pooled)


def _input_of(batch: Any) -> Any:
    """Return what a batch has for the model."""
    input = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not hasattr(input, "to"):  # what moves like a tensor may be a graph, or boxes
        raise InputError(
            "expected batches that are a Tensor, or a tuple or list that begins with one, but got "
            f"a {type(input).__name__}; give what the model takes, for example "
            "(batch['image'] for batch in loader)."
        )
    return input


# Their forward broadcasts or copies buffers, which would undo what is measured here.
_BROADCASTING = (nn.parallel.DistributedDataParallel, nn.DataParallel)


class _Watcher:
    """Collect the moments of what one layer normalises.

    With momentum 1 the layer's running statistics are those of the last batch alone, whichever
    backend computes them; they are read after each call.
    """

    def __init__(self, layer: Any, buffers: dict[str, Tensor]) -> None:
        self.layer, self.buffers = layer, buffers
        self.shape: torch.Size | None = None  # of what is normalised, until it is added
        self.saved = {name: buffer.clone() for name, buffer in buffers.items()}
        self.ranks = getattr(layer, "vt_world_size", 1)
        mean = buffers["running_mean"]
        rows = mean if mean.dim() == 2 else mean[None]
        zeros = torch.zeros_like(rows, dtype=wide_dtype(mean))
        self.moments: Moments = (zeros[:, :1].clone(), zeros, zeros.clone())

    def check_input_dim(self, input: Tensor) -> None:
        """Note what is normalised: a subclass may have reshaped its input."""
        type(self.layer)._check_input_dim(self.layer, input)
        self.shape = input.shape

    def normalize(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Note what is normalised, also where a block calls this and no hook runs."""
        self.forget(input)
        output = type(self.layer).normalize(self.layer, input, *args, **kwargs)
        self.after()
        return output

    def before(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Start with the input: some layers normalise without that check."""
        inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.forget(next(inputs))

    def forget(self, input: Tensor) -> None:
        """Forget the last batch."""
        self.shape = input.shape
        for name in ("running_mean", "running_var"):
            self.buffers[name].zero_()
        count = self.buffers.get("num_batches_tracked")
        self.count = None if count is None else count.clone()

    def after(self, *_: Any) -> None:
        """Add this batch, rank by rank, unless that was done inside."""
        if self.shape is None:
            return
        values, mean, _deviations = self.moments
        samples = values.new_tensor(share_sizes(self.shape[0], self.ranks))
        seen = values.new_ones(len(values) // self.ranks, self.ranks)
        if self.count is not None:  # of several micro-steps, the one that this batch was
            seen = (self.buffers["num_batches_tracked"] > self.count).view_as(seen)
        batch = (seen * samples).view_as(values) * self.shape[2:].numel()
        new_mean = self.buffers["running_mean"].to(mean).view_as(mean)
        new_var = self.buffers["running_var"].to(mean).view_as(mean)
        new = (batch, new_mean, new_var * (batch - 1))  # undoes Bessel's correction
        self.moments = merge_moments(*map(torch.stack, zip(self.moments, new, strict=True)))
        self.shape = None

    def attach(self, stack: ExitStack) -> None:
        """Watch until the stack is closed."""
        if isinstance(self.layer, DistBatchNormMixin):
            self.layer.normalize = self.normalize  # type: ignore[method-assign]
            stack.callback(delattr, self.layer, "normalize")
        self.layer._check_input_dim = self.check_input_dim
        stack.callback(delattr, self.layer, "_check_input_dim")
        for handle in (
            self.layer.register_forward_pre_hook(self.before, with_kwargs=True),
            self.layer.register_forward_hook(self.after),
        ):
            stack.callback(handle.remove)

    def restore(self) -> None:
        """Put the statistics back."""
        for name, buffer in self.buffers.items():
            buffer.copy_(self.saved[name])

    def write(self, moments: Moments, pooled: bool) -> None:
        """Write the population's statistics to the rows that saw samples."""
        if pooled:
            moments = merge_moments(*moments)
        values, mean, deviations = moments
        for name, new in (
            ("running_mean", mean),
            ("running_var", deviations / values),
        ):
            buffer = self.buffers[name]
            rows = buffer if buffer.dim() == 2 else buffer[None]
            rows.copy_(torch.where(values > 0, new.to(rows), rows))


def _layers(model: nn.Module) -> dict[nn.Module, dict[str, Tensor]]:
    """Return the layers to recalibrate, each with its buffers."""
    layers = {}
    for name, module in model.named_modules():
        buffers = running_statistics(module)
        if not buffers or (model.training and not module.training):
            continue
        if isinstance(module, nn.SyncBatchNorm):
            raise UnsupportedModuleError(
                f"expected layers whose statistics are their own, but {name!r} is a SyncBatchNorm; "
                "replace it by BatchNorm first."
            )
        layers[module] = buffers
    if not layers:
        raise NothingToConvertError(
            "expected a model with batch norm layers that keep running statistics and are not "
            "frozen, but found none; call model.eval() first to recalibrate frozen layers too."
        )
    return layers


@contextmanager
def _estimating(model: nn.Module, watchers: list[_Watcher]) -> Iterator[None]:
    """Run as in evaluation, but the watched layers as in training, and put all back."""
    modes = [(module, module.training) for module in model.modules()]
    layers = [watcher.layer for watcher in watchers]
    options = [(layer, layer.momentum, layer.track_running_stats) for layer in layers]
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code has no hooks
        model.eval()
        for watcher in watchers:
            watcher.layer.training = watcher.layer.track_running_stats = True
            watcher.layer.momentum = 1.0
            watcher.attach(stack)
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for layer, momentum, tracks in options:
                layer.momentum, layer.track_running_stats = momentum, tracks
            for watcher in watchers:
                watcher.restore()


def _show(
    batches: Iterable[Any], loader: Any, max_batches: int | None, wanted: bool
) -> Iterator[Any]:
    """Yield the batches and count them on a terminal's line."""
    if not (wanted and sys.stderr.isatty()):
        yield from batches
        return
    try:
        total = str(min(len(loader), max_batches or len(loader)))
    except TypeError:  # no length
        total = str(max_batches or "?")
    for number, batch in enumerate(batches, 1):
        sys.stderr.write(f"\rrecalibrate: batch {number} of {total}")
        sys.stderr.flush()
        yield batch
    sys.stderr.write("\n")
