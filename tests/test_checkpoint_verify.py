"""What ``verify`` finds between two files, and how it says so."""

from __future__ import annotations

import copy
import enum
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from distbn_convert.checkpoint import convert_checkpoint, verify_checkpoint
from distbn_convert.errors import NothingToDoError, RefusedError, VerificationError

from .checkpoints import bn_state, load, save


class Color(enum.Enum):
    RED = 1


class Text(str):
    pass


def dcp_save(folder: Path, content: dict[str, Any]) -> Path:
    dcp.save(content, checkpoint_id=folder, no_dist=True)
    return folder


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


@pytest.mark.parametrize("state", ["ema.model", "a.b"])
def test_a_sub_tree_whose_key_has_dots_is_compared(tmp_path: Path, state: str) -> None:
    content = {"ema.model": {**bn_state(), "conv": torch.zeros(3)}, "a": {"b": bn_state()}}
    path = save(tmp_path, content, "in.pth")
    flat = tmp_path / "flat.safetensors"
    convert_checkpoint(path, flat, 2, format="safetensors", state=state)
    for files in (path, path), (path, flat), (flat, path):
        report = verify_checkpoint(*files, state=state)
        assert (report.groups, report.largest_difference, report.warnings) == (1, 0.0, ())
    content["ema.model"]["conv"] = torch.ones(3)
    content["a"] = {"b": content["a"]["b"] | {"conv": torch.ones(3)}}
    other = save(tmp_path, content, "other.pth")
    for files in (path, other), (other, flat):
        with pytest.raises(VerificationError, match=r"differ: \S+\.conv (differs|is in the)"):
            verify_checkpoint(*files, state=state)


def test_sub_trees_that_are_spelled_alike_are_all_compared(tmp_path: Path) -> None:
    content = {"a.b": bn_state(), "a": {"b": {"x": torch.zeros(2)}}}
    path = save(tmp_path, content, "in.pth")
    assert verify_checkpoint(path, path, state="a.b").groups == 1
    content["a"]["b"]["x"] += 1
    with pytest.raises(VerificationError, match=r"differ: a\.b\.x differs\.$"):
        verify_checkpoint(path, save(tmp_path, content, "other.pth"), state="a.b")


@pytest.mark.parametrize("against", [True, False])
@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"model": bn_state(), "ema": {"module": bn_state()}}, "model, ema.module"),
        (bn_state(), r"\(top level\)"),
        ({"model": {"weight": torch.ones(2)}}, "none"),
    ],
)
def test_a_sub_tree_that_is_not_there_is_an_error(
    tmp_path: Path, content: Any, names: str, against: bool
) -> None:
    path = save(tmp_path, content)
    told = rf"in\.pth has nothing at --state modell; its state dicts with BatchNorms: {names}\.$"
    with pytest.raises(NothingToDoError, match=told):
        verify_checkpoint(path, path if against else None, state="modell")


@pytest.mark.parametrize("state", [None, "model"])
def test_tensors_in_lists_are_compared_in_sub_trees_too(tmp_path: Path, state: str | None) -> None:
    model = bn_state()
    paths = [
        save(tmp_path, {"model": {**model, "list": [value], "epoch": 1}}, f"{number}.pth")
        for number, value in enumerate((torch.zeros(2), torch.zeros(2), torch.ones(2)))
    ]
    assert verify_checkpoint(*paths[:2], state=state).warnings == ()
    with pytest.raises(VerificationError, match=r"differ: model\.list\.0: the values differ\.$"):
        verify_checkpoint(*paths[1:], state=state)


@pytest.mark.parametrize("number", range(6))
def test_keys_that_equal_nothing_but_themselves_are_compared(tmp_path: Path, number: int) -> None:
    keys: list[Any] = [
        nn.Parameter(torch.rand(2)),
        (torch.ones(2), 3),
        math.nan,
        Color.RED,
        Text("a"),
        (math.nan, Color.RED),
    ]
    key, same = keys[number], nn.Parameter(torch.zeros(2))
    state = {key: {"buffer": torch.zeros(3)}, same: torch.ones(1), nn.Parameter(same.clone()): 2}
    content = {"model": bn_state(), "state": state, "by": {key: bn_state()}}
    one, two = (save(tmp_path, content, f"{name}.pth") for name in ("one", "two"))
    convert_checkpoint(one, tmp_path / "virtual", 2, opaque=True)
    for other in (two, tmp_path / "virtual"):
        report = verify_checkpoint(one, other, opaque=True)
        assert (report.groups, report.largest_difference) == (2, 0.0)
    state[key]["buffer"][0] = 1
    with pytest.raises(VerificationError, match=r"differ: state\..+\.buffer differs\.$"):
        verify_checkpoint(one, save(tmp_path, content, "other.pth"), opaque=True)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
def test_objects_of_distributed_checkpoints_are_compared(tmp_path: Path) -> None:
    model = bn_state()
    content = {"model": model, "epoch": 0, "opt": {"lr": 0.5, "step": torch.tensor(3)}}
    one, two = (dcp_save(tmp_path / name, content) for name in ("one", "two"))
    assert verify_checkpoint(one, two).warnings == ()
    other = dcp_save(tmp_path / "other", content | {"epoch": 1, "opt": {"lr": 0.1}})
    told = r"differ: opt\.step is in the first alone; epoch differs; opt\.lr differs\.$"
    with pytest.raises(VerificationError, match=told):
        verify_checkpoint(one, other)
    assert verify_checkpoint(one, other, state="model").groups == 1
    flat = tmp_path / "flat.safetensors"
    tensors = {f"model.{key}": value for key, value in model.items()}
    save_file(tensors | {"opt.step": torch.tensor(3)}, flat)
    report = verify_checkpoint(flat, one)
    assert report.groups == 1
    assert report.warnings == (f"epoch and 1 more in {one} had no counterpart in {flat}.",)
    convert_checkpoint(one, tmp_path / "model.safetensors", 2, state="model", format="safetensors")
    assert verify_checkpoint(tmp_path / "model.safetensors", one, state="model").groups == 1


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.parametrize(
    ("rest", "place", "alone"),
    [
        ({"rng": [torch.zeros(2), torch.ones(2)]}, "rng.1", None),
        ({"ema": None}, "ema.bn.weight", None),
        ({"groups": [{"a": torch.ones(2)}, [[torch.ones(2), 3]]]}, "groups.1.0.0", "groups.1.0.1"),
        ({"groups": [{"lr": 0.1, "params": [0, 1]}], "x": torch.ones(2)}, "x", "groups.0.lr and 1"),
        ({"pair": ([torch.ones(2)], {"a": torch.ones(2)}), "x": torch.ones(2)}, "x", "pair"),
    ],
)
def test_a_file_and_a_distributed_checkpoint_hold_the_same(
    tmp_path: Path, rest: dict[str, Any], place: str, alone: str | None
) -> None:
    """Lists have a name for each tensor there, and what is one object under two keys is twice."""
    model = bn_state()
    content = {"model": model, **{k: model if v is None else v for k, v in rest.items()}}
    files = save(tmp_path, content), dcp_save(tmp_path / "in", content)
    for pair in (files, files[::-1]):
        report = verify_checkpoint(*pair)
        assert (report.groups, report.largest_difference) == (2 if "ema" in rest else 1, 0)
        assert len(report.warnings) == (2 if alone else 0)
        assert all(line.startswith(f"{alone}") for line in report.warnings)
    content = copy.deepcopy(content)
    node: Any = content
    for key in place.split(".", 1 + 9 * ("ema" not in place)):
        node = node[int(key) if isinstance(node, list) else key]
    node.add_(1)
    with pytest.raises(VerificationError, match=rf"differ: .*{place} differs"):
        verify_checkpoint(save(tmp_path, content, "other.pth"), files[1])


class Unknown(dict[str, Any]):
    """Has a class, which distributed checkpoints do not keep, and items, which they do."""


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.parametrize(
    ("rest", "in_both"), [((bn_state(),), {}), (Unknown(a=torch.ones(2)), {"a": torch.ones(2)})]
)
def test_what_a_distributed_checkpoint_lacks_is_told(
    tmp_path: Path, rest: Any, in_both: dict[str, Any]
) -> None:
    model = bn_state()
    path = save(tmp_path, {"model": model, "rest": rest})
    folder = dcp_save(tmp_path / "in", {"model": model, "rest": in_both})
    for pair in ((path, folder), (folder, path)):
        (warning,) = verify_checkpoint(*pair, opaque=True).warnings
        assert warning.startswith(f"rest in {path} had no counterpart")


@pytest.mark.parametrize("keys", [("a", "b"), ("b", "a")])
def test_what_a_flat_file_lacks_of_a_shared_state_dict_is_told(
    tmp_path: Path, keys: tuple[str, str]
) -> None:
    model = bn_state()
    path = save(tmp_path, dict.fromkeys(keys, model))
    both = {f"{key}.{name}": value.clone() for key in keys for name, value in model.items()}
    save_file(both, tmp_path / "both.safetensors")
    assert verify_checkpoint(path, tmp_path / "both.safetensors").groups == 2
    save_file({n: t for n, t in both.items() if n[0] == "a"}, tmp_path / "one.safetensors")
    with pytest.raises(VerificationError, match=r"the BatchNorm b\.bn is in the first alone"):
        verify_checkpoint(path, tmp_path / "one.safetensors")


def test_what_is_shared_ever_more_often_is_not_spelled_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distbn_convert.checkpoint.tree._MOST_PLACES", 1000)
    tree: Any = bn_state()
    save_file(bn_state(), tmp_path / "flat.safetensors")
    for _ in range(10):
        tree = {"a": tree, "b": tree, "c": [1]}
    tree["c"].append(tree)  # a cycle
    with pytest.raises(RefusedError, match="shared objects in more than 1,000 places, too many"):
        verify_checkpoint(save(tmp_path, tree), tmp_path / "flat.safetensors")


def test_many_objects_that_are_not_shared_are_spelled_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the names and labels of a data set are."""
    monkeypatch.setattr("distbn_convert.checkpoint.tree._MOST_PLACES", 10)
    model, samples = bn_state(), [(str(number), number) for number in range(20)]
    save_file(model, tmp_path / "flat.safetensors")
    path = save(tmp_path, {"model": model, "samples": samples})
    assert verify_checkpoint(path, tmp_path / "flat.safetensors", state="model").groups == 1


def test_what_one_format_alone_can_hold_is_told(tmp_path: Path) -> None:
    path = save(tmp_path, {"model": bn_state(), "epoch": 3, "rng": [torch.zeros(2)], "groups": []})
    flat = tmp_path / "flat.safetensors"
    save_file({f"model.{key}": value for key, value in load(path)["model"].items()}, flat)
    report = verify_checkpoint(path, flat)
    assert report.warnings == (f"epoch and 1 more in {path} had no counterpart in {flat}.",)
    assert verify_checkpoint(path, path).warnings == ()


def folder(path: Path, **files: str) -> Path:
    """A folder of safetensors with other files in it."""
    (path / "logs").mkdir(parents=True)
    torch.manual_seed(0)
    save_file(bn_state(), path / "model.safetensors")
    for name, content in files.items():
        (path / name.replace("__", "/").replace("_", ".")).write_text(content)
    return path


def test_metadata_of_safetensors_are_compared(tmp_path: Path) -> None:
    """But for the format, which every file that we write names."""
    state, one, two = bn_state(), tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(state, one, metadata={"format": "pt", "step": "1"})
    save_file(state, two, metadata={"step": "1"})
    convert_checkpoint(one, tmp_path / "shards", 2, max_shard_size=40)
    verify_checkpoint(tmp_path / "shards", two)
    for metadata in ({"step": "2"}, None):
        save_file(state, two, metadata=metadata)
        for other in (one, tmp_path / "shards"):
            with pytest.raises(VerificationError, match="differ: the metadata 'step' differs"):
                verify_checkpoint(other, two)


def test_shards_of_torch_have_no_place_for_metadata(tmp_path: Path) -> None:
    state, shard, flat = bn_state(), "pytorch_model-00001-of-00001.bin", tmp_path / "a.safetensors"
    save_file(state, flat, metadata={"step": "1"})
    (tmp_path / "shards").mkdir()
    torch.save(state, tmp_path / "shards" / shard)
    index = {"weight_map": dict.fromkeys(state, shard)}
    (tmp_path / "shards" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    verify_checkpoint(tmp_path / "shards", flat)


def test_files_beside_the_weights_are_compared(tmp_path: Path) -> None:
    files = {"optimizer_bin": "1", "state_json": "{}", "logs__events": "a"}
    one, two = (folder(tmp_path / name, **files) for name in ("one", "two"))
    convert_checkpoint(two, tmp_path / "v", 2)
    for other in (two, tmp_path / "v"):
        assert not any("counterpart" in line for line in verify_checkpoint(one, other).warnings)
    other = folder(tmp_path / "other", **files | {"optimizer_bin": "2", "logs__events": "b"})
    with pytest.raises(
        VerificationError, match=r"differ: logs/events differs; optimizer\.bin differs"
    ):
        verify_checkpoint(one, other)
    less = folder(tmp_path / "less", optimizer_bin="1", notes_txt="")
    told = verify_checkpoint(one, less).warnings
    assert f"logs/events and 1 more in {one} had no counterpart in {less}." in told
    assert f"notes.txt in {less} had no counterpart in {one}." in told
    told = verify_checkpoint(one, one / "model.safetensors").warnings
    assert any(line.startswith(f"logs/events and 2 more in {one} had no") for line in told)
