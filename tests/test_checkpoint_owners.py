"""Owner, mode and access list of what is replaced."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from distbn_convert.checkpoint.atomic import atomic_output
from distbn_convert.checkpoint.folders import atomic_folder

from .places import access_list, mode, names, set_access_list


@pytest.mark.parametrize("old_mode", [0o600, 0o644, 0o755])
def test_an_overwritten_file_keeps_its_mode_and_owner(tmp_path: Path, old_mode: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(old_mode)
    if os.getuid() == 0:
        os.chown(path, 12345, 23456)
    before = path.stat()
    with atomic_output(path, overwrite=True) as file:
        assert mode(Path(file.name)) == 0o600
        assert path.read_bytes() == b"old"
        file.write(b"new")
    after = path.stat()
    assert path.read_bytes() == b"new"
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("inherited", [False, True])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_what_is_replaced_keeps_its_access_list(
    tmp_path: Path, folder: bool, listed: bool, inherited: bool
) -> None:
    """With the mode alone the group gets what the list gives others."""
    path = tmp_path / "a"
    path.mkdir(0o770) if folder else path.touch(0o640)
    expected = set_access_list(path) if listed else None
    if inherited:  # by what is new in this folder
        set_access_list(tmp_path, "default")
    before = mode(path)
    with (atomic_folder if folder else atomic_output)(path, overwrite=True):
        pass
    assert access_list(path) == expected
    assert mode(path) == before
    if folder:
        assert access_list(path, "default") is None


@pytest.mark.parametrize("error", [None, errno.EPERM, errno.EINVAL, errno.ENOSYS])
def test_a_system_without_owners_replaces_files_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int | None
) -> None:
    """Windows, where Python has none of these; user namespaces without that owner; FUSE."""

    def refuse(*args: object) -> None:
        raise OSError(error, "no such owner here")

    for name in ("chown", "fchown", "fchmod", "getxattr"):
        if error is None:
            monkeypatch.delattr(os, name, raising=False)
        elif name in ("chown", "fchown"):
            monkeypatch.setattr(os, name, refuse)
    for _ in range(2):
        with atomic_output(tmp_path / "a", overwrite=True) as file:
            file.write(b"new")
        with atomic_folder(tmp_path / "folder", overwrite=True) as folder:
            (folder / "b").touch()
    assert names(tmp_path) == ["a", "folder"]
