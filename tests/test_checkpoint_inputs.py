"""No output takes the place of something that was read, whatever --force allows."""

from __future__ import annotations

import errno
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from distbn_convert.checkpoint import (
    backup,
    convert_checkpoint,
    edit,
    gather,
    gather_checkpoints,
    revert_checkpoint,
    verify_checkpoint,
)
from distbn_convert.errors import OutputExistsError, ReadError

from .checkpoints import Net, contents, load, run_cli, write_index
from .places import access_list, restrict, set_access_list


def shards(folder: Path) -> Path:
    save_file(Net().state_dict(), folder / "whole.safetensors")
    convert_checkpoint(folder / "whole.safetensors", folder / "shards", 2, max_shard_size=300)
    return folder / "shards"


@pytest.mark.parametrize("options", [{}, {"format": "safetensors"}])
@pytest.mark.parametrize("linked", [False, True])
def test_shards_do_not_replace_the_folder_of_the_input(
    tmp_path: Path, options: dict[str, Any], linked: bool
) -> None:
    """All fits in one file, which has the name of the input: no name would be lost."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in/model.safetensors"
    real = tmp_path / "real" if linked else path
    torch.save(Net().state_dict(), real) if options else save_file(Net().state_dict(), real)
    if linked:
        path.symlink_to(real)
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError, match=r"in holds the input .*model\.safetensors"):
        convert_checkpoint(
            path, tmp_path / "in", 2, overwrite=True, max_shard_size="1GB", **options
        )
    assert contents(tmp_path) == before
    assert path.is_symlink() is linked


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_is_gathered_is_not_replaced(tmp_path: Path, dry_run: bool) -> None:
    paths = [tmp_path / f"rank{rank}.pth" for rank in range(3)]
    for path in paths:
        torch.save(Net().state_dict() if path == paths[0] else load(paths[0]), path)
    (tmp_path / "link").hardlink_to(paths[2])
    before = contents(tmp_path)
    for dst in (paths[1], tmp_path / "link"):
        with pytest.raises(OutputExistsError, match=f"{dst} is the input .*rank"):
            gather_checkpoints(paths, dst, overwrite=True, dry_run=dry_run)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("given", ["folder", "index"])
def test_a_file_does_not_replace_a_shard_that_it_is_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    folder = shards(tmp_path)
    src = folder / "model.safetensors.index.json" if given == "index" else folder
    shard = sorted(folder.glob("*.safetensors"))[1]
    before = contents(tmp_path)
    result = run_cli(capsys, "revert", src, shard, "--format", "safetensors", "--force")
    assert result.code == 6
    assert f"Error: {shard} is the input {shard}, which would be lost" in result.err
    assert contents(tmp_path) == before


def test_a_file_does_not_replace_a_piece_of_a_distributed_checkpoint(tmp_path: Path) -> None:
    with warnings.catch_warnings():  # that there is no process group
        warnings.simplefilter("ignore")
        dcp.save({"model": Net().state_dict()}, checkpoint_id=tmp_path / "in")
    before = contents(tmp_path)
    assert before.keys() == {"in/.metadata", "in/__0_0.distcp"}
    for name in before:
        with pytest.raises(OutputExistsError, match="is the input"):
            convert_checkpoint(tmp_path / "in", tmp_path / name, 2, overwrite=True, format="torch")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("exists", [False, True])
def test_a_file_may_be_written_into_the_folder_that_it_is_made_of(
    tmp_path: Path, exists: bool
) -> None:
    """Its temporary name is no change of the input."""
    folder = shards(tmp_path)
    before = contents(folder)
    if exists:
        (folder / "new.safetensors").write_bytes(b"old")
    dst = folder / "new.safetensors"
    revert_checkpoint(folder, dst, format="safetensors", overwrite=True)
    assert contents(folder).keys() == {*before, "new.safetensors"}
    assert verify_checkpoint(tmp_path / "whole.safetensors", dst).largest_difference == 0


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_an_input_that_is_written_while_it_is_gathered_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: int
) -> None:
    """Whichever of them it is."""
    torch.manual_seed(0)
    state = Net().state_dict()
    paths = [tmp_path / f"rank{rank}.pth" for rank in range(3)]
    for path in paths:
        torch.save(state, path)
    gather_groups = gather.gather_groups

    def meanwhile(*args: Any) -> Any:
        result = gather_groups(*args)
        torch.save(state, tmp_path / "new")  # beside it, as to a mapped file that is cut short
        (tmp_path / "new").replace(paths[changed])
        return result

    monkeypatch.setattr(gather, "gather_groups", meanwhile)
    with pytest.raises(ReadError, match=f"rank{changed}.pth changed while it was being read"):
        gather_checkpoints(paths, tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def saved_as(kind: str, place: Path) -> Iterator[tuple[Path, Path]]:
    """Yield an input and a file of it, each that it has."""
    if kind in ("zip", "legacy"):
        torch.save(Net().state_dict(), place, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "safetensors":
        save_file(Net().state_dict(), place)
    else:
        place.mkdir()
        (place / "logs").mkdir()
        (place / "logs" / "config.json").write_text("{}")
    if place.is_file():
        yield place, place
        return
    if kind == "dcp":
        with warnings.catch_warnings():  # that there is no process group
            warnings.simplefilter("ignore")
            dcp.save({"model": Net().state_dict()}, checkpoint_id=place)
    elif kind == "accelerate":
        save_file(Net().state_dict(), place / "model.safetensors")
    else:
        plain = place.with_name("plain")
        revert_checkpoint(shards(place.parent), plain, fsync=False)
        for path in plain.iterdir():
            path.rename(place / path.name)
    source = next(place.glob("*.index.json")) if kind == "index" else place
    for file in sorted(file for file in place.rglob("*") if file.is_file()):
        yield source, file


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "kind", ["zip", "legacy", "safetensors", "accelerate", "dcp", "folder", "index"]
)
def test_a_file_that_is_written_over_while_it_is_read_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, in_place: bool
) -> None:
    """It stays the same file, and of the same size."""
    replicate_groups = edit.replicate_groups
    cases = list(saved_as(kind, tmp_path / "in"))
    for source, file in cases:
        data = file.read_bytes()
        os.utime(file, (1, 1))

        def meanwhile(*args: Any, file: Path = file, data: bytes = data) -> Any:
            with open(file, "r+b") as opened:
                opened.write(data)
            return replicate_groups(*args)

        with monkeypatch.context() as patched:
            patched.setattr(edit, "replicate_groups", meanwhile)
            dst = None if in_place else tmp_path / "out"
            with pytest.raises(ReadError, match=f"{source} changed while it was being read"):
                convert_checkpoint(source, dst, 2, in_place=in_place, fsync=False)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "in.bak").exists()
    convert_checkpoint(cases[0][0], tmp_path / "out", 2, fsync=False)


@pytest.mark.parametrize("kind", ["zip", "safetensors", "accelerate", "dcp", "folder", "index"])
@pytest.mark.parametrize("system", ["linux", "no hard links"])
def test_what_is_written_into_the_new_checkpoint_does_not_show_in_the_backup(
    tmp_path: Path, kind: str, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving the next state writes over files, as torch.save does."""
    restrict(monkeypatch, system)
    source, _ = next(saved_as(kind, tmp_path / "in"))
    before = contents(tmp_path / "in")
    names = [os.path.relpath(path, tmp_path / "in") for path in (tmp_path / "in").rglob("*")]
    for name in (".", *names):
        if os.geteuid() == 0:
            os.chown(tmp_path / "in" / name, 12, 34)
        os.utime(tmp_path / "in" / name, (1e9, 1e9))
    owner = (tmp_path / "in").stat().st_uid, (tmp_path / "in").stat().st_gid
    convert_checkpoint(source, None, 2, in_place=True)
    assert contents(tmp_path / "in").keys() == before.keys()
    for name in (".", *names):
        new, old = (tmp_path / place / name for place in ("in", "in.bak"))
        assert [(path.stat().st_uid, path.stat().st_gid) for path in (new, old)] == [owner] * 2
        assert old.stat().st_mtime == 1e9
    for name in before:
        with open(tmp_path / "in" / name, "r+b") as file:
            file.write(b"written over")
    assert contents(tmp_path / "in.bak") == before


def test_files_that_may_only_be_read_are_kept_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As caches have them; root may write to them all the same."""
    restrict(monkeypatch, "no hard links")

    def open_as_user(path: str, mode: str) -> IO[Any]:
        if mode != "rb" and not os.stat(path).st_mode & stat.S_IWUSR:
            raise PermissionError(errno.EACCES, "may only be read", path)
        return open(path, mode)

    monkeypatch.setattr(backup, "open", open_as_user, raising=False)
    source, _ = next(saved_as("folder", tmp_path / "in"))
    before = contents(tmp_path / "in")
    for name in before:
        (tmp_path / "in" / name).chmod(0o444)
    convert_checkpoint(source, None, 2, in_place=True)
    assert contents(tmp_path / "in.bak") == before


@pytest.mark.parametrize("backup", [True, False])
def test_a_folder_in_place_keeps_access_lists(tmp_path: Path, backup: bool) -> None:
    source, _ = next(saved_as("folder", tmp_path / "in"))
    places = [source, *source.rglob("*")]
    expected = [set_access_list(path) for path in places]
    set_access_list(tmp_path / "in" / "logs", "default")
    convert_checkpoint(source, None, 2, in_place=True, backup=backup)
    assert [access_list(path) for path in places] == expected
    assert access_list(tmp_path / "in" / "logs", "default") == expected[0]


def test_links_in_a_folder_are_no_change_of_it(tmp_path: Path) -> None:
    """Not even one to the folder in which the output appears."""
    (tmp_path / "in").mkdir()
    save_file(Net().state_dict(), tmp_path / "in" / "model.safetensors")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "in" / "outputs").symlink_to(tmp_path / "outputs")
    convert_checkpoint(tmp_path / "in", tmp_path / "outputs" / "out", 2, fsync=False)
    assert (tmp_path / "outputs" / "out" / "outputs").is_symlink()
    (tmp_path / "in" / "latest").symlink_to("of a run that was removed")
    convert_checkpoint(tmp_path / "in", None, 2, in_place=True)
    for name in ("outputs", "latest"):
        assert all((tmp_path / folder / name).is_symlink() for folder in ("in", "in.bak"))


@pytest.mark.parametrize("kind", ["index", "folder", "dcp", "accelerate"])
def test_a_log_may_grow_beside_what_another_format_is_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As long as none of it is carried over; what is read is watched as ever."""
    replicate_groups = edit.replicate_groups
    cases = list(saved_as(kind, tmp_path / "in"))
    options = {"format": "torch", "state": "model" if kind == "dcp" else None, "fsync": False}
    for source, file in [*cases, (cases[0][0], tmp_path / "in" / "new.log")]:

        def meanwhile(*args: Any, file: Path = file) -> Any:
            with open(file, "ab") as opened:
                opened.write(b"epoch 3")
            return replicate_groups(*args)

        with monkeypatch.context() as patched:
            patched.setattr(edit, "replicate_groups", meanwhile)
            if file.name in ("config.json", "new.log"):
                convert_checkpoint(source, tmp_path / file.name, 2, **options)
                continue
            with pytest.raises(ReadError, match="changed while it was"):
                convert_checkpoint(source, tmp_path / "out", 2, **options)
            os.truncate(file, file.stat().st_size - len(b"epoch 3"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", [False, True])
def test_shards_below_a_link_to_a_folder_are_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "in" / "weights").symlink_to(tmp_path / "blobs")
    state, shard = Net().state_dict(), tmp_path / "blobs" / "1.safetensors"
    save_file(state, shard)
    write_index(tmp_path / "in", dict.fromkeys(state, "weights/1.safetensors"))
    replicate_groups = edit.replicate_groups

    def meanwhile(*args: Any) -> Any:
        os.utime(shard, (1e9, 1e9))
        return replicate_groups(*args)

    if changed:
        monkeypatch.setattr(edit, "replicate_groups", meanwhile)
        with pytest.raises(ReadError, match="in changed while it was being read"):
            convert_checkpoint(tmp_path / "in", tmp_path / "out", 2, format="torch")
    else:
        convert_checkpoint(tmp_path / "in", tmp_path / "out", 2, format="torch")
        assert load(tmp_path / "out").keys() == state.keys()


@pytest.mark.parametrize("read", [False, True])
def test_a_log_may_grow_beside_what_is_gathered_but_not_carried_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: bool
) -> None:
    gather_groups, state = gather.gather_groups, Net().state_dict()
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
        save_file(state, tmp_path / f"rank{rank}" / "model.safetensors")

    def meanwhile(*args: Any) -> Any:
        result = gather_groups(*args)
        name = "model.safetensors" if read else "train.log"
        with open(tmp_path / "rank1" / name, "ab") as opened:
            opened.write(b" ")
        return result

    monkeypatch.setattr(gather, "gather_groups", meanwhile)
    folders = [tmp_path / "rank0", tmp_path / "rank1"]
    if read:
        with pytest.raises(ReadError, match="rank1 changed while it was being read"):
            gather_checkpoints(folders, tmp_path / "out")
    else:
        gather_checkpoints(folders, tmp_path / "out")
    assert (tmp_path / "out").exists() is not read
