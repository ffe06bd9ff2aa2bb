"""The scripts in examples/ run: the teacher's trainer and its embedding, and the benchmark."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ibmd_cli.models import load_model
from ibmd_cli.mosaics import embedded_pairs

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script: str, *arguments: object) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("task", ["outline2emoji", "emoji-sr4x"])
def test_teacher_is_trained_continued_and_embedded(task: str, tmp_path: Path):
    names, x_T, x_0 = embedded_pairs()
    for split in ("train", "val"):
        np.savez(
            tmp_path / f"{split}.npz", x_T=x_T[:8, 0].numpy(), x_0=x_0[:8].permute(0, 2, 3, 1).numpy(), names=names[:8]
        )
    settings = ["--data", tmp_path, "--out", tmp_path / "teacher", "--batch-size", 2, "--every", 1, "--threads", 1]
    for steps in (1, 2):
        run("emoji/train_teacher.py", task, *settings, "--steps", steps)
    run("emoji/embed.py", task, "teacher", tmp_path / "teacher" / "state.pt", "--out", tmp_path / "assets")
    teacher = load_model(str(tmp_path / "assets" / "teacher"), "teacher")
    embedded = load_model(f"builtin:{task}", "teacher")
    assert teacher.config["training"]["steps"] == 2
    assert teacher.config["network"] == embedded.config["network"]
    assert teacher.config["bridge"] == embedded.config["bridge"]


def test_signals_are_distilled_by_a_teacher_of_ones_own():
    lines = run("signal1d.py", "--steps", 4).splitlines()
    assert [line.split("   ")[0].split(",")[0] for line in lines] == ["teacher"] * 3 + ["student"] * 4


@pytest.mark.slow
def test_lean_step_needs_less_memory_for_the_same_gradient():
    table = run("benchmarks/student_step.py", "--batch-size", 16, "--steps", 2, "--rounds", 1, "--threads", 1)
    rows = [line.rsplit(maxsplit=6) for line in table.splitlines()[2:]]
    ratios = {row[0]: float(row[3]) for row in rows}
    assert ratios["lean, recomputed"] < ratios["lean"] < ratios["naive"]
    assert all(float(row[-1]) < 1e-5 for row in rows)
