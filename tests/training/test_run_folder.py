"""A run cannot be lost: whatever stops it, the same command gives the student of an uninterrupted run, to the bit."""

import fcntl
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from distilling import distill, interrupt, log, poison, same, train, weights

from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import sha256
from ibmd_cli.models.folder import load_model
from ibmd_cli.models.model import StudentModel
from ibmd_cli.reporting import Reporter
from ibmd_cli.training import run_folder
from ibmd_cli.training.log import read_log
from ibmd_cli.training.optimise import Player, Schedule
from ibmd_cli.training.run_folder import Position, Run

MEASURED = ("seconds", "images_per_second", "peak_memory_bytes")
"""What a clock or a meter says, and may differ from run to run."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def arguments(tiny_teacher: Path, drawings: Path, cache: Path) -> list[object]:
    """A run of four steps, with the same settings in each test."""
    for folder in (tiny_teacher, drawings):
        if not (cache / folder.name).exists():
            shutil.copytree(folder, cache / folder.name)
    small = ["--steps", 4, "--bridge-steps", 2, "--batch-size", 2, "--checkpoint-every", 2, "--preview-every", 4]
    return ["--teacher", cache / tiny_teacher.name, "--data", cache / drawings.name, *small, "--quiet"]


@pytest.fixture
def whole(arguments: list[object], cache: Path, tmp_path: Path) -> Path:
    """A run that nothing interrupted."""
    if not (cache / "whole").exists():
        distill(*arguments, "--out", cache / "whole")
    shutil.copytree(cache / "whole", tmp_path / "whole")
    return tmp_path / "whole"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1  # of a student's config.json, before the settings, which may differ
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_run_continues_to_the_same_bit(
    arguments: list[object], whole: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    command = [*arguments, "--out", tmp_path / "cut"]
    interrupt(monkeypatch, command, 3, number)
    assert (tmp_path / "cut" / "checkpoints" / "step-000003").is_dir()
    distill(*command)
    assert same(whole, tmp_path / "cut")
    assert log(whole, MEASURED) == log(tmp_path / "cut", MEASURED)
    for file in (tmp_path / "cut" / "previews").iterdir():
        assert file.read_bytes() == (whole / "previews" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("damage", "name"),
    [(flip, "state.pt"), (truncate, "state.pt"), (Path.unlink, "state.pt"), (truncate, "state.pt.sha256")],
)
def test_damaged_checkpoint_gives_way_to_the_one_before(
    arguments: list[object], whole: Path, name: str, damage: Callable[[Path], None]
):
    before = weights(whole)
    damage(whole / "checkpoints" / "step-000004" / name)
    shutil.rmtree(whole / "student")
    result = distill(*arguments, "--out", whole)
    assert re.search(r"step-000004: damaged .*; trying the one before it", result.stderr), result.stderr
    assert all(torch.equal(before[key], v) for key, v in weights(whole).items())


def test_damaged_checkpoint_does_not_push_out_a_sound_one(
    arguments: list[object], whole: Path, monkeypatch: pytest.MonkeyPatch
):
    """With --keep 1, the one of step 3 is the only one to continue from, though a later, damaged one is there."""
    shutil.rmtree(whole / "student")
    flip(whole / "checkpoints" / "step-000004" / "state.pt")
    command = [*arguments, "--keep", "1", "--out", whole]
    interrupt(monkeypatch, command, 1)
    assert {folder.name for folder in (whole / "checkpoints").iterdir()} == {"step-000003", "step-000004"}
    before = log(whole, MEASURED)
    distill(*command)
    assert log(whole, MEASURED)[:3] == before


def test_no_sound_checkpoint_of_a_run_that_is_not_finished(
    arguments: list[object], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = [*arguments, "--out", tmp_path / "cut"]
    interrupt(monkeypatch, command, 3)
    for file in (tmp_path / "cut").glob("checkpoints/*/state.pt"):
        truncate(file)
    assert "no sound checkpoint; starting from step 0" in distill(*command).stderr
    assert same(whole, tmp_path / "cut")


DAMAGES = {
    "newest damaged": lambda out: flip(out / "checkpoints" / "step-000004" / "state.pt"),
    "newest gone": lambda out: shutil.rmtree(out / "checkpoints" / "step-000004"),
    "all damaged": lambda out: [truncate(file) for file in out.glob("checkpoints/*/state.pt")],
    "all gone": lambda out: shutil.rmtree(out / "checkpoints"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_finished_run_with_damaged_checkpoints_is_left_alone(arguments: list[object], whole: Path, damage: str):
    before = weights(whole)
    DAMAGES[damage](whole)
    files = {f: f.stat().st_mtime_ns for name in ("student", "previews") for f in (whole / name).iterdir()}
    result = distill(*arguments, "--out", whole)
    assert (result.exit_code, result.stdout.split()) == (0, [str(whole / "student")])
    assert "its student is whole, and left alone" in result.stderr
    assert {f: f.stat().st_mtime_ns for f in files} == files
    assert all(torch.equal(before[key], v) for key, v in weights(whole).items())


@pytest.mark.parametrize("damage", ["all damaged", "all gone"])
def test_finished_run_of_which_nothing_is_whole_is_not_started_anew(arguments: list[object], whole: Path, damage: str):
    DAMAGES[damage](whole)
    (whole / "student" / "config.json").unlink()
    lines = log(whole)
    with pytest.raises(IbmdError, match="neither the student nor a checkpoint is sound; to train anew, give another"):
        distill(*arguments, "--out", whole)
    assert log(whole) == lines


@pytest.mark.parametrize(
    ("damage", "name"),
    [(flip, "model.safetensors"), (flip, "config.json"), (truncate, "config.json"), (shutil.rmtree, "")],
)
def test_damaged_student_is_written_again(
    arguments: list[object], whole: Path, name: str, damage: Callable[[Path], None]
):
    before = weights(whole)
    damage(whole / "student" / name)
    assert "written again from the checkpoint" in distill(*arguments, "--out", whole).stderr
    assert all(torch.equal(before[key], v) for key, v in weights(whole).items())
    assert load_model(str(whole)).config["training"]["step"] == 4


def test_what_a_killed_process_leaves(arguments: list[object], whole: Path, tmp_path: Path):
    """Killed between the two renames of `student/`, in the middle of a log line and of other files."""
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    (cut / "student").rename(cut / ".ibmd-abc.old")
    for folder in (cut, cut / "checkpoints"):
        shutil.copytree(whole / "student", folder / ".ibmd-def.tmp")
    (cut / "previews" / ".ibmd-ghi.tmp.png").write_bytes(b"half")
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "bri')
    distill(*arguments, "--out", cut)
    assert same(whole, cut)
    assert log(whole, MEASURED) == log(cut, MEASURED)
    assert not list(cut.rglob(".ibmd-*"))


def test_killed_before_the_settings_were_written(arguments: list[object], tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".ibmd-abc.tmp.json").touch()
    assert distill(*arguments, "--steps", 1, "--out", tmp_path / "run").exit_code == 0
    assert not list((tmp_path / "run").rglob(".ibmd-*"))


FULL = (
    r"checkpoints/step-000004: cannot be written \(File too large; [\d.]+ MiB are free, [\d.]+ MiB are needed\); "
    r"the checkpoint before it is intact \(step-000002\); .* run the same command again$"
)


def test_disk_full_during_a_checkpoint(
    arguments: list[object], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run stops in one line, and continues to the same bit when there is space again."""
    command = [*arguments, "--out", tmp_path / "cut"]
    interrupt(monkeypatch, command, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)  # as a quota
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(IbmdError, match=FULL):
            distill(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in (tmp_path / "cut" / "run.html").read_text()
    assert [folder.name for folder in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-000002"]
    result = distill(*command)
    assert "damaged" not in result.stderr
    assert same(whole, tmp_path / "cut")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system: not root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)  # at once, even if a traceback holds a file open


@pytest.mark.parametrize("share", [0.0, 0.3, 1.1])
def test_full_disk(
    arguments: list[object], whole: Path, small_disk: Path, share: float, monkeypatch: pytest.MonkeyPatch
):
    """Space is left for a share of a checkpoint: the log, the checkpoint or the student does not fit."""
    command = [*arguments, "--out", small_disk / "cut"]
    interrupt(monkeypatch, command, 2)
    left = int(share * (whole / "checkpoints" / "step-000004" / "state.pt").stat().st_size)
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - left))
    with pytest.raises(IbmdError) as caught:
        distill(*command)
    wanted = re.match(rf"{small_disk}/cut/(.*): cannot be written \(No space left on device; ", str(caught.value))
    assert wanted, caught.value
    assert ".ibmd-" not in str(caught.value)
    assert wanted[1].split("/")[0] in ("metrics.jsonl", "checkpoints", "student", "previews", "run.html")
    (small_disk / "other").unlink()
    assert "damaged (" not in distill(*command).stderr
    assert same(whole, small_disk / "cut")
    assert log(whole, MEASURED) == log(small_disk / "cut", MEASURED)


def test_finished_run_is_left_alone(arguments: list[object], whole: Path):
    before = (whole / "student" / "model.safetensors").stat().st_mtime_ns
    result = distill(*arguments, "--out", whole)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (whole / "student" / "model.safetensors").stat().st_mtime_ns == before


def test_changed_setting_is_refused_by_name(arguments: list[object], whole: Path):
    with pytest.raises(UsageError, match=r"other settings \(lr: .* there, 0\.5 here\)"):
        distill(*arguments, "--out", whole, "--lr", "0.5")
    with pytest.raises(UsageError, match="holds a run already"):
        distill(*arguments, "--out", whole, "--resume", "never")


OUTS = {  # what stands there: how it is made, what is said
    "file": (lambda out, teacher: out.touch(), "is no folder; give another --out"),
    "part of the path a file": (lambda out, teacher: out.parent.touch(), "is no folder; give another --out"),
    "dangling link": (lambda out, teacher: out.symlink_to("nothing"), "is no folder; give another --out"),
    "model folder": (lambda out, teacher: shutil.copytree(teacher, out), "its config.json is not that of a run"),
    "other settings": (
        lambda out, teacher: out.mkdir() or (out / "config.json").write_text('{"lr": 1}'),
        "its config.json is not that of a run",
    ),
    "not JSON": (lambda out, teacher: out.mkdir() or (out / "config.json").write_text("{"), "cannot be read as JSON"),
    "folder of images": (
        lambda out, teacher: out.mkdir() or (out / "a.png").touch(),
        "not empty and not a run folder; give another --out",
    ),
}


@pytest.mark.parametrize("kind", OUTS)
def test_what_is_no_run_folder_is_refused_before_anything_is_read(tiny_teacher: Path, tmp_path: Path, kind: str):
    make, message = OUTS[kind]
    out = tmp_path / "runs" / "mine"
    if kind != "part of the path a file":
        out.parent.mkdir()
    make(out, tiny_teacher)
    with pytest.raises(IbmdError, match=message):
        distill("--teacher", "nothing", "--data", "nothing", "--out", out)


def test_settings_of_a_run_are_checked_before_anything_is_read(arguments: list[object], whole: Path):
    for changed in (["--seed", 5], ["--lr", 0.5, "--nfe", 1], ["--resume", "never"]):
        with pytest.raises(UsageError, match="other settings|holds a run already"):
            distill(*arguments, *changed, "--teacher", "nothing", "--data", "nothing", "--out", whole)
    with pytest.raises(UsageError, match="--resume .*: no checkpoint: expected a folder"):
        distill(*arguments, "--teacher", "nothing", "--resume", whole / "checkpoints" / "x", "--out", whole)


def test_foreign_folder_is_refused(arguments: list[object], tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not empty and not a run folder"):
        distill(*arguments, "--out", tmp_path / "run")


def test_two_commands_do_not_train_in_one_folder(arguments: list[object], whole: Path):
    with (whole / "config.json").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process trains in it"):
            distill(*arguments, "--out", whole)
    assert distill(*arguments, "--out", whole).exit_code == 0


# ---------------------------------------------------------------------------- between updates of the bridge model


@pytest.fixture
def warm(arguments: list[object]) -> list[object]:
    """The same run with a warm-up, and images that are shared."""
    return [*arguments, "--bridge-warmup", 5, "--reuse", 2]


@pytest.mark.parametrize("update", [1, 2, 5, 7, 8, 9])  # of the warm-up's five and of two before each student update
def test_run_interrupted_between_bridge_updates_continues_to_the_same_bit(
    warm: list[object], tmp_path: Path, update: int, monkeypatch: pytest.MonkeyPatch
):
    distill(*warm, "--out", tmp_path / "whole")
    command = [*warm, "--out", tmp_path / "cut"]
    interrupt(monkeypatch, command, update, player="bridge_model")
    (newest,) = (tmp_path / "cut" / "checkpoints").glob("*-bridge-*")
    step = 0 if update <= 7 else 1
    assert newest.name == f"step-{step:06d}-bridge-{update:06d}"
    result = distill(*command)
    assert "not of step" not in result.stderr
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert log(tmp_path / "whole", MEASURED) == log(tmp_path / "cut", MEASURED)
    names = {folder.name for folder in (tmp_path / "cut" / "checkpoints").iterdir()}
    assert names == {"step-000002", "step-000004"}


def test_killed_run_loses_no_more_than_one_bridge_update_where_checkpoints_are_due(
    warm: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each attempt gets one update further, as on a machine where each is killed soon."""
    distill(*warm, "--out", tmp_path / "whole")
    monkeypatch.setattr(run_folder, "SECONDS", 0.0)
    monkeypatch.setattr(run_folder, "SHARE", math.inf)
    real, left = Player.update, [0]

    class Killed(BaseException):
        pass

    def update(player: Player, step: int, compute: Callable[..., torch.Tensor]) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(player, step, compute)

    monkeypatch.setattr(Player, "update", update)
    command, attempts = [*warm, "--out", tmp_path / "killed"], 0
    while True:
        left[0], attempts = 2, attempts + 1
        try:
            distill(*command)
            break
        except Killed:
            pass
    assert attempts <= 5 + 4 * 3
    assert same(tmp_path / "whole", tmp_path / "killed")
    assert log(tmp_path / "whole", MEASURED) == log(tmp_path / "killed", MEASURED)


def test_first_preview_is_made_once(warm: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = [*warm, "--out", tmp_path / "run"]
    interrupt(monkeypatch, command, 2, player="bridge_model")
    file = tmp_path / "run" / "previews" / "step-000000.png"
    before = file.stat().st_mtime_ns
    interrupt(monkeypatch, command, 1, player="bridge_model")
    assert file.stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------- losses that are not finite


def test_run_that_trained_nothing_fails_and_says_so(
    arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poison(monkeypatch, lambda name, step: name == "student")
    for _ in range(2):  # and again, when it is finished
        with pytest.raises(IbmdError, match="nothing was learnt: all 4 updates of the student were skipped"):
            distill(*arguments, "--out", tmp_path / "run")
    assert "nothing was learnt" in (tmp_path / "run" / "run.html").read_text(encoding="utf-8")
    assert "nothing was learnt" in (tmp_path / "run" / "student" / "README.md").read_text(encoding="utf-8").lower()


def test_rates_that_are_far_too_high_fail(arguments: list[object], tmp_path: Path):
    with pytest.raises(IbmdError, match="nothing was learnt|not finite 5 times in a row"):
        distill(*arguments, "--lr", "1e6", "--bridge-lr", "1e6", "--out", tmp_path / "run")


def test_skipped_steps_are_counted_and_resumed_exactly(
    arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # The bridge model's first two updates of the second step (k = 1), and the student's third update.
    poison(monkeypatch, lambda name, step: step == 2 if name == "student" else step in (2, 3))
    for name in ("whole", "cut"):
        command = [*arguments, "--out", tmp_path / name]
        if name == "cut":
            interrupt(monkeypatch, command, 3)
        result = distill(*command)
        assert "not finite" in result.stderr or name == "cut"
    lines = log(tmp_path / "whole", MEASURED)
    assert [line["skipped"] for line in lines] == [0, 2, 3, 3]
    assert lines == log(tmp_path / "cut", MEASURED)
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert all(v.isfinite().all() for v in weights(tmp_path / "cut").values())


def test_scaler_of_fp16_is_in_the_checkpoint(whole: Path, tmp_path: Path):
    student = load_model(str(whole), "student")
    assert isinstance(student, StudentModel)
    player = Player("student", student.predictor, Accelerator(cpu=True), Schedule(0.1), steps=4, seed=0)
    saved, loaded = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (2.0**5, 2.0**16))
    Run(tmp_path / "run", {"student": player}, student, 2, saved).save(Position(1))
    assert Run(tmp_path / "run", {"student": player}, student, 2, loaded).restore("auto", Reporter(quiet=True))[0] == 1
    assert loaded.get_scale() == 2.0**5


def test_divergence_stops_and_names_the_way_on(
    arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = [*arguments, "--steps", "12"]
    with monkeypatch.context() as patch:
        poison(patch, lambda name, step: name == "student" and step >= 3)
        with pytest.raises(IbmdError, match="student step 8: .* not finite 5 times in a row") as caught:
            distill(*arguments, "--out", tmp_path / "first")
    checkpoint = tmp_path / "first" / "checkpoints" / "step-000006"
    assert f"--resume {checkpoint} starts it from the last good checkpoint" in str(caught.value)
    assert "not finite 5 times" in (tmp_path / "first" / "run.html").read_text()
    command = [*arguments, "--lr", "1e-5", "--resume", checkpoint, "--out", tmp_path / "second"]
    interrupt(monkeypatch, command, 3)
    shutil.rmtree(tmp_path / "first")  # no longer needed: it continues from its own checkpoint of step 9
    distill(*command)
    assert [line["step"] for line in log(tmp_path / "second")] == list(range(7, 13))
    assert load_model(str(tmp_path / "second")).config["training"]["step"] == 12


def test_named_checkpoint_must_be_sound(arguments: list[object], whole: Path, tmp_path: Path):
    distill(*arguments, "--steps", "6", "--resume", whole / "checkpoints" / "step-000002", "--out", tmp_path / "more")
    assert load_model(str(tmp_path / "more")).config["training"]["step"] == 6
    flip(whole / "checkpoints" / "step-000004" / "state.pt")
    with pytest.raises(IbmdError, match="--resume .*step-000004: not a sound checkpoint"):
        distill(*arguments, "--resume", whole / "checkpoints" / "step-000004", "--out", whole)


FOREIGN = {  # what a checkpoint with the right checksum may hold
    "no torch file": lambda file, state: file.write_bytes(b"garbage" * 100),
    "other tensors": lambda file, state: torch.save({"a": torch.zeros(1)}, file),
    "a list": lambda file, state: torch.save([1], file),
    "no bridge model": lambda file, state: torch.save({**state, "bridge_model": None}, file),
    "another network": lambda file, state: torch.save(
        {**state, "student": {**state["student"], "model": dict.fromkeys(state["student"]["model"], torch.zeros(3))}},
        file,
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_checkpoint_of_something_else_is_refused_or_passed_over(
    arguments: list[object], whole: Path, tmp_path: Path, kind: str
):
    newest = whole / "checkpoints" / "step-000004"
    file = newest / "state.pt"
    FOREIGN[kind](file, torch.load(file, weights_only=True))
    (newest / "state.pt.sha256").write_text(f"{sha256(file)}  state.pt\n")
    with pytest.raises(IbmdError, match="--resume .*step-000004: not a sound checkpoint"):
        distill(*arguments, "--resume", newest, "--out", tmp_path / "new")
    log_of = whole / "metrics.jsonl"
    log_of.write_text("".join(log_of.read_text().splitlines(keepends=True)[:3]))
    result = distill(*arguments, "--out", whole)
    assert "step-000004: damaged" in result.stderr
    assert "not of step 2; written again from the checkpoint" in result.stderr


# ------------------------------------------------------------------------------------------ real signals and processes


@pytest.mark.slow
def test_25_kills(arguments: list[object], tmp_path: Path):
    """SIGKILL, by turns after a random update and in a random file operation, of a run that is always writing."""
    arguments = [*arguments, "--bridge-steps", 1, "--steps", 80]
    context = multiprocessing.get_context("forkserver")  # imports PyTorch once
    context.set_forkserver_preload(["ibmd_cli.training.loop", "torch._dynamo", "typer.testing", "pytest"])
    rng, out, half_written = random.Random(0), tmp_path / "killed", 0
    for i in range(25):
        in_operation = i % 2 == 0
        busy = [*arguments, "--checkpoint-every", 1, "--preview-every", 1]
        before = len(read_log(out))
        process = context.Process(target=train, args=(busy, out, rng.randint(1, 150) if in_operation else 0))
        process.start()
        after = before + rng.randint(1, 3)  # updates, not seconds: a quick machine must not end the run by that
        while not in_operation and len(read_log(out)) < after and process.is_alive():
            time.sleep(0.01)
        process.join(None if in_operation else rng.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"process {i} ended by itself"
        half_written += bool(list(out.rglob(".ibmd-*")))
    assert half_written >= 5
    result = distill(*arguments, "--checkpoint-every", 80, "--out", out)
    assert "damaged (" not in result.stderr  # what was half-written never looked like a checkpoint
    distill(*arguments, "--checkpoint-every", 80, "--out", tmp_path / "whole")
    assert same(out, tmp_path / "whole")
    losses = [[line["bridge_loss"], line["student_loss"]] for line in log(out)]
    assert losses == [[line["bridge_loss"], line["student_loss"]] for line in log(tmp_path / "whole")]
    assert not list(out.rglob(".ibmd-*"))


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
    assert run.wait(600) == 130
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    assert newest.name.startswith(f"step-{len(lines):06d}")  # both stopped after the update, with a checkpoint


def started(arguments: list[object], out: Path, *more: str) -> subprocess.Popen:
    """Start `ibmd distill`, and wait until it has trained a little."""
    program = [sys.executable, "-m", "ibmd_cli", "distill", *map(str, arguments), "--device", "cpu", "--steps", "2000"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [*program, "--out", str(out), *more], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (out / "metrics.jsonl").exists():
        assert run.poll() is None
        time.sleep(0.1)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_is_killed_is_named(arguments: list[object], tmp_path: Path, rank: int):
    run = started(arguments, tmp_path / "run", "--processes", "2")
    (process,) = (p for p in psutil.Process(run.pid).children() if p.environ().get("RANK") == str(rank))
    process.kill()
    message = run.communicate(timeout=600)[1]
    assert run.returncode == 1
    lines = [line for line in message.splitlines() if line.startswith("error: ")]
    assert lines[-1] == f"error: process {rank + 1} of 2 was killed (signal 9); the same command continues", message
    assert "gloo" not in message


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_is_answered_at_once_and_leaves_a_checkpoint(
    arguments: list[object], tmp_path: Path, number: signal.Signals
):
    run = started([a for a in arguments if a != "--quiet"], tmp_path / "run")
    run.send_signal(number)
    message = run.communicate(timeout=600)[1]
    assert run.returncode == 130
    assert "stopping after this update; once more ends now" in message
    assert "the same command continues from here" in message
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_hangup_is_ignored_under_nohup(arguments: list[object], tmp_path: Path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which a program inherits
    try:
        run = started(arguments, tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    run.send_signal(signal.SIGHUP)
    lines = len(read_log(tmp_path / "run"))
    while len(read_log(tmp_path / "run")) < lines + 3:
        assert run.poll() is None
        time.sleep(0.1)
    run.kill()
    run.communicate()


SKIPPING = """
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from ibmd_cli.training.optimise import Player, Schedule

torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
player = Player("p", torch.nn.Linear(3, 1), accelerator, Schedule(0.1), steps=4, seed=0)
for step in range(4):
    def compute(rng, backward):
        loss = player.model(torch.randn(2, 3, generator=rng)).square().mean()
        backward(loss * (torch.nan if step == 2 and accelerator.process_index == 1 else 1.0))
        return loss.item()
    player.update(step, compute)
result = f"{player.skipped} {player.network.weight.tolist()}"
Path(sys.argv[1], f"result-{accelerator.process_index}").write_text(result)
"""


SPLIT = """
import json, sys
from pathlib import Path

import torch
from accelerate import Accelerator
from ibmd_cli.training.fsdp import part
from ibmd_cli.models.folder import load_model
from ibmd_cli.training.optimise import Player, Schedule

accelerator = Accelerator(cpu=True)
predictor = load_model(sys.argv[2], "teacher").predictor
numbers = sum(p.numel() for p in predictor.parameters())
player = Player("p", predictor, accelerator, Schedule(0.1), steps=1, seed=0, ema=0.9, split=True)
def compute(rng, backward):
    x = torch.randn(2, 3, 16, 16, generator=rng)
    loss = player.model(x, torch.full((2,), 0.5), x).square().mean()
    backward(loss)
    return loss.detach()
player.update(0, compute)
moments = [v for state in player.optimizer.state_dict()["state"].values() for v in state.values() if v.ndim]
kinds = [player.network.parameters(), player.averages[0.9].module.parameters(), moments]
shares = [sum(part(x).numel() for x in tensors) / numbers for tensors in kinds]
Path(sys.argv[1], f"result-{accelerator.process_index}").write_text(json.dumps(shares))
"""


def in_two_processes(program: str, folder: Path, *arguments: object) -> list[str]:
    """Run a program in two processes that talk through gloo; return what each wrote into its file in the folder."""
    end = "\nimport torch.distributed\ntorch.distributed.destroy_process_group()\n"  # else its threads abort
    (folder / "program.py").write_text(program + end)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launch, *map(str, (folder / "program.py", folder, *arguments))]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=300)
    assert done.returncode == 0, done.stderr
    return [(folder / f"result-{i}").read_text() for i in range(2)]


@pytest.mark.slow
def test_processes_skip_together(tmp_path: Path):
    """A gradient that is not finite in one of two processes is skipped by both, and they stay the same."""
    one, other = in_two_processes(SKIPPING, tmp_path)
    assert one == other
    assert one.startswith("1 ")


@pytest.mark.slow
def test_processes_hold_a_half_each(tiny_teacher: Path, tmp_path: Path):
    """With --fsdp: of weights, average and both moments; a first dimension of 3 leaves 2 to one and 1 to the other."""
    shares = [json.loads(text) for text in in_two_processes(SPLIT, tmp_path, tiny_teacher)]
    for weights_, average, moments in shares:
        assert weights_ == average == moments / 2 == pytest.approx(0.5, abs=0.01)
    assert sum(weights_ for weights_, *_ in shares) == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--micro-batch", "auto"], ["--fsdp", "--micro-batch", "1"]], ids=lambda o: o[0])
def test_two_processes(arguments: list[object], tmp_path: Path, options: list[str]):
    """Two CPU processes over gloo learn what one learns, and one may continue their run."""
    arguments = [*arguments, "--batch-size", 4]
    distill(*arguments, "--out", tmp_path / "one")
    command = [sys.executable, "-m", "ibmd_cli", "distill", *map(str, arguments), "--device", "cpu"]
    command += ["--processes", "2", *options, "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "two" / "student")]
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-000004")
    shutil.copytree(tmp_path / "two", tmp_path / "both")
    distill(*arguments, "--out", tmp_path / "both")
    for name in ("two", "both"):
        for key in ("bridge_loss", "student_loss"):
            losses = [[line[key] for line in log(tmp_path / run)] for run in ("one", name)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6)
        alone, together = weights(tmp_path / "one"), weights(tmp_path / name)
        differences = torch.cat([(alone[key] - v).abs().flatten() for key, v in together.items()])
        # Adam turns the rounding of gradients that are nearly zero into steps of up to lr, here 5e-5.
        assert differences.quantile(0.99) < 1e-6
        assert differences.max() <= 4 * 2 * 5e-5
    assert load_model(str(tmp_path / "both")).config["training"]["step"] == 4
