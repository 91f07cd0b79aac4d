"""Laws of conversion that hold for every checkpoint, tried on random ones."""

from __future__ import annotations

import io
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from distbn_convert.checkpoint import convert_checkpoint, inspect_checkpoint, revert_checkpoint
from distbn_convert.checkpoint.groups import Group, LookAlike, TensorSpec, describe, find_groups
from distbn_convert.errors import NothingToDoError
from distbn_convert.replicas import reduce_statistics

from .checkpoints import load, resaved

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
NAMES = st.sampled_from(["bn", "layer1.0.bn1", "downsample.1", "module._orig_mod.norm", "a.b"])


@st.composite
def batch_norm(draw: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """The keys that one BatchNorm saves, without prefix."""
    channels, dtype = draw(st.integers(0, 5)), draw(DTYPES)
    state = {}
    if draw(st.booleans()):
        state["weight"] = torch.randn(channels, dtype=dtype)
        state["bias"] = torch.randn(channels, dtype=dtype)
    state["running_mean"] = (torch.randn(channels, dtype=torch.float64) * 30).to(dtype)
    state["running_var"] = torch.rand(channels, dtype=torch.float64).to(dtype)
    if draw(st.booleans()):
        state["num_batches_tracked"] = torch.tensor(draw(st.integers(0, 2**62)))
    return state


@st.composite
def state_dict(draw: Callable[..., Any]) -> dict[str, Any]:
    state: dict[str, Any] = OrderedDict() if draw(st.booleans()) else {}
    for name in draw(st.lists(NAMES, unique=True, max_size=3)):
        state[f"{name}.conv.weight"] = torch.randn(2, 3).t()
        state.update({f"{name}.{key}": value for key, value in draw(batch_norm()).items()})
    if isinstance(state, OrderedDict):
        state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    return state


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 2**70),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.builds(lambda: torch.randint(9, (2, 2))),
    state_dict(),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.one_of(st.text(max_size=4), st.integers(0, 9)), inner, max_size=3),
    ),
    max_leaves=6,
)


@settings(max_examples=30)
@given(
    tree=TREES,
    state=state_dict(),
    anchor=batch_norm(),
    ranks=st.integers(1, 9),
    rank=st.integers(0, 8),
)
def test_every_reduction_is_the_inverse_of_conversion(
    tree: Any, state: dict[str, Any], anchor: dict[str, Any], ranks: int, rank: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save({"model": state, "rest": tree, "one": anchor}, folder / "in")
        convert_checkpoint(folder / "in", folder / "v", ranks, fsync=False)
        for reduction in ("mean", "select", "pooled"):
            out = folder / reduction
            revert_checkpoint(folder / "v", out, reduction, rank % ranks, fsync=False)
            assert out.read_bytes() == resaved(folder / "in")
        with pytest.raises(NothingToDoError):
            convert_checkpoint(folder / "v", folder / "twice", ranks, fsync=False)
        with pytest.raises(NothingToDoError):
            revert_checkpoint(folder / "in", folder / "twice", fsync=False)
        before, after = inspect_checkpoint(folder / "in"), inspect_checkpoint(folder / "v")
        assert [(g.path, g.prefix) for g in before.groups] == [
            (g.path, g.prefix) for g in after.groups
        ]


@settings(max_examples=30)
@given(state=state_dict(), anchor=batch_norm(), ranks=st.integers(2, 6))
def test_conversion_changes_nothing_but_statistics(
    state: dict[str, Any], anchor: dict[str, Any], ranks: int
) -> None:
    state = state | {f"anchor.{key}": value for key, value in anchor.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(state, folder / "in")
        convert_checkpoint(folder / "in", folder / "v", ranks, fsync=False)
        virtual = load(folder / "v")
        assert list(virtual) == list(state)
        for key, value in state.items():
            new = virtual[key]
            if key.endswith(("running_mean", "running_var", "num_batches_tracked")):
                assert new.shape == (ranks, *value.shape)
                assert new.is_contiguous()
                assert all(torch.equal(row, value) for row in new)
                new.view(-1)[:1] += 1  # the rows share no memory
                assert torch.equal(new[1], value)
            else:
                assert new.stride() == value.stride()
                assert torch.equal(new, value)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 8), dtype=DTYPES)
def test_reductions_have_the_properties_of_averages(
    seed: int, ranks: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(ranks, 7, generator=generator, dtype=torch.float64).to(dtype)
    var = torch.rand(ranks, 7, generator=generator, dtype=torch.float64).to(dtype)
    averaged = reduce_statistics(mean, var, "mean")
    for rows, result in zip((mean, var), averaged, strict=True):
        assert (rows.amin(0) <= result).all()
        assert (result <= rows.amax(0)).all()
    pooled = reduce_statistics(mean, var, "pooled")
    assert torch.equal(pooled[0], averaged[0])
    assert (pooled[1] >= averaged[1]).all()
    if dtype != torch.float64:
        order = torch.randperm(ranks, generator=generator)
        for one, other in zip(averaged, reduce_statistics(mean[order], var[order]), strict=True):
            assert torch.equal(one, other)


def specs(**shapes: tuple[int, ...]) -> dict[str, TensorSpec | None]:
    return {
        name.replace("__", "."): TensorSpec("float32", shape, not name.endswith("tracked"))
        for name, shape in shapes.items()
    }


INTEGERS = TensorSpec("int64", (3,), False)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (specs(b__running_mean=(3,)), "no running_var"),
        (specs(b__running_mean=(3,), b__running_var=(4,)), r"no BatchNorm"),
        (specs(b__running_mean=(3,), b__running_var=(3,), b__weight=(4,)), "weight or bias"),
        (specs(b__running_mean=(3,), b__running_var=(3,), b__running_std=(3,)), '"running_std"'),
        (specs(b__running_mean=(2, 3, 4), b__running_var=(2, 3, 4)), "not BatchNorm"),
        (specs(b__running_mean=(), b__running_var=()), "not BatchNorm"),
        (specs(b__running_mean=(3,)) | {"b.running_var": INTEGERS}, "not floating-point"),
        (specs(b__running_var=(3,)) | {"b.running_mean": INTEGERS}, "not floating-point"),
    ],
)
def test_look_alikes_are_told_apart(keys: dict[str, TensorSpec | None], reason: str) -> None:
    (found,) = find_groups(keys)
    assert isinstance(found, LookAlike)
    assert reason in found.reason


@pytest.mark.parametrize(("number", "more"), [(1, ""), (2, " and 1 more"), (3, " and 2 more")])
def test_look_alikes_of_one_reason_are_told_in_one_line(number: int, more: str) -> None:
    found = find_groups({f"{name}.running_mean": INTEGERS for name in "abc"[:number]})
    alike = [item for item in found if isinstance(item, LookAlike)]
    assert describe(alike) == [f"a{more} left alone: {alike[0].reason}."]


def test_a_name_with_bn_in_it_means_nothing_and_running_mean_must_stand_alone() -> None:
    keys = specs(bn1__weight=(3,), bn1__bias=(3,), my_running_mean=(3,), my_running_var=(3,))
    assert find_groups(keys) == []
    (group,) = find_groups(specs(**{"x__running_mean": (8, 3), "x__running_var": (8, 3)}))
    assert isinstance(group, Group)
    assert (group.ranks, group.channels, group.keys) == (8, 3, ("x.running_mean", "x.running_var"))


def test_a_counter_of_the_wrong_shape_is_a_contradiction() -> None:
    shapes = {"b__running_mean": (8, 3), "b__running_var": (8, 3), "b__num_batches_tracked": ()}
    (group,) = find_groups(specs(**shapes))
    assert isinstance(group, Group)
    assert group.problem == "num_batches_tracked has shape () where (8,) was expected"


def test_resaving_is_deterministic_so_that_bytes_can_be_compared() -> None:
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        torch.save({"a": torch.arange(3), "b": [1.5, "x"]}, file)
    assert files[0].getvalue() == files[1].getvalue()
