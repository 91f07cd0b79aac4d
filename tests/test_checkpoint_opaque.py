"""Unknown Python objects in files of torch are carried through, unexecuted, and compared."""

from __future__ import annotations

import collections
import enum
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import nn

from distbn_convert.checkpoint import (
    convert_checkpoint,
    inspect_checkpoint,
    revert_checkpoint,
    verify_checkpoint,
)
from distbn_convert.errors import (
    NothingToDoError,
    ReadError,
    RefusedError,
    VerificationError,
)

from .checkpoints import Net, bn_state, load, repickled

LEFT_ALONE = (
    "left alone: its running_mean or running_var is no plain tensor (but a NumPy array, say), or "
    "in a Python object; save it as a tensor."
)
ZIPPED = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Config(dict):  # type: ignore[type-arg]
    """A dictionary of a training framework, with an attribute."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.frozen = True


class Settings(Config):
    pass


class Custom:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and self.value == other.value


class Listed(list):  # type: ignore[type-arg]
    pass


class Pair(NamedTuple):
    first: Any
    second: Any


class Subclass(torch.Tensor):
    pass


class Color(enum.Enum):
    RED = 1
    GREEN = 2
    BLUE = 3


def odd_objects() -> dict[str, Any]:
    """What frameworks save and the safe loader refuses."""
    queues = collections.defaultdict(list)
    queues["loss"].append(0.5)
    return {
        "defaultdict": queues,
        "deque": collections.deque([1, 2], maxlen=4),
        "range": range(3, 9),
        "config": Config(lr=0.1, layers=[1, 2]),
        "custom": Custom({"tensor": torch.arange(3), "nested": Custom(2)}),
        "array": numpy.arange(6.0).reshape(2, 3),
        "set": {3},
        "bytes": b"\x00\xff",
        "type": Custom,
        "slice": slice(1, 5),
        "complex": 1 + 2j,
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
    }


def save(path: Path, content: Any, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@ZIPPED
def test_case_22_odd_objects_are_refused_by_name_and_carried_with_opaque(
    tmp_path: Path, zipped: bool
) -> None:
    path = save(tmp_path / "in.pth", {"model": Net().state_dict(), **odd_objects()}, zipped)
    with pytest.raises(RefusedError, match=r"collections\.defaultdict \(\d+ more\).*--opaque"):
        convert_checkpoint(path, tmp_path / "no.pth", 4)
    assert not (tmp_path / "no.pth").exists()
    report = convert_checkpoint(path, tmp_path / "v.pth", 4, opaque=True)
    listed = report.to_dict()["opaque_globals"]
    assert {f"{__name__}.Config", f"{__name__}.Custom", "collections.deque"} <= set(listed)
    assert not any(name.startswith("torch.") for name in listed)  # they are no strangers
    revert_checkpoint(tmp_path / "v.pth", tmp_path / "back.pth", opaque=True)
    original, back = load(path), load(tmp_path / "back.pth")
    assert list(back) == list(original)
    for name in odd_objects():
        assert type(back[name]) is type(original[name])
        if name == "array":
            assert numpy.array_equal(back[name], original[name])
        elif name == "custom":
            assert torch.equal(back[name].value["tensor"], original[name].value["tensor"])
            assert back[name].value["nested"] == original[name].value["nested"]
        else:
            assert back[name] == original[name]
    assert back["config"].frozen is True
    assert back["deque"].maxlen == 4
    assert back["defaultdict"].default_factory is list
    for key, value in original["model"].items():
        assert torch.equal(back["model"][key], value)
    assert back["model"]._metadata == original["model"]._metadata


@ZIPPED
def test_tensors_with_attributes_and_of_subclasses_are_carried_with_opaque(
    tmp_path: Path, zipped: bool
) -> None:
    tensors = {
        "tensor": torch.randn(3),
        "parameter": nn.Parameter(torch.randn(2)),
        "subclass": torch.randn(4).as_subclass(Subclass),
    }
    for name, tensor in tensors.items():
        tensor.of_mine = name  # type: ignore[attr-defined]
    path = save(tmp_path / "in.pth", {**bn_state(), **tensors, **odd_objects()}, zipped)
    convert_checkpoint(path, tmp_path / "v.pth", 4, opaque=True)
    revert_checkpoint(tmp_path / "v.pth", tmp_path / "back.pth", opaque=True)
    back = load(tmp_path / "back.pth")
    for name, tensor in tensors.items():
        assert type(back[name]) is type(tensor)
        assert vars(back[name]) == {"of_mine": name}
        assert torch.equal(back[name], tensor)


def test_untyped_storages_are_carried_with_opaque(tmp_path: Path) -> None:
    storage = torch.arange(3.0).untyped_storage()
    path = save(tmp_path / "in.pth", {**bn_state(), "storage": storage})
    convert_checkpoint(path, tmp_path / "v.pth", 2, opaque=True)
    convert_checkpoint(path, tmp_path / "same.pth", 2)
    assert (tmp_path / "v.pth").read_bytes() == (tmp_path / "same.pth").read_bytes()
    assert load(tmp_path / "v.pth")["storage"]._untyped_storage.tolist() == storage.tolist()


def test_statistics_that_opaque_does_not_look_into_are_told(tmp_path: Path) -> None:
    two = nn.BatchNorm2d(3).state_dict(prefix="two.")
    two["two.running_var"].of_mine = 1
    path = save(tmp_path / "in.pth", {**bn_state(), **two})
    assert convert_checkpoint(path, tmp_path / "all.pth", 2).counts == {"converted": 2}
    report = convert_checkpoint(path, tmp_path / "one.pth", 2, opaque=True)
    assert report.counts == {"converted": 1}
    assert f"two {LEFT_ALONE}" in report.warnings
    path = save(path, {**bn_state(), "two.running_mean": 0.5, "two.running_var": 0.25})
    report = convert_checkpoint(path, tmp_path / "numbers.pth", 2)
    assert f"two {LEFT_ALONE}" in report.warnings


def test_lists_are_looked_into_with_opaque_and_what_is_in_other_objects_is_told(
    tmp_path: Path,
) -> None:
    """Pickled modules keep their statistics in such objects, where ranks would break them."""
    queue, pair = collections.deque([bn_state()]), Pair(bn_state(), 3)
    objects = {"pair": pair, "custom": Custom(bn_state()), "module": nn.BatchNorm2d(3)}
    told = [f"pair.args.0.bn and 2 more {LEFT_ALONE}"]
    path = save(tmp_path / "in.pth", {"list": Listed([bn_state(), 3]), "queue": queue, **objects})
    report = inspect_checkpoint(path, opaque=True)
    assert [group.name for group in report.groups] == ["list.0.bn", "queue.0.bn"]
    assert report.tensors == 5 * 5
    assert list(report.warnings) == told
    assert convert_checkpoint(path, tmp_path / "v.pth", 2, opaque=True).warnings == (*told,)
    virtual = load(tmp_path / "v.pth")
    assert type(virtual["list"]) is Listed
    assert virtual["list"][0]["bn.running_var"].shape == (2, 3)
    assert virtual["queue"][0]["bn.running_var"].shape == (2, 3)
    assert virtual["pair"].first["bn.running_var"].shape == (3,)
    verify_checkpoint(tmp_path / "v.pth", path, opaque=True)
    revert_checkpoint(tmp_path / "v.pth", tmp_path / "back.pth", opaque=True)
    verify_checkpoint(tmp_path / "back.pth", path, opaque=True)
    with pytest.raises(RefusedError, match=r"dict with --state list\.0 or --state queue\.0\.$"):
        convert_checkpoint(path, tmp_path / "no", 2, opaque=True, format="safetensors")
    alone = save(tmp_path / "alone.pth", objects)
    with pytest.raises(NothingToDoError, match=r"\(15 tensors\)\. pair\.args\.0\.bn and 2"):
        convert_checkpoint(alone, tmp_path / "no.pth", 2, opaque=True)


class Table(dict):  # type: ignore[type-arg]
    """Of a class of yours, with an attribute."""


def test_one_state_dict_of_unknown_containers_is_taken_and_compared(tmp_path: Path) -> None:
    table = Table(bn_state())
    table.extra = torch.ones(3)
    content = {"list": Listed([bn_state(), bn_state()]), "table": table, "o": Custom(bn_state())}
    path = save(tmp_path / "in.pth", content)
    for state in ("list.1", "table"):
        dst, options = tmp_path / f"{state}.pth", {"opaque": True, "state": state}
        convert_checkpoint(path, dst, 2, format="torch", **options)
        assert verify_checkpoint(dst, path, **options).groups == 1
    assert load(tmp_path / "table.pth").extra.tolist() == [1, 1, 1]
    with pytest.raises(NothingToDoError, match="has nothing at --state o.absent"):
        verify_checkpoint(path, path, opaque=True, state="o.absent")
    verify_checkpoint(path, path, opaque=True, state="o.states.0")


def test_long_chains_of_unknown_objects_are_opened(tmp_path: Path) -> None:
    chain = None
    for _ in range(400):
        chain = Custom(chain)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10000)
    try:
        path = save(tmp_path / "in.pth", {"model": bn_state(), "chain": chain})
    finally:
        sys.setrecursionlimit(limit)
    assert len(inspect_checkpoint(path, opaque=True).groups) == 1


def test_what_the_safe_loader_does_not_accept_of_torch_itself_is_named(tmp_path: Path) -> None:
    class Stored:
        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (b"",)

    path = save(tmp_path / "in.pth", {**bn_state(), "stored": Stored()})
    with pytest.raises(RefusedError, match=r"not accept: torch\.storage\._load_from_bytes\."):
        convert_checkpoint(path, tmp_path / "no.pth", 2)
    assert convert_checkpoint(path, tmp_path / "v.pth", 2, opaque=True).counts == {"converted": 1}


@ZIPPED
def test_opaque_files_of_every_pickle_protocol_come_back(tmp_path: Path, zipped: bool) -> None:
    for protocol in (2, 3, 4, 5):
        path = tmp_path / f"in{protocol}.pth"
        torch.save(
            {"m": Net().state_dict(), **odd_objects()},
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=zipped,
        )
        convert_checkpoint(path, tmp_path / f"v{protocol}", 2, opaque=True)
        revert_checkpoint(tmp_path / f"v{protocol}", tmp_path / f"b{protocol}", opaque=True)
        back = zipfile.ZipFile(tmp_path / f"b{protocol}").read("archive/data.pkl")
        assert back[:2] == bytes([0x80, protocol])
        assert load(tmp_path / f"b{protocol}")["config"] == Config(lr=0.1, layers=[1, 2])


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("value", "other"),
    [
        ({Color.RED}, {Color.BLUE}),
        (frozenset(Color), frozenset({Color.RED, Color.GREEN, Custom})),
        ({print, len, sum}, {print, len, max}),
    ],
)
def test_sets_of_opaque_objects_are_carried_and_compared(
    tmp_path: Path, protocol: int, value: Any, other: Any
) -> None:
    state, paths = bn_state(), []
    for number, content in enumerate((value, other)):
        paths.append(tmp_path / f"{number}.pth")
        torch.save({"model": state, "set": content}, paths[-1], pickle_protocol=protocol)
    convert_checkpoint(paths[0], tmp_path / "v.pth", 2, opaque=True)
    assert load(tmp_path / "v.pth")["set"] == value
    verify_checkpoint(tmp_path / "v.pth", paths[0], opaque=True)
    with pytest.raises(VerificationError, match=r"differ: set[:.]"):
        verify_checkpoint(*paths, opaque=True)


def test_state_dicts_in_opaque_dictionaries_are_compared_as_others(tmp_path: Path) -> None:
    content = {"model": Config(**bn_state()), "epoch": 1}
    path = save(tmp_path / "in.pth", content)
    convert_checkpoint(path, tmp_path / "v.pth", 2, opaque=True)
    assert verify_checkpoint(tmp_path / "v.pth", path, opaque=True).groups == 1
    content["model"].frozen = False
    content["model"]["bn.weight"] = torch.ones(3)
    with pytest.raises(VerificationError, match=r"model\.bn\.weight differs; model\.states"):
        verify_checkpoint(path, save(tmp_path / "other.pth", content), opaque=True)


@pytest.mark.parametrize("key", ["type", "states", "x"])
def test_objects_are_compared_whatever_tensors_are_among_their_items(
    tmp_path: Path, key: str
) -> None:
    """A place of that name is among those that are compared as tensors."""
    state = bn_state()
    paths = [
        save(tmp_path / cls.__name__, {"model": state, "config": cls(**{key: torch.ones(2)})})
        for cls in (Config, Settings)
    ]
    with pytest.raises(VerificationError, match=r"differ: config\.type: the values differ\.$"):
        verify_checkpoint(*paths, opaque=True)


def test_an_object_that_is_given_its_state_twice_is_refused(tmp_path: Path) -> None:
    """No pickler writes that; the second would take the place of the first."""
    path = save(tmp_path / "in.pth", {**Net().state_dict(), "custom": Custom(7)})
    crafted = repickled(path, b"K\x07sb", b"K\x07sb}b")
    with pytest.raises(ReadError, match="given its state twice"):
        convert_checkpoint(crafted, tmp_path / "out.pth", 2, opaque=True)
    assert not (tmp_path / "out.pth").exists()


def test_an_opaque_round_trip_of_an_ordinary_file_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "in.pth", {"model": Net().state_dict(), "epoch": 3})
    convert_checkpoint(path, tmp_path / "opaque.pth", 4, opaque=True)
    convert_checkpoint(path, tmp_path / "plain.pth", 4)
    opaque, plain = load(tmp_path / "opaque.pth"), load(tmp_path / "plain.pth")
    assert all(torch.equal(opaque["model"][k], v) for k, v in plain["model"].items())
    assert inspect_checkpoint(path, opaque=True).opaque_globals == ()
