"""Previews: the same sources and noise each time, the picture's rows, diversity against the teacher's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibmd_cli.data.sources import SourceImages
from ibmd_cli.models.model import StudentModel, TeacherModel
from ibmd_cli.models.references import load_teacher
from ibmd_cli.reporting import Reporter
from ibmd_cli.training.config import DistillConfig
from ibmd_cli.training.new_student import new_student
from ibmd_cli.training.preview import TEACHER_CALLS, VARIANTS, Preview


@pytest.fixture
def teacher(tiny_teacher: Path) -> TeacherModel:
    return load_teacher(str(tiny_teacher))


def preview_of(teacher: TeacherModel, drawings: Path, seed: int = 0) -> Preview:
    sources = SourceImages((str(drawings),), teacher.config, Reporter(quiet=True))
    return Preview(sources, teacher, seed, torch.device("cpu"))


def student_of(teacher: TeacherModel, folder: Path, **settings: object) -> StudentModel:
    return new_student(DistillConfig(teacher=str(folder / "tiny-teacher"), **settings), teacher)  # type: ignore[arg-type]


def test_same_weights_make_the_same_picture(teacher: TeacherModel, drawings: Path, tmp_path: Path):
    student = student_of(teacher, tmp_path, noise_init=0.5)
    found = [
        preview_of(teacher, drawings, seed).save(tmp_path / f"{i}.png", student, student.predictor)
        for i, seed in enumerate((0, 0, 1))
    ]
    pictures = [np.asarray(Image.open(tmp_path / f"{i}.png")) for i in range(3)]
    assert found[0] == found[1] != found[2]
    assert (pictures[0] == pictures[1]).all()
    assert not (pictures[0] == pictures[2]).all()


def test_noise_that_changes_nothing_has_no_diversity(teacher: TeacherModel, drawings: Path, tmp_path: Path):
    still, varied = (student_of(teacher, tmp_path, noise_init=init) for init in (0.0, 0.5))
    preview = preview_of(teacher, drawings)
    of_still = preview.save(tmp_path / "still.png", still, still.predictor)
    of_varied = preview.save(tmp_path / "varied.png", varied, varied.predictor)
    assert of_still["diversity"] == 0 < of_varied["diversity"]
    assert of_still["teacher_diversity"] == of_varied["teacher_diversity"] > 0


def test_student_without_noise_reports_no_diversity(teacher: TeacherModel, drawings: Path, tmp_path: Path):
    student = student_of(teacher, tmp_path, noise=False)
    assert preview_of(teacher, drawings).save(tmp_path / "p.png", student, student.predictor) == {}
    assert (tmp_path / "p.png").is_file()


def test_teacher_is_run_once(teacher: TeacherModel, drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls, real = [], TeacherModel.translate

    def translate(self: TeacherModel, batch: object, rng: object, nfe: int) -> torch.Tensor:
        calls.append(nfe)
        return real(self, batch, rng, nfe)  # type: ignore[arg-type]

    monkeypatch.setattr(TeacherModel, "translate", translate)
    student, preview = student_of(teacher, tmp_path), preview_of(teacher, drawings)
    assert calls == []
    for _ in range(2):
        preview.save(tmp_path / "p.png", student, student.predictor)
    own = teacher.config["sampling"]["nfe"]
    assert calls == [own, *[min(own, TEACHER_CALLS)] * VARIANTS]


def test_few_sources_are_shown_once_each(teacher: TeacherModel, drawings: Path):
    for file in sorted(drawings.iterdir())[3:]:
        file.unlink()
    batch = preview_of(teacher, drawings).batch
    assert len(batch.x_T) == 3
    assert all(not torch.equal(batch.x_T[i], batch.x_T[j]) for i in range(3) for j in range(i))
