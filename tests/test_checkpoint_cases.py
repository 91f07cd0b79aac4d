"""The forty cases that the conversion of checkpoints was specified by, and where they are tested.

A test says which case it is of in its name or its docstring.
"""

from __future__ import annotations

import ast
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distbn_convert.checkpoint import convert_checkpoint, revert_checkpoint
from distbn_convert.errors import FileAccessError, OutputExistsError

from .checkpoints import (
    BATCH_NORMS,
    Net,
    bn_state,
    load,
    repickled,
    resaved,
    round_trip,
    run_cli,
    save,
    torchvision_style,
)

CASES = {
    1: "converted and reverted is bit-identical in every dtype",
    2: "denormals are kept",
    3: "NaN and infinities are carried through, counted and told; strict refuses",
    4: "large values do not overflow; a result that does is an error",
    5: "one rank is allowed; 0, negative and more than 65536 are wrong usage",
    6: "a rank that is not there is wrong usage",
    7: "several V revert if the rank fits all; V that differ within a group are damage",
    8: "no BatchNorm is nothing to do, and no output",
    9: "already virtual is nothing to do; a mixture is told; strict refuses",
    10: "no weight and bias",
    11: "no num_batches_tracked; none is made up",
    12: "InstanceNorm looks the same, which is documented; exclude works",
    13: "RunningMeanStd is skipped and told",
    14: "a BatchNorm without prefix",
    15: "prefixes of wrappers are kept",
    16: "each BatchNorm of timm's SplitBatchNorm is judged on its own",
    17: "EMA copies are converted too; state narrows",
    18: "MMCV's underscore copies are told, and converted on request",
    19: "both encoders of MoCo",
    20: "optimizer, scheduler, scaler, random state and epoch; the run resumes",
    21: "argparse.Namespace and numpy scalars are accepted",
    22: "unknown objects are refused by name; opaque carries and lists them",
    23: "a payload never runs, and is listed",
    24: "cycles, shared parts, odd keys",
    25: "tied BatchNorms stay tied",
    26: "views of one storage",
    27: "strides of other tensors",
    28: "what safetensors cannot hold is refused; state extracts",
    29: "metadata, order and names of safetensors",
    30: "a BatchNorm across two shards",
    31: "an index that points elsewhere, or disagrees with its shards",
    32: "a damaged safetensors header is as unreadable as to the package, a key twice as well",
    33: "a deflated zip, and a bomb",
    34: "whatever is no checkpoint, or damaged, is one line",
    35: "TorchScript, torch.export, whole modules, Ultralytics get their own advice",
    36: "a file saved on a GPU",
    37: "the same file under any name needs in_place, which keeps mode and owner",
    38: "disk full, quota, limits, read-only, no folder: told with sizes, the old output intact",
    39: "signals while writing",
    40: "DTensors, folders of DCP, files of several ranks",
}
TESTS = Path(__file__).parent


def cases_in(text: str) -> Iterator[int]:
    """Yield the numbers of ``Case 3``, ``cases 1, 2 and 5``, ``test_case_10_and_11_...``."""
    for numbers in re.findall(r"\bcases? (\d+(?:(?:, | and | )\d+)*)", text, re.IGNORECASE):
        yield from map(int, re.findall(r"\d+", numbers))


def test_every_case_has_a_test() -> None:
    tested: set[int] = set()
    for file in TESTS.glob("test_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                words = node.name.removeprefix("test_").replace("_", " ")
                tested.update(cases_in(f"{words}\n{ast.get_docstring(node)}"))
    assert sorted(CASES.keys() - tested) == []
    assert sorted(tested - CASES.keys()) == []
    assert sorted(CASES) == list(range(1, 41))


def test_numbers_of_cases_are_found_in_names_and_docstrings() -> None:
    assert list(cases_in("case 10 and 11 missing affine")) == [10, 11]
    assert list(cases_in("Cases 15, 17 and 21: of 3 kinds")) == [15, 17, 21]
    assert list(cases_in("these cases have 3 tensors, in case of 4")) == []


@pytest.mark.parametrize(
    ("case", "arguments", "message"),
    [
        (5, ["convert", "plain", "o", "--vt-world-size", "0"], "from 1 to 65536"),
        (5, ["convert", "plain", "o", "--vt-world-size", "-1"], "from 1 to 65536"),
        (5, ["convert", "plain", "o", "--vt-world-size", "65537"], "from 1 to 65536"),
        (6, ["revert", "v", "o", "--reduction", "select", "--rank", "8"], "from 0 to 7"),
        (6, ["revert", "v", "o", "--reduction", "select", "--rank", "-1"], "from 0 to 7"),
    ],
)
def test_wrong_numbers_are_wrong_usage(
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    case: int,
    arguments: list[str],
    message: str,
) -> None:
    """Cases 5 and 6 on the command line."""
    monkeypatch.chdir(tmp_path)
    convert_checkpoint(save(tmp_path, bn_state(), "plain"), "v", 8)
    done = run_cli(capsys, *arguments)
    assert (done.code, done.out) == (2, ""), case
    assert message in done.err
    assert sorted(os.listdir()) == ["plain", "v"]


def test_case_05_as_many_ranks_as_allowed(tmp_path: Path) -> None:
    path = save(tmp_path, bn_state(2))
    convert_checkpoint(path, tmp_path / "v", 65536)
    assert load(tmp_path / "v")["bn.running_var"].shape == (65536, 2)
    revert_checkpoint(tmp_path / "v", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == resaved(path)


def test_case_07_only_one_statistic_with_ranks_is_damage(tmp_path: Path, capsys: Any) -> None:
    mixed = bn_state(3, **{"bn.running_mean": torch.rand(8, 3)})
    path = save(tmp_path, mixed)
    for command in (["revert"], ["convert", "--vt-world-size", 2]):
        done = run_cli(capsys, *command, path, tmp_path / "o")
        assert done.code == 5
        assert "running_mean has 8 ranks but running_var has no ranks" in done.err
    assert os.listdir(tmp_path) == ["in.pth"]


def test_case_12_the_readme_says_that_instance_norm_looks_the_same() -> None:
    text = " ".join((TESTS.parent / "README.md").read_text(encoding="utf-8").split())
    assert re.search(r"InstanceNorm with running statistics has the same keys .* `--exclude", text)


def test_case_02_denormals_survive_where_torch_flushes_them(tmp_path: Path) -> None:
    tiny = torch.tensor([5.6e-45, 1.4e-45, 0.0, 1e-40])
    path = save(tmp_path, bn_state(4, **{"bn.running_var": tiny}))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        back = round_trip(path, 7)
    finally:
        torch.set_flush_denormal(False)
    assert back.read_bytes() == resaved(path)


def test_case_17_both_models_of_mmengine_are_converted_where_they_are(tmp_path: Path) -> None:
    """Its EMAHook swaps the two on saving, so that neither name says which one is averaged."""
    live, averaged = Net().state_dict(), Net().state_dict(prefix="module.")
    content = {
        "meta": {"epoch": 3, "dataset_meta": {"classes": ("cat", "dog")}},
        "state_dict": live,
        "message_hub": {"log_scalars": {}, "runtime_info": {"iter": 7}},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "ema_state_dict": {"steps": torch.tensor(7), **averaged},
    }
    path = save(tmp_path, content)
    assert round_trip(path, 4).read_bytes() == resaved(path)
    virtual = load(tmp_path / "virtual")
    assert torch.equal(virtual["state_dict"]["head.running_mean"][3], live["head.running_mean"])
    assert virtual["ema_state_dict"]["module.head.running_mean"].shape == (4, 4)
    assert virtual["ema_state_dict"]["steps"].item() == 7
    for name, other in (("state_dict", "ema_state_dict"), ("ema_state_dict", "state_dict")):
        report = convert_checkpoint(path, tmp_path / name, 4, state=name)
        assert report.counts == {"converted": BATCH_NORMS, "skipped": BATCH_NORMS}
        left = load(tmp_path / name)[other]
        assert all(torch.equal(left[key], value) for key, value in content[other].items())


def test_case_36_a_cuda_tagged_file_works_without_a_gpu(tmp_path: Path) -> None:
    path = save(tmp_path, {"model": bn_state()})
    tagged = repickled(path, b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert round_trip(tagged).read_bytes() == resaved(path)


@pytest.mark.parametrize("spelling", ["same", "dot", "symlink", "hardlink"])
def test_case_37_the_same_file_by_any_name_needs_in_place(tmp_path: Path, spelling: str) -> None:
    path = torchvision_style(tmp_path / "in.pth")
    before = path.read_bytes()
    dst = tmp_path / "link.pth"
    if spelling == "symlink":
        dst.symlink_to(path)
    elif spelling == "hardlink":
        os.link(path, dst)
    else:
        dst = Path(f"{tmp_path}/./in.pth") if spelling == "dot" else path
    with pytest.raises(OutputExistsError, match="same file"):
        convert_checkpoint(path, dst, 2, overwrite=True)
    assert path.read_bytes() == before


def test_case_37_in_place_keeps_the_mode_and_a_backup(tmp_path: Path) -> None:
    path = torchvision_style(tmp_path / "in.pth")
    before = path.read_bytes()
    path.chmod(0o640)
    report = convert_checkpoint(path, None, 2, in_place=True)
    assert report.counts == {"converted": 2 * BATCH_NORMS}
    assert path.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "in.pth.bak").read_bytes() == before
    with pytest.raises(OutputExistsError, match=r"in\.pth\.bak exists"):
        revert_checkpoint(path, path, in_place=True)
    revert_checkpoint(path, path, in_place=True, backup=False)
    assert path.read_bytes() == resaved(tmp_path / "in.pth.bak")
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "in.pth.bak"]


def test_case_37_in_place_through_a_link_replaces_its_target(tmp_path: Path) -> None:
    path = torchvision_style(tmp_path / "in.pth")
    content = load(path) | {"weights": torch.rand(500, 1000)}
    torch.save(content, path)
    before = path.read_bytes()
    path.chmod(0o604)
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
    owner = (path.stat().st_uid, path.stat().st_gid)
    (tmp_path / "link.pth").symlink_to("in.pth")
    os.link(path, tmp_path / "hard.pth")
    convert_checkpoint(tmp_path / "link.pth", tmp_path / "link.pth", 2, in_place=True)
    assert os.readlink(tmp_path / "link.pth") == "in.pth"
    assert load(path)["model"]["head.running_mean"].shape == (2, 4)
    assert torch.equal(load(path)["weights"], content["weights"])
    assert (path.stat().st_uid, path.stat().st_gid) == owner
    assert path.stat().st_mode & 0o777 == 0o604
    for kept in ("hard.pth", "in.pth.bak"):
        assert (tmp_path / kept).read_bytes() == before


@pytest.mark.parametrize("spelling", ["in.pth", "./in.pth", "link.pth", "hard.pth"])
def test_case_37_the_same_file_ends_the_command_with_status_6(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = save(tmp_path, bn_state()).read_bytes()
    Path("link.pth").symlink_to("in.pth")
    os.link("in.pth", "hard.pth")
    done = run_cli(capsys, "convert", "in.pth", spelling, "--vt-world-size", 2, "--force")
    assert done.code == 6
    assert "Use in_place=True (--in-place)" in done.err
    assert Path("in.pth").read_bytes() == before


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.ENOSPC, errno.EFBIG])
@pytest.mark.parametrize("kind", ["torch", "safetensors", "accelerate"])
def test_case_38_what_has_no_room_is_told_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, code: int
) -> None:
    """Also a quota, which nobody can set in a test: the write fails as it would there."""
    state = Net().state_dict() | {"weights": torch.rand(300_000)}
    source, target = tmp_path / "in", tmp_path / "out"
    if kind == "torch":
        torch.save(state, source)
    elif kind == "safetensors":
        save_file(state, source)
    else:
        source.mkdir()
        save_file(state, source / "model.safetensors")
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("distbn_convert.checkpoint.atomic._Raw.write", full)
    with pytest.raises(FileAccessError, match=r" \(needs 1\.2 MB[,)]") as caught:
        convert_checkpoint(source, target, 2, overwrite=True)
    assert (caught.value.exit_code, caught.value.errno) == (7, code)
    assert os.strerror(code).lower() in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_case_38_a_missing_folder_is_told_and_not_made(tmp_path: Path, capsys: Any) -> None:
    path = save(tmp_path, bn_state())
    done = run_cli(capsys, "convert", path, tmp_path / "no" / "o", "--vt-world-size", 2)
    assert done.code == 7
    assert "no does not exist; make it first" in done.err
    assert os.listdir(tmp_path) == ["in.pth"]
