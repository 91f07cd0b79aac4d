"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
import torch

from distbn_convert.checkpoint.atomic import atomic_output
from distbn_convert.checkpoint.places import same_file
from distbn_convert.checkpoint.temporaries import new_temporary
from distbn_convert.errors import FileAccessError, OutputExistsError

from .places import largest_file, mode, names, restrict, umask

IN_ONE_DAY = 86400


@pytest.fixture(params=["unnamed", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to write a new file: without a name until it is complete, or with a temporary."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return request.param


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_file_appears_complete_with_the_mode_of_the_umask(
    tmp_path: Path, way: str, overwrite: bool
) -> None:
    with umask(0o027), atomic_output(tmp_path / "a", overwrite=overwrite) as file:
        file.write(b"one")
        assert not (tmp_path / "a").exists()
        file.write(b"two")
    assert (tmp_path / "a").read_bytes() == b"onetwo"
    assert mode(tmp_path / "a") == 0o640
    assert names(tmp_path) == ["a"]


def test_what_was_written_can_be_read_back_before_it_is_published(tmp_path: Path, way: str) -> None:
    with atomic_output(tmp_path / "a") as file:
        torch.save(torch.arange(5), file)
        file.flush()
        assert torch.load(file.name, mmap=True).tolist() == [0, 1, 2, 3, 4]
        assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_of_any_kind_leaves_what_was_there(
    tmp_path: Path, way: str, overwrite: bool, error: type[BaseException]
) -> None:
    if overwrite:
        (tmp_path / "a").write_bytes(b"old")
    before = names(tmp_path)

    def write() -> None:
        with atomic_output(tmp_path / "a", overwrite=overwrite) as file:
            file.write(b"x" * 100)
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == before
    assert not overwrite or (tmp_path / "a").read_bytes() == b"old"


def test_an_existing_file_is_left_alone_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with (
        pytest.raises(OutputExistsError, match="a exists; use overwrite=True"),
        atomic_output(tmp_path / "a"),
    ):
        raise AssertionError
    assert (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("system", ["linux", "no renameat2", "no hard links"])
def test_a_file_that_appears_meanwhile_is_left_alone(
    tmp_path: Path, way: str, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    restrict(monkeypatch, system)

    def write() -> None:
        with atomic_output(tmp_path / "a") as file:
            file.write(b"mine")
            (tmp_path / "a").write_bytes(b"theirs")

    with pytest.raises(OutputExistsError, match="a appeared meanwhile and was left alone"):
        write()
    assert (tmp_path / "a").read_bytes() == b"theirs"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("system", ["linux", "no renameat2", "no hard links"])
def test_each_system_writes_the_same_file(
    tmp_path: Path, way: str, system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    restrict(monkeypatch, system)
    with atomic_output(tmp_path / "a") as file:
        file.write(b"x" * 1000)
    assert (tmp_path / "a").read_bytes() == b"x" * 1000
    assert names(tmp_path) == ["a"]


def test_of_many_writers_exactly_one_wins(tmp_path: Path, way: str) -> None:
    barrier = threading.Barrier(8)
    outcomes: list[str] = []

    def write(number: int) -> None:
        try:
            with atomic_output(tmp_path / "a", fsync=False) as file:
                file.write(bytes([number]) * 1000)
                barrier.wait()
            outcomes.append("written")
        except OutputExistsError:
            outcomes.append("exists")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["exists"] * 7 + ["written"]
    content = (tmp_path / "a").read_bytes()
    assert content == content[:1] * 1000
    assert names(tmp_path) == ["a"]


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real/a")
    with atomic_output(tmp_path / "link", overwrite=True) as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_bytes() == b"new"
    assert names(tmp_path / "real") == ["a"]


def test_a_link_to_nothing_gets_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("a")
    with atomic_output(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"new"


def test_an_overwritten_file_can_still_be_read_by_who_has_it_open(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(torch.arange(1000), path)
    mapped = torch.load(path, mmap=True)
    with atomic_output(path, overwrite=True) as file:
        torch.save(mapped * 2, file)
    assert mapped.sum() == 499500
    assert torch.load(path).sum() == 999000


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("none/a", errno.ENOENT, "the folder .*none does not exist; make it first"),
        ("file/a", errno.ENOTDIR, "cannot (write|look at) .*file/a: "),
        ("folder", errno.EISDIR, "it is a folder; give the name of a file in it"),
        ("fifo", errno.EINVAL, "it is not a regular file"),
        ("new/", errno.EISDIR, "that is the name of a folder"),
        ("loop", errno.ELOOP, "too many levels of symbolic links"),
        ("a" * 300, errno.ENAMETOOLONG, "file name too long"),
    ],
)
def test_a_place_that_cannot_hold_a_file_is_told(
    tmp_path: Path, name: str, code: int, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    before = names(tmp_path)
    with (
        pytest.raises(FileAccessError, match=message) as caught,
        atomic_output(f"{tmp_path}/{name}", overwrite=True),
    ):
        raise AssertionError
    assert caught.value.errno == code
    assert names(tmp_path) == before


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="there is no /proc")
def test_a_pipe_that_is_open_is_told_as_one() -> None:
    """As ``/dev/stdout`` is, which leads to a name in ``/proc`` that is none."""
    reader, writer = os.pipe()
    try:
        with (
            pytest.raises(FileAccessError, match="it is not a regular file"),
            atomic_output(f"/proc/self/fd/{writer}", expected_bytes=1),
        ):
            raise AssertionError
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("length", [200, 255])
def test_the_longest_name_of_the_file_system_is_fine(tmp_path: Path, length: int) -> None:
    with atomic_output(tmp_path / ("é" * (length // 2) + "a" * (length % 2)), overwrite=True):
        pass
    assert len(names(tmp_path)) == 1


def test_space_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(FileAccessError) as caught,
        atomic_output(tmp_path / "a", expected_bytes=2_100_000_000_000_000),
    ):
        raise AssertionError
    text = str(caught.value)
    assert text.startswith(f"not enough space in {tmp_path}: needs 2100.0 TB, has ")
    assert text.endswith("; nothing was written.")
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_space_that_is_a_little_too_small_is_told_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needed 1.1 MB and had 1.1 MB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_099_999))
    with (
        pytest.raises(FileAccessError, match=r"needs 1,100,000 bytes, has 1,099,999; nothing was"),
        atomic_output(tmp_path / "a", expected_bytes=1_100_000),
    ):
        raise AssertionError
    assert names(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("writer", ["torch", "pickle", "bytes", "small"])
def test_a_file_that_grows_too_large_is_told_whoever_wrote_it(
    tmp_path: Path, way: str, overwrite: bool, writer: str
) -> None:
    write = {
        "torch": lambda file: torch.save(torch.zeros(10_000_000), file),
        "pickle": lambda file: pickle.dump(bytes(40_000_000), file),
        "bytes": lambda file: file.write(bytes(40_000_000)),
        "small": lambda file: file.write(bytes(2_000_000)),  # fails in the last flush
    }[writer]
    if overwrite:
        (tmp_path / "a").write_bytes(b"old")
    before = names(tmp_path)
    with (
        pytest.raises(FileAccessError, match=r"cannot write .*a: file too large\.") as caught,
        largest_file(1_000_000),
        atomic_output(tmp_path / "a", overwrite=overwrite) as file,
    ):
        write(file)
    assert caught.value.errno == errno.EFBIG
    assert names(tmp_path) == before
    assert not overwrite or (tmp_path / "a").read_bytes() == b"old"


@pytest.mark.parametrize("error", [None, RuntimeError("of its own")], ids=repr)
def test_a_failed_write_that_the_writer_hides_is_still_found(
    tmp_path: Path, way: str, error: Exception | None
) -> None:
    def write(file: IO[bytes]) -> None:
        with contextlib.suppress(OSError):
            file.write(bytes(40_000_000))
        if error is not None:
            raise error

    with (
        pytest.raises(FileAccessError, match="file too large"),
        largest_file(1_000_000),
        atomic_output(tmp_path / "a") as file,
    ):
        write(file)
    assert names(tmp_path) == []


def test_the_cause_is_found_behind_errors_of_the_writer(tmp_path: Path) -> None:
    def fail() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    with (
        pytest.raises(FileAccessError, match=r"no space left on device \(.* free in ") as caught,
        atomic_output(tmp_path / "a"),
    ):
        fail()
    assert caught.value.errno == errno.ENOSPC


def test_a_descriptor_that_the_block_itself_could_not_flush_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(FileAccessError, match=r"cannot write .*a: input/output error") as caught,
        atomic_output(tmp_path / "a"),
    ):
        raise OSError(errno.EIO, "Input/output error")
    assert caught.value.errno == errno.EIO
    assert names(tmp_path) == []


def test_errors_that_are_not_about_the_output_pass_unchanged(tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="source"),
        atomic_output(tmp_path / "a"),
        open(tmp_path / "source", "rb"),
    ):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("function", ["fsync", "replace", "fchmod"])
def test_a_failing_last_step_leaves_the_old_file(
    tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, function, fail)
    with (
        pytest.raises(FileAccessError, match=r"cannot write .*a: input/output error") as caught,
        atomic_output(tmp_path / "a", overwrite=True) as file,
    ):
        file.write(b"new")
    monkeypatch.undo()
    assert caught.value.errno == errno.EIO
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_and_folder_are_flushed_to_the_disk_unless_unwanted(
    tmp_path: Path, way: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[bool] = []
    real = os.fsync

    def spy(descriptor: int) -> None:
        flushed.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    for wanted, expected in ((True, [False, True]), (False, [])):
        flushed.clear()
        with atomic_output(tmp_path / f"{wanted}", overwrite=overwrite, fsync=wanted):
            pass
        assert flushed == expected


def test_a_system_that_will_not_name_an_unnamed_file_still_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restrict(monkeypatch, "no hard links")
    with umask(0o022), atomic_output(tmp_path / "a") as file:
        unnamed = file.name.startswith("/proc/")
        file.write(b"x" * 1000)
    if not unnamed:
        pytest.skip("this file system has no files without a name")
    assert (tmp_path / "a").read_bytes() == b"x" * 1000
    assert mode(tmp_path / "a") == 0o644
    assert names(tmp_path) == ["a"]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_next_run_removes_old_leftovers_of_dead_processes_and_nothing_else(
    tmp_path: Path,
) -> None:
    dead, alive = dead_pid(), os.getppid()
    old, new = time.time() - IN_ONE_DAY, time.time()
    leftovers = {
        f".a.{dead}.0123abcd.distbn-tmp": (old, False),
        f".a.{os.getpid()}.0123abcd.distbn-tmp": (old, False),
        f".a.{dead}.0123abce.distbn-tmp": (new, True),
        f".a.{alive}.0123abcd.distbn-tmp": (old, True),
        f".b.{dead}.0123abcd.distbn-tmp": (old, True),
        f".a.{dead}.0123abcd.tmp": (old, True),
        f"x.a.{dead}.0123abcd.distbn-tmp": (old, True),
    }
    for name, (age, _) in leftovers.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    folder = tmp_path / f".a.{dead}.fedcba98.distbn-tmp"
    (folder / "inner").mkdir(parents=True)
    os.utime(folder, (old, old))
    ours = new_temporary(tmp_path / "a")
    ours.touch()
    os.utime(ours, (old, old))
    with atomic_output(tmp_path / "a"):
        pass
    kept = {name for name, (_, stays) in leftovers.items() if stays}
    assert set(names(tmp_path)) == kept | {"a", ours.name}


def test_what_is_left_when_the_process_ends_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from distbn_convert.checkpoint.temporaries import new_temporary\n"
        "new_temporary(Path(sys.argv[1], 'a')).touch()\n"
        "new_temporary(Path(sys.argv[1], 'b')).mkdir()\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait(); print(len(os.listdir(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2\n", "")
    assert names(tmp_path) == []


def test_same_file_sees_through_links_and_spelling(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"same")
    (tmp_path / "b").write_bytes(b"same")
    (tmp_path / "soft").symlink_to("a")
    os.link(tmp_path / "a", tmp_path / "hard")
    for name in ("a", "soft", "hard", f"../{tmp_path.name}/./a"):
        assert same_file(tmp_path / "a", f"{tmp_path}/{name}")
    for name in ("b", "none"):
        assert not same_file(tmp_path / "a", tmp_path / name)
    assert not same_file(tmp_path / "none", tmp_path / "none")


def test_nothing_here_imports_torch_or_click() -> None:
    module = "distbn_convert.checkpoint.atomic"
    code = f"import sys, {module}; print(sorted({{'torch', 'click'}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
