"""The shape of the package: which file may import what, what is public, what importing costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import distbn_convert

PACKAGE = Path(distbn_convert.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# A file imports only from lower floors (and from its own).
FLOORS = [
    {"errors"},
    {"kernels"},
    {"checks", "operators"},
    {"functional"},
    {"replicas", "processes"},
    {"layers"},
    {"registry"},
    {"plan"},
    {"convert"},
    {"checkpoint", "models", "samplers", "sync"},
    {"population", "integrations"},
    {"cli"},
    {"__main__"},
]
# Third-party package -> where alone it may be imported.
HOMES = {
    "triton": "kernels",
    "click": "cli",
    "torchvision": "models",
    "timm": "integrations",
    "lightning": "integrations",
}


def part_of(file: Path) -> str:
    """The floor's word for a file: its module or its folder."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def floor_of(part: str) -> int:
    return next(level for level, parts in enumerate(FLOORS) if part in parts)


def imports(file: Path) -> list[str]:
    """Absolute names of everything that a file imports, anywhere in it."""
    package = ["distbn_convert", *file.relative_to(PACKAGE).parent.parts]
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            names += [".".join([*base, alias.name]) for alias in node.names]
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_file_imports_only_from_lower_floors_and_its_own_packages(file: Path) -> None:
    part = part_of(file)
    for name in imports(file):
        top, *rest = name.split(".")
        if top in HOMES:
            assert part == HOMES[top], f"{name} may be imported in {HOMES[top]} alone"
        if top == "distbn_convert" and part != "__init__" and rest and rest[0] != "__version__":
            assert rest[0] == part or floor_of(rest[0]) < floor_of(part), name


def test_public_names_can_be_imported_and_are_no_others() -> None:
    for name in distbn_convert.__all__:
        assert getattr(distbn_convert, name) is not None
    assert sorted(distbn_convert.__all__) == dir(distbn_convert)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        distbn_convert.no_such_name  # noqa: B018


def test_public_names_can_be_imported_without_the_extras() -> None:
    """Also by ``help(distbn_convert)``; torchvision is asked for by the call that needs it."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torchvision', 'matplotlib']))\n"
        "from distbn_convert import *\n"
        "try: models.get_model('resnet18', 2)\n"
        "except ModuleNotFoundError as error: print(error.name, error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == (
        "torchvision expected torchvision, whose models these are, but torchvision is not "
        "installed; install it with: pip install 'distbn_convert[models]'\n"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_file_names_what_is_public(file: Path) -> None:
    if any(name.partition(".")[0] == "triton" for name in imports(file)):
        pytest.importorskip("triton", reason="triton is not installed")
    names = ("distbn_convert", *file.relative_to(PACKAGE).with_suffix("").parts)
    module = importlib.import_module(".".join(names).removesuffix(".__init__"))
    assert module.__doc__
    for name in getattr(module, "__all__", []):
        assert hasattr(module, name)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import distbn_convert", ["torch", "click", "numpy"]),
        ("import distbn_convert.cli", ["torch", "numpy"]),
        (
            "import distbn_convert as d, torch; d.convert_model(torch.nn.BatchNorm1d(2), 2)",
            ["torchvision", "timm", "click", "triton", "safetensors"],
        ),
    ],
)
def test_importing_stays_cheap(code: str, absent: list[str]) -> None:
    check = f"{code}; import sys; print([m for m in {absent} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_file_has_outgrown_its_room() -> None:
    lengths = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_the_package_runs_as_the_command_does() -> None:
    command = [sys.executable, "-m", "distbn_convert", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"distbn-convert, version {distbn_convert.__version__}\n"
