from __future__ import annotations

import io
import itertools
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from distbn_convert.checkpoint import gather_checkpoints, verify_checkpoint
from distbn_convert.checkpoint.atomic import atomic_output
from distbn_convert.checkpoint.safetensors import (
    Header,
    read_header,
    read_tensor,
    rewrite,
    write,
)
from distbn_convert.checkpoint.stream import Sink, Source
from distbn_convert.errors import FileAccessError, ReadError, RefusedError

from .checkpoints import bn_state, entry, header_bytes
from .versions import since_torch

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32),
    *(torch.int64, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any dtype and shape, any bits."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return data.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


names = TEXT.filter(lambda name: name != "__metadata__")
states = st.dictionaries(names, tensors(), max_size=6)
metadatas = st.none() | st.dictionaries(TEXT, TEXT, max_size=3)
# Of no tensors but metadata the package makes "{},...", which it cannot read itself.
cases = st.tuples(states, metadatas).map(lambda case: case if case[0] else ({}, None))


def bits(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).tolist())
        for name, tensor in state.items()
    }


def metadata_of(content: bytes) -> dict[str, str] | None:
    return json.loads(content[8 : 8 + struct.unpack_from("<Q", content)[0]]).get("__metadata__")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors") / "a.safetensors"


def written(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    write(out, state, metadata)
    return out.getvalue()


def rewritten(path: Path, replacements: Mapping[str, Tensor]) -> bytes:
    out = io.BytesIO()
    rewrite(path, out, read_header(path), replacements)
    return out.getvalue()


@given(cases)
def test_what_is_written_is_byte_for_byte_what_the_package_writes(
    case: tuple[dict[str, Tensor], dict[str, str] | None],
) -> None:
    state, metadata = case
    if metadata is not None and len(metadata) > 1:  # the package writes these in random order
        assert bits(load(written(state, metadata))) == bits(state)
        assert metadata_of(written(state, metadata)) == metadata
        assert written(state, dict(reversed(metadata.items()))) == written(state, metadata)
    else:
        assert written(state, metadata) == save(state, metadata)


@given(cases)
def test_every_tensor_is_read_as_the_package_reads_it(
    path: Path, case: tuple[dict[str, Tensor], dict[str, str] | None]
) -> None:
    state, metadata = case
    path.write_bytes(save(state, metadata))
    header = read_header(path)
    assert bits({name: read_tensor(path, header, name) for name in header.tensors}) == bits(state)
    assert header.metadata == metadata
    assert header.size == path.stat().st_size


@settings(max_examples=150)
@given(st.data())
def test_rewriting_is_loading_replacing_and_saving(path: Path, data: st.DataObject) -> None:
    state, metadata = data.draw(cases)
    chosen = data.draw(st.sets(st.sampled_from(sorted(state)))) if state else set()
    replacements = {name: data.draw(tensors()) for name in chosen}
    path.write_bytes(save(state, metadata))
    content = rewritten(path, replacements)
    assert bits(load(content)) == bits({**state, **replacements})
    assert metadata_of(content) == metadata
    order = list(read_header(path).tensors)
    path.write_bytes(content)
    assert list(read_header(path).tensors) == order


@given(cases)
def test_rewriting_without_a_change_gives_the_same_bytes(
    path: Path, case: tuple[dict[str, Tensor], dict[str, str] | None]
) -> None:
    state, metadata = case
    path.write_bytes(save(state, metadata))
    assert rewritten(path, {}) == path.read_bytes()


def test_a_batch_norm_becomes_virtual_in_a_stream(tmp_path: Path) -> None:
    source, target = tmp_path / "plain.safetensors", tmp_path / "virtual.safetensors"
    state = {"conv": torch.randn(3_000_000), "bn.running_mean": torch.randn(5), "z": torch.ones(2)}
    save_file(state, source, {"format": "pt"})
    new = {"bn.running_mean": state["bn.running_mean"].expand(8, 5)}
    seen: list[tuple[int, int]] = []
    header = read_header(source)
    with atomic_output(target) as out:
        result = rewrite(source, out, header, new, progress=lambda *step: seen.append(step))
    loaded = load_file(target)
    assert bits(loaded) == bits({**state, **new})
    assert result == read_header(target)
    assert seen[-1] == (target.stat().st_size, target.stat().st_size)
    assert all(before[0] < after[0] for before, after in itertools.pairwise(seen))


@pytest.mark.parametrize("reason", ["other file system", "not there", "stops half-way"])
@pytest.mark.parametrize("way", ["copy_file_range", "pwrite"])
def test_without_the_kernels_help_the_bytes_are_the_same(
    tmp_path: Path, way: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"a": torch.randn(5_000_000), "b": torch.randn(7)}, source)
    real = getattr(os, way, None)
    calls = []

    def fail(*arguments: Any) -> int:
        calls.append(arguments)
        if reason == "stops half-way" and len(calls) == 1:
            if way == "pwrite":
                return real(arguments[0], arguments[1][:1000], arguments[2])
            return real(*arguments[:2], 1000, *arguments[3:])
        raise OSError(18, "Invalid cross-device link")

    if reason == "not there":
        monkeypatch.delattr(os, way, raising=False)
    elif real is None:
        pytest.skip(f"this system has no {way}")
    else:
        monkeypatch.setattr(os, way, fail)
    with atomic_output(target) as out:
        if way == "pwrite":  # the data begin in the midst of a block
            rewrite(source, out, read_header(source), {})
        else:
            with Source(source) as whole:
                Sink(out, whole.size).copy(whole, 0, whole.size)
    assert target.read_bytes() == source.read_bytes()
    assert bool(calls) == (reason != "not there")


def test_a_source_that_is_cut_short_meanwhile_is_told(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(1 << 24))
    opened = Source(source).__enter__()
    with open(tmp_path / "out", "wb") as out:
        os.truncate(source, 1 << 22)
        out.write(b"x")
        with pytest.raises(ReadError, match="changed while it was read"):
            Sink(out, opened.size).copy(opened, 0, opened.size)
    with pytest.raises(ReadError, match="changed while it was read"):
        opened.__exit__(None)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, dtype=torch.complex128), "no dtype for 'a', which is torch.complex128"),
        (torch.eye(2).to_sparse(), r"dense tensors on the CPU .*torch\.sparse_coo"),
        (torch.zeros(2, device="meta"), "meta"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_a_byte_is_written(
    path: Path, tensor: Tensor, message: str
) -> None:
    path.write_bytes(save({"a": torch.zeros(2)}))
    out = io.BytesIO()
    with pytest.raises(RefusedError, match=message):
        write(out, {"a": tensor})
    with pytest.raises(RefusedError, match=message):
        rewrite(path, out, read_header(path), {"a": tensor})
    assert out.getvalue() == b""


@since_torch(2, 7, reason="there is no float8_e8m0fnu")
def test_the_scales_of_mx_formats_are_read_and_written(path: Path) -> None:
    """The package's load, of bytes, does not know them; its load_file does."""
    state = {"a": torch.arange(3, dtype=torch.uint8).view(torch.float8_e8m0fnu)}
    save_file(state, path)
    assert written(state) == path.read_bytes()
    assert bits({"a": read_tensor(path, read_header(path), "a")}) == bits(state)


@since_torch(2, 8, reason="there is no float4_e2m1fn_x2")
@pytest.mark.parametrize("shape", [(3, 2), (1,), (2, 0)])
def test_numbers_of_four_bits_are_read_and_written(path: Path, shape: tuple[int, ...]) -> None:
    """Torch has two of them in an element, the format counts each."""
    packed = torch.arange(math.prod(shape), dtype=torch.uint8).view(shape)
    state = {**bn_state(), "a": packed.view(torch.float4_e2m1fn_x2)}
    save_file(state, path)
    assert written(state) == path.read_bytes()
    assert bits({"a": read_tensor(path, read_header(path), "a")}) == bits({"a": state["a"]})
    other = path.with_suffix(".pth")
    torch.save(state, other)
    verify_checkpoint(path, other)
    gather_checkpoints([path, other], path.with_name("both"), format="torch", overwrite=True)


@since_torch(2, 8, reason="there is no float4_e2m1fn_x2")
def test_numbers_of_four_bits_without_dimensions_are_refused() -> None:
    """What was written was called damaged when it was read back."""
    pair = torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(RefusedError, match="'a', which is torch.float4_e2m1fn_x2 without dimensio"):
        write(io.BytesIO(), {"a": pair})


@pytest.mark.parametrize(("dtype", "shape"), [("F6_E2M3", [4]), ("F4", [2, 3])])
def test_a_dtype_that_torch_lacks_is_copied_but_not_read(
    path: Path, dtype: str, shape: list[int]
) -> None:
    """Or has for an even number alone."""
    tensors = {"a": entry(dtype, shape, [0, 3]), "b": entry("U8", [1], [3, 4])}
    path.write_bytes(header_bytes(tensors, b"abcd"))
    header = read_header(path)
    with pytest.raises(RefusedError, match=f"'a' as {dtype}, for which torch .* has no dtype"):
        read_tensor(path, header, "a")
    assert rewritten(path, {"b": torch.zeros(1, dtype=torch.uint8)}).endswith(b"abc\x00")


def test_views_of_any_kind_are_written_as_their_values() -> None:
    base = torch.arange(12.0).view(3, 4)
    complex_ = torch.tensor([1 + 2j, 3 - 4j])
    state = {"t": base.t(), "e": base[:1].expand(5, 4), "c": complex_.conj(), "s": base[1:, 2]}
    state["n"] = complex_.conj().imag
    state["p"] = torch.nn.Parameter(base[:, ::2])
    loaded = load(written(state))
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor.detach()), name


def test_a_file_that_changes_is_noticed(path: Path) -> None:
    path.write_bytes(save({"a": torch.zeros(2)}))
    header = read_header(path)
    path.write_bytes(save({"a": torch.zeros(3)}))
    with pytest.raises(ReadError, match="changed while it was read"):
        read_tensor(path, header, "a")
    with pytest.raises(ReadError, match="changed while it was read"):
        rewrite(path, io.BytesIO(), header, {})

    class Meddler(io.BytesIO):
        def write(self, data: Any) -> int:
            os.utime(path, ns=(0, self.tell()))
            return super().write(data)

    with pytest.raises(ReadError, match="changed while it was read"):
        rewrite(path, Meddler(), read_header(path), {})


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    missing = tmp_path / "none.safetensors"
    header = Header({}, None, 8)
    for read in (
        lambda: read_header(missing),
        lambda: rewrite(missing, io.BytesIO(), header, {}),
    ):
        with pytest.raises(FileAccessError, match=r"cannot read .* no such file or directory"):
            read()


def test_reading_a_header_imports_neither_torch_nor_the_package(path: Path) -> None:
    path.write_bytes(save({"a": torch.zeros(2)}))
    code = (
        "import sys; from distbn_convert.checkpoint.safetensors import *\n"
        "header = read_header(sys.argv[1])\n"
        "with open(sys.argv[2], 'wb') as out: rewrite(sys.argv[1], out, header, {})\n"
        "print(*header.tensors, {'torch', 'safetensors', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path, path.with_name("b")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "a set()\n"
    assert path.with_name("b").read_bytes() == path.read_bytes()
