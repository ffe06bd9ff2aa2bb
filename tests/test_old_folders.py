"""What version 0.1 wrote (commit 8e0e6e0), before the modules were moved, still loads, runs and continues."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from distilling import distill, weights
from PIL import Image
from typer.testing import CliRunner

from ibmd_cli import Student, load_teacher, sample_teacher
from ibmd_cli.cli import app

OLD = Path(__file__).parent / "written_by_0.1"
SETTINGS = ["--steps", "6", "--bridge-steps", "2", "--batch-size", "2"]
SETTINGS += ["--checkpoint-every", "2", "--preview-every", "6", "--keep", "1"]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


@pytest.mark.parametrize("student", ["finished", "finished/student", "student.onnx"])
def test_student_gives_the_same_picture(old: Path, student: str):
    result = CliRunner().invoke(app, f"sample -i drawings/0.png --student {student} -o new.png --device cpu -q".split())
    assert result.exit_code == 0, result.output
    assert abs(pixels(old / "new.png") - pixels(old / "out.png")).max() <= 1


def test_stopped_run_continues(old: Path):
    result = distill("--teacher", "teacher", "--data", "drawings", "--out", "stopped", *SETTINGS, "--quiet")
    assert result.exit_code == 0, result.output
    ours, theirs = weights(old / "stopped"), weights(old / "finished")
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-3) for name in theirs)


def test_public_names(old: Path):
    picture = Image.open(old / "drawings" / "0.png")
    assert Student.from_pretrained("finished")(picture).size == picture.size
    teacher = load_teacher("teacher", device="cpu")
    x_T = torch.zeros(1, 3, 16, 16)
    assert sample_teacher(teacher, x_T, sampler="dbim", nfe=2).shape == x_T.shape
