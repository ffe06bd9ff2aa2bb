"""A stranger with an exported file alone: the card's script without ibmd, and the runtimes of other years."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from students import STUDENTS, make_student
from typer.testing import CliRunner

from ibmd_cli.cli import app
from ibmd_cli.export.onnx import DTYPES, OPSETS, make_graph, save_graph
from ibmd_cli.models.card import student_card
from ibmd_cli.models.folder import load_model
from ibmd_cli.models.interface import noise_shapes
from ibmd_cli.models.model import StudentModel

IR_VERSIONS = {18: 8, 19: 9, 20: 9}
"""Of the ONNX releases that brought these opsets (its document on versioning): 1.13, 1.14, 1.15."""
ALONE = "import sys; sys.modules |= {'ibmd_cli': None, 'torch': None}; exec(open('script.py').read())"


def run_card(student: StudentModel, folder: Path, seed: int, name: str) -> np.ndarray:
    """Run the card's lines, with another seed and name, in an interpreter that knows neither ibmd nor PyTorch."""
    (script,) = re.findall(r"```python\n(import [^`]*onnxruntime.*?)```", student_card(student), re.DOTALL)
    picture = 'Image.open("SOURCE.png").convert("RGB"), "SOURCE.png", 0, 1'
    assert picture in script
    script = script.replace(picture, picture.replace('"SOURCE.png", 0', f'"{name}", {seed}'))
    (folder / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "-I", "-c", ALONE], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.asarray(Image.open(folder / "RESULT.png")).astype(int)


def assert_card_makes_the_pictures_of_sample(student: StudentModel, folder: Path) -> None:
    """For sources that are reduced, enlarged, and fit; but for a level where a pixel lies on the edge between two."""
    side = student.image_size // student.source_scale
    results = []
    for i, size in enumerate([(5 * side, 3 * side), (side // 2, side // 2 + 3), (side, side)]):
        source = Image.effect_noise(size, 90).convert("RGB").resize((size[0] // 3 + 1, size[1] // 3 + 1))
        source.resize(size, Image.Resampling.BICUBIC).save(folder / "SOURCE.png")
        command = ["sample", str(folder / "SOURCE.png"), "--student", str(folder / "student.onnx"), "--seed", str(i)]
        if student.config["mask"]:
            hole = Image.new("L", size)
            hole.paste(255, (size[0] // 3, size[1] // 4, size[0], size[1] // 2))
            hole.save(folder / "HOLE.png")
            command += ["--mask", str(folder / "HOLE.png")]
        command += ["--label", "0"] if student.config["classes"] else []
        result = CliRunner().invoke(app, [*command, "-o", str(folder / f"{i}.png"), "--quiet"])
        assert result.exit_code == 0, result.output
        want = np.asarray(Image.open(folder / f"{i}.png")).astype(int)
        got = run_card(student, folder, i, "SOURCE.png")
        assert np.abs(got - want).max() <= 1
        assert np.mean(got != want) < 0.002
        results.append(got)
    if noise_shapes(student, (3, side, side)):
        other = run_card(student, folder, i, "other.png")
        assert np.abs(other - results[-1]).max() > 1, "the name has no effect"


KINDS = {
    **STUDENTS,
    "one short draw": {"timesteps": [1.0], "channels": 3},
    "no noise": {"timesteps": [1.0]},
    "odd draws, a hole of noise": {"timesteps": [1.0, 0.5], "channels": 3, "grid": 3, "fill": "noise", "scale": 4},
    "an odd short draw after another": {"timesteps": [1.0, 0.5], "channels": 1, "fill": "white"},
}


@pytest.mark.parametrize(
    "name", [name if name == "one short draw" else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_card_without_ibmd(tmp_path: Path, tiny_config: dict, name: str):
    options = dict(KINDS[name])
    tiny_config["image"]["source_scale"] = options.pop("scale", 1)
    student = make_student(tiny_config, **options)
    save_graph(make_graph(student), tmp_path / "student.onnx")
    assert_card_makes_the_pictures_of_sample(student, tmp_path)


@pytest.mark.slow
def test_card_without_ibmd_of_the_embedded_student(tmp_path: Path):
    student = load_model("builtin:outline2emoji", "student")
    save_graph(make_graph(student), tmp_path / "student.onnx")
    assert_card_makes_the_pictures_of_sample(student, tmp_path)


# --------------------------------------------------------------------------------------------------------- runtimes

RUN = """
import sys, numpy as np, onnxruntime
for file in sys.argv[1:]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (2, 0):
        inputs = {i.name: np.full([count, *(16 if isinstance(n, str) else n for n in i.shape[1:])], 0.5, "float32")
                  for i in session.get_inputs()}
        np.save(f"{file}.{count}.npy", session.run(None, inputs)[0])
"""


@pytest.mark.slow
def test_runtimes_of_every_year(tmp_path: Path, tiny_config: dict):
    """All have the lowest IR version; the oldest and the newest runtime compute what the installed one does."""
    student = make_student(tiny_config, timesteps=[1.0], channels=2)
    files = []
    for opset in OPSETS:
        graph = make_graph(student, opset)
        for dtype in DTYPES:
            files.append(tmp_path / f"{opset}-{dtype}.onnx")
            save_graph(graph, files[-1], dtype)
            assert onnx.load(files[-1]).ir_version == IR_VERSIONS[opset]
    subprocess.run([sys.executable, "-c", RUN, *files], check=True)
    wanted = {file: np.load(f"{file}.2.npy") for file in files}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    index = subprocess.run([*pip, "index", "versions", "onnxruntime"], capture_output=True, text=True)
    found = re.search(r"Available versions: (.*)", index.stdout)
    if index.returncode or found is None:
        pytest.skip(f"pip cannot reach its index: {index.stderr.strip()[-200:]}")
    versions = found[1].split(", ")
    for version, numpy, opsets in (
        (versions[-1], "numpy<2", (18,)),
        (versions[0], "numpy", OPSETS),
    ):  # 1.15 lacks Shape-19
        packages = tmp_path / version
        install = [*pip, "install", "--quiet", "--target", packages, f"onnxruntime=={version}", numpy]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"onnxruntime {version} cannot be installed: {done.stderr.strip()[-200:]}")
        able = [file for file in files if int(file.name[:2]) in opsets]
        environment = {**os.environ, "PYTHONPATH": str(packages)}
        subprocess.run([sys.executable, "-c", RUN, *able], env=environment, check=True)
        for file in able:
            assert np.abs(np.load(f"{file}.2.npy") - wanted[file]).max() < 1e-3
            assert np.load(f"{file}.0.npy").shape == (0, 3, 16, 16)
