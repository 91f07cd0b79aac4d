"""Torch zips filled from the file they were loaded from: the same bytes as torch.save writes."""

from __future__ import annotations

import gc
import mmap
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distbn_convert.checkpoint import convert_checkpoint, revert_checkpoint, zipcopy
from distbn_convert.checkpoint.checksums import check_zip, data_start
from distbn_convert.checkpoint.mapped import MappedPart, mapped_parts
from distbn_convert.checkpoint.stores import ReadOptions
from distbn_convert.checkpoint.torchfile import TorchFile, load_torch
from distbn_convert.checkpoint.zipcopy import checksums_beside, plan_copy
from distbn_convert.errors import ReadError, VerificationError

from .checkpoints import STYLES, load, resaved

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is mapped")
LARGE = 300_000  # elements; what is larger than 256 KiB is read back while the next is written


def tree() -> dict[str, Any]:
    weight = torch.randn(LARGE)
    return {
        "weight": weight,
        **torch.nn.BatchNorm1d(4).state_dict(prefix="bn."),
        "view": weight[3:90].view(3, 29).t(),
        "tied": [weight, weight],
        "empty": torch.zeros(0, 3),
        "digits": "1" * 40,  # as long as torch's serialization id
        "half": torch.randn(5000).bfloat16(),
        "last": torch.randn(LARGE),
    }


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each file that was written had a plan."""
    made = []

    def noted(file: TorchFile) -> Any:
        plan = plan_copy(file)
        made.append(plan is not None)
        return plan

    monkeypatch.setattr("distbn_convert.checkpoint.torchstore.plan_copy", noted)
    return made


@pytest.mark.parametrize("make", STYLES.values(), ids=STYLES)
def test_the_files_of_training_loops_are_copied_and_come_out_as_torch_saves_them(
    tmp_path: Path, plans: list[bool], make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path / "in.pth")
    convert_checkpoint(path, tmp_path / "virtual", 3)
    revert_checkpoint(tmp_path / "virtual", tmp_path / "back")
    assert plans == [True, True]
    assert (tmp_path / "back").read_bytes() == resaved(path)
    assert (tmp_path / "virtual").read_bytes() == resaved(tmp_path / "virtual")


def test_large_small_tied_and_empty_tensors_are_copied(tmp_path: Path, plans: list[bool]) -> None:
    torch.save(tree(), tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "virtual", 2)
    revert_checkpoint(tmp_path / "virtual", tmp_path / "back")
    assert plans == [True, True]
    assert (tmp_path / "back").read_bytes() == resaved(tmp_path / "in")


def test_inert_objects_are_copied_with_the_rest(tmp_path: Path, plans: list[bool]) -> None:
    torch.save(tree() | {"odd": zipfile.ZipInfo("x")}, tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "virtual", 2, opaque=True)
    revert_checkpoint(tmp_path / "virtual", tmp_path / "back", opaque=True)
    assert plans == [True, True]
    with zipfile.ZipFile(tmp_path / "in") as one, zipfile.ZipFile(tmp_path / "back") as two:
        for info in one.infolist():
            name = info.filename.replace("in/", "archive/", 1)
            if "/data/" in name:
                assert two.read(name) == one.read(info)


def test_what_is_not_mapped_is_saved_by_torch_alone(tmp_path: Path, plans: list[bool]) -> None:
    torch.save(tree(), tmp_path / "legacy", _use_new_zipfile_serialization=False)
    convert_checkpoint(tmp_path / "legacy", tmp_path / "virtual", 2)
    assert plans == [False]
    torch.save(tree(), tmp_path / "stored")
    with (
        zipfile.ZipFile(tmp_path / "stored") as stored,
        zipfile.ZipFile(tmp_path / "deflated", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    convert_checkpoint(tmp_path / "deflated", tmp_path / "again", 2)
    assert plans == [False, False]
    # All random numbers apart, they are what a copied file is.
    assert list(load(tmp_path / "again")) == list(load(tmp_path / "virtual"))


def test_a_tensor_without_data_is_copied_without_a_warning(
    tmp_path: Path, plans: list[bool]
) -> None:
    torch.save({**tree(), "meta": torch.zeros(3, device="meta")}, tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "virtual", 2)
    assert all(plans)
    assert load(tmp_path / "virtual")["meta"].is_meta


@pytest.mark.filterwarnings("ignore:.*[qQ]uantized")
def test_a_quantized_tensor_which_torch_cannot_lay_out_is_saved(
    tmp_path: Path, plans: list[bool]
) -> None:
    quantized = torch.quantize_per_tensor(torch.randn(50), 0.1, 3, torch.qint8)
    torch.save(tree() | {"quantized": quantized}, tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "virtual", 2)
    assert plans == [False]
    again = load(tmp_path / "virtual")["quantized"]
    assert torch.equal(again.int_repr(), quantized.int_repr())


def test_the_checksums_beside_many_tensors_are_found_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The places of the tensors are looked up; comparing each with each took a minute."""
    kept, taken = ([torch.zeros(4) for _ in range(20_000)] for _ in range(2))
    places = {(tensor.data_ptr(), 16): 1 for tensor in [*kept, *taken]}
    monkeypatch.setattr(zipcopy, "mapped_parts", lambda _: [MappedPart(0, 1 << 63, 0)])
    monkeypatch.setattr(zipcopy, "_checksums", lambda _: places)
    started = time.process_time()
    known = checksums_beside(TorchFile(None, mapped=Path("any")), taken)
    assert time.process_time() - started < 3
    assert known.keys() == {(tensor.data_ptr(), 16) for tensor in kept}


def test_memory_that_was_written_to_is_not_taken_for_the_file(tmp_path: Path) -> None:
    torch.save(tree(), tmp_path / "in")
    file = load_torch(tmp_path / "in", ReadOptions())
    assert plan_copy(file) is not None
    file.tree["last"][5] = 3
    assert mapped_parts(tmp_path / "in") == []
    assert plan_copy(file) is None


def test_a_file_that_was_replaced_meanwhile_is_not_taken_for_the_one_loaded(tmp_path: Path) -> None:
    torch.save(tree(), tmp_path / "in")
    file = load_torch(tmp_path / "in", ReadOptions())
    torch.save(tree(), tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "in")
    assert plan_copy(file) is None


@pytest.mark.parametrize("size", [LARGE, 5000])
def test_a_damaged_storage_is_found_in_the_copy_and_told_of_the_input(
    tmp_path: Path, size: int
) -> None:
    path = tmp_path / "in"
    torch.save(tree() | {"marked": torch.full((size,), 2.5)}, path)
    damage(path, torch.full((9,), 2.5).numpy().tobytes())
    with pytest.raises(ReadError, match=r"in is damaged: the checksum of in/data/\d+ does not"):
        convert_checkpoint(path, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
    convert_checkpoint(path, tmp_path / "out", 2, verify=False)
    with pytest.raises(ReadError, match="out is damaged"):  # it does not pass for sound
        check_zip(tmp_path / "out")


def damage(path: Path, wanted: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(wanted) + 1] ^= 1
    path.write_bytes(data)


def test_a_file_that_torch_wrote_without_checksums_gets_them(
    tmp_path: Path, plans: list[bool]
) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tree(), tmp_path / "in")
    finally:
        torch.serialization.set_crc32_options(True)
    convert_checkpoint(tmp_path / "in", tmp_path / "out", 2)
    assert plans == [True]
    assert (tmp_path / "out").read_bytes() == resaved(tmp_path / "out")
    assert check_zip(tmp_path / "out") > 5


def test_a_layout_that_is_not_understood_is_left_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plans: list[bool]
) -> None:
    torch.save(tree(), tmp_path / "in")
    lay_out = zipcopy._lay_out
    changes: list[Callable[[list[bytes | int]], list[bytes | int]]] = [
        lambda pieces: [piece for piece in pieces if isinstance(piece, bytes)],  # no holes
        lambda pieces: [p + 1 if isinstance(p, int) else p for p in pieces],  # of other sizes
        lambda pieces: [p for p in pieces if isinstance(p, int) or p[:4] != b"PK\x07\x08"],
        lambda pieces: [cut_directory(piece) for piece in pieces],
    ]
    for number, change in enumerate(changes):
        monkeypatch.setattr(zipcopy, "_lay_out", lambda file, c=change: c(lay_out(file)))
        convert_checkpoint(tmp_path / "in", tmp_path / f"out{number}", 2)
        assert plans[-1] is False
        assert (tmp_path / f"out{number}").read_bytes() == resaved(tmp_path / f"out{number}")


def cut_directory(piece: bytes | int) -> bytes | int:
    if isinstance(piece, bytes) and piece.startswith(b"PK\x01\x02"):
        return piece[:-1]
    return piece


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_while_torch_lays_out_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    torch.save(tree(), tmp_path / "in")

    def interrupted(*_: Any) -> None:
        raise error

    monkeypatch.setattr(zipcopy._Skeleton, "seek", interrupted)
    with pytest.raises(error):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_a_storage_put_in_the_place_of_another_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tensors of one size change places with their checksums; only comparing can tell."""
    torch.save(tree(), tmp_path / "in")
    storages = zipcopy._storages

    def swapped(file: TorchFile) -> list[torch.UntypedStorage]:
        found = storages(file)
        return [found[-1], *found[1:-1], found[0]]

    monkeypatch.setattr(zipcopy, "_storages", swapped)
    with pytest.raises(VerificationError, match="differs at weight"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", 2)


def test_the_system_tells_where_in_the_file_a_tensor_lies(tmp_path: Path) -> None:
    path = tmp_path / "with a space\tand (deleted)"
    torch.save(tree(), path)
    file = load_torch(path, ReadOptions())
    (part,) = mapped_parts(path)
    weight = file.tree["last"]
    place = part.place(weight.data_ptr(), weight.nbytes)
    with zipfile.ZipFile(path) as archive, open(path, "rb", buffering=0) as opened:
        starts = [data_start(opened, info) for info in archive.infolist()]
    assert place in starts
    assert path.read_bytes()[place:][: weight.nbytes] == weight.numpy().tobytes()
    assert part.place(part.stop - 4, 8) is None
    assert part.place(part.start - 4, 8) is None


def test_the_state_of_one_mapping_is_not_taken_from_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path.resolve() / "in"
    entry = (
        "{0:x}000-{1:x}000 rw-p 00000000 fd:00 42 {2}\nSize: 4 kB\nAnonymous: {3} kB\nSwap: 0 kB\n"
    )
    entries = [(1, 2, path, 4), (2, 3, "", 0), (3, 4, path, 0), (5, 6, "", 0), (6, 7, "[heap]", 0)]
    (tmp_path / "smaps").write_text("".join(entry.format(*each) for each in entries))
    monkeypatch.setattr("distbn_convert.checkpoint.mapped._MAPS", tmp_path / "smaps")
    assert mapped_parts(path) == [(0x3000, 0x4000, 0)]


def test_a_file_of_the_other_byte_order_is_not_altered_where_maps_are_shared(
    tmp_path: Path,
) -> None:
    """Torch turns the bytes round in memory, which a program may have told it to share."""
    path = tmp_path / "in"
    torch.save(tree(), tmp_path / "native")
    with zipfile.ZipFile(tmp_path / "native") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("/byteorder") else old.read(name))
    before = path.read_bytes()
    convert_checkpoint(path, tmp_path / "out", 2)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        convert_checkpoint(path, tmp_path / "shared", 2)
        assert torch.serialization.get_default_mmap_options() == mmap.MAP_SHARED
    assert path.read_bytes() == before
    assert (tmp_path / "shared").read_bytes() == (tmp_path / "out").read_bytes()


def test_a_plan_does_not_keep_the_file_mapped(tmp_path: Path) -> None:
    torch.save(tree(), tmp_path / "in")
    gc.collect()
    gc.disable()
    try:
        file = load_torch(tmp_path / "in", ReadOptions())
        storages = zipcopy._storages(file)
        assert len(mapped_parts(tmp_path / "in")) == 1
        del file, storages
        assert mapped_parts(tmp_path / "in") == []
    finally:
        gc.enable()


def test_pages_that_were_written_to_and_swapped_out_are_not_taken_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path.resolve() / "in"
    entry = f"1000-2000 rw-p 00000000 fd:00 42 {path}\nAnonymous: 0 kB\nSwap: {{}} kB\n"
    monkeypatch.setattr("distbn_convert.checkpoint.mapped._MAPS", tmp_path / "smaps")
    for swapped, parts in ((4, []), (0, [(0x1000, 0x2000, 0)])):
        (tmp_path / "smaps").write_text(entry.format(swapped))
        assert mapped_parts(path) == parts
