"""The scripts in examples/ run: the teacher's trainer and its embedding, and the benchmark."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.files import read_json
from ibmd_cli.models.folder import load_model

EXAMPLES = Path(__file__).parents[2] / "examples"


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
    assert teacher.config["network"] == {**embedded.config["network"], "middle_attention": True}  # since then
    assert teacher.config["bridge"] == embedded.config["bridge"]


@pytest.mark.slow
def test_signals_are_distilled_by_a_teacher_of_ones_own():
    lines = run("signal1d.py", "--steps", 4).splitlines()
    assert [line.split("   ")[0].split(",")[0] for line in lines] == ["teacher"] * 3 + ["student"] * 4


@pytest.mark.slow
def test_lean_iterations_need_less_memory_for_the_same_gradients():
    rows = ["all", "all but lean layers", "all, student run twice", "all, 4 micro-batches"]
    settings = ["--batch-size", 32, "--bridge-steps", 1, "--rounds", 1, "--threads", 1, "--rows", *rows]
    table = run("benchmarks/distill_cost.py", *settings).splitlines()[2:]
    ratio = {line[:26].strip(): float(line[26:].split()[2]) for line in table}
    assert ratio["all, 4 micro-batches"] < ratio["all, student run twice"] < ratio["all"]
    assert ratio["all"] < ratio["all but lean layers"] < ratio["plain"] == 1
    assert all(float(line.split()[-1]) < 1e-4 for line in table)


@pytest.mark.slow
def test_cost_of_a_teacher():
    lines = run("benchmarks/teacher_cost.py", "--network", "tiny", "--rounds", 1, "--threads", 1, "--size", 16)
    assert [line.split()[0] for line in lines.splitlines()] == ["tiny,", "network", "update", "scores", "1,000"]


@pytest.mark.slow
def test_table_of_students_of_several_steps():
    arguments = ["--student", "builtin:outline2emoji", "--images", 4, "--teacher-nfe", 2]
    rows = run("multistep.py", "outline2emoji", *arguments).splitlines()
    assert [row.split()[:2] for row in rows[1:]] == [["builtin:outline2emoji", "1"], ["teacher", "2"]]


@pytest.mark.slow
def test_curves_are_trained_and_drawn(tmp_path: Path):
    names, x_T, x_0 = embedded_pairs()
    truth = x_0[:8].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "val.npz", x_T=x_T[:8, 0].numpy(), x_0=truth, names=names[:8])
    (tmp_path / "out").mkdir()
    folders = ("--data", tmp_path, "--work", tmp_path / "work", "--out", tmp_path / "out")
    table = run("emoji/curves.py", *folders, "--seeds", 1, "--steps", 2)
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["paper", "uniform-t", "preset"]
    assert (tmp_path / "out" / "curves.svg").read_text().count("<polyline") == 14
    folders = ("--data", tmp_path, "--work", tmp_path / "changed", "--out", tmp_path / "changed")
    change = ("--only", "preset", "--change", '{"precision": "bf16", "reuse": 2}')
    table = run("emoji/curves.py", *folders, "--seeds", 1, "--steps", 2, *change)
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["preset"]
    settings = read_json(tmp_path / "changed" / "preset-0" / "config.json")["settings"]
    assert (settings["precision"], settings["reuse"]) == ("bf16", 2)
    assert (tmp_path / "changed" / "curves.svg").read_text().count("<polyline") == 6
