"""`ibmd export`: files that agree with the student, or no file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import ibmd_cli.export
from ibmd_cli.cli import app
from ibmd_cli.errors import IbmdError
from ibmd_cli.models import load_model

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def export(*arguments: object) -> object:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("dtype", BYTES)
def test_file_agrees_and_carries_its_configuration(tmp_path: Path, dtype: str):
    file = tmp_path / "student.safetensors"
    report = json.loads(export("--dtype", dtype, "--output", file, "--json").stdout)
    student, again = load_model("builtin:outline2emoji", "student"), load_model(str(file), "student")
    assert again.config == student.config
    assert {v.dtype for v in load_file(file).values()} == {
        getattr(torch, {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype])
    }
    parameters = sum(p.numel() for p in student.predictor.parameters())
    assert report["bytes"] == file.stat().st_size
    assert parameters * BYTES[dtype] < report["bytes"] < 1.05 * parameters * BYTES[dtype]
    assert report["max_difference"] <= ibmd_cli.export.TOLERANCE[dtype]


def test_file_that_differs_is_not_left_behind(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(ibmd_cli.export.TOLERANCE, "bf16", 1e-9)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "fp8"], "--dtype: 'fp8' is not one of fp32, fp16, bf16"),
        (["--output", "student.bin"], "expected a name that ends in .safetensors"),
        (["--format", "onnx"], "--format: 'onnx' is not one of: safetensors"),
        (["--student", "builtin:outline2emojy"], "nearest: builtin:outline2emoji"),
    ],
)
def test_bad_requests(tmp_path: Path, arguments: list[str], message: str):
    with pytest.raises(IbmdError, match=message):
        export("--output", tmp_path / "x.safetensors", *arguments)
