"""Whatever happens while a checkpoint is written, the old one or the new one is there, whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from distbn_convert.checkpoint import convert_checkpoint, inspect_checkpoint
from distbn_convert.errors import FileAccessError, OutputExistsError

from .checkpoints import contents
from .places import restrict

ROOT = Path(__file__).parent.parent
OLD = b"an older output"
SHARDS = ("1.safetensors", "2.safetensors")
FORMATS = ("torch", "safetensors", "sharded", "resharded")  # the last makes shards of a file
TEMPORARY = re.compile(r"\.[^/]+\.\d+\.[0-9a-f]{8}\.distbn-tmp")
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def lines(self) -> int:
        """Lines on stderr; click leaves the line of ^C with an empty one."""
        return len(self.err.split("\n")) - 1 - self.err.startswith("\n")

    def failed_with(self, status: int, message: str) -> None:
        """One line, no traceback, the documented status."""
        assert (self.status, self.err.count("\n")) == (status, 1), self
        assert re.match(f"Error: .*{message}", self.err), self.err


class Commands:
    """Starts command lines in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.out, self.err = folder / "out", folder / "err"
        self.zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *args: object, **request: Any) -> int:
        """Start a command and return its process id; wait() must follow."""
        assert self.zygote.stdin is not None
        self.out.write_text("")
        self.err.write_text("")
        streams = {"out": str(self.out), "err": str(self.err)}
        line = json.dumps({"args": [str(arg) for arg in args], **streams, **request})
        self.zygote.stdin.write(line + "\n")
        self.zygote.stdin.flush()
        return self._number()

    def wait(self) -> Ended:
        status = self._number()
        return Ended(status, self.out.read_text(), self.err.read_text())

    def run(self, *args: object, **request: Any) -> Ended:
        self.start(*args, **request)
        return self.wait()

    def _number(self) -> int:
        assert self.zygote.stdout is not None
        return int(self.zygote.stdout.readline())

    def close(self) -> None:
        assert self.zygote.stdin is not None
        assert self.zygote.stdout is not None
        self.zygote.stdin.close()
        self.zygote.wait()
        self.zygote.stdout.close()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    started = Commands(tmp_path_factory.mktemp("streams"))
    yield started
    started.close()


def make_source(folder: Path, format: str, megabytes: int) -> Path:
    """A checkpoint with one BatchNorm among large weights."""
    state = dict(torch.nn.BatchNorm1d(8).state_dict(prefix="bn."))
    state["weight"] = torch.rand(megabytes, 250_000)
    if format == "torch":
        torch.save({"model": state, "epoch": 3}, folder / "in")
    elif format != "sharded":
        save_file(state, folder / "in")
    else:
        (folder / "in").mkdir()
        weight_map = {name: SHARDS[name == "weight"] for name in state}
        for shard in SHARDS:
            names = [name for name in state if weight_map[name] == shard]
            save_file({name: state[name] for name in names}, folder / "in" / shard)
        index = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        (folder / "in" / "model.safetensors.index.json").write_text(index)
    return folder / "in"


class Scene:
    """A source, what converting it gives, how long that takes, and a place to do it again."""

    def __init__(self, folder: Path, format: str, commands: Commands) -> None:
        self.commands, self.format, self.folder = commands, format, folder
        self.source = make_source(folder, format, megabytes=4)
        self.before = contents(self.source)
        self.place = folder / "place"
        self.target = self.place / "out"
        self.seconds = 10.0
        for _ in range(3):  # the first is slower
            self.reset(False)
            started = time.perf_counter()
            done = self.convert()
            self.seconds = min(self.seconds, time.perf_counter() - started)
            assert done == (0, done.out, ""), done
        self.new = contents(self.target)

    def args(self, force: bool = False) -> list[object]:
        options = ["--force"] if force else []
        options += ["--max-shard-size", "1MB"] if self.format == "resharded" else []
        return ["convert", self.source, self.target, "--vt-world-size", 4, *options]

    def convert(self, force: bool = False, **request: Any) -> Ended:
        return self.commands.run(*self.args(force), **request)

    def reset(self, force: bool) -> dict[str, bytes] | None:
        """Bring the place into its state before a run; return what is at the target."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        return self.put_old() if force else None

    def put_old(self) -> dict[str, bytes]:
        """Put an older output there, which --force may replace."""
        if self.format in ("sharded", "resharded"):
            self.target.mkdir()
            (self.target / next(iter(self.new))).write_bytes(OLD)
        else:
            self.target.write_bytes(OLD)
        return contents(self.target)

    def check(self, old: dict[str, bytes] | None, ended: Ended, debris: bool = False) -> None:
        """The source untouched, the target old or new, nothing else."""
        assert contents(self.source) == self.before
        now = contents(self.target) if self.target.exists() else None
        assert now in (old, self.new), f"{ended}: neither the old nor the new output"
        assert ended.status != 0 or now == self.new, ended
        names = {name for name in os.listdir(self.place) if name != "out"}
        assert not names or debris, f"{ended}: {names}"
        assert all(TEMPORARY.fullmatch(name) for name in names), names
        assert "Traceback" not in ended.err, ended.err
        assert ended.lines == (ended.status > 0), ended


@pytest.fixture(scope="module", params=FORMATS)
def scene(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, commands: Commands
) -> Scene:
    return Scene(tmp_path_factory.mktemp(request.param), request.param, commands)


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_case_39_a_signal_at_any_time_leaves_the_old_or_the_new_output(
    scene: Scene, number: signal.Signals, force: bool
) -> None:
    for _ in range(2):
        old = scene.reset(force)
        delay = random.SystemRandom().uniform(0, 1.1 * scene.seconds)
        process = scene.commands.start(*scene.args(force))
        time.sleep(delay)
        send(process, number)
        ended = scene.commands.wait()
        told = f"{number.name} after {delay:.4f} of {scene.seconds:.4f} s: {ended}"
        assert ended.status in (0, STATUS[number]), told
        scene.check(old, ended, debris=number == signal.SIGKILL)


def test_case_39_the_next_run_cleans_up_after_sigkill(scene: Scene) -> None:
    """A process killed in the middle of writing leaves a temporary, which has its hour."""
    for force in (True, False):
        old = scene.reset(force)
        process = scene.commands.start(*scene.args(force))
        wait_until(lambda: any(map(TEMPORARY.fullmatch, os.listdir(scene.place))), scene.seconds)
        send(process, signal.SIGKILL)
        scene.check(old, scene.commands.wait(), debris=True)
        left = [name for name in os.listdir(scene.place) if name != "out"]
        for name in left:
            os.utime(scene.place / name, (1, 1))
        done = scene.convert(force=True)
        assert done.status == 0
        assert contents(scene.target) == scene.new
        assert os.listdir(scene.place) == ["out"]


def send(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was faster
        os.kill(process, number)


def wait_until(condition: Any, seconds: float) -> None:
    stop = time.perf_counter() + seconds
    while not condition() and time.perf_counter() < stop:
        time.sleep(0.0005)


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_case_38_a_limit_on_the_size_of_files_is_told(scene: Scene, force: bool) -> None:
    for size in (1000, 2_000_000):
        old = scene.reset(force)
        ended = scene.convert(force, largest_file=size)
        ended.failed_with(7, r"cannot write .*/out.*: file too large \(needs \d[\d.]* .?B\)\.")
        scene.check(old, ended)


@contextlib.contextmanager
def mounted(place: Path, *commands: list[str]) -> Iterator[None]:
    """Mount something there, which takes root."""
    try:
        for command in commands:
            subprocess.run(
                ["mount", *command, str(place)], check=True, capture_output=True, text=True
            )
    except (OSError, subprocess.CalledProcessError) as error:
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)
        pytest.skip(f"mounting is not permitted here: {getattr(error, 'stderr', error)}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


TINY = ["-t", "tmpfs", "-o", "size=1m", "tmpfs"]
NO_SPACE_CHECK = [
    f"distbn_convert.checkpoint.{name}:check_space!" for name in ("atomic", "folders")
]


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_case_38_a_full_disk_is_told_before_and_while_writing(scene: Scene, force: bool) -> None:
    for broken, message in (
        ([], r"not enough space in .*: needs 4\.\d MB, has \d.*; nothing was written\."),
        (
            NO_SPACE_CHECK,
            r"cannot write .*/out.*: no space left on device \(needs \d.*, \d.* free in ",
        ),
    ):
        scene.reset(False)
        with mounted(scene.place, TINY):
            old = scene.put_old() if force else None
            ended = scene.convert(force, broken=broken)
            ended.failed_with(7, message)
            scene.check(old, ended)


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_case_38_a_read_only_folder_is_told(scene: Scene, force: bool) -> None:
    old = scene.reset(force)
    bind = ["--bind", str(scene.place)]
    with mounted(scene.place, bind, ["-o", "remount,bind,ro"]):
        ended = scene.convert(force)
        ended.failed_with(7, r"cannot write .*/out: read-only file system\.")
        scene.check(old, ended)


BROKEN = (
    *("os:fsync", "os:replace", "os:rename", "os:link", "os:fchmod", "os:chmod", "os:mkdir"),
    *(
        "os:copy_file_range",
        "os:pwrite",
        "shutil:copystat",
        "distbn_convert.checkpoint.rename:_renameat2",
    ),
)


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_a_broken_disk_is_told_or_does_not_matter(scene: Scene, force: bool) -> None:
    outcomes = {}
    for target in BROKEN:
        old = scene.reset(force)
        ended = scene.convert(force, broken=[target])
        if ended.status:
            ended.failed_with(7, ".*/out.*input/output error")
        scene.check(old, ended)
        outcomes[target] = ended.status
    assert outcomes["os:fsync"] == 7
    assert outcomes["os:copy_file_range"] == outcomes["os:pwrite"] == 0
    assert 0 < sum(map(bool, outcomes.values())) < len(BROKEN)


@pytest.mark.parametrize("scene", FORMATS[:-1], indirect=True)  # shards are a new folder
@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
@pytest.mark.parametrize("backup", [False, True])
def test_a_signal_while_a_checkpoint_is_converted_in_place(
    scene: Scene, number: signal.Signals, backup: bool
) -> None:
    scene.reset(False)
    copy = shutil.copytree if scene.source.is_dir() else shutil.copy
    copy(scene.source, scene.target)
    options = ["--in-place", "--backup" if backup else "--no-backup"]
    delay = random.SystemRandom().uniform(0, 1.1 * scene.seconds)
    process = scene.commands.start("convert", scene.target, "--vt-world-size", 4, *options)
    time.sleep(delay)
    send(process, number)
    ended = scene.commands.wait()
    told = f"{number.name} after {delay:.4f} of {scene.seconds:.4f} s: {ended}"
    assert ended.status in (0, STATUS[number]), told
    kept = scene.place / "out.bak"
    if kept.exists():
        assert backup, told
        assert contents(kept) == scene.before, told
        (shutil.rmtree if kept.is_dir() else os.unlink)(kept)
    else:
        assert not backup or contents(scene.target) == scene.before, told
    scene.check(scene.before, ended, debris=number == signal.SIGKILL)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "")], ids=repr)
@pytest.mark.parametrize(
    ("format", "call", "published"),
    [
        *(("torch", "fsync", False), ("torch", "fsync", True)),
        *(("sharded", "fsync", False), ("sharded", "fsync", True), ("sharded", "rmdir", True)),
    ],
)
def test_the_backup_stays_from_when_the_new_checkpoint_is_in_its_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    call: str,
    published: bool,
    error: BaseException,
) -> None:
    source = make_source(tmp_path, format, megabytes=1)
    before = contents(source)
    real, failed = getattr(os, call), []

    def fail(*args: Any, **options: Any) -> Any:
        if (contents(source) != before) == published:
            failed.append(args)
            raise error
        return real(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with contextlib.suppress(KeyboardInterrupt, FileAccessError):
            convert_checkpoint(source, None, 4, in_place=True)
    assert failed
    if published:
        assert contents(tmp_path / "in.bak") == before
    else:
        assert contents(source) == before
        assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(("format", "call"), [("torch", "link"), ("sharded", "mkdir")])
@pytest.mark.parametrize("links", [True, False])
def test_of_two_runs_in_place_at_once_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, call: str, links: bool
) -> None:
    """The other one goes from start to end when the first one begins to keep its backup."""
    source = make_source(tmp_path, format, megabytes=1)
    before = contents(source)

    def meanwhile(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        restrict(monkeypatch, "linux" if links else "no hard links")
        convert_checkpoint(source, None, 2, in_place=True)
        return getattr(os, call)(*args, **options)

    monkeypatch.setattr(os, call, meanwhile)
    with pytest.raises(OutputExistsError, match=r"in\.bak exists; move it away"):
        convert_checkpoint(source, None, 4, in_place=True)
    assert contents(tmp_path / "in.bak") == before
    assert inspect_checkpoint(source).virtual_ranks == 2
    assert sorted(os.listdir(tmp_path)) == ["in", "in.bak"]


GUARDED = (
    "import signal, sys; from tests.zygote import STOPPING, command_line\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)\n"
    "print('ready', flush=True); sys.exit(command_line(sys.argv[1:]))"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_while_torch_is_imported(tmp_path: Path, number: signal.Signals) -> None:
    """It ends the command; one that comes when the output is in its place finds it complete."""
    source = make_source(tmp_path, "torch", megabytes=1)
    before = contents(source)
    convert_checkpoint(source, tmp_path / "whole", 4)
    options = ["convert", source, tmp_path / "out", "--vt-world-size", "4"]
    process = subprocess.Popen(
        [sys.executable, "-c", GUARDED, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    delay = random.SystemRandom().uniform(0, 1.5)
    time.sleep(delay)
    process.send_signal(number)
    out, err = process.communicate()
    ended = Ended(process.returncode, out, err)
    told = f"{number.name} after {delay:.4f} s: {ended}"
    assert ended.status in (0, STATUS[number]), told
    assert "Traceback" not in err, told
    assert ended.lines == (ended.status > 0), told
    assert contents(source) == before
    left = sorted(os.listdir(tmp_path))
    assert left in (["in", "whole"], ["in", "out", "whole"]), told
    assert "out" in left or ended.status > 0, told
    if "out" in left:
        assert contents(tmp_path / "out") == contents(tmp_path / "whole"), told


IMPORTING = (  # a signal to itself in the middle of an import, in code that must not raise
    "import os, signal, sys; from tests.zygote import STOPPING, command_line\n"
    "class Finder:\n"
    "    def find_spec(self, name, *rest):\n"
    "        if name == 'torch.nn':\n"
    "            try:\n"
    "                os.kill(os.getpid(), int(sys.argv.pop())); sum(range(10))\n"
    "            except BaseException:\n"
    "                os.abort()\n"
    "sys.meta_path.insert(0, Finder())\n"
    "for name in sys.argv.pop().split(): delattr(signal, name)\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)\n"
    "sys.exit(command_line(sys.argv[1:-1]))"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("lacking", ["", "SIGHUP SIGALRM setitimer"], ids=["posix", "windows"])
def test_a_signal_waits_until_an_import_is_over(
    tmp_path: Path, number: signal.Signals, lacking: str
) -> None:
    """Torch's C++ ends the process if its calls into Python raise there."""
    source = make_source(tmp_path, "torch", megabytes=1)
    options = ["convert", source, tmp_path / "out", "--vt-world-size", "4", str(int(number))]
    command = [sys.executable, "-c", IMPORTING, *options, lacking]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    ended = Ended(done.returncode, done.stdout, done.stderr)
    assert (ended.status, ended.lines) == (STATUS[number], 1), ended
    assert sorted(os.listdir(tmp_path)) == ["in"]
