"""Teachers by reference: recognised, converted once, distilled and sampled from their published files."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hubserver import File, HubServer, Repo
from parity import checkpoints as published
from parity.rule import families, outputs, rule_weights
from parity.teachers import error, inputs
from PIL import Image
from typer.testing import CliRunner

from ibmd_cli.cli import app
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.models import published_teachers
from ibmd_cli.models.convert import Checkpoint
from ibmd_cli.models.folder import load_model, load_student
from ibmd_cli.models.references import list_teachers, load_teacher, recognise
from ibmd_cli.networks.unet import UNet, UNetConfig
from ibmd_cli.sampling.config import SampleConfig
from ibmd_cli.sampling.pipeline import _load_model

PUBLISHED = {  # alias: family of the parity set, container, options
    "ddbm-edges2handbags": ("ddbm_vp", published.ddbm, None),
    "dbim-imagenet-inpaint-center": ("dbim_inpaint", published.dbim, None),
    "i2sb-jpeg-10": ("i2sb_sde03", published.i2sb, {}),
    "i2sb-blur-uni": (
        "i2sb_otode10",
        published.i2sb,
        {"beta_max": 1.0, "ot_ode": True, "corrupt": "blur-uni"},
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IBMD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "teachers"


def write(folder: Path, alias: str) -> Path:
    """Write a narrow teacher as its authors publish it; returns the path to give."""
    family, container, options = PUBLISHED[alias]
    file = published.save(
        container(rule_weights(family)), folder / ("checkpoint.pt" if options is None else "latest.pt")
    )
    if options is None:
        return file
    published.save_options(folder, **options)
    return folder


@pytest.mark.parametrize("alias", PUBLISHED)
def test_published_file_is_converted_once_and_computes_as_published(tmp_path: Path, cache: Path, alias: str):
    path = write(tmp_path / "files", alias)
    teacher = load_teacher(str(path), preset=alias)
    assert teacher.name == alias
    row = published_teachers.published()[alias]
    assert teacher.bridge.to_dict().items() >= row["bridge"].items()
    assert (teacher.image_size, teacher.config["licence"]) == (row["image_size"], row["licence"])
    assert teacher.config["source"]["reference"] == str(path)

    family = PUBLISHED[alias][0]
    info = families()[family]
    t = torch.tensor(info.get("x0hat_mixed_steps") or info["x0hat_mixed_times"])
    x_t, x_T, label, _ = inputs(family)
    assert error(teacher.predict_x0(x_t, t, x_T, label), outputs(family)["x0hat_mixed"]) < 1e-5

    (folder,) = cache.iterdir()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    load_teacher(str(path), preset=alias)
    assert [f.stat().st_mtime_ns for f in cache.glob("*/model.safetensors")] == [before]


@pytest.mark.parametrize("alias", published_teachers.published())
def test_full_size_checkpoints_are_recognised_and_others_are_not(alias: str):
    """By network, classes and I2SB's options; so no other file gets the name and licence of a published one."""
    row = published_teachers.published()[alias]
    network = UNetConfig(6 if row["conditional"] else 3, num_classes=row["classes"], **row["network"])
    with torch.device("meta"):
        full, other = (UNet(config).state_dict() for config in (network, replace(network, num_res_blocks=1)))
    options = {"corrupt": row["degradation"]} if row["family"] == "i2sb" else None
    assert recognise(Checkpoint(Path("x"), row["family"], full, options)) == alias
    assert recognise(Checkpoint(Path("x"), row["family"], other, options)) is None


def test_unknown_network_has_what_its_family_shares_and_no_licence(tmp_path: Path):
    path = write(tmp_path / "files", "ddbm-edges2handbags")
    teacher = load_teacher(str(path))
    assert (teacher.name, teacher.config["licence"]) == ("checkpoint", "not stated")
    assert teacher.bridge == load_teacher(str(path), preset="ddbm-edges2handbags").bridge


def test_options_beside_a_file_are_part_of_it(tmp_path: Path):
    folder = write(tmp_path / "files", "i2sb-jpeg-10")
    assert load_teacher(str(folder / "latest.pt")).bridge.noise_free is False
    published.save_options(folder, beta_max=1.0, ot_ode=True, corrupt="blur-uni")
    assert load_teacher(str(folder / "latest.pt")).bridge.noise_free is True
    (folder / "log.txt").touch()
    assert load_teacher(str(folder)).bridge.noise_free is True


def test_model_folder_says_itself_what_a_checkpoint_leaves_open():
    with pytest.raises(UsageError, match="leave them out"):
        load_teacher("builtin:outline2emoji", head_channels=64)
    teacher = load_teacher("builtin:outline2emoji", preset="ddbm-diode")  # the settings of a run, not of the network
    assert teacher.config == load_teacher("builtin:outline2emoji").config


@pytest.mark.parametrize("t", [-1, 1000])
def test_times_outside_of_the_bridge_are_refused(t: int):
    teacher = load_teacher("builtin:emoji-sr4x")
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"expected 0 … 999"):
        teacher.predict_x0(x, torch.tensor([t]), x)


def test_float64_images_are_predicted_in_float64():
    teacher = load_teacher("builtin:emoji-sr4x")
    x, t = torch.rand(2, 3, 32, 32), torch.tensor([500, 900])
    single, double = teacher.predict_x0(x, t, x), teacher.predict_x0(x.double(), t, x.double())
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-5)


def test_changed_file_is_converted_anew(tmp_path: Path, cache: Path):
    path = write(tmp_path / "files", "ddbm-edges2handbags")
    load_teacher(str(path))
    os.utime(path, ns=(0, 0))
    load_teacher(str(path))
    assert len(list(cache.iterdir())) == 2


def test_narrow_network_has_heads_no_wider_than_itself(tmp_path: Path):
    path = write(tmp_path / "files", "ddbm-edges2handbags")
    assert load_teacher(str(path)).config["network"]["head_channels"] == 32  # the family's 64, but it has 32 channels


def test_attention_order_can_be_given(tmp_path: Path):
    path = write(tmp_path / "files", "ddbm-edges2handbags")
    assert load_teacher(str(path)).config["network"]["attention_order"] == "new"
    other = load_teacher(str(path), attention_order="legacy")
    assert other.config["network"]["attention_order"] == "legacy"
    config = SampleConfig(inputs=("a.png",), teacher=str(path), head_channels=16, attention_order="legacy")
    network = _load_model(config, quiet=True).config["network"]
    assert (network["head_channels"], network["attention_order"]) == (16, "legacy")


@pytest.mark.parametrize(
    ("alias", "preset", "message"),
    [
        ("ddbm-edges2handbags", "i2sb-jpeg-10", "family"),
        ("i2sb-jpeg-10", "i2sb-blur-uni", r"options\.pkl says"),
    ],
)
def test_preset_of_another_teacher_is_refused(tmp_path: Path, cache: Path, alias: str, preset: str, message: str):
    path = write(tmp_path / "files", alias)
    with pytest.raises(IbmdError, match=message):
        load_teacher(str(path), preset=preset)
    assert not cache.exists() or not list(cache.iterdir())


def test_i2sb_without_options_needs_a_preset(tmp_path: Path):
    folder = write(tmp_path / "files", "i2sb-jpeg-10")
    (folder / "options.pkl").unlink()
    with pytest.raises(IbmdError, match=r"options\.pkl.*preset"):
        load_teacher(str(folder))
    assert load_teacher(str(folder), preset="i2sb-jpeg-10").bridge.to_dict()["beta_max"] == 0.3


def test_references_that_name_nothing(tmp_path: Path):
    with pytest.raises(NotAvailable, match=r"nearest: ddbm-edges2handbags"):
        load_teacher("hub:ddbm-edge2handbag")
    with pytest.raises(NotAvailable, match=r"Google Drive.*--preset i2sb-jpeg-5"):
        load_teacher("hub:i2sb-jpeg-5")
    with pytest.raises(UsageError, match=r"--preset i2sb-jpg-5.*i2sb-jpeg-5"):
        load_teacher("builtin:outline2emoji", preset="i2sb-jpg-5")
    with pytest.raises(NotAvailable, match="no teacher"):
        load_teacher(str(tmp_path / "nothing.pt"))


OLD = Path(__file__).parent.parent / "written_by_0.1"
NO_TEACHERS = {  # what it is: what names it, what the message says
    "run folder": ("finished", "a run folder, where a teacher is needed. The run's own teacher is teacher"),
    "run without a student": ("started", "a run folder, where a teacher is needed. The run's own teacher is teacher"),
    "student": (
        "finished/student",
        "a student, where a teacher is needed. Its own teacher is teacher: --teacher teacher",
    ),
    "weights of a student": ("finished/student/model.safetensors", "Its own teacher is teacher: --teacher teacher"),
    "ONNX file": ("student.onnx", "a student, where a teacher is needed. Name it with --student"),
    "checkpoint of a run": ("stopped/checkpoints/step-000003/state.pt", "expected tensors by name"),
    "folder of images": ("drawings", "no checkpoint here: expected latest.pt and options.pkl"),
    "image": ("out.png", "neither a torch file nor safetensors"),
}


@pytest.mark.parametrize("kind", NO_TEACHERS)
@pytest.mark.parametrize("command", ["plan", "distill", "sample", "eval"])
def test_what_is_no_teacher_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, command: str
):
    shutil.copytree(OLD, tmp_path / "old")
    shutil.copytree(OLD / "finished", tmp_path / "old" / "started", ignore=shutil.ignore_patterns("student"))
    monkeypatch.chdir(tmp_path / "old")
    reference, message = NO_TEACHERS[kind]
    arguments = {
        "plan": ["distill", "--dry-run", "--data", "nothing"],
        "distill": ["distill", "--data", "nothing", "--out", "new"],
        "sample": ["sample", "-i", "drawings", "-o", "new/"],
        "eval": ["eval", "--student", "none", "--data", "nothing", "--out", "new"],
    }[command]
    error = CliRunner().invoke(app, [*arguments, "--teacher", reference]).exception
    assert isinstance(error, IbmdError), error
    assert str(error).startswith(reference)
    assert message in str(error)
    assert "\n" not in str(error)
    assert not Path("new").exists()


def test_run_folder_is_accepted_where_a_student_is_meant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    assert load_student("finished").digest() == load_student("finished/student").digest()
    with pytest.raises(IbmdError, match="a teacher, where a student is needed"):
        load_student("teacher")
    shutil.rmtree("finished/student")
    with pytest.raises(NotAvailable, match="a run that has no student yet: its command, typed again, continues it"):
        load_student("finished")


def test_published_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, opened, real = write(tmp_path / "files", "ddbm-edges2handbags"), [], torch.load
    monkeypatch.setattr(torch, "load", lambda *given, **options: opened.append(given) or real(*given, **options))
    load_teacher(str(path))
    assert len(opened) == 1


def test_every_known_teacher_is_listed():
    rows = list_teachers()
    names = [row["teacher"] for row in rows]
    assert names[:2] == ["builtin:emoji-sr4x", "builtin:outline2emoji"]
    assert names[2:] == [f"hub:{alias}" for alias in published_teachers.published()]
    assert len({tuple(row) for row in rows}) == 1
    shown = CliRunner().invoke(app, ["distill", "--list-teachers", "--json"])
    assert json.loads(shown.stdout)["teachers"] == rows


def test_embedded_teachers_are_conditional_and_unconditional():
    kinds = {name: load_teacher(f"builtin:{name}") for name in ("outline2emoji", "emoji-sr4x")}
    assert kinds["outline2emoji"].config["conditional"] is True
    sr4x = kinds["emoji-sr4x"]
    assert (sr4x.config["conditional"], sr4x.bridge.kind, sr4x.source_scale) == (False, "i2sb", 4)


@pytest.mark.slow
def test_a_published_teacher_is_sampled_and_distilled_by_the_command(tmp_path: Path):
    """From the file of its authors to a student, on clean photographs, by the commands of the README."""
    folder = write(tmp_path / "jpeg-10", "i2sb-jpeg-10")
    published.save_options(folder, image_size=64)
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = torch.Generator().manual_seed(0)
    for i in range(2):
        pixels = torch.randint(256, (64, 64, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(photos / f"{i}.png")
    run = ["distill", "--teacher", str(folder), "--data", str(photos), "--degrade", "jpeg-10", "--steps", "1"]
    run += ["--bridge-steps", "1", "--batch-size", "1", "--out", str(tmp_path / "run"), "--device", "cpu", "-q"]
    done = subprocess.run([sys.executable, "-m", "ibmd_cli", *run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    student = load_model(str(tmp_path / "run"), "student")
    assert student.config["licence"] == "not stated"  # no published network is as narrow
    assert student.config["degradation"] == "jpeg-10"
    for model in (["--student", str(tmp_path / "run")], ["--teacher", str(folder), "--sampler", "i2sb", "--nfe", "2"]):
        out = tmp_path / f"{model[0][2:]}.png"
        command = ["sample", *model, "--input", str(photos / "0.png"), "--degrade", "jpeg-10", "--output", str(out)]
        done = subprocess.run([sys.executable, "-m", "ibmd_cli", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with Image.open(out) as image:
            assert image.size == (64, 64)


def test_teacher_on_the_hub_is_fetched_converted_and_listed_by_the_command(tmp_path: Path):
    path = write(tmp_path / "files", "ddbm-edges2handbags")
    repos = {"alexzhou907/DDBM": Repo({"e2h_ema_0.9999_420000.pt": File(path.read_bytes())})}
    with HubServer(repos) as server:
        environment = {
            **os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        code = (
            "from ibmd_cli.models.references import load_teacher; t = load_teacher('hub:ddbm-edges2handbags'); "
            "print(t.name, t.config['source']['reference'], t.config['source']['bytes'])"
        )
        for offline in ("0", "1"):  # the second time from the cache
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True,
                env={**environment, "HF_HUB_OFFLINE": offline},
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            expected = f"ddbm-edges2handbags hub:ddbm-edges2handbags {path.stat().st_size}\n"
            assert done.stdout == expected


def test_a_run_is_planned_without_fetching_converting_or_writing(tmp_path: Path, cache: Path):
    """Of a published teacher that is not here, the table tells all; of its authors' file, the file."""

    def plan(*arguments: str) -> dict:
        shown = CliRunner().invoke(app, ["distill", *arguments, "--dry-run", "--json"])
        assert shown.exit_code == 0, shown.output
        return json.loads(shown.stdout)

    row = published_teachers.published()["ddbm-edges2handbags"]
    told = plan("--teacher", "hub:ddbm-edges2handbags", "--nfe", "2")
    assert told["plan"]["parameters of the teacher"] == row["parameters"]
    assert told["plan"]["parameters of the student"] == row["parameters"] + 3 * 9 * 192  # z: 3 channels more
    assert told["plan"]["files to download"][0]["files"] == [row["file"]]
    assert (told["settings"]["steps"], told["origins"]["steps"]) == (300, "preset")

    path = write(tmp_path / "files", "ddbm-edges2handbags")
    told = plan("--teacher", str(path), "--preset", "ddbm-edges2handbags")
    assert told["settings"]["steps"] == 14000
    assert told["plan"]["parameters of the teacher"] == sum(w.numel() for w in rule_weights("ddbm_vp").values())
    assert [f["files"] for f in told["plan"]["files to download"]] == [["edges2handbags.tar.gz"]]  # the preset's data
    assert not cache.exists()
    assert {f.name for f in tmp_path.iterdir()} == {"files"}


@pytest.mark.parametrize("alias", published_teachers.published())
def test_the_table_describes_the_published_networks(alias: str):
    row = published_teachers.published()[alias]
    network = {"in_channels": 6 if row["conditional"] else 3, "num_classes": row["classes"], **row["network"]}
    with torch.device("meta"):
        count = sum(p.numel() for p in UNet(UNetConfig(**network)).parameters())
    assert count == row["parameters"]
