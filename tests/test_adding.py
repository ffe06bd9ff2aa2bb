"""Adding a metric, a degradation, a bridge or an export format: one row or class, and every command knows it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from distilling import SMALL, distill
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from ibmd_cli.cli import app
from ibmd_cli.data.degradations import DEGRADATIONS, Degradation
from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.export.config import FORMATS, ExportConfig, Format
from ibmd_cli.export.exporter import Exporter
from ibmd_cli.export.torch_export import Unrolled
from ibmd_cli.method.bridges import BRIDGES, VEBridge, make_bridge
from ibmd_cli.metrics.scores import METRICS, Metric
from ibmd_cli.models.folder import load_student, save_model
from ibmd_cli.models.model import TeacherModel
from ibmd_cli.models.references import load_teacher
from ibmd_cli.networks.predictor import make_predictor


def ibmd(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Six pairs of 16×16 pixels."""
    names, x_T, x_0 = embedded_pairs()
    for side, images in (("source", x_T), ("target", x_0)):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for name, image in list(zip(names, images, strict=True))[:6]:
            small = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize((16, 16))
            small.save(tmp_path / "pairs" / side / f"{name}.png")
    return tmp_path / "pairs"


def mean_gap(samples: Tensor, truth: Tensor) -> Tensor:
    return (samples.mean((0, 2, 3, 4)) - truth.mean((1, 2, 3))).abs()


def range_of_draws(samples: Tensor, truth: Tensor, pool: int) -> Tensor:
    return (samples.amax(0) - samples.amin(0)).mean((1, 2, 3))


def test_metric_is_one_row(pairs: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METRICS, "mean_gap", Metric("gap", "low", 3, "gap of the means", least=0, function=mean_gap))
    monkeypatch.setitem(
        METRICS, "range", Metric("range", "", 3, "range over draws", compares="draws", function=range_of_draws)
    )
    arguments = ("--student", "none", "--teacher", tiny_teacher, "--teacher-nfe", 2, "--samples", 2)
    told = ibmd("eval", *arguments, "--data", pairs, "--metric", "mean_gap,range", "--out", tmp_path / "out", "--json")
    results = json.loads(told)
    (row,) = results["rows"]
    assert 0 <= row["mean_gap"]["low"] <= row["mean_gap"]["value"] <= row["mean_gap"]["high"]
    assert row["range"]["value"] > 0
    assert results["floor"]["mean_gap"]["kind"] == "unrelated"
    assert "gap of the means" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def darken(x: Tensor) -> Tensor:
    return (x - 1) / 2


@pytest.mark.parametrize("slow", [False, True])
def test_degradation_is_one_row(
    slow: bool, pairs: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(DEGRADATIONS, "dark", Degradation("half as bright", darken, multiple=8, slow=slow))
    clean = pairs / "target"
    run = tmp_path / "run"
    small = ("--teacher", tiny_teacher, "--data", clean, "--degrade", "dark", "--out", run, *SMALL)
    assert distill(*small).exit_code == 0
    assert json.loads((run / "config.json").read_text())["settings"]["degrade"] == "dark"
    out = tmp_path / "out"
    ibmd("sample", "--student", run, "--input", clean, "--output", out, "--degrade", "dark", "--quiet")
    assert len(list(out.iterdir())) == 6
    ibmd("sample", "--student", run, "--input", clean, "--output", tmp_path / "clean", "--quiet")
    some = next(out.iterdir()).name
    one, other = (np.asarray(Image.open(tmp_path / folder / some)) for folder in ("out", "clean"))
    assert not np.array_equal(one, other)
    asked = ("--degrade", "dark", "--metric", "psnr", "--samples", 1, "--json")
    assert json.loads(ibmd("eval", "--student", run, "--data", clean, *asked))["settings"]["degrade"] == "dark"


@dataclass(frozen=True)
class SlowEnd(VEBridge):
    """A bridge of its own clock: the VE bridge, at times that are stretched by two."""

    kind: ClassVar[str] = "slow-end"
    T: float = 2.0
    t_min: float = 2e-4

    def alpha_rho(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return super().alpha_rho(t / 2)

    def drift(self, t: Tensor) -> tuple[Tensor, Tensor]:
        f, g2 = super().drift(t / 2)
        return f, g2 / 2

    def _time_of(self, rho: Tensor) -> Tensor:
        return 2 * rho


def test_bridge_is_one_class(tiny_config: dict, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(BRIDGES, SlowEnd.kind, SlowEnd)
    bridge = make_bridge({"kind": "slow-end"})
    assert bridge.to_dict()["kind"] == "slow-end"
    config = {**tiny_config, "bridge": bridge.to_dict()}
    torch.manual_seed(0)
    save_model(TeacherModel(make_predictor(config).eval(), config), tmp_path / "teacher")
    assert isinstance(load_teacher(str(tmp_path / "teacher")).bridge, SlowEnd)
    run = tmp_path / "run"
    assert distill("--teacher", tmp_path / "teacher", "--data", drawings, "--out", run, *SMALL).exit_code == 0
    assert isinstance(load_student(str(run)).predictor.bridge, SlowEnd)
    ibmd("sample", "--student", run, "--input", drawings, "--output", tmp_path / "out", "--quiet")
    assert len(list((tmp_path / "out").iterdir())) == 8


def write_npz(exporter: Exporter, config: ExportConfig, file: Path, say: Callable[[str], None]) -> None:
    say("writing")
    with file.open("wb") as stream:
        np.savez(stream, **{name: v.numpy() for name, v in exporter.student.predictor.state_dict().items()})


def run_npz(file: Path) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    student = load_student("builtin:outline2emoji")
    with np.load(file) as arrays:
        student.predictor.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays})
    module = Unrolled(student)
    return lambda inputs: [module(**{name: torch.from_numpy(v) for name, v in inputs.items()}).detach().numpy()]


def test_export_format_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FORMATS, "npz", Format(".npz", ("fp32",), 2, write_npz, run_npz, use="np.load({output})"))
    told = json.loads(ibmd("export", "--output", tmp_path / "student.npz", "--json"))
    (told,) = told if isinstance(told, list) else [told]
    assert (told["format"], told["psnr"], told["max_difference"]) == ("npz", None, 0)
    assert told["next"] == f"np.load({tmp_path / 'student.npz'})"
    assert (tmp_path / "student.npz").stat().st_size == told["bytes"]
