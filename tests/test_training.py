"""`ibmd distill` end to end on a tiny teacher: its folder, exact resume, guards, several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from typer.testing import CliRunner

import ibmd_cli.training
from ibmd_cli.cli import app
from ibmd_cli.errors import IbmdError
from ibmd_cli.models import load_model
from ibmd_cli.optimisation import Player, Schedule

SMALL = ["--steps", "4", "--bridge-steps", "2", "--batch-size", "4", "--checkpoint-every", "2", "--preview-every", "2"]


def distill(*arguments: object) -> object:
    result = CliRunner().invoke(app, ["distill", "--device", "cpu", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def arguments(tiny_teacher: Path, drawings: Path) -> list[object]:
    return ["--teacher", tiny_teacher, "--data", drawings, *SMALL, "--quiet"]


def test_run_folder(arguments: list[object], tmp_path: Path):
    out = tmp_path / "run"
    result = distill(*arguments, "--out", out)
    assert result.stdout.split() == [str(out / "student")]
    assert {f.name for f in out.iterdir()} == {"config.json", "metrics.jsonl", "previews", "checkpoints", "student"}
    assert [f.name for f in sorted((out / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    assert [f.name for f in sorted((out / "previews").iterdir())] == [f"step-{k:06d}.png" for k in (0, 2, 4)]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    names = "step bridge_loss student_loss lr images seconds images_per_second peak_memory_bytes"
    assert set(lines[0]) == set(names.split())
    assert lines[-1]["images"] == 4 * 4 * 3
    student = load_model(str(out))
    assert student.config["training"]["step"] == 4
    assert student.config["licence"] == "MIT"
    assert student.config["sampling"]["noise"] == {"channels": 3, "grid": 16}


def test_student_moves_and_same_seed_gives_the_same(arguments: list[object], tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        distill(*arguments, "--out", tmp_path / name, "--seed", seed)
    assert same(tmp_path / "a", tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("options", [["--micro-batch", "1"], ["--recompute"], ["--checkpointing"]])
def test_ways_to_save_memory_change_nothing_else(arguments: list[object], tmp_path: Path, options: list[str]):
    if options == ["--micro-batch", "1"]:
        options = [*options, "--batch-size", "1"]  # one image: the same draws either way
        arguments = [*arguments, "--batch-size", "1"]
    distill(*arguments, "--no-recompute", "--out", tmp_path / "plain")
    distill(*arguments, *options, "--out", tmp_path / "lean")
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "lean")
    # the same sums in another order of backward passes: float32 rounding, enlarged by Adam's division
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)


def test_interrupted_run_continues_to_the_same_bit(arguments: list[object], tmp_path: Path, monkeypatch):
    distill(*arguments, "--out", tmp_path / "whole")
    ready = iter([False, False, True])

    def interrupt_in_the_third_step(accelerator: Accelerator, interrupted: list[int]) -> bool:
        if next(ready, False):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
        return bool(interrupted)

    with monkeypatch.context() as patch:
        patch.setattr(ibmd_cli.training, "_agreed", interrupt_in_the_third_step)
        assert distill(*arguments, "--out", tmp_path / "cut").exit_code == 130
    assert (tmp_path / "cut" / "checkpoints" / "step-000003").is_dir()
    distill(*arguments, "--out", tmp_path / "cut")
    assert same(tmp_path / "whole", tmp_path / "cut")
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_damaged_checkpoint_gives_way_to_the_one_before(arguments: list[object], tmp_path: Path):
    out = tmp_path / "run"
    distill(*arguments, "--out", out)
    whole = weights(out)
    state = out / "checkpoints" / "step-000004" / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    result = distill(*arguments, "--out", out)
    assert "damaged" in result.stderr
    assert all(torch.equal(whole[key], v) for key, v in weights(out).items())


def test_finished_run_is_left_alone(arguments: list[object], tmp_path: Path):
    out = tmp_path / "run"
    distill(*arguments, "--out", out)
    before = (out / "student" / "model.safetensors").stat().st_mtime_ns
    assert distill(*arguments, "--out", out).exit_code == 0
    assert (out / "student" / "model.safetensors").stat().st_mtime_ns == before


def test_changed_setting_is_refused_by_name(arguments: list[object], tmp_path: Path):
    distill(*arguments, "--out", tmp_path / "run")
    with pytest.raises(IbmdError, match=r"other settings \(lr: .* there, 0\.5 here\)"):
        distill(*arguments, "--out", tmp_path / "run", "--lr", "0.5")
    with pytest.raises(IbmdError, match="holds a run already"):
        distill(*arguments, "--out", tmp_path / "run", "--resume", "never")


def test_foreign_folder_is_refused(arguments: list[object], tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(IbmdError, match="not empty and not a run folder"):
        distill(*arguments, "--out", tmp_path / "run")


def test_nan_stops_the_run_and_keeps_the_last_checkpoint(arguments: list[object], tmp_path: Path, monkeypatch):
    out = tmp_path / "run"
    real = ibmd_cli.training.Player.update

    def poisoned(self: Player, step: int, compute: object) -> float:
        if self.name == "student" and step == 3:
            next(self.model.parameters()).data.fill_(torch.nan)
        return real(self, step, compute)

    with monkeypatch.context() as patch:
        patch.setattr(ibmd_cli.training.Player, "update", poisoned)
        with pytest.raises(IbmdError, match="student step 4: loss nan.*the last checkpoint is intact"):
            distill(*arguments, "--out", out)
    assert [f.name for f in (out / "checkpoints").iterdir()] == ["step-000002"]
    distill(*arguments, "--out", out)
    distill(*arguments, "--out", tmp_path / "whole")
    assert same(out, tmp_path / "whole")


def test_data_that_cannot_serve(tiny_teacher: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for data, message in ((tmp_path / "empty", "no images in it"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(IbmdError, match=message):
            distill("--teacher", tiny_teacher, "--data", data, "--out", tmp_path / "run")
    (tmp_path / "empty" / "text.png").write_text("not an image")
    with pytest.raises(IbmdError, match="1 of 1 images cannot be read"):
        distill("--teacher", tiny_teacher, "--data", tmp_path / "empty", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batch_that_does_not_divide(arguments: list[object], tmp_path: Path):
    with pytest.raises(IbmdError, match="--batch-size 4 is not a multiple"):
        distill(*arguments, "--micro-batch", "3", "--out", tmp_path / "run")


def test_dry_run_prints_every_value_with_its_origin(arguments: list[object], tmp_path: Path):
    result = distill(*arguments, "--out", tmp_path / "run", "--dry-run", "--json")
    report = json.loads(result.stdout)
    assert report["settings"]["steps"] == 4
    assert report["origins"]["steps"] == "flag"
    assert report["origins"]["ema"] == "default"
    assert report["plan"]["parameters of the student"] > report["plan"]["parameters of the teacher"]
    assert not (tmp_path / "run").exists()


def test_list_teachers():
    report = json.loads(distill("--list-teachers", "--json").stdout)
    assert report["teachers"][0]["teacher"] == "builtin:outline2emoji"
    assert report["teachers"][0]["licence"] == "CC-BY-SA-4.0"
    assert "builtin:outline2emoji" in distill("--list-teachers").stdout


@pytest.mark.parametrize("recompute", ["--recompute", "--no-recompute"])
def test_mixed_precision_follows_full_precision(arguments: list[object], tmp_path: Path, recompute: str):
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)  # its precision is one per process
        distill(*arguments, recompute, "--lr", "1e-3", "--precision", precision, "--out", tmp_path / precision)
    full, mixed = weights(tmp_path / "fp32"), weights(tmp_path / "bf16")
    moved = max(float((full[key] - v).abs().max()) for key, v in mixed.items())
    # Adam moves a weight by at most about lr per step, whatever the gradient's rounding
    assert 0 < moved <= 2 * 4 * 1e-3
    AcceleratorState._reset_state(reset_partial_state=True)


def test_multi_step_student(arguments: list[object], tmp_path: Path):
    distill(*arguments, "--nfe", "2", "--out", tmp_path / "run")
    student = load_model(str(tmp_path / "run"))
    assert student.config["sampling"]["timesteps"][0] == 1.0
    assert student.nfe == 2


def test_micro_batches_give_the_same_update():
    """Gradients averaged over 4 × 4 images equal those of 1 × 16, as the loss is a mean."""
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for micro in (1, 4):
        torch.manual_seed(0)
        player = Player(
            "p", torch.nn.Linear(3, 1), Accelerator(cpu=True), Schedule(0.1), steps=1, seed=0, micro_batches=micro
        )
        parts = iter(x.chunk(micro))

        def compute(rng: torch.Generator, backward, parts=parts, player=player) -> float:
            loss = player.model(next(parts)).square().mean()
            backward(loss)
            return loss.item()

        player.update(0, compute)
        results.append(torch.cat([p.flatten() for p in player.network.parameters()]))
    assert torch.allclose(*results, atol=1e-6)


@pytest.mark.parametrize(("decay", "last"), [("none", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_schedule(decay: str, last: float):
    schedule = Schedule(1.0, warmup=4, decay=decay, floor=0.1)
    assert schedule(0, 1000) == pytest.approx(0.2)
    assert schedule(1000, 1000) == pytest.approx(last)


def test_finished_run_without_its_student_gets_it_back(arguments: list[object], tmp_path: Path):
    distill(*arguments, "--out", tmp_path / "run")
    whole = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    distill(*arguments, "--out", tmp_path / "run")
    assert all(torch.equal(whole[key], v) for key, v in weights(tmp_path / "run").items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--data", "builtin:outline2emoji"], "images of 32 pixels, but the teacher is for 16"),
    ],
)
def test_settings_that_do_not_go_together(arguments: list[object], tmp_path: Path, options: list[str], message: str):
    with pytest.raises(IbmdError, match=message):
        distill(*arguments, *options, "--out", tmp_path / "run")


@pytest.mark.slow
def test_processes_pass_on_signals_and_exit_codes(arguments: list[object], tmp_path: Path):
    program = [sys.executable, "-m", "ibmd_cli", "distill", *map(str, arguments), "--device", "cpu", "--processes", "2"]
    program += ["--out", str(tmp_path / "run")]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    wrong = subprocess.run([*program, "--batch-size", "3"], capture_output=True, text=True, env=environ)
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1), wrong.stderr
    run = subprocess.Popen([*program, "--steps", "2000"], env=environ, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert run.poll() is None
        time.sleep(0.2)
    run.terminate()
    assert run.wait(60) == 130
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert newest.name == f"step-{len(lines):06d}"  # both stopped after the step, with a checkpoint


@pytest.mark.slow
def test_two_processes(arguments: list[object], tmp_path: Path):
    """Two CPU processes over gloo train one student, and a run of two is not continued by one."""
    command = [sys.executable, "-m", "ibmd_cli", "distill", *map(str, arguments), "--device", "cpu"]
    command += ["--processes", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "run" / "student")]
    assert load_model(str(tmp_path / "run")).config["training"]["step"] == 4
    with pytest.raises(IbmdError, match="processes: 2 there, 1 here"):
        distill(*arguments, "--out", tmp_path / "run")
