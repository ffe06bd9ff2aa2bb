"""`ibmd export`: files that agree with the student, or no file."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import ibmd_cli.export.exporter
import ibmd_cli.export.onnx
import ibmd_cli.export.torch_export
from ibmd_cli.cli import app
from ibmd_cli.errors import IbmdError
from ibmd_cli.export.config import FORMATS, ExportConfig
from ibmd_cli.export.exporter import Exporter, Tolerance
from ibmd_cli.export.runner import load_exported, open_exported
from ibmd_cli.models.folder import load_model
from ibmd_cli.models.interface import describe_student

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def export(*arguments: object) -> object:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("dtype", BYTES)
def test_file_agrees_and_carries_its_configuration(tmp_path: Path, dtype: str):
    file = tmp_path / "student.safetensors"
    result = export("--dtype", dtype, "--output", file, "--json", *(["--quiet"] if dtype == "bf16" else []))
    notes, report = result.stderr.splitlines(), json.loads(result.stdout)
    assert [note.partition(": step ")[2][:6] for note in notes[:2]] == ([] if dtype == "bf16" else ["1 of 2", "2 of 2"])
    assert bool(notes) == (dtype != "bf16") == any("next: ibmd sample --student" in note for note in notes)
    student, again = load_model("builtin:outline2emoji", "student"), load_model(str(file), "student")
    assert again.config == student.config
    with safe_open(file, "pt") as tensors:
        assert json.loads(tensors.metadata()["ibmd"])["readme"] == describe_student(student)
    assert {v.dtype for v in load_file(file).values()} == {
        getattr(torch, {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype])
    }
    parameters = sum(p.numel() for p in student.predictor.parameters())
    assert report["bytes"] == file.stat().st_size
    assert parameters * BYTES[dtype] < report["bytes"] < 1.05 * parameters * BYTES[dtype]
    assert report["max_difference"] <= {"fp32": 0, "fp16": 0.02, "bf16": 0.1}[dtype]
    assert report["psnr"] is None if report["max_difference"] == 0 else report["psnr"] > 45
    assert report["images"] == 32


def test_file_that_differs_is_not_left_behind(tmp_path: Path, monkeypatch):
    for tolerance in (Tolerance(1e-9, 0), Tolerance(2, 1000)):
        monkeypatch.setitem(ibmd_cli.export.exporter.TOLERANCE, "bf16", tolerance)
        with pytest.raises(IbmdError, match="differs from builtin:outline2emoji by up to .* nothing was written"):
            export("--dtype", "bf16", "--output", tmp_path / "student.safetensors")
        assert list(tmp_path.iterdir()) == []


def test_existing_file_is_kept(tmp_path: Path):
    file = tmp_path / "student.safetensors"
    file.write_text("precious")
    with pytest.raises(IbmdError, match="exists"):
        export("--output", file)
    assert file.read_text() == "precious"
    export("--output", file, "--on-exists", "overwrite")
    assert load_model(str(file)).nfe == 1


def test_file_that_appears_meanwhile_is_kept(tmp_path: Path):
    """At the last step, so that only the moment of naming can tell."""
    file = tmp_path / "student.safetensors"
    (config,) = ExportConfig(output=file, dtype="fp16").files()
    with pytest.raises(IbmdError, match="appeared meanwhile, and is left as it is; give another --output, or --on"):
        Exporter("builtin:outline2emoji", lambda step: file.write_text("precious")).export(config)
    assert file.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [file]


def test_two_exports_into_one_file(tmp_path: Path):
    """The second is refused while the first works, whose file is whole."""
    file, refused = tmp_path / "student.safetensors", []
    (config,) = ExportConfig(output=file, dtype="fp16").files()

    def export_again(step: str) -> None:
        with pytest.raises(IbmdError, match="another export is writing it; give another --output") as caught:
            Exporter("builtin:outline2emoji").export(config)
        refused.append(caught.value)

    Exporter("builtin:outline2emoji", export_again).export(config)
    assert len(refused) == 2
    assert load_model(str(file)).nfe == 1
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signal_leaves_no_file(tmp_path: Path, number: signal.Signals):
    """While the network is traced, by which time the temporary file and the claim are there."""
    command = [sys.executable, "-m", "ibmd_cli", "export", "--output", tmp_path / "student.pt2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        assert "step 1 of 3, tracing" in line
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(number)
        process.stderr.read()
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_damaged_weights_are_found(tmp_path: Path, format: str, monkeypatch):
    """A graph whose weights are not the student's: the gate runs the file, not the student."""
    make, write = ibmd_cli.export.onnx.make_graph, ibmd_cli.export.torch_export.torch.export.save

    def make_damaged(*arguments):
        graph = make(*arguments)
        tensor = max(graph.graph.initializer, key=lambda t: len(t.raw_data))
        tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
        return graph

    def write_damaged(program, *arguments, **options):
        with torch.no_grad():
            max(program.state_dict.values(), key=torch.numel).neg_()
        write(program, *arguments, **options)

    monkeypatch.setattr(ibmd_cli.export.onnx, "make_graph", make_damaged)
    monkeypatch.setattr(ibmd_cli.export.torch_export.torch.export, "save", write_damaged)
    with pytest.raises(IbmdError, match="differs from builtin:outline2emoji by up to .* nothing was written"):
        export("--format", format, "--output", tmp_path / f"student{FORMATS[format].suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_all_formats_in_one_table(tmp_path: Path):
    reports = json.loads(export("--all", "--output", tmp_path / "all", "--json").stdout)["exports"]
    assert {(report["format"], report["dtype"]) for report in reports} == {
        (format, dtype) for format, row in FORMATS.items() for dtype in row.dtypes if format != "web"
    }
    assert {Path(report["output"]) for report in reports} == set((tmp_path / "all").iterdir())
    config = load_model("builtin:outline2emoji", "student").config
    for report in reports:
        assert report["max_difference"] <= ibmd_cli.export.exporter.TOLERANCE[report["dtype"]].max_difference
        assert report["bytes"] == Path(report["output"]).stat().st_size
        if report["format"] != "safetensors":
            assert load_exported(Path(report["output"])).config == config
    with pytest.raises(IbmdError, match="exists; give another --output"):
        export("--all", "--output", tmp_path / "all")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_noise_inside(tmp_path: Path, suffix: str):
    report = json.loads(export("--noise-inside", "--output", tmp_path / f"student{suffix}", "--json").stdout)
    assert report["max_difference"] < 1e-4
    assert open_exported(tmp_path / f"student{suffix}").inputs == ("x_T",)


def test_format_is_told_by_the_name():
    for format, row in FORMATS.items():
        assert ExportConfig("runs/mine", output=Path(f"student{row.suffix}")).files()[0].format == format
        (file,) = ExportConfig("builtin:outline2emoji", format=format, dtype="fp16").files()
        assert file.output == Path(f"outline2emoji-fp16{row.suffix}")
    assert ExportConfig("runs/mine").files()[0].output == Path("mine-fp32.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "fp8"], "--dtype fp8: expected fp32, fp16, bf16 or int8"),
        (["--dtype", "int8"], "--dtype int8: is not one of fp32, fp16, bf16, which safetensors has"),
        (["--output", "student.bin"], "expected a name that ends in .safetensors"),
        (["--format", "onnx"], "expected a name that ends in .onnx for onnx"),
        (["--format", "tflite"], "--format tflite: expected safetensors, onnx, torch-export or web"),
        (["--opset", "20"], "--opset 20: safetensors has none"),
        (["--opset", "99", "--output", "student.onnx"], "--opset 99: expected 18 to 20"),
        (["--noise-inside"], "--noise-inside: safetensors has no noise inside"),
        (["--all", "--dtype", "fp16"], "--all: writes every format and dtype; leave out"),
        (["--student", "builtin:outline2emojy"], "nearest: builtin:outline2emoji"),
    ],
)
def test_bad_requests(tmp_path: Path, arguments: list[str], message: str):
    with pytest.raises(IbmdError, match=message):
        export("--output", tmp_path / "x.safetensors", *arguments)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("plain/x.onnx", "a part of the path is a file"),
        ("folder.onnx", "it is a folder"),
        ("n" * 255 + ".onnx", "give a shorter name"),
        ("new/" + "n" * 255 + ".onnx", "give a shorter name"),
        ("/proc/x.onnx", "cannot be written ("),
    ],
)
def test_where_nothing_can_be_written_is_known_before_work(tmp_path, output, reason):
    (tmp_path / "plain").touch()
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(IbmdError, match="--output") as error:
        ExportConfig(format="onnx", output=tmp_path / output, on_exists="overwrite").files()
    assert reason in str(error.value)
    assert not (tmp_path / "new").exists()
