from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distbn_convert import (
    DistBatchNorm2d,
    DistBatchNormMixin,
    convert_model,
    register_pair,
    revert_model,
)
from distbn_convert.errors import RegistryError
from distbn_convert.registry import plain_class_of


class Parent(nn.BatchNorm2d):
    pass


class BatchNormReLU(Parent):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class DistBatchNormReLU(BatchNormReLU, DistBatchNorm2d):
    pass


register_pair(BatchNormReLU, DistBatchNormReLU)


def test_registered_subclass_keeps_its_forward_and_comes_back() -> None:
    layer, input = BatchNormReLU(3), torch.randn(8, 3, 4, 4)
    expected = convert_model(nn.BatchNorm2d(3), 4)(input).relu()
    convert_model(layer, 4)
    assert type(layer) is DistBatchNormReLU
    assert torch.equal(layer(input), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(input), expected)
    evaluated = layer.eval()(input)
    assert type(revert_model(layer)) is BatchNormReLU
    assert torch.equal(layer(input), evaluated)


class Unrelated(DistBatchNorm2d):
    pass


class WrongOrder(DistBatchNorm2d, BatchNormReLU):
    """Its forward is batch norm's: the activation would be lost."""


class Flat(nn.BatchNorm1d):
    pass


class FlatTo2d(Flat, DistBatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("plain", "dist", "match"),
    [
        (nn.Linear, DistBatchNorm2d, "plain must be a subclass of torch's BatchNorm"),
        (nn.BatchNorm2d(3), DistBatchNorm2d, "give the class itself"),
        (BatchNormReLU, Unrelated, "dist must derive from BatchNormReLU"),
        (BatchNormReLU, "DistBatchNormReLU", "but got 'DistBatchNormReLU'; write class Dist"),
        (BatchNormReLU, BatchNormReLU, "dist must derive from BatchNormReLU and from Dist"),
        (BatchNormReLU, WrongOrder, r"must keep the forward of BatchNormReLU, .* write class Dist"),
        (Flat, FlatTo2d, "from Flat and from DistBatchNorm1d"),
        (nn.SyncBatchNorm, Unrelated, "subclass of torch's BatchNorm, not SyncBatchNorm, but"),
        (nn.BatchNorm2d, Unrelated, "in no pair yet, but BatchNorm2d or Unrelated already is"),
        (DistBatchNorm2d, Unrelated, "without virtual ranks, but got DistBatchNorm2d; give"),
        (Parent, DistBatchNormReLU, "but Parent or DistBatchNormReLU already is"),
        (BatchNormReLU, DistBatchNormReLU, "register each class once"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(plain: Any, dist: Any, match: str) -> None:
    with pytest.raises(RegistryError, match=match):
        register_pair(plain, dist)


def of_its_own(name: str, value: Any) -> type[nn.Module]:
    return type("Own", (nn.BatchNorm2d,), {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalize", lambda self, input: input),
        ("_evaluate", lambda self: None),
        ("partition", property(lambda self: 3)),
        ("impl", "op"),
    ],
)
def test_names_that_virtual_ranks_need_are_not_shadowed(name: str, value: Any) -> None:
    plain = of_its_own(name, value)
    dist = type("DistOwn", (plain, DistBatchNorm2d), {})
    with pytest.raises(RegistryError, match=f"but Own has {name}; rename that"):
        register_pair(plain, dist)


class Bare(_BatchNorm):
    """Of no dimension that torch names."""

    def _check_input_dim(self, input: Any) -> None:
        assert input.dim() == 6


class DistBare(Bare, DistBatchNormMixin):
    pass


class NoCheck(_BatchNorm):
    def forward(self, input: Any) -> Any:
        return nn.functional.batch_norm(input, self.running_mean, self.running_var, training=True)


class DistNoCheck(NoCheck, DistBatchNormMixin):
    def forward(self, input: Any) -> Any:
        return self.normalize(input)


@pytest.mark.parametrize(("plain", "dist"), [(Bare, DistBare), (NoCheck, DistNoCheck)])
def test_direct_subclasses_of_torchs_base_have_a_way_too(plain: Any, dist: Any) -> None:
    if plain_class_of(dist) is None:
        register_pair(plain, dist)
    layer, input = convert_model(plain(3), 2), torch.randn(4, 3, 2, 2, 1, 1)
    assert type(layer) is dist
    expected = [nn.BatchNorm3d(3)(share.flatten(4)) for share in input.chunk(2)]
    torch.testing.assert_close(layer(input).flatten(4), torch.cat(expected))


def test_class_that_a_module_cannot_become_is_refused() -> None:
    class Other(BatchNormReLU):
        pass

    class DistOther(Other, DistBatchNorm2d):
        __slots__ = ("more",)

    with pytest.raises(RegistryError, match="an? Other must be able to become a DistOther, but"):
        register_pair(Other, DistOther)
