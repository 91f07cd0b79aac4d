"""Folders that appear complete or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from distbn_convert.checkpoint.atomic import atomic_output
from distbn_convert.checkpoint.folders import atomic_folder
from distbn_convert.errors import FileAccessError, OutputExistsError

from .places import largest_file, mode, names, restrict, umask


@pytest.mark.parametrize("interrupted", [0, 1, 2])
def test_an_interruption_while_the_old_folder_is_removed_does_not_stop_that(
    tmp_path: Path, interrupted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "out", {"a": "old", "b": "old", "c": "old"})
    real, calls = os.unlink, []

    def unlink(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == interrupted + 1:
            raise KeyboardInterrupt
        real(*args, **options)

    def write() -> None:
        with atomic_folder(tmp_path / "out", overwrite=True) as folder:
            fill(folder, {"a": "new", "b": "new", "c": "new"})
            monkeypatch.setattr(os, "unlink", unlink)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert content(tmp_path / "out") == {"a": "new", "b": "new", "c": "new"}
    assert names(tmp_path) == ["out"]


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_new_folder_appears_complete_with_the_mode_of_the_umask(tmp_path: Path) -> None:
    with umask(0o027), atomic_folder(tmp_path / "out") as folder:
        fill(folder, {"a": "1", "sub/b": "2"})
        assert not (tmp_path / "out").exists()
        assert folder.parent == tmp_path
    assert content(tmp_path / "out") == {"a": "1", "sub/b": "2"}
    assert mode(tmp_path / "out") == 0o750
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("system", ["linux", "no renameat2"])
def test_a_folder_is_replaced_whole_and_keeps_its_mode(
    tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    restrict(monkeypatch, system)
    fill(tmp_path / "out", {"a": "old"})
    (tmp_path / "out").chmod(0o711)
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        fill(folder, {"a": "new", "b": "more"})
        assert content(tmp_path / "out") == {"a": "old"}
    assert content(tmp_path / "out") == {"a": "new", "b": "more"}
    assert mode(tmp_path / "out") == 0o711
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_folder(
    tmp_path: Path, overwrite: bool, error: type[BaseException]
) -> None:
    if overwrite:
        fill(tmp_path / "out", {"a": "old"})
    before = names(tmp_path)

    def write() -> None:
        with atomic_folder(tmp_path / "out", overwrite=overwrite) as folder:
            fill(folder, {"a": "new"})
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == before
    assert not overwrite or content(tmp_path / "out") == {"a": "old"}


@pytest.mark.parametrize("system", ["linux", "no renameat2"])
def test_a_failing_exchange_leaves_the_old_folder(
    tmp_path: Path, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "out", {"a": "old"})
    restrict(monkeypatch, system)
    real = os.rename

    def fail(source: Path, target: Path) -> None:
        if str(source).endswith("-tmp"):
            raise OSError(errno.EIO, "Input/output error", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", fail)
    if system == "linux":
        monkeypatch.setattr("distbn_convert.checkpoint.folders.exchange", fail)
    with (
        pytest.raises(FileAccessError, match=r"cannot write .*out: input/output error"),
        atomic_folder(tmp_path / "out", overwrite=True) as folder,
    ):
        fill(folder, {"a": "new"})
    assert content(tmp_path / "out") == {"a": "old"}
    assert names(tmp_path) == ["out"]


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "out", {"a": "old", "notes.txt": "dear", "runs/1": "x"})
    with (
        pytest.raises(OutputExistsError, match=r"would not: notes\.txt, runs, runs/1; remove"),
        atomic_folder(tmp_path / "out", overwrite=True) as folder,
    ):
        fill(folder, {"a": "new"})
    assert content(tmp_path / "out") == {"a": "old", "notes.txt": "dear", "runs/1": "x"}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("system", ["linux", "no renameat2"])
@pytest.mark.parametrize("theirs", [{"a": "theirs"}, {}])
def test_a_folder_that_appears_meanwhile_is_left_alone(
    tmp_path: Path, system: str, theirs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    restrict(monkeypatch, system)

    def write() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            fill(folder, {"a": "mine"})
            (tmp_path / "out").mkdir()
            fill(tmp_path / "out", theirs)

    with pytest.raises(OutputExistsError, match="out appeared meanwhile"):
        write()
    assert content(tmp_path / "out") == theirs
    assert names(tmp_path) == ["out"]


def test_a_place_that_cannot_hold_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "there").mkdir()
    cases = [
        ("file", True, FileAccessError, "it is no folder"),
        ("there", False, OutputExistsError, "there exists; use overwrite=True"),
        ("none/out", False, FileAccessError, "none does not exist"),
    ]
    for name, overwrite, kind, message in cases:
        with (
            pytest.raises(kind, match=message),
            atomic_folder(tmp_path / name, overwrite=overwrite),
        ):
            raise AssertionError
    with (
        pytest.raises(FileAccessError, match="not enough space in"),
        atomic_folder(tmp_path / "out", expected_bytes=10**16),
    ):
        raise AssertionError
    assert names(tmp_path) == ["file", "there"]


@pytest.mark.parametrize("place", [".", "logs"])
def test_the_folder_of_whoever_calls_is_not_replaced(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell would stay in the old one, and see nothing there."""
    fill(tmp_path / "out", {"a": "old", "logs/b": "old"})
    monkeypatch.chdir(tmp_path / "out" / place)
    with (
        pytest.raises(FileAccessError, match="the current folder, .* change to another") as caught,
        atomic_folder(os.path.relpath(tmp_path / "out"), overwrite=True),
    ):
        raise AssertionError
    assert caught.value.errno == errno.EBUSY
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    (tmp_path / "new").rmdir()
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        fill(folder, {"a": "new", "logs/b": "new"})
    assert content(tmp_path / "out") == {"a": "new", "logs/b": "new"}


def test_a_mounted_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path)
    with (
        pytest.raises(FileAccessError, match="a mounted folder cannot be replaced") as caught,
        atomic_folder(tmp_path, overwrite=True),
    ):
        raise AssertionError
    assert caught.value.errno == errno.EBUSY


def test_a_failure_inside_is_told_under_the_name_that_the_user_gave(tmp_path: Path) -> None:
    with (
        pytest.raises(FileAccessError) as caught,
        largest_file(1000),
        atomic_folder(tmp_path / "out") as folder,
        atomic_output(folder / "model.bin") as file,
    ):
        file.write(bytes(2000))
    assert str(caught.value) == f"cannot write {tmp_path}/out/model.bin: file too large."
    with (
        pytest.raises(FileAccessError, match=r"cannot write .*out: file too large\.") as caught,
        largest_file(1000),
        atomic_folder(tmp_path / "out") as folder,
    ):
        (folder / "model.bin").write_bytes(bytes(2000))
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == []
