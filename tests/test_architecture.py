"""Imports point one way, and the command line starts without what it does not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ibmd_cli"
ALLOWED = "cli → sampling → evaluation → export → training → data → models → metrics → images → networks → method"
ROOMS = ALLOWED.split(" → ")
ONLY = {"typer": {"cli"}, "accelerate": {"processes", "training"}}
"""Packages that only these rooms, or files at the root, import."""
FILES = sorted(PACKAGE.rglob("*.py"))


def room(dotted: str) -> str:
    """`ibmd_cli.models.folder` → models; `ibmd_cli.files` → files."""
    return dotted.split(".")[1] if "." in dotted else "__init__"


def rank(name: str) -> int:
    """How far down a room is; files at the root are below all, and `__main__` is above all."""
    return -1 if name == "__main__" else ROOMS.index(name) if name in ROOMS else len(ROOMS)


def is_root(name: str) -> bool:
    return rank(name) == len(ROOMS)


def module(file: Path) -> str:
    return ".".join(("ibmd_cli", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            submodules = {f"{base}.{alias.name}" for alias in node.names}
            names |= {name for name in submodules if name in MODULES} or {base}
    return names


MODULES = {module(file): file for file in FILES}


def test_every_room_is_in_the_line():
    assert {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()} == set(ROOMS)
    assert len(list(PACKAGE.glob("*.py"))) <= 11


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name: str):
    here = room(name)
    if name == "ibmd_cli":
        return  # gives public names of the rooms to those who ask
    for other in imports(MODULES[name]):
        if other.startswith("ibmd_cli."):
            assert rank(room(other)) > rank(here) or room(other) == here or is_root(here) and is_root(room(other)), (
                f"{name} imports {other}, which is not below it"
            )
        for package, allowed in ONLY.items():
            if other.split(".")[0] == package:
                assert here in allowed, f"{name} imports {package}"


def test_no_circle():
    modules = {name: file for name, file in MODULES.items() if name != "ibmd_cli"}
    # Not `ibmd_cli` itself, which gives public names of the rooms to those who ask.
    edges = {name: {other for other in imports(file) if other in modules} for name, file in modules.items()}
    while leaves := {name for name, others in edges.items() if not others}:
        edges = {name: others - leaves for name, others in edges.items() if name not in leaves}
    # The package itself hands out its public names when they are asked for, so it may be imported by all.
    assert not edges, f"modules that import each other: {sorted(edges)}"


def test_method_needs_torch_alone():
    allowed = {"torch", "numpy", "ibmd_cli", *sys.stdlib_module_names}
    for name, file in MODULES.items():
        if room(name) == "method":
            assert {other.split(".")[0] for other in imports(file)} <= allowed


@pytest.mark.parametrize("heavy", ["torch", "accelerate", "PIL", "numpy", "huggingface_hub"])
def test_command_line_starts_light(heavy: str):
    code = f"import sys, ibmd_cli.cli; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("ibmd_cli.sampling.pipeline, ibmd_cli.export.runner", "torch"),
        ("ibmd_cli.sampling.pipeline, ibmd_cli.sampling.engine", "accelerate"),
        (", ".join(name for name in MODULES if room(name) == "images"), "torch"),
    ],
)
def test_imported_only_where_it_is_needed(modules: str, heavy: str):
    code = f"import sys, {modules}; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
