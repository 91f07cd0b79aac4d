"""What of an index and its shards is refused when they are read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distbn_convert.checkpoint.shard_index import read_index
from distbn_convert.errors import ReadError, RefusedError

from .checkpoints import write_index

UNSAFE = [
    *("../a.safetensors", "sub/../../a.safetensors", "/etc/a.safetensors", "..\\a.safetensors"),
    *("C:\\a.safetensors", "C:a.safetensors", "\\\\host\\share\\a.safetensors", "\\a.safetensors"),
    *("//host/share/a.safetensors", "a\0.safetensors", "a\n.safetensors"),
]


@pytest.mark.parametrize("shard", UNSAFE)
def test_case_31_a_shard_outside_the_folder_is_refused_on_every_system(
    tmp_path: Path, shard: str
) -> None:
    (tmp_path / "in").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    path = write_index(tmp_path / "in", {"a": shard})
    with pytest.raises(RefusedError, match=r"points outside the folder\. Refused\.") as caught:
        read_index(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shard", "message"),
    [
        ("model.safetensors.index.json", "a.bin", "is no .safetensors file"),
        ("model.safetensors.index.json", "", "is no .safetensors file"),
        ("model.bin.index.json", "a.safetensors", r"is no \.bin file"),
        ("model.bin.index.json", "a.pkl", r"is no \.bin file"),
        ("tf_model.h5.index.json", "a.h5", r"is an index of \.h5 files"),
        ("model.index.json", "a", "is an index of nameless files"),
    ],
)
def test_a_shard_of_another_kind_is_refused(
    tmp_path: Path, name: str, shard: str, message: str
) -> None:
    for path in ("a.bin", "a.safetensors", "a.pkl", "a.h5", "a"):
        (tmp_path / path).touch()
    with pytest.raises(RefusedError, match=message):
        read_index(write_index(tmp_path, {"x": shard}, name))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid JSON"),
        ("[]", "no JSON object"),
        ('{"weight_map": {"a": "a.safetensors"}', "no valid JSON"),
        ('{"metadata": {}}', "expected a weight_map"),
        ('{"weight_map": ["a"]}', "expected a weight_map"),
        ('{"weight_map": {"a": 1}}', "expected a weight_map"),
        ('{"weight_map": {}, "metadata": []}', "its metadata is no object"),
        ('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "has the key 'a' twice"),
        ('{"weight_map": {}, "weight_map": {}}', "has the key 'weight_map' twice"),
    ],
)
def test_case_31_a_damaged_index_is_told(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ReadError, match=message):
        read_index(tmp_path)


def test_case_31_a_huge_index_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    with open(path, "wb") as file:
        file.truncate(10**9)
    with pytest.raises(RefusedError, match=r"has 1\.0 GB, but an index has at most 64\.0 MB"):
        read_index(path)


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_case_31_index_and_shards_must_agree(tmp_path: Path, kind: str) -> None:
    suffix, save = (".safetensors", save_file) if kind == "safetensors" else (".bin", torch.save)
    one, two, name = f"1{suffix}", f"2{suffix}", f"model{suffix}.index.json"
    save({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / one)
    save({"c": torch.zeros(2)}, tmp_path / two)
    good = {"a": one, "b": one, "c": two}
    assert read_index(write_index(tmp_path, good, name)).weight_map == good
    cases: list[tuple[dict[str, str], str]] = [
        ({**good, "d": two}, f"{two} lacks 'd', which the index places there"),
        ({"a": one, "c": two}, f"{one} holds 'b', which the index places nowhere"),
        ({**good, "b": two}, f"{one} holds 'b', which the index places in {two}"),
        ({**good, "d": f"3{suffix}"}, f"shard '3{suffix}' of .* is missing"),
    ]
    for weight_map, message in cases:
        with pytest.raises(ReadError, match=message):
            read_index(write_index(tmp_path, weight_map, name))
    (tmp_path / two).write_bytes(b"damaged")
    with pytest.raises(ReadError, match=f"{two} is"):
        read_index(write_index(tmp_path, good, name))


def test_a_torch_shard_that_is_no_mapping_is_told(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "1.bin")
    with pytest.raises(ReadError, match=r"'1\.bin' .* is no mapping of names to tensors"):
        read_index(write_index(tmp_path, {"a": "1.bin"}, "model.bin.index.json"))


class Payload:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (os.system, ("touch executed",))


def test_a_malicious_torch_shard_is_refused_and_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Payload()}, tmp_path / "1.bin")
    with pytest.raises(RefusedError, match=r"1\.bin holds Python objects .* posix\.system"):
        read_index(write_index(tmp_path, {"a": "1.bin"}, "model.bin.index.json"))
    assert not (tmp_path / "executed").exists()


def test_reading_an_index_of_safetensors_imports_no_torch(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    path = write_index(tmp_path, {"a": "1.safetensors"})
    code = (
        "import sys; from distbn_convert.checkpoint.shard_index import read_index\n"
        "print(*read_index(sys.argv[1]).weight_map, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "a False\n"
