"""Model folders: round trips, and refusals that name what is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.files import assets
from ibmd_cli.method.bridges import DBIMBridge, I2SBBridge, VEBridge, VPBridge
from ibmd_cli.method.distillation import Sources, translate
from ibmd_cli.method.noise import stream
from ibmd_cli.models.folder import builtin_names, load_model, refuse_models, save_model
from ibmd_cli.models.model import StudentModel, student_times
from ibmd_cli.models.references import TeacherRef, load_teacher, look_up_teacher


def edit(folder: Path, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_round_trip_is_exact(tiny_teacher: Path, tmp_path: Path):
    teacher = load_model(str(tiny_teacher), "teacher")
    save_model(teacher, tmp_path / "copy")
    again = load_model(str(tmp_path / "copy"), "teacher")
    x_T = torch.rand(2, 3, 16, 16)
    assert again.config == teacher.config
    draws = [model.translate(Sources(x_T), stream(0), nfe=3) for model in (teacher, again)]
    assert torch.equal(*draws)


def test_saving_replaces_a_folder_whole(tiny_teacher: Path):
    teacher = load_model(str(tiny_teacher))
    (tiny_teacher / "stray").touch()
    save_model(teacher, tiny_teacher)
    assert sorted(f.name for f in tiny_teacher.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [f.name for f in tiny_teacher.parent.iterdir() if f.name.startswith(".")] == []


def test_failed_save_leaves_the_old_folder(tiny_teacher: Path):
    teacher = load_model(str(tiny_teacher))
    before = (tiny_teacher / "model.safetensors").read_bytes()
    teacher.config["licence"] = object()  # cannot be written as JSON
    with pytest.raises(TypeError):
        save_model(teacher, tiny_teacher)
    assert (tiny_teacher / "model.safetensors").read_bytes() == before
    assert [f.name for f in tiny_teacher.parent.iterdir() if f.name.startswith(".")] == []


def test_newer_format_is_refused(tiny_teacher: Path):
    edit(tiny_teacher, format_version=99, ibmd_version="9.9")
    with pytest.raises(IbmdError, match=r"format_version 99, written by ibmd 9\.9.*pip install -U"):
        load_model(str(tiny_teacher))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("backbone.out.2.bias"), r"backbone\.out\.2\.bias \(missing\)"),
        (lambda t: t.update(stray=torch.zeros(1)), r"stray \(extra\)"),
        (lambda t: t.update({"backbone.out.2.bias": torch.zeros(5)}), r"\[5\], expected \[3\]"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(tiny_teacher: Path, change, message: str):
    tensors = load_file(tiny_teacher / "model.safetensors")
    change(tensors)
    save_file(tensors, tiny_teacher / "model.safetensors")
    with pytest.raises(IbmdError, match=message):
        load_model(str(tiny_teacher))


def config_of(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **changes)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated weights": (lambda t: os.truncate(t / "model.safetensors", 1000), "cannot be read as safetensors"),
    "weights without content": (lambda t: os.truncate(t / "model.safetensors", 0), "cannot be read as safetensors"),
    "cut JSON": (lambda t: (t / "config.json").write_text("{"), "cannot be read as JSON"),
    "bytes that are no text": (lambda t: (t / "config.json").write_bytes(b"\xff\xfe"), "cannot be read as JSON"),
    "another JSON": (lambda t: (t / "config.json").write_text("[1]"), "expected a JSON object"),
    "another library's": (lambda t: (t / "config.json").write_text('{"_class_name": "UNet"}'), "not a model of ibmd"),
    "no version": (config_of(format_version=None), "format_version None"),
    "unknown times": (config_of(times={"sigma": 3}), "does not describe a model"),
    "empty range of times": (config_of(times={"sigma_min": 3.0, "sigma_max": 2.0}), "expected a rising range"),
    "empty network": (config_of(network={}), "does not describe a model"),
    "network of another type": (config_of(network=[1]), "does not describe a model"),
    "unknown bridge": (config_of(bridge={"kind": "no"}), "does not describe a model"),
    "no image": (config_of(image=None), "does not describe a model"),
    "size that is no number": (config_of(image={"size": "big", "channels": 3}), "does not describe a model"),
    "no sampling": (config_of(sampling=None), "does not describe a model"),
    "empty sampling": (config_of(sampling={}), "does not describe a model"),
    "unknown sampler": (config_of(sampling={"sampler": "heun", "nfe": 3}), "sampler 'heun': expected ddbm"),
    "weights of another network": (
        lambda t: save_file({"a": torch.zeros(1)}, t / "model.safetensors"),
        "tensors do not fit",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_teacher_is_named_when_loaded_and_when_planned(tiny_teacher: Path, damage: str):
    change, message = DAMAGES[damage]
    change(tiny_teacher)
    for use in (load_model, load_teacher, lambda reference: look_up_teacher(TeacherRef(reference))):
        with pytest.raises(IbmdError, match=message):
            use(str(tiny_teacher))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_file_that_may_not_be_read_is_named_with_its_reason(tiny_teacher: Path, file: str):
    (tiny_teacher / file).chmod(0)
    script = (
        "import os, sys; from ibmd_cli.models.references import *; import ibmd_cli.networks.unet\n"
        "if os.getuid() == 0: os.setuid(1000)\n"
        "try: look_up_teacher(TeacherRef(sys.argv[1]))\n"
        "except Exception as error: print(error)"
    )
    for folder in list(tiny_teacher.parents)[:-1]:
        if folder.owner() == "root" and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o555)
    message = subprocess.run(
        [sys.executable, "-c", script, tiny_teacher], capture_output=True, text=True, encoding="utf-8", check=True
    ).stdout
    assert str(tiny_teacher / file) in message
    assert "Permission denied" in message


@pytest.mark.parametrize("reference", ["", " "])
def test_teacher_without_a_name_is_refused(reference: str):
    with pytest.raises(UsageError, match="nothing is named"):
        load_teacher(reference)


def test_folders_of_runs_and_models_are_no_data(tiny_teacher: Path, drawings: Path):
    run = Path(__file__).parent.parent / "written_by_0.1" / "finished"
    for folder in (run, run / "student", tiny_teacher):
        with pytest.raises(UsageError, match="--data .*: the folder of a run or a model: expected one of images"):
            refuse_models([str(drawings), str(folder)])
    refuse_models([str(drawings), "builtin:outline2emoji", "dataset:diode", ""])


def test_unknown_reference_names_the_nearest():
    with pytest.raises(NotAvailable, match="builtin:outline2emoji"):
        load_model("builtin:outline2emojy")
    with pytest.raises(NotAvailable, match="builtin:outline2emoji"):
        load_model("no/such/folder", "student")


def test_teacher_where_a_student_is_needed(tiny_teacher: Path):
    with pytest.raises(IbmdError, match="a teacher, where a student is needed"):
        load_model(str(tiny_teacher), "student")


def test_folder_without_a_model(tmp_path: Path):
    with pytest.raises(NotAvailable, match=r"expected config\.json and model\.safetensors"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_embedded_models_load(kind: str):
    assert "outline2emoji" in builtin_names()
    assert load_model("builtin:outline2emoji", kind).image_size == 32


def test_embedded_assets_are_small_and_attributed():
    folder = assets() / "outline2emoji"
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 25e6
    assert "CC BY-SA 4.0" in (folder / "LICENSE.md").read_text()
    for kind in ("teacher", "student"):
        assert load_model("builtin:outline2emoji", kind).config["licence"] == "CC-BY-SA-4.0"


def test_student_of_four_steps_makes_fewer_calls_at_times_that_it_knows():
    student = load_model("builtin:outline2emoji", "student")
    assert isinstance(student, StudentModel)
    times = [1.0, 0.7, 0.4, 0.1]
    sampling = {**student.config["sampling"], "timesteps": times}
    student = StudentModel(student.predictor, {**student.config, "sampling": sampling})
    calls = {n: list(student.setup_for(n).timesteps) for n in (1, 2, 3, 4)}
    assert calls == {1: [1.0], 2: [1.0, 0.4], 3: [1.0, 0.7, 0.1], 4: times}
    x_T = torch.rand(1, 3, 32, 32)
    *_, last = translate(student.predictor, student.setup_for(2), Sources(x_T), stream(0))
    assert torch.equal(student.translate(Sources(x_T), stream(0), nfe=2), last.clamp(-1, 1))
    for nfe in (0, 5):
        with pytest.raises(UsageError, match=f"--nfe {nfe}: .* was distilled for 4: expected 1 … 4"):
            student.setup_for(nfe)


@pytest.mark.parametrize("bridge", [VPBridge(), VEBridge(T=80.0), I2SBBridge(), DBIMBridge()], ids=lambda b: b.kind)
def test_times_of_a_student(bridge):
    for nfe in (1, 2, 4):
        times = student_times(bridge, nfe)
        assert times == sorted(times, reverse=True)
        assert (len(times), times[0]) == (nfe, bridge.T)
        assert student_times(bridge, nfe, times) == times
    wrong = [(bridge.T / 2,), (bridge.T, bridge.T), (bridge.T, 0.0), (bridge.T, bridge.t_min)]
    for times in wrong + ([(999, 499.5)] if bridge.kind == "i2sb" else []):
        with pytest.raises(UsageError, match="--timesteps .*: expected .* fall from"):
            student_times(bridge, len(times), times)
