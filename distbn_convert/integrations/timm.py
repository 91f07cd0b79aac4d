"""timm's batch norm with drop and activation, with virtual ranks."""

from __future__ import annotations

from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor

from ..layers import DistBatchNorm2d
from ..registry import register_pair

__all__ = ["DistBatchNormAct2d"]


class DistBatchNormAct2d(BatchNormAct2d, DistBatchNorm2d):
    """timm's ``BatchNormAct2d`` with virtual ranks: its ``drop`` and ``act`` follow the norm.

    Made by :func:`~distbn_convert.convert_model`. See
    :class:`~distbn_convert.DistBatchNorm2d`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, drop, activate ``Tensor[N, C, H, W]``."""
        return self.act(self.drop(self.normalize(x)))  # type: ignore[no-any-return]


register_pair(BatchNormAct2d, DistBatchNormAct2d)
