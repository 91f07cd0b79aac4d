"""timm's batch norm with drop and activation, with virtual ranks."""

from __future__ import annotations

from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..layers import DistBatchNorm2d
from ..registry import register_pair

__all__ = ["DistBatchNormAct2d"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class DistBatchNormAct2d(BatchNormAct2d, DistBatchNorm2d):
    """timm's ``BatchNormAct2d`` with virtual ranks: its ``drop`` and ``act`` follow the norm.

    Made by :func:`~distbn_convert.convert_model`. In training a ReLU is computed with the norm in
    one operation, if nobody would notice: ``drop`` does nothing and neither has hooks. See
    :class:`~distbn_convert.DistBatchNorm2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, drop, activate ``Tensor[N, C, H, W]``."""
        if self.training and _is_just(self.act, nn.ReLU) and _is_just(self.drop, nn.Identity):
            return self.normalize(x, activation="relu")
        return self.act(self.drop(self.normalize(x)))  # type: ignore[no-any-return]


def _is_just(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call of the module does what the class does, and nothing else."""
    hooks = any(getattr(module, name) for name in _HOOKS)
    hooks = hooks or any(getattr(torch_module, f"_global{name}") for name in _HOOKS)
    return type(module) is cls and not hooks and "forward" not in vars(module)


register_pair(BatchNormAct2d, DistBatchNormAct2d)
