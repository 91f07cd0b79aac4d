"""What each real process does in tests/integrations/test_deploy.py."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from timm.utils import distribute_bn

from distbn_convert import convert_model, revert_model

from .. import ddp


def distribute() -> tuple[ddp.State, ddp.State]:
    """Reduce by timm and then over the virtual ranks, and by one reduction over all."""
    model = convert_model(ddp.make_model(), 2)
    torch.manual_seed(dist.get_rank())
    model(torch.randn(8, 3, 8, 8, dtype=torch.float64) + dist.get_rank())
    grouped = revert_model(copy.deepcopy(model), process_group=dist.group.WORLD)
    distribute_bn(model, dist.get_world_size(), reduce=True)
    return dict(revert_model(model).state_dict()), dict(grouped.state_dict())
