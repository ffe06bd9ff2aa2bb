"""`ibmd distill --teacher new`: pairs → teacher → student, in one run folder."""

import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distilling import distill, interrupt, log, poison, same, train
from PIL import Image

import ibmd_cli.training.teacher as teacher_module
from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.images.fit import to_image
from ibmd_cli.models.folder import load_student
from ibmd_cli.models.references import load_teacher
from ibmd_cli.settings import resolve
from ibmd_cli.training.config import DistillConfig, duration
from ibmd_cli.training.log import read_log
from ibmd_cli.training.teacher import describe_teacher, read_network

NETWORK = """
model_channels = 16
channel_mult = [1, 2]
num_res_blocks = 1
attention = []
head_channels = 16
norm_groups = 8
dropout = 0.1
"""
STEPS = ["--teacher-steps", "6", "--steps", "4", "--bridge-steps", "2", "--batch-size", "4"]
EVERY = ["--checkpoint-every", "2", "--preview-every", "3", "--score-every", "2"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, and 24 real pairs, of which one is there twice."""
    folder, found = tmp_path_factory.mktemp("kept"), embedded_pairs()
    (folder / "own.toml").write_text(NETWORK)
    for side, images in (("source", found.x_T), ("target", found.x_0)):
        (folder / "pairs" / side).mkdir(parents=True)
        for i, x in enumerate((*images[:92:4], images[0])):
            to_image(x).save(folder / "pairs" / side / f"{i:02d}.png")
    return folder


def arguments_for(folder: Path) -> list[object]:
    own = ["--teacher", "new", "--data", folder / "pairs", "--size", 16, "--network", folder / "own.toml"]
    return [*own, *STEPS, *EVERY, "--ema", "0.5,0.9", "--quiet"]


@pytest.fixture(scope="module")
def whole(kept: Path) -> Path:
    """A run that was not interrupted."""
    assert distill(*arguments_for(kept), "--out", kept / "whole").stdout.split() == [str(kept / "whole" / "student")]
    return kept / "whole"


@pytest.fixture
def pairs(kept: Path, tmp_path: Path) -> Path:
    """The pairs, for a test that changes them."""
    return shutil.copytree(kept / "pairs", tmp_path / "pairs")


@pytest.fixture
def arguments(kept: Path, pairs: Path) -> list[object]:
    arguments = arguments_for(kept)
    arguments[3] = pairs
    return arguments


def test_one_run_folder_with_both_halves(kept: Path, whole: Path, tmp_path: Path):
    out = whole
    names = {"config.json", "run.html", "previews", "checkpoints", "teacher.jsonl", "metrics.jsonl"}
    assert {f.name for f in out.iterdir()} == {*names, "teacher", "student", "student-last"}
    checkpoints = {f"teacher-{k:06d}" for k in (4, 6)} | {f"step-{k:06d}" for k in (2, 4)}
    assert {f.name for f in (out / "checkpoints").iterdir()} == checkpoints
    assert {f"teacher-{k:06d}.png" for k in (2, 4, 6)} < {f.name for f in (out / "previews").iterdir()}
    scores = {"energy_score", "energy_score_low", "energy_score_high", "mse", "spread", "ema"}
    lines = [json.loads(line) for line in (out / "teacher.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if scores | {"mse_1", "energy_score_1"} <= line.keys()] == [2, 4, 6]
    assert [line["step"] for line in log(out) if scores <= line.keys()] == [2, 4]
    best = min((line for line in lines if "energy_score" in line), key=lambda line: line["energy_score"])
    assert load_teacher(str(out / "teacher")).config["training"]["step"] == best["step"]
    student = load_student(str(out))
    assert student.config["teacher"]["sha256"] == load_teacher(str(out / "teacher")).digest()
    assert load_student(str(out / "student-last")).config["training"]["step"] == 4
    page = (out / "run.html").read_text()
    for title in ("over teacher updates", "over student updates", "Energy score", "Previews <small>of the teacher"):
        assert title in page
    config, origins = resolve(DistillConfig, {"teacher": str(out / "teacher")}, {}, None)
    assert (config.batch_size, origins["batch_size"]) == (32, "preset")  # of its kind
    # Any later run uses it as any teacher, and scores its students on held-out pairs if it is asked to.
    again = ["--teacher", out / "teacher", "--data", kept / "pairs", *STEPS[2:], *EVERY, "--validation", "40%"]
    distill(*again, "--quiet", "--out", tmp_path / "again")
    assert [line["step"] for line in log(tmp_path / "again") if "energy_score" in line] == [2, 4]


def teachers_equal(one: Path, other: Path) -> bool:
    a, b = (load_teacher(str(run / "teacher")) for run in (one, other))
    states = [model.predictor.state_dict() for model in (a, b)]
    # The name is the run folder's; some settings may differ.
    configs = [{**m.config, "name": "", "training": m.config["training"]["step"]} for m in (a, b)]
    return configs[0] == configs[1] and all(torch.equal(v, states[1][key]) for key, v in states[0].items())


@pytest.mark.parametrize(("player", "step"), [("teacher", 1), ("teacher", 5), ("bridge_model", 3), ("student", 2)])
def test_interrupted_in_either_half_it_continues_to_the_same_bits(
    kept: Path, whole: Path, tmp_path: Path, player: str, step: int, monkeypatch: pytest.MonkeyPatch
):
    arguments = [*arguments_for(kept), "--out", tmp_path / "cut"]
    interrupt(monkeypatch, arguments, step, player=player)
    distill(*arguments)
    assert teachers_equal(whole, tmp_path / "cut")
    assert same(whole, tmp_path / "cut")
    timed = ("seconds", "images_per_second", "peak_memory_bytes")
    assert log(whole, timed) == log(tmp_path / "cut", timed)


@pytest.mark.slow
def test_kills_in_both_halves(kept: Path, whole: Path, tmp_path: Path):
    """SIGKILL in random file operations, and after random updates, of a run that is always writing."""
    context = multiprocessing.get_context("forkserver")  # imports PyTorch once
    context.set_forkserver_preload(["ibmd_cli.training.loop", "torch._dynamo", "typer.testing", "pytest"])
    rng, out, halves = random.Random(0), tmp_path / "killed", {"teacher.jsonl": 0, "metrics.jsonl": 0}
    arguments = [*arguments_for(kept), "--checkpoint-every", 1, "--preview-every", 1]
    for i in range(14):
        process = context.Process(target=train, args=(arguments, out, rng.randint(1, 60) if i % 2 else 0))
        process.start()
        now = sum(len(read_log(out, name)) for name in halves)
        while not i % 2 and sum(len(read_log(out, name)) for name in halves) <= now and process.is_alive():
            time.sleep(0.01)
        process.join(None if i % 2 else rng.uniform(0, 0.02))
        process.kill()
        process.join()
        for name in halves:
            halves[name] += bool(read_log(out, name))
        if process.exitcode == 0:
            break
    assert min(halves.values()) >= 2, "it was killed in both halves"
    distill(*arguments_for(kept), "--out", out)
    assert teachers_equal(whole, out)
    assert same(whole, out)
    assert not list(out.rglob(".ibmd-*"))


def test_stops_after_the_teacher_and_goes_on(kept: Path, whole: Path, tmp_path: Path):
    arguments = [*arguments_for(kept), "--out", tmp_path / "run"]
    first = distill(*(word for word in arguments if word != "--quiet"), "--stop-after", "teacher")
    assert f"next: ibmd sample drawing.png --teacher {tmp_path / 'run' / 'teacher'}" in first.stderr
    assert first.stdout.split() == [str(tmp_path / "run" / "teacher")]
    assert not (tmp_path / "run" / "student").exists()
    distill(*arguments)
    assert same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--bridge", "ve"], {"bridge": "ve", "preconditioning": "ddbm", "conditional": True}),
        (
            ["--bridge", "i2sb", "--noise-scale", "0.5"],
            {"bridge": "i2sb", "preconditioning": "i2sb", "conditional": False},
        ),
        (["--prediction", "x0", "--colour", "0.1"], {"bridge": "vp", "preconditioning": "x0", "conditional": True}),
        (["--prediction", "residual"], {"bridge": "vp", "preconditioning": "residual", "conditional": True}),
    ],
)
def test_kinds_of_teachers(arguments: list[object], tmp_path: Path, options: list[str], facts: dict):
    distill(*arguments, *options, "--steps", 1, "--score-every", 9, "--out", tmp_path / "run")
    config = load_teacher(str(tmp_path / "run" / "teacher")).config
    found = {"bridge": config["bridge"]["kind"], "preconditioning": config["preconditioning"]["kind"]}
    assert found | {"conditional": config["conditional"]} == facts
    assert load_student(str(tmp_path / "run")).nfe == 1


def test_sources_are_made_of_targets(arguments: list[object], pairs: Path, tmp_path: Path):
    arguments[3] = pairs / "target"
    distill(*arguments, "--degrade", "jpeg-10", "--out", tmp_path / "run", "--stop-after", "teacher")
    assert load_teacher(str(tmp_path / "run" / "teacher")).config["degradation"] == "jpeg-10"


def test_held_out_pairs_of_another_folder(arguments: list[object], pairs: Path, tmp_path: Path):
    shutil.copytree(pairs, tmp_path / "other")
    distill(*arguments, "--validation", tmp_path / "other", "--out", tmp_path / "run", "--stop-after", "teacher")
    inputs = json.loads((tmp_path / "run" / "config.json").read_text())["inputs"]
    assert set(inputs) == {str(pairs), str(tmp_path / "other")}


def test_without_held_out_pairs_the_last_is_kept(arguments: list[object], tmp_path: Path):
    distill(*arguments, "--validation", "0", "--out", tmp_path / "run")
    assert load_teacher(str(tmp_path / "run" / "teacher")).config["training"]["step"] == 6
    assert load_student(str(tmp_path / "run")).config["training"]["step"] == 4
    assert not (tmp_path / "run" / "student-last").exists()


def test_classes_are_the_folders(arguments: list[object], pairs: Path, tmp_path: Path):
    for file in list(pairs.rglob("*.png")):
        folder = file.parent / f"{int(file.stem) % 2}"
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    (tmp_path / "classes.toml").write_text("classes = 2\n")
    options = ["--config", tmp_path / "classes.toml", "--stop-after", "teacher", "--out", tmp_path / "run"]
    distill(*arguments, *options)
    assert load_teacher(str(tmp_path / "run" / "teacher")).config["network"]["num_classes"] == 2


def test_fine_tuning_starts_from_a_teacher(arguments: list[object], tmp_path: Path):
    distill(*arguments, "--out", tmp_path / "first", "--stop-after", "teacher")
    more = [*arguments, "--init", tmp_path / "first" / "teacher", "--teacher-steps", "1", "--stop-after", "teacher"]
    distill(*more, "--out", tmp_path / "second")
    a, b = (load_teacher(str(tmp_path / name / "teacher")) for name in ("first", "second"))
    assert a.config["preconditioning"] == b.config["preconditioning"]
    moved = [(v - b.predictor.state_dict()[key]).abs().max().item() for key, v in a.predictor.state_dict().items()]
    assert 0 < max(moved) <= 1.1e-4 / 100  # Adam's first step is the rate, which warms up over a hundred
    with pytest.raises(UsageError, match="is for 16 pixels: --size 16"):
        distill(*more, "--size", "32", "--out", tmp_path / "third")


@pytest.mark.parametrize(("text", "steps"), [("1000h", 6), ("1e-9s", 1)])
def test_time_sets_the_steps(arguments: list[object], tmp_path: Path, text: str, steps: int):
    distill(*arguments, "--teacher-time", text, "--out", tmp_path / "run", "--stop-after", "teacher")
    lines = (tmp_path / "run" / "teacher.jsonl").read_text().splitlines()
    assert len(lines) == steps


@pytest.mark.parametrize("words", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_out_of_memory_halves_the_micro_batch(
    arguments: list[object], tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch
):
    real, limit = teacher_module.bridge_loss, 2

    def bridge_loss(predictor, setup, x_0, batch, rng):
        if len(x_0) > limit:
            raise torch.OutOfMemoryError(words) if "CUDA" in words else RuntimeError(words)
        return real(predictor, setup, x_0, batch, rng)

    monkeypatch.setattr(teacher_module, "bridge_loss", bridge_loss)
    options = [option for option in arguments if option != "--quiet"]
    result = distill(*options, "--out", tmp_path / "halved", "--stop-after", "teacher")
    assert result.stderr.count("out of memory: 2 images at a time from here on (--micro-batch 2)") == 1
    assert {line["micro_batch"] for line in read_log(tmp_path / "halved", "teacher.jsonl")} == {2}
    distill(*arguments, "--micro-batch", 2, "--out", tmp_path / "two", "--stop-after", "teacher")
    assert teachers_equal(tmp_path / "halved", tmp_path / "two")
    limit = 0
    with pytest.raises(RuntimeError, match=words):  # one image does not fit
        distill(*arguments, "--out", tmp_path / "none")


def test_duration():
    assert [duration(text) for text in ("90s", "30m", "1.5h")] == [90, 1800, 5400]
    for text in ("", "30", "m", "-1m", "infh", "30 minutes"):
        with pytest.raises(UsageError, match=f"--teacher-time {text}: expected a number with s, m or h"):
            duration(text)


def test_gradients_that_are_not_finite(arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch, lambda name, step: name == "teacher" and step >= 3)
    with pytest.raises(IbmdError, match="teacher step 8: loss .* not finite 5 times in a row"):
        distill(*arguments, "--teacher-steps", "20", "--out", tmp_path / "run")
    kept = load_teacher(str(tmp_path / "run" / "teacher"))
    assert all(torch.isfinite(p).all() for p in kept.predictor.parameters())


# ------------------------------------------------------------------------------------------------------ its network


@pytest.mark.parametrize(
    ("network", "size", "patch", "prediction"),
    [
        ("small", 64, 4, "x0"), ("small", 32, 2, "ddbm"), ("small", 16, 1, "ddbm"), ("small", 256, 8, "x0"),
        ("base", 64, 2, "ddbm"), ("base", 128, 4, "x0"), ("tiny", 48, 2, "ddbm"), ("adm-64", 64, 1, "ddbm"),
        ("adm-256", 256, 1, "ddbm"),
    ],
)  # fmt: skip
def test_patches_fit_the_size(network: str, size: int, patch: int, prediction: str):
    config = DistillConfig(teacher="new", data=("x",), network=network, size=size)
    teacher = describe_teacher(config, "x")
    assert (teacher["network"]["patch_size"], teacher["preconditioning"]["kind"]) == (patch, prediction)


def test_defaults_of_times_depend_on_the_bridge():
    of = {
        bridge: describe_teacher(DistillConfig(teacher="new", data=("x",), bridge=bridge, size=32), "x")
        for bridge in ("vp", "ve", "i2sb")
    }
    assert [bool(teacher["times"]) for teacher in of.values()] == [True, True, False]
    assert [teacher["preconditioning"]["time"] for teacher in of.values()] == ["log", "log", "own"]
    assert of["vp"]["sampling"]["log_grid"] is True
    assert of["vp"]["times"] == {"sigma_min": 0.02, "sigma_max": 200.0, "at_T": 0.125}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("smal", None, "--network smal: nearest: small"),
        ("none.toml", None, "--network .*none.toml: cannot be read"),
        ("own.toml", "model_channels = [", "--network .*own.toml: cannot be read"),
        (
            "own.toml",
            "model_chanels = 4",
            "--network .*own.toml: no setting 'model_chanels': nearest: model_channels",
        ),
        ("own.toml", "in_channels = 6", "no setting 'in_channels'"),
    ],
)
def test_network_that_is_none(tmp_path: Path, name: str, text: str | None, message: str):
    if text:
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        read_network(str(tmp_path / name) if name.endswith(".toml") else name)


# ------------------------------------------------------------------------------------------------------- bad input


def without_partner(pairs: Path) -> list[object]:
    (pairs / "target" / "03.png").unlink()
    return []


def too_few(pairs: Path) -> list[object]:
    for file in pairs.rglob("*.png"):
        if int(file.stem) > 2:
            file.unlink()
    return []


def without_targets(pairs: Path) -> list[object]:
    shutil.rmtree(pairs / "target")
    return []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_partner, "no partner of equal name for source/03.png"),
        (too_few, "3 pairs: expected at least 16 to train a teacher and to hold some out"),
        (without_targets, "expected source/ and target/ in it"),
        (
            lambda pairs: ["--size", "21", "--network", "small"],
            "--size 21: the network small takes multiples of 4: expected",
        ),
        (lambda pairs: ["--preset", "ddbm-diode"], "--preset ddbm-diode: is of a published teacher"),
        (lambda pairs: ["--validation", "no/folder"], "--validation no/folder: expected a share"),
        (lambda pairs: ["--validation", "120%"], "--validation 120%: expected a share below 100%"),
        (lambda pairs: ["--prediction", "i2sb"], "--prediction i2sb: is for --bridge i2sb"),
        (lambda pairs: ["--network", "huge"], "--network huge: "),
        (lambda pairs: ["--teacher-time", "soon"], "--teacher-time soon: expected a number with s, m or h"),
        (lambda pairs: ["--fsdp"], "--fsdp does not go with --teacher new"),
        (
            lambda pairs: ["--degrade", "jpeg-10", "--layout", "ab"],
            "--degrade jpeg-10: --layout ab has sources already",
        ),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[object], pairs: Path, tmp_path: Path, spoil: Callable[[Path], list[object]], message: str
):
    more = spoil(pairs)
    with pytest.raises(IbmdError, match=message) as error:
        distill(*arguments, *more, "--out", tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_new_teacher_needs_pairs(tmp_path: Path):
    with pytest.raises(UsageError, match="--teacher new: expected pairs to train it on: --data FOLDER"):
        distill("--teacher", "new", "--out", tmp_path / "run")


def test_other_settings_on_a_run_folder(arguments: list[object], tmp_path: Path):
    distill(*arguments, "--out", tmp_path / "run", "--stop-after", "teacher")
    with pytest.raises(UsageError, match="a run with other settings .*teacher_steps: 6 there, 7 here"):
        distill(*arguments, "--teacher-steps", "7", "--out", tmp_path / "run")


def test_grey_and_transparent_pictures_are_read_as_rgb(arguments: list[object], pairs: Path, tmp_path: Path):
    for i, mode in enumerate(["L", "RGBA", "1", "P"]):
        file = pairs / "source" / f"{i:02d}.png"
        Image.open(file).convert(mode).save(file)
    distill(*arguments, "--out", tmp_path / "run", "--stop-after", "teacher")


def test_copies_across_the_split_are_left_out(arguments: list[object], pairs: Path, tmp_path: Path):
    for side in ("source", "target"):
        for i in range(12, 24):
            shutil.copy(pairs / side / f"{i - 12:02d}.png", pairs / side / f"{i:02d}.png")
    options = [option for option in arguments if option != "--quiet"]
    result = distill(*options, "--out", tmp_path / "run", "--stop-after", "teacher")
    assert "have a picture in common with held-out ones and are left out" in result.stderr
    assert "pairs for training: a teacher soon knows so few by heart" in result.stderr
