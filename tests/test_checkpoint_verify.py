"""What ``verify`` finds between two files, and how it says so."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distbn_convert.checkpoint import convert_checkpoint, verify_checkpoint
from distbn_convert.errors import VerificationError

from .checkpoints import bn_state, save


def test_each_difference_is_told_also_where_numbers_are_the_same_objects(tmp_path: Path) -> None:
    """Python keeps one object of a small number, in whatever place it stands."""
    state = bn_state()
    paths = []
    for epoch in (1, 2):
        content = {"epoch": epoch, "model": state, "scheduler": {"last_epoch": epoch, "step": [4]}}
        paths.append(save(tmp_path, content, f"epoch{epoch}.pth"))
    told = r"differ: epoch: the values differ; scheduler\.last_epoch: the values differ\.$"
    with pytest.raises(VerificationError, match=told):
        verify_checkpoint(*paths)


@pytest.mark.parametrize(
    ("one", "two", "how"),
    [
        (1, "1", "int and str"),
        ([1], (1,), "list and tuple"),
        ([1], [1, 2], "only the second has 1"),
        ({"b": 1, "a": 2}, {"a": 2, "b": 1}, "the same keys in another order"),
        ([torch.zeros(2)], [torch.zeros(3)], r"0: shapes \(2,\) and \(3,\)"),
        ([torch.zeros(2)], [torch.zeros(2).half()], r"0: torch\.float32 and torch\.float16"),
        ([torch.zeros(2)], [torch.ones(2)], "0: the values differ"),
        ([torch.arange(9.0)[1:]], [torch.arange(9.0)[1:] + 1], "0: the values differ"),
        ([torch.arange(10)[1:].int()], [torch.arange(10)[1:].int() + 1], "0: the values differ"),
    ],
)
def test_how_the_rest_differs_is_told(tmp_path: Path, one: Any, two: Any, how: str) -> None:
    state = bn_state()
    paths = [
        save(tmp_path, {"model": state, "rest": rest}, f"{name}.pth")
        for name, rest in (("one", one), ("two", two), ("again", copy.deepcopy(one)))
    ]
    assert verify_checkpoint(paths[0], paths[2]).largest_difference == 0
    with pytest.raises(VerificationError, match=rf"differ: rest(: |\.){how}\.$"):
        verify_checkpoint(*paths[:2])


def test_what_one_file_has_alone_is_told_of_either(tmp_path: Path) -> None:
    state = bn_state()
    both = state | {key.replace("bn.", "other."): value for key, value in state.items()}
    one, two = save(tmp_path, state, "one.pth"), save(tmp_path, both, "two.pth")
    for files, which in ((one, two), "second"), ((two, one), "first"):
        told = (
            rf"the BatchNorm other is in the {which} alone; other\.weight is in the {which} alone"
        )
        with pytest.raises(VerificationError, match=rf"{told}; .* \(and 1 more\)\.$"):
            verify_checkpoint(*files)


def test_other_numbers_of_ranks_are_told_as_shapes(tmp_path: Path) -> None:
    path = save(tmp_path, bn_state())
    for ranks in (2, 4):
        convert_checkpoint(path, tmp_path / f"{ranks}.pth", ranks)
    told = r"bn\.running_mean is float32 \(2, 3\) and float32 \(4, 3\); bn\.running_var"
    with pytest.raises(VerificationError, match=told):
        verify_checkpoint(tmp_path / "2.pth", tmp_path / "4.pth")


def test_statistics_may_differ_by_the_tolerance(tmp_path: Path) -> None:
    paths = []
    for added in (0.0, 0.25):
        mean = torch.tensor([1.0, math.nan, math.inf]) + added
        paths.append(save(tmp_path, bn_state_like(mean), f"{added}.pth"))
    assert verify_checkpoint(*paths, tolerance=0.25).largest_difference == 0.25
    with pytest.raises(VerificationError, match=r"differ: bn\.running_mean differs by 0\.25\.$"):
        verify_checkpoint(*paths, tolerance=0.24)


@pytest.mark.parametrize("other", [math.nan, -math.inf, 5.0])
def test_what_is_no_number_is_within_no_tolerance(tmp_path: Path, other: float) -> None:
    means = torch.tensor([1.0, 2.0, math.inf]), torch.tensor([1.0, 2.0, other])
    paths = [save(tmp_path, bn_state_like(mean), f"{i}.pth") for i, mean in enumerate(means)]
    with pytest.raises(VerificationError, match=r"bn\.running_mean differs by inf\.$"):
        verify_checkpoint(*paths, tolerance=1e30)


def bn_state_like(mean: torch.Tensor) -> dict[str, torch.Tensor]:
    """A state dict that is the same but for its mean."""
    torch.manual_seed(0)
    return bn_state(**{"bn.running_mean": mean})


def test_requires_grad_counts_where_both_formats_have_it(tmp_path: Path) -> None:
    state = {
        key: nn.Parameter(value) if value.is_floating_point() else value
        for key, value in bn_state().items()
    }
    path = save(tmp_path, state)
    convert_checkpoint(path, tmp_path / "v.safetensors", 2, format="safetensors")
    for files in (path, tmp_path / "v.safetensors"), (tmp_path / "v.safetensors", path):
        assert verify_checkpoint(*files).largest_difference == 0
    frozen = {key: value.detach() for key, value in state.items()}
    with pytest.raises(VerificationError, match=r"differ: bn\.weight differs; bn\.bias differs\.$"):
        verify_checkpoint(path, save(tmp_path, frozen, "frozen.pth"))


def test_parameters_must_be_the_same_and_counters_on_both_sides(tmp_path: Path) -> None:
    state = bn_state()
    one = save(tmp_path, state, "one.pth")
    two = save(tmp_path, state | {"bn.weight": state["bn.weight"] + 1e-6}, "two.pth")
    with pytest.raises(VerificationError, match=r"differ: bn\.weight differs\.$"):
        verify_checkpoint(one, two, tolerance=1.0)
    del state["bn.num_batches_tracked"]
    for files in (one, save(tmp_path, state)), (save(tmp_path, state), one):
        with pytest.raises(VerificationError, match="bn has num_batches_tracked in one file alone"):
            verify_checkpoint(*files)
