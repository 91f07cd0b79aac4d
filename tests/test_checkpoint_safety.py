"""Nothing in a file is executed, and whatever a file is, the answer is one sentence."""

from __future__ import annotations

import argparse
import datetime
import io
import os
import pickle
import random
import sys
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distbn_convert.checkpoint import (
    convert_checkpoint,
    inspect_checkpoint,
    revert_checkpoint,
)
from distbn_convert.errors import (
    CheckpointError,
    NothingToDoError,
    ReadError,
    RefusedError,
)

from .checkpoints import BATCH_NORMS, Net, bn_state, load, resaved, run_cli

ZIPPED = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Custom:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and self.value == other.value


class Payload:
    """Runs a command when a pickle of it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def save(path: Path, content: Any, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@ZIPPED
def test_case_23_a_payload_never_runs_and_is_listed(
    tmp_path: Path, zipped: bool, capsys: Any
) -> None:
    marker = tmp_path / "executed"
    content = {"model": Net().state_dict(), "payload": Payload(marker)}
    path = save(tmp_path / "in.pth", content, zipped)
    done = run_cli(capsys, "convert", path, tmp_path / "no.pth", "--vt-world-size", 2)
    assert done.code == 4
    assert "posix.system" in done.err
    arguments = ["convert", path, tmp_path / "v.pth", "--vt-world-size", 2, "--opaque", "--json"]
    done = run_cli(capsys, *arguments)
    assert done.code == 0
    assert done.json["opaque_globals"] == ["posix.system"]
    assert not marker.exists()
    assert run_cli(capsys, "inspect", tmp_path / "v.pth", "--opaque").code == 0
    assert not marker.exists()
    load(tmp_path / "v.pth")  # the payload is still one
    assert marker.exists()


def test_the_environment_cannot_switch_the_safe_loader_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "executed"
    path = save(tmp_path / "in.pth", {"model": Net().state_dict(), "payload": Payload(marker)})
    with pytest.raises(RefusedError, match=r"posix\.system"):
        convert_checkpoint(path, tmp_path / "no.pth", 2)
    assert not marker.exists()


def test_case_21_what_training_scripts_save_is_accepted(tmp_path: Path) -> None:
    content = {
        "model": Net().state_dict(),
        "args": argparse.Namespace(lr=0.1, path=Path("data"), when=datetime.datetime(2020, 1, 2)),
        "simple": types.SimpleNamespace(a=1),
        "metric": numpy.float64(0.5),
        "step": numpy.int64(3),
        "array": numpy.arange(4, dtype=numpy.float32),
        "frozen": frozenset([1]),
        "delta": datetime.timedelta(seconds=4),
        "torch": torch.__version__,
    }
    path = save(tmp_path / "in.pth", content)
    convert_checkpoint(path, tmp_path / "v.pth", 2)
    revert_checkpoint(tmp_path / "v.pth", tmp_path / "back.pth")
    assert (tmp_path / "back.pth").read_bytes() == resaved(path)


def test_allow_global_makes_one_class_acceptable(tmp_path: Path) -> None:
    path = save(tmp_path / "in.pth", {"model": Net().state_dict(), "custom": Custom(3)})
    report = convert_checkpoint(path, tmp_path / "v", 2, allow_globals=[f"{__name__}.Custom"])
    assert report.counts == {"converted": BATCH_NORMS}
    assert load(tmp_path / "v")["custom"] == Custom(3)
    with pytest.raises(RefusedError, match="can be imported"):
        convert_checkpoint(path, tmp_path / "w", 2, allow_globals=["no.such.Class"])


def test_case_35_whole_modules_and_exported_graphs_get_their_own_advice(tmp_path: Path) -> None:
    module = save(tmp_path / "module.pth", nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(RefusedError, match=r"whole pickled nn\.Module.*state_dict"):
        convert_checkpoint(module, tmp_path / "o", 2)
    with pytest.raises(NothingToDoError, match="no BatchNorm statistics"):
        convert_checkpoint(module, tmp_path / "o", 2, opaque=True)
    export = torch.export.export(nn.Sequential(nn.BatchNorm1d(3)).eval(), (torch.rand(4, 3),))
    torch.export.save(export, tmp_path / "graph.pt2")
    with pytest.raises(RefusedError, match=r"torch\.export"):
        convert_checkpoint(tmp_path / "graph.pt2", tmp_path / "o", 2)


def test_case_35_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"script/{name}", b"\x80\x02N.")
    with pytest.raises(RefusedError, match=r"TorchScript.*state dict"):
        convert_checkpoint(tmp_path / "script.pt", tmp_path / "o", 2)


def test_case_35_ultralytics_files_are_told_as_whole_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tasks = types.ModuleType("ultralytics.nn.tasks")
    kind = type("DetectionModel", (nn.Sequential,), {"__module__": tasks.__name__})
    tasks.DetectionModel = kind  # type: ignore[attr-defined]
    for name in ("ultralytics", "ultralytics.nn"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, tasks.__name__, tasks)
    model = kind(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half()
    path = save(tmp_path / "yolo.pt", {"epoch": -1, "model": model, "ema": None, "train_args": {}})
    for name in ("ultralytics", "ultralytics.nn", tasks.__name__):
        monkeypatch.delitem(sys.modules, name)
    done = run_cli(capsys, "convert", path, tmp_path / "o", "--vt-world-size", 2)
    assert done.code == 4
    assert "whole pickled nn.Module (ultralytics.nn.tasks.DetectionModel)" in done.err
    assert "Save model.state_dict() instead" in done.err
    assert os.listdir(tmp_path) == ["yolo.pt"]


def test_a_lazy_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "in.pth", nn.LazyBatchNorm1d().state_dict())
    with pytest.raises(RefusedError):
        convert_checkpoint(path, tmp_path / "o", 2)


def test_statistics_on_the_meta_device_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        path = save(tmp_path / "in.pth", nn.BatchNorm1d(3).state_dict())
    with pytest.raises(RefusedError, match="has no data"):
        convert_checkpoint(path, tmp_path / "o", 2)


def not_checkpoints(folder: Path) -> dict[str, Path]:
    """Files of many kinds that are no checkpoints."""
    generator = random.Random(0)
    whole = save(folder / "whole.pth", {"model": Net().state_dict()}).read_bytes()
    with tarfile.open(folder / "tar.pth", "w") as archive:
        archive.add(folder / "whole.pth")
    numpy.savez(folder / "arrays.npz", a=numpy.zeros(3))
    raw = {
        "empty.pth": b"",
        "random.pth": generator.randbytes(5000),
        "lfs.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 133\n",
        "page.pth": b"<!DOCTYPE html><html>Not found</html>",
        "gzip.pth": b"\x1f\x8b\x08\x00" + bytes(50),
        "pickle.pth": pickle.dumps({"a": 1}),
        "half.pth": whole[: len(whole) // 2],
        "start.pth": whole[:10],
        "zeros.pth": bytes(4000),
        "text.pth": b"hello\n" * 20,
    }
    for name, data in raw.items():
        (folder / name).write_bytes(data)
    return {path.name: path for path in folder.iterdir() if path.name != "whole.pth"}


def test_case_34_whatever_is_no_checkpoint_is_told_in_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "in").mkdir()
    for name, path in not_checkpoints(tmp_path / "in").items():
        done = run_cli(capsys, "convert", path, tmp_path / "out", "--vt-world-size", 2)
        assert done.code in (4, 5), (name, done)
        assert len(done.err.splitlines()) == 1
        assert str(path) in done.err
        assert len(done.err) > len(str(path)) + 20
    assert os.listdir(tmp_path) == ["in"]


def damaged(data: bytes, generator: random.Random) -> bytes:
    """One truncation, bit flip, run of zeros or insertion."""
    place = generator.randrange(len(data))
    kind = generator.choice(["truncate", "flip", "flip", "flip", "zeros", "insert"])
    if kind == "truncate":
        return data[:place]
    if kind == "flip":
        return (
            data[:place] + bytes([data[place] ^ (1 << generator.randrange(8))]) + data[place + 1 :]
        )
    if kind == "zeros":
        length = min(generator.randrange(1, 200), len(data) - place)
        return data[:place] + bytes(length) + data[place + length :]
    return data[:place] + generator.randbytes(generator.randrange(1, 50)) + data[place:]


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "opaque"])
def test_case_34_damaged_files_end_with_a_documented_error_or_a_sound_output(
    tmp_path: Path, kind: str
) -> None:
    generator = random.Random(kind)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    if kind == "safetensors":
        save_file(model.state_dict(), tmp_path / "whole", metadata={"format": "pt"})
    else:
        save(tmp_path / "whole", {"m": model.state_dict(), "n": {"lr": 0.1}}, kind != "legacy")
    data = (tmp_path / "whole").read_bytes()
    path, out = tmp_path / "in", tmp_path / "out"
    for _ in range(120):
        broken = damaged(data, generator)
        path.write_bytes(broken)
        refused: CheckpointError | None = None
        try:
            convert_checkpoint(path, out, 2, fsync=False, opaque=kind == "opaque")
        except CheckpointError as error:
            refused = error
        if refused is None:
            inspect_checkpoint(out, opaque=kind == "opaque")
            out.unlink()
        else:
            assert refused.exit_code in (3, 4, 5, 7)
            assert str(refused).strip()
            assert "\n" not in str(refused)
        assert path.read_bytes() == broken
        assert sorted(os.listdir(tmp_path)) == ["in", "whole"]


def test_a_fifo_and_a_device_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(RefusedError, match="not a regular file"):
            convert_checkpoint(path, tmp_path / "o", 2)


def test_a_crafted_zip_with_a_false_directory_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "in.pth", {"model": Net().state_dict()})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"data.pkl", b"data.pkx"))
    with pytest.raises(CheckpointError):
        convert_checkpoint(path, tmp_path / "o", 2)
    path.write_bytes(data[:-30])
    with pytest.raises(ReadError, match="directory"):
        convert_checkpoint(path, tmp_path / "o", 2)


def test_reading_from_memory_needs_no_name(tmp_path: Path) -> None:
    """A torch file whose name says safetensors is judged by its content."""
    file = io.BytesIO()
    torch.save({"model": Net().state_dict()}, file)
    path = tmp_path / "really_torch.safetensors"
    path.write_bytes(file.getvalue())
    assert inspect_checkpoint(path).source.format == "torch"


@pytest.mark.parametrize(("value", "name"), [(range(3), "range"), (int, "int")])
def test_names_of_python_2_are_told_in_todays_spelling(
    tmp_path: Path, value: Any, name: str
) -> None:
    """Pickles of torch's protocol call them xrange and long."""
    path = save(tmp_path / "in", {"model": bn_state(), "value": value})
    with pytest.raises(RefusedError, match=rf"does not accept: builtins\.{name}\."):
        convert_checkpoint(path, tmp_path / "out", 2)
    report = convert_checkpoint(path, tmp_path / "out", 2, opaque=True)
    assert report.opaque_globals == (f"builtins.{name}",)
    assert load(tmp_path / "out")["value"] == value
