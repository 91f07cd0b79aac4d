"""Headers of safetensors: those that the package refuses too, and what is odd but legal."""

from __future__ import annotations

import io
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from distbn_convert.checkpoint.header import DTYPE_BITS, encode_header
from distbn_convert.checkpoint.safetensors import read_bytes, read_header, rewrite
from distbn_convert.errors import ReadError

from .checkpoints import entry, header_bytes, run_cli


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "a.safetensors"


SURROGATE = b'{"\\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
TWICE = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"shape":[2]}}'
DAMAGED = {
    "empty": (b"", "it has 0 bytes, less than the length of a header"),
    "seven bytes": (b"\0" * 7, "it has 7 bytes"),
    "only a length": (struct.pack("<Q", 2), "claims 2 bytes, but the file has 8"),
    "cut header": (save({"a": torch.ones(2)})[:40], "but the file has 40"),
    "huge header": (struct.pack("<Q", 100_000_001) + b"{}", "more than the format's 100 MB"),
    "largest number": (b"\xff" * 8 + b"{}", "more than the format's 100 MB"),
    "no JSON": (header_bytes(b"{nonsense"), "no valid JSON"),
    "no UTF-8": (header_bytes(b'{"\xff":1}'), "no valid JSON"),
    "UTF-16": (header_bytes('{"a":1}'.encode("utf-16")), "no valid JSON"),
    "deep": (header_bytes(b'{"a":' + b"[" * 100_000), "no valid JSON"),
    "long number": (header_bytes(b'{"a":' + b"1" * 5000 + b"}"), "no valid JSON"),
    "NaN": (header_bytes(b'{"a":NaN}'), "holds NaN"),
    "half a pair": (header_bytes(SURROGATE, b"ab"), "no valid JSON"),
    "two documents": (header_bytes(b"{}{}"), "no valid JSON"),
    "a list": (header_bytes([]), "no JSON object"),
    "entry no object": (header_bytes({"a": 1}), "the entry of 'a' lacks"),
    "no dtype": (header_bytes({"a": {"shape": [], "data_offsets": [0, 0]}}), "'a' lacks"),
    "field twice": (header_bytes(TWICE, b"ab"), "has the key 'shape' twice"),
    "unknown dtype": (header_bytes({"a": entry("F31")}, b"ab"), "unknown dtype 'F31'"),
    "dtype no str": (header_bytes({"a": entry(["U8"])}, b"ab"), r"unknown dtype \['U8'\]"),
    "negative shape": (
        header_bytes({"a": entry("U8", [-1, -2])}, b"ab"),
        r"shape \[-1, -2\]",
    ),
    "fraction": (header_bytes({"a": entry("U8", [2.0])}, b"ab"), r"shape \[2\.0\]"),
    "true": (header_bytes({"a": entry("U8", [2, True])}, b"ab"), r"shape \[2, True\]"),
    "shape no list": (header_bytes({"a": entry("U8", 2)}, b"ab"), "impossible shape 2"),
    "overflow": (
        header_bytes({"a": entry("U8", [2**40, 2**40], [0, 0])}),
        "impossible shape",
    ),
    "overflow by bits": (
        header_bytes({"a": entry("U8", [2**62], [0, 0])}),
        "impossible shape",
    ),
    "overflow times 0": (
        header_bytes({"a": entry("U8", [2**40, 2**40, 0], [0, 0])}),
        "impossible shape",
    ),
    "beyond 64 bits": (
        header_bytes({"a": entry("U8", [2**64, 0], [0, 0])}),
        "impossible shape",
    ),
    "three offsets": (header_bytes({"a": entry("U8", [2], [0, 2, 4])}, b"ab"), "offsets"),
    "negative offset": (
        header_bytes({"a": entry("U8", [2], [-2, 0])}),
        r"offsets \[-2, 0\]",
    ),
    "backwards": (header_bytes({"a": entry("U8", [2], [2, 0])}, b"ab"), r"offsets \[2, 0\]"),
    "too small": (header_bytes({"a": entry("F32")}, b"ab"), "not 2 bytes"),
    "half a byte": (header_bytes({"a": entry("F4", [3])}, b"ab"), "not 2 bytes"),
    "hole at the start": (
        header_bytes({"a": entry("U8", [2], [1, 3])}, b"abc"),
        "leave a hole",
    ),
    "hole": (
        header_bytes({"a": entry(), "b": entry("U8", [2], [3, 5])}, b"abcde"),
        r"'a' and 'b' leave a hole \(2 and 3\)",
    ),
    "overlap": (
        header_bytes({"a": entry(), "b": entry("U8", [2], [1, 3])}, b"abc"),
        "overlap",
    ),
    "same place": (header_bytes({"a": entry(), "b": entry()}, b"ab"), "overlap"),
    "trailing bytes": (header_bytes({"a": entry()}, b"abc"), "need 2 bytes, but 3 follow"),
    "cut data": (header_bytes({"a": entry()}, b"a"), "need 2 bytes, but 1 follow"),
    "metadata no str": (header_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (header_bytes({"__metadata__": []}), "__metadata__"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_case_32_a_damaged_header_is_refused_as_by_the_package(path: Path, name: str) -> None:
    content, message = DAMAGED[name]
    path.write_bytes(content)
    with pytest.raises(ReadError, match=message) as caught:
        read_header(path)
    text = str(caught.value)
    assert text.startswith(f"{path} is damaged: ")
    assert "\n" not in text
    with pytest.raises(SafetensorError):
        deserialize(content)


@pytest.mark.parametrize("name", DAMAGED)
def test_case_32_a_damaged_header_ends_the_command_with_status_5(
    tmp_path: Path, capsys: Any, name: str
) -> None:
    content, message = DAMAGED[name]
    path = tmp_path / "in.safetensors"
    path.write_bytes(content)
    done = run_cli(capsys, "convert", path, tmp_path / "o.safetensors", "--vt-world-size", 2)
    assert done.code == 5, done
    assert len(done.err.splitlines()) == 1
    assert os.listdir(tmp_path) == ["in.safetensors"]
    told = (message, r"is empty \(0 bytes\)", "is not a checkpoint, or is damaged")
    assert any(re.search(one, done.err) for one in told)


def test_case_32_a_key_that_occurs_twice_is_refused_where_the_package_accepts_it(
    path: Path,
) -> None:
    one = b'"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
    content = header_bytes(b"{" + one + b"," + one + b"}", b"ab")
    assert len(deserialize(content)) == 1
    path.write_bytes(content)
    with pytest.raises(ReadError, match="has the key 'a' twice"):
        read_header(path)


ODD = {
    "nothing": header_bytes({}),
    "spaces around": header_bytes(
        b'  {"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}} ', b"ab"
    ),
    "metadata null": header_bytes({"__metadata__": None, "a": entry()}, b"ab"),
    "a field more": header_bytes({"a": {**entry(), "note": [1, {"x": "é"}]}}, b"ab"),
    "not in order": header_bytes({"b": entry("U8", [1], [2, 3]), "a": entry()}, b"abc"),
    "empty tensors between": header_bytes(
        {
            "a": entry(),
            "b": entry("F32", [0, 7], [2, 2]),
            "c": entry("U8", [1], [2, 3]),
        },
        b"abc",
    ),
    "an escaped pair": header_bytes({"\U0001f600": entry()}, b"ab"),
    **{
        dtype: header_bytes({"a": entry(dtype, [8], [0, bits])}, bytes(bits))
        for dtype, bits in DTYPE_BITS.items()
    },
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_but_legal_is_read_and_carried_through(path: Path, name: str) -> None:
    path.write_bytes(ODD[name])
    expected = dict(deserialize(ODD[name]))
    header = read_header(path)
    assert {name: tuple(info["shape"]) for name, info in expected.items()} == {
        name: info.shape for name, info in header.tensors.items()
    }
    for key, info in expected.items():
        assert bytes(read_bytes(path, header, key)) == bytes(info["data"])
    out = io.BytesIO()
    rewrite(path, out, header, {})
    content = out.getvalue()
    assert dict(deserialize(content)) == expected
    path.write_bytes(content)
    again = read_header(path)
    assert {name: info.extra for name, info in again.tensors.items()} == {
        name: info.extra for name, info in header.tensors.items()
    }


@settings(max_examples=300)
@given(st.data())
def test_bytes_flipped_in_the_header_end_as_with_the_package(
    path: Path, data: st.DataObject
) -> None:
    state = {"a.b": torch.arange(3), "c": torch.ones(2, 2, dtype=torch.float16)}
    content = bytearray(save(state, {"format": "pt"}))
    end = 8 + content[0]  # of the header, which is shorter than 256 bytes
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.integers(0, end))
        content[place] = data.draw(st.sampled_from(b'0123456789{}[],:" -eFIU\x00\xff'))
    path.write_bytes(content)
    try:
        ours: object = {name: info.shape for name, info in read_header(path).tensors.items()}
    except ReadError:
        ours = None
    try:
        theirs: object = {name: tuple(info["shape"]) for name, info in deserialize(bytes(content))}
    except SafetensorError:
        theirs = None
    assert ours == theirs


def test_the_package_accepts_the_header_that_is_encoded(path: Path) -> None:
    path.write_bytes(ODD["an escaped pair"])
    assert deserialize(encode_header(read_header(path)) + b"ab")[0][0] == "\U0001f600"
