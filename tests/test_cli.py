"""The command line: exit codes, streams, JSON, start-up."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distbn_convert.checkpoint import convert_checkpoint, inspect_checkpoint

from .checkpoints import BATCH_NORMS, Net, load, resaved, run_cli, torchvision_style

COMMANDS = ["convert", "revert", "inspect", "gather", "verify", "models", "models export"]
HINTS = {4: "--opaque carries it over", 6: ("use ", "Use ")}
PROGRAM = [sys.executable, "-c", "from distbn_convert.cli import main; main()"]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.pth"
    torch.save({"model": Net().state_dict()}, path)
    return path


def loaded_modules(*args: str, cwd: Path) -> set[str]:
    """The modules that a run of the command line has loaded at its end."""
    code = (
        "import sys, atexit, json;"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr));"
        "from distbn_convert.cli import main; main()"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=cwd, env=env
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_convert_and_revert_are_twins_of_the_library(capsys: Any, plain: Path) -> None:
    done = run_cli(capsys, "convert", plain, plain.with_name("v.pth"), "--vt-world-size", 8)
    assert done.code == 0
    assert done.out.startswith(f"converted {BATCH_NORMS} BatchNorms to 8 virtual ranks: ")
    assert done.err == ""
    convert_checkpoint(plain, plain.with_name("library.pth"), 8)
    assert plain.with_name("v.pth").read_bytes() == plain.with_name("library.pth").read_bytes()
    done = run_cli(capsys, "revert", plain.with_name("v.pth"), plain.with_name("p.pth"))
    assert done.code == 0
    assert "from 8 virtual ranks by mean" in done.out
    assert plain.with_name("p.pth").read_bytes() == resaved(plain)


def test_inspect_prints_a_line_for_each_layer(capsys: Any, plain: Path) -> None:
    done = run_cli(capsys, "inspect", plain)
    lines = done.out.splitlines()
    assert f"{BATCH_NORMS} BatchNorms" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == [
        "model.conv1_BN",
        "model.downsample.1",
        "model.head",
    ]


def test_inspect_measures_the_spread_between_ranks(capsys: Any, tmp_path: Path) -> None:
    state = {
        "bn.running_mean": torch.tensor([[1.0, 0.0], [3.0, 0.0]]),
        "bn.running_var": torch.tensor([[1.0, 4.0], [3.0, 4.0]]),
    }
    torch.save(state, tmp_path / "v.pth")
    spread = inspect_checkpoint(tmp_path / "v.pth").groups[0].spread
    assert spread is not None
    assert spread.mean_max == pytest.approx(1 / 2**0.5)  # deviation 1, variance 2
    assert spread.var_max == pytest.approx(0.5)  # deviation 1 of 2
    assert spread.mean_median == pytest.approx(spread.mean_max / 2)
    document = run_cli(capsys, "inspect", tmp_path / "v.pth", "--json").json
    assert document["schema"] == 1
    assert document["groups"][0]["spread"]["var_max"] == pytest.approx(0.5)


def test_json_reports_have_the_documented_keys(capsys: Any, plain: Path) -> None:
    out = plain.with_name("v.pth")
    document = run_cli(capsys, "convert", plain, out, "--vt-world-size", 2, "--json").json
    assert document["schema"] == 1
    assert document["command"] == "convert"
    assert document["source"] == {
        "path": str(plain),
        "format": "torch",
        "bytes": plain.stat().st_size,
        "sha256": None,
    }
    assert document["output"]["bytes"] == out.stat().st_size
    assert document["virtual_ranks"] == 2
    assert document["counts"] == {"converted": BATCH_NORMS}
    first = document["groups"][0]
    assert (first["path"], first["prefix"], first["channels"]) == (["model"], "conv1_BN.", 5)
    assert (first["state"], first["action"], first["tracked"]) == ("plain", "converted", 0)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_sha256_of_input_and_output_is_reported(capsys: Any, plain: Path) -> None:
    torch.save({"model": Net().state_dict(), "w": torch.rand(1_000_000)}, plain)
    virtual, back = plain.with_name("v.pth"), plain.with_name("back.pth")
    convert = ("convert", plain, virtual, "--vt-world-size", 2, "--sha256")
    document = run_cli(capsys, *convert, "--json").json
    assert document["source"]["sha256"] == sha256(plain)
    assert document["output"]["sha256"] == sha256(virtual)
    dry = run_cli(capsys, *convert, "--dry-run", "--json", "--force").json
    assert (dry["source"]["sha256"], dry["output"]) == (sha256(plain), None)
    lines = run_cli(capsys, "revert", virtual, back, "--sha256").out.splitlines()
    assert lines[1:] == [f"{sha256(path)}  {path}" for path in (virtual, back)]
    assert run_cli(capsys, "inspect", plain, "--sha256").out.splitlines()[-1] == (
        f"{sha256(plain)}  {plain}"
    )
    verified = run_cli(capsys, "verify", virtual, "--against", plain, "--sha256", "--json").json
    assert verified["source"]["sha256"] == sha256(virtual)
    assert verified["against"]["sha256"] == sha256(plain)
    lines = run_cli(capsys, "verify", virtual, "--sha256").out.splitlines()
    assert lines[1:] == [f"{sha256(virtual)}  {virtual}"]
    before = sha256(virtual)
    document = run_cli(capsys, "revert", virtual, "--in-place", "--sha256", "--json").json
    assert document["source"]["sha256"] == before
    assert document["output"]["sha256"] == sha256(virtual) == sha256(back)


def test_a_folder_has_no_sha256(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file(Net().state_dict(), tmp_path / "in" / "model.safetensors")
    convert = ("convert", tmp_path / "in", tmp_path / "v", "--vt-world-size", 2, "--sha256")
    done = run_cli(capsys, *convert, "--json")
    assert done.code == 0
    assert done.json["source"]["sha256"] is done.json["output"]["sha256"] is None
    assert len(run_cli(capsys, "inspect", tmp_path / "v").out.splitlines()) == len(
        run_cli(capsys, "inspect", tmp_path / "v", "--sha256").out.splitlines()
    )
    assert "not of folders" in " ".join(run_cli(capsys, "convert", "--help").out.split())


@pytest.mark.parametrize(
    ("code", "word", "arguments"),
    [
        (2, "usage", ["convert", "plain.pth", "o", "--vt-world-size", "0"]),
        (2, "usage", ["convert", "plain.pth", "o", "--vt-world-size", "x"]),
        (2, "usage", ["convert", "plain.pth", "o"]),
        (2, "usage", ["convert", "plain.pth", "--vt-world-size", "2"]),
        (2, "usage", ["revert", "virtual.pth", "o", "--reduction", "select", "--rank", "8"]),
        (2, "usage", ["no-such-command"]),
        (3, "nothing-to-do", ["revert", "plain.pth", "o"]),
        (3, "nothing-to-do", ["convert", "virtual.pth", "o", "--vt-world-size", "8"]),
        (3, "nothing-to-do", ["convert", "linear.pth", "o", "--vt-world-size", "8"]),
        (4, "refused", ["convert", "module.pth", "o", "--vt-world-size", "8"]),
        (5, "unreadable", ["convert", "cut.pth", "o", "--vt-world-size", "8"]),
        (6, "exists", ["convert", "plain.pth", "virtual.pth", "--vt-world-size", "8"]),
        (6, "exists", ["convert", "plain.pth", "./plain.pth", "--vt-world-size", "8", "-f"]),
        (7, "io", ["convert", "absent.pth", "o", "--vt-world-size", "8"]),
        (7, "io", ["convert", "plain.pth", "no/such/o", "--vt-world-size", "8"]),
        (8, "verification", ["verify", "plain.pth", "--against", "other.pth"]),
    ],
)
def test_every_exit_code_is_one_line_or_one_json_document(
    capsys: Any,
    plain: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    word: str,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(plain.parent)
    convert_checkpoint("plain.pth", "virtual.pth", 8)
    torch.save(torch.nn.Linear(2, 2).state_dict(), "linear.pth")
    torch.save(torch.nn.Linear(2, 2), "module.pth")
    torch.save({"model": Net().state_dict()}, "other.pth")
    Path("cut.pth").write_bytes(plain.read_bytes()[:2000])
    before = {name: Path(name).read_bytes() for name in os.listdir()}
    done = run_cli(capsys, *arguments)
    assert done.code == code
    assert done.out == ""
    assert len([line for line in done.err.splitlines() if line.startswith("Error: ")]) == 1
    assert "Traceback" not in done.err
    if code != 2:
        assert len(done.err.splitlines()) == 1
    done = run_cli(capsys, *arguments, "--json")
    assert done.code == code
    assert done.json["error"]["code"] == word
    assert done.json["error"]["exit_code"] == code
    message, hint = done.json["error"]["message"], done.json["error"]["hint"]
    assert hint is None or message.endswith((f"; {hint}", f". {hint}"))
    if code in HINTS:
        assert hint.startswith(HINTS[code])
    if code != 2:
        assert done.json["error"]["path"] == arguments[1]
    assert {name: Path(name).read_bytes() for name in os.listdir()} == before


def test_a_command_without_arguments_is_a_usage_error(capsys: Any) -> None:
    assert run_cli(capsys).code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example(capsys: Any, command: str) -> None:
    done = run_cli(capsys, *command.split(), "--help")
    assert done.code == 0
    assert f"$ distbn-convert {command}" in done.out


def test_the_help_names_only_what_a_command_has_and_cuts_no_sentence(capsys: Any) -> None:
    assert "..." not in run_cli(capsys, "--help").out.replace("[ARGS]...", "")
    for command in COMMANDS:
        told = run_cli(capsys, *command.split(), "--help").out
        options = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", told, re.MULTILINE))
        options |= set(re.findall(r" / (--[\w-]+)", told))
        assert set(re.findall(r"--[a-z][\w-]+", told)) <= options, command
    options = ["plain.pth", "plain.pth", "o", "--in-place"]  # which a union of files cannot be
    assert "No such option" in run_cli(capsys, "gather", *options).err


def test_the_help_documents_the_exit_codes(capsys: Any) -> None:
    done = run_cli(capsys, "--help")
    told = done.out[done.out.index("Exit status:") :]
    codes = re.findall(r"(?:^ *|  |, )(\d+)(?=,|  )", told, re.MULTILINE)
    assert codes == ["0", "1", "2", "3", "4", "5", "6", "7", "8", "130", "143"]
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    told = readme[readme.index("Exit statuses:") :].partition(".")[0]
    assert re.findall(r"\d+", told) == codes


def test_help_and_safetensors_inspection_import_no_torch(plain: Path) -> None:
    convert_checkpoint(plain, plain.with_name("v.pth"), 3)
    save_file(load(plain.with_name("v.pth"))["model"], plain.with_name("v.safetensors"))
    for args in (
        ["--help"],
        ["--version"],
        ["convert", "--help"],
        ["models", "--help"],
        ["inspect", "v.safetensors"],
    ):
        modules = loaded_modules(*args, cwd=plain.parent)
        assert not {"torch", "numpy", "torchvision", "matplotlib"} & modules, args


def test_help_answers_at_once() -> None:
    """In seconds of the processor, so that a busy machine does not count."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    seconds = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*PROGRAM, "--help"], check=True, capture_output=True, env=env)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.15


def test_the_standard_streams_carry_checkpoints(plain: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*PROGRAM, "convert", "-", "-", "--vt-world-size", "4"],
        input=plain.read_bytes(),
        capture_output=True,
        env=env,
        check=True,
    )
    convert_checkpoint(plain, plain.with_name("v.pth"), 4)
    assert done.stdout == plain.with_name("v.pth").read_bytes()
    assert b"converted 3 BatchNorms" in done.stderr


def test_every_command_that_reads_takes_the_standard_input(plain: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for args in (["inspect", "-"], ["verify", "-", "--against", str(plain)]):
        with open(plain, "rb") as file:
            done = subprocess.run([*PROGRAM, *args], stdin=file, capture_output=True, env=env)
        assert done.returncode == 0, done.stderr
        assert f"{BATCH_NORMS} BatchNorms".encode() in done.stdout


def test_every_command_speaks_json(capsys: Any, plain: Path) -> None:
    virtual, back, both = (plain.with_name(name) for name in ("v.pth", "b.pth", "both.pth"))
    exported = plain.with_name("r.safetensors")
    for command, args in {
        "convert": (plain, virtual, "--vt-world-size", 2),
        "revert": (virtual, back),
        "inspect": (virtual,),
        "gather": (plain, back, both),
        "verify": (virtual, "--against", plain),
        "models": ("resnet18",),
        "models export": ("resnet18", exported, "--vt-world-size", 2),
    }.items():
        done = run_cli(capsys, *command.split(), *args, "--json")
        assert done.code == 0, done.err
        assert (done.json["schema"], done.json["command"]) == (1, command)
        assert done.err == ""
    assert done.json["output"]["bytes"] == exported.stat().st_size


def test_warnings_go_to_stderr_and_quiet_silences_them(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "in.pth"
    state = {"bn.running_mean": torch.rand(2), "bn.running_var": torch.rand(2)}
    torch.save({**state, "epoch": 3}, path)
    save_file(state, tmp_path / "flat")
    uncounted = "1 of 1 BatchNorms have no num_batches_tracked"
    for warning, *args in (
        (uncounted, "convert", path, tmp_path / "out", "--vt-world-size", 2, "--force"),
        (uncounted, "inspect", path),
        ("epoch in ", "verify", path, "--against", tmp_path / "flat"),
    ):
        done = run_cli(capsys, *args)
        assert done.err.startswith(f"Warning: {warning}")
        done = run_cli(capsys, *args, "--quiet")
        assert (done.out, done.err) == ("", "")


def test_quiet_prints_errors_alone(capsys: Any, plain: Path) -> None:
    for command in (["inspect", plain], ["verify", plain], ["verify", plain, "--against", plain]):
        done = run_cli(capsys, *command, "--quiet")
        assert (done.code, done.out, done.err) == (0, "", "")
        assert run_cli(capsys, *command, "--quiet", "--json").json["source"]["path"] == str(plain)
    assert run_cli(capsys, "inspect", plain.with_name("absent"), "-q").err.startswith("Error: ")


def test_an_unusual_compression_ratio_takes_force(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "zeros.pth"
    torch.save({**Net().state_dict(), "zeros": torch.zeros(100_000)}, tmp_path / "stored")
    deflated = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "stored") as old, deflated as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    convert = ["convert", path, tmp_path / "out", "--vt-world-size", 2]
    for command in (["inspect", path], ["verify", path], convert):
        done = run_cli(capsys, *command)
        assert done.code == 4
        assert "as weights never do. If you trust it, use --force." in done.err
        assert run_cli(capsys, *command, "--force").code == 0


def test_a_dry_run_speaks_json_too(capsys: Any, plain: Path) -> None:
    done = run_cli(
        capsys, "convert", plain, plain.with_name("o"), "--vt-world-size", 2, "-n", "--json"
    )
    assert done.json["dry_run"] is True
    assert done.json["output"] is None
    assert not plain.with_name("o").exists()


def test_options_are_the_librarys(capsys: Any, tmp_path: Path) -> None:
    path = torchvision_style(tmp_path / "in.pth")
    run_cli(
        capsys,
        *("convert", path, "--in-place", "--vt-world-size", 2, "--include", "head"),
        *("--state", "model"),
    )
    assert (tmp_path / "in.pth.bak").exists()
    content = load(path)
    assert content["model"]["head.running_mean"].shape == (2, 4)
    assert content["model"]["conv1_BN.running_mean"].shape == (5,)
    assert content["model_ema"]["module.head.running_mean"].shape == (4,)
