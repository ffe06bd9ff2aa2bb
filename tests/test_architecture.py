"""Imports point one way, and the command line starts without what it does not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ibmd_cli"
LAYERS = (
    ("normals",),
    ("errors", "figures", "files", "heap", "layers", "logs", "markup", "noise", "reporting"),
    ("bridges", "config", "decoding", "degradations", "devices", "encoding", "hub", "launching", "sharing", "tiles"),
    ("albums", "exported", "images", "labels", "networks", "pages", "sheets"),
    ("distillation", "fsdp", "jobs", "memory"),
    ("outcomes", "samplers"),
    ("models",),
    ("checkpoints", "programs"),
    ("onnx_graphs", "runners", "teachers"),
    ("cards", "classifiers", "engines", "mosaics", "optimisation", "metrics", "weights"),
    ("distances", "features", "protocols", "records", "reports", "web"),
    ("fetching", "loading", "pairs", "references"),
    ("measuring",),
    ("pictures", "scoring"),
    ("data", "evaluation", "export", "runs", "translating"),
    ("plan", "reading", "student", "training"),
    ("sampling",),
    ("cli",),
    ("__main__",),
)
LEVEL = {module: level for level, layer in enumerate(LAYERS) for module in layer}
ONLY = {"typer": {"cli"}, "accelerate": {"launching", "optimisation", "training"}}


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("[!_]*.py")), ids=lambda f: f.stem)
def test_imports_point_downwards(file: Path):
    assert file.stem in LEVEL, f"{file.name}: give it a layer here"
    for name in imports(file):
        if name.startswith("ibmd_cli."):
            other = name.split(".")[1]
            assert LEVEL[other] < LEVEL[file.stem], f"{file.stem} imports {other}, which is not below it"
        for package, allowed in ONLY.items():
            if name.split(".")[0] == package:
                assert file.stem in allowed, f"{file.stem} imports {package}"


def test_heart_needs_torch_alone():
    foreign = {name.split(".")[0] for name in imports(PACKAGE / "distillation.py")} - set(sys.stdlib_module_names)
    assert foreign == {"torch", "ibmd_cli"}


@pytest.mark.parametrize("heavy", ["torch", "accelerate", "PIL", "numpy", "huggingface_hub"])
def test_command_line_starts_light(heavy: str):
    code = f"import sys, ibmd_cli.cli; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_sampling_imports_pytorch_only_for_its_models():
    code = "import sys, ibmd_cli.sampling, ibmd_cli.runners; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_sampling_does_not_import_accelerate():
    code = "import sys, ibmd_cli.sampling, ibmd_cli.engines; sys.exit('accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
