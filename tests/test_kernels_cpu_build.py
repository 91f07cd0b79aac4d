from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from distbn_convert.kernels import cpu
from distbn_convert.kernels.cpu import build

CHILD = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout, format="%(levelname)s", level=logging.WARNING)
from distbn_convert.functional import dist_batch_norm
from distbn_convert.kernels import cpu, reference, select_backend
for dtype in cpu.VALUES:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(9, 19, 6, 7).to(dtype).contiguous(memory_format=layout).requires_grad_()
        y = dist_batch_norm(x, vt_world_size=4)
        (dx,) = torch.autograd.grad(y, x, y.detach().sin())
        wide = x.detach().double()
        truth, mean, rstd = reference.forward(wide, *(None,) * 6, 0.1, 1e-5, 4, False, False)
        saved = wide, None, None, None, mean, rstd
        slope, *_ = reference.backward(y.double().sin(), *saved, 4, False, False)
        eps = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), truth, rtol=eps, atol=eps)
        torch.testing.assert_close(dx.double(), slope, rtol=eps, atol=eps)
print(select_backend(x).__name__)
"""

CHILD_IN_FLOAT32 = CHILD.replace("cpu.VALUES", "(torch.float32,)")

FORKS = f"""
import os, torch, sys
from distbn_convert.functional import dist_batch_norm
children = []
for _ in range(8):
    pid = os.fork()
    if not pid:
        exec({CHILD_IN_FLOAT32!r})
        sys.stdout.flush()
        os._exit(0)
    children.append(pid)
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 8
"""

needs_compiler = pytest.mark.skipif(
    not cpu.load(torch.float32), reason="the CPU kernel cannot be built here; its log line says why"
)


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def start(cache: Path, code: str = CHILD, **variables: str) -> subprocess.Popen[str]:
    """A process that normalises, with a cache of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(cache), "OMP_NUM_THREADS": "1"} | variables,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> list[str]:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output.split()


@pytest.fixture
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))


def expect_line(caplog: pytest.LogCaptureFixture, level: str, text: str) -> None:
    caplog.set_level(level)  # without the line of a compiler that starts, where that fails
    assert build._load(torch.float32) is None
    assert [record.levelname for record in caplog.records] == [level]
    assert text in caplog.text


@pytest.mark.usefixtures("_fresh")
def test_switched_off_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DISTBN_CPU_KERNEL", "OFF")
    expect_line(caplog, "INFO", "DISTBN_CPU_KERNEL=off")


@pytest.mark.usefixtures("_fresh")
def test_no_compiler_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    expect_line(caplog, "INFO", "no C++ compiler 'no-such-compiler -v'")


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("header", [None, "inline Tensor empty_like();"])
def test_torch_without_what_the_kernel_needs_is_said_in_one_line(
    header: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(build, "_TORCH", tmp_path)
    if header:
        (tmp_path / "include/torch/csrc/stable").mkdir(parents=True)
        (tmp_path / "include/torch/csrc/stable/ops.h").write_text(header)
    expect_line(caplog, "INFO", "no stable ABI")


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("fate", ["exit 1", "kill -9 $$"])
def test_failing_compiler_warns_once_and_leaves_nothing(
    fate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = f'for last; do :; done; echo half > "$last"; echo the reason >&2; {fate}'
    monkeypatch.setenv("CXX", str(script(tmp_path / "broken", body)))
    expect_line(caplog, "WARNING", "the reason")
    assert [path.suffix for path in (tmp_path / "cache/distbn_convert").iterdir()] == [".lock"]


@pytest.mark.usefixtures("_fresh")
def test_cache_that_cannot_be_written_warns_once_and_names_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    monkeypatch.setenv("CXX", sys.executable)
    expect_line(caplog, "WARNING", "cache")
    assert "set TORCH_EXTENSIONS_DIR to build it in another folder" in caplog.text


@pytest.mark.parametrize(
    ("extensions", "xdg", "expected"),
    [("/e", "/x", "/e"), ("", "/x", "/x"), ("", "", "/h/.cache")],
    ids=str,
)
def test_the_cache_is_where_torch_keeps_extensions(
    extensions: str, xdg: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", extensions)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", "/h")
    assert build._cache() == Path(expected, "distbn_convert")


@needs_compiler
@pytest.mark.usefixtures("_fresh")
def test_library_that_cannot_be_loaded_warns_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a folder mounted without programs, or of another C++ runtime; here it is empty."""
    monkeypatch.setenv("CXX", "true")
    expect_line(caplog, "WARNING", "too short")


@needs_compiler
@pytest.mark.usefixtures("_fresh")
def test_torch_may_lie_in_a_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "Étienne's, or another"
    folder.symlink_to(build._TORCH)
    monkeypatch.setattr(build, "_TORCH", folder)
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    (tmp_path / "batch_norm.cpp").touch()
    assert build._build(torch.float32).exists()


@needs_compiler
@pytest.mark.usefixtures("_fresh")
def test_only_the_wait_for_a_compiler_is_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "true")
    caplog.set_level(logging.INFO)
    library = build._build(torch.float32)
    assert build._build(torch.float32) == library  # the second time it is there
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "compiling the CPU kernel for float32" in record.getMessage()
    assert str(library) in record.getMessage()


@pytest.mark.usefixtures("_fresh")
def test_a_compiler_may_say_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(script(tmp_path / "broken", r"printf 'fehler \374' >&2; exit 1")))
    expect_line(caplog, "WARNING", "fehler \ufffd")
    caplog.clear()
    monkeypatch.setenv("CXX", "c++ -DNAME='x")
    expect_line(caplog, "WARNING", "No closing quotation")


@pytest.mark.usefixtures("_fresh")
def test_compiler_that_never_ends_is_given_up_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_TIMEOUT", 1)
    child = tmp_path / "child"
    body = f"sleep 60 & echo $! > {child}.tmp; mv {child}.tmp {child}; wait"
    monkeypatch.setenv("CXX", str(script(tmp_path / "slow", body)))
    expect_line(caplog, "WARNING", "timed out")
    status = Path(f"/proc/{child.read_text().strip()}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the compiler's child goes on")


@pytest.mark.usefixtures("_fresh")
def test_who_waits_for_a_compiler_that_fails_does_not_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    body = f"echo run >> {log}; while [ ! -e {tmp_path}/end ]; do sleep 0.05; done; exit 1"
    monkeypatch.setenv("CXX", str(script(tmp_path / "broken", body)))
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(build._load, torch.float32) for _ in range(3)]
        while not log.exists():
            time.sleep(0.01)
        time.sleep(0.5)  # in which the others begin to wait
        (tmp_path / "end").touch()
        assert [job.result() for job in waiting] == [None] * 3
    assert log.read_text().split() == ["run"]
    assert sum("another process could not" in line for line in caplog.text.splitlines()) == 2
    assert build._load(torch.float32) is None  # later, it is tried again
    assert log.read_text().split() == ["run", "run"]


@pytest.mark.usefixtures("_fresh")
def test_after_one_failure_no_other_dtype_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setenv(
        "CXX", str(script(tmp_path / "broken", f"echo run >> {tmp_path}/log; exit 1"))
    )
    assert not any(build.load(dtype) for dtype in build.VALUES)
    assert (tmp_path / "log").read_text().split() == ["run"]
    assert len(caplog.records) == 1


@needs_compiler
@pytest.mark.usefixtures("_fresh")
def test_machines_of_different_capability_have_different_libraries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = set()
    monkeypatch.setattr(build, "_compile", lambda command, library: paths.add(library))
    for capability in ("DEFAULT", "AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        build._build(torch.float32)
    assert len(paths) == 3


@needs_compiler
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="is tested as it is"
)
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_plainer_instructions_give_the_same_results(capability: str, tmp_path: Path) -> None:
    words = finish(start(tmp_path, ATEN_CPU_CAPABILITY=capability))
    assert words == ["distbn_convert.kernels.cpu"]


@needs_compiler
@pytest.mark.slow
def test_eight_processes_at_once_compile_once_and_all_use_the_kernel(tmp_path: Path) -> None:
    log = tmp_path / "log"
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    counting = script(tmp_path / "counting", f'echo run >> {log}; exec {compiler} "$@"')
    words = finish(start(tmp_path, FORKS, CXX=str(counting)))
    assert "".join(words) == "distbn_convert.kernels.cpu" * 8
    assert log.read_text().split() == ["run"]


@needs_compiler
@pytest.mark.slow
def test_killed_build_and_damaged_library_do_not_matter_to_the_next_process(
    tmp_path: Path,
) -> None:
    started = tmp_path / "started"
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    body = f"""
        if [ ! -e {started} ]; then
            echo $$ > {started}.tmp; mv {started}.tmp {started}
            exec sleep 300
        fi
        exec {compiler} "$@"
    """
    slow_once = script(tmp_path / "slow_once", body)
    victim = start(tmp_path, CHILD_IN_FLOAT32, CXX=str(slow_once))
    while not started.exists():
        assert victim.poll() is None
        time.sleep(0.05)
    victim.kill()
    victim.communicate()
    os.kill(int(started.read_text()), signal.SIGKILL)
    cache = tmp_path / "distbn_convert"
    assert list(cache.glob("*.lock"))
    assert not list(cache.glob("*.so"))
    assert finish(start(tmp_path, CHILD_IN_FLOAT32, CXX=str(slow_once))) == [
        "distbn_convert.kernels.cpu"
    ]

    (library,) = cache.glob("*.so")  # the dtype in use, no other
    library.write_bytes(library.read_bytes()[:5000])
    assert finish(start(tmp_path, CHILD_IN_FLOAT32, CXX=str(slow_once))) == [
        "distbn_convert.kernels.cpu"
    ]


def test_the_script_that_checks_memory_compiles_every_dtype(tmp_path: Path) -> None:
    """With a compiler that makes nothing, and a pytest that only tells its version."""
    root = Path(__file__).parent.parent
    (tmp_path / "scripts").mkdir()
    shutil.copy(root / "scripts" / "check_memory", tmp_path / "scripts")
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHON": sys.executable, "CXX": "true"}
    run = subprocess.run(
        [tmp_path / "scripts" / "check_memory", "--version"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].startswith("pytest ")
    libraries = tmp_path.glob("runs/asan/distbn_convert/*.so")
    assert len(list(libraries)) == len(build.VALUES)
