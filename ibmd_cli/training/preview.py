"""Previews of a run: source, teacher and student side by side, and how much the noise z changes the results."""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ibmd_cli.data.sources import SourceImages
from ibmd_cli.files import atomic_file
from ibmd_cli.images.fit import to_uint8
from ibmd_cli.images.grids import labelled_grid
from ibmd_cli.method.noise import stream
from ibmd_cli.metrics.scores import diversity
from ibmd_cli.models.model import StudentModel, TeacherModel

SOURCES = 8
VARIANTS = 4
"""Draws of z for each of the sources, from which diversity is computed."""
TEACHER_CALLS = 10
MOST_CALLS = 100
"""Of the teacher: the published ones are sampled in up to 999."""


def preview_calls(teacher_nfe: int, nfe: int, previews: int) -> int:
    """Return how many images networks are called on for the previews of a run, those of the teacher included."""
    of_teacher = min(teacher_nfe, MOST_CALLS) + VARIANTS * min(teacher_nfe, TEACHER_CALLS)
    return SOURCES * (of_teacher + previews * VARIANTS * nfe)


class Preview:
    """The student on the same sources with the same noise each time: a picture, and how much the noise changes.

    The rows of the picture are source, teacher, student. Diversity is compared with that of the teacher at
    `TEACHER_CALLS` calls, or fewer: nearly all of it is there by then.
    """

    def __init__(self, sources: SourceImages, teacher: TeacherModel, seed: int, device: torch.device) -> None:
        rows = torch.linspace(0, len(sources) - 1, min(SOURCES, len(sources))).long().tolist()
        self.batch = sources.take(rows, stream(seed, "preview sources"), device)
        self.teacher, self.seed = teacher, seed

    @cached_property
    def of_teacher(self) -> tuple[Tensor, float]:
        """The teacher's images, and their diversity; made when they are first asked for, which takes a while."""
        nfe = min(self.teacher.config["sampling"]["nfe"], MOST_CALLS)
        images = self.teacher.translate(self.batch, self._streams(), nfe)
        calls = min(nfe, TEACHER_CALLS)
        variants = [self.teacher.translate(self.batch, self._streams(v), calls) for v in range(VARIANTS)]
        return images, float(diversity(torch.stack(variants)).mean())

    def save(self, file: Path, student: StudentModel, predictor: nn.Module) -> dict[str, float]:
        """Write the picture with the student's present (averaged) weights; return what it adds to the log.

        A student without noise adds nothing.
        """
        student = StudentModel(predictor, student.config)  # type: ignore[arg-type]
        variants = [student.translate(self.batch, self._streams(v)) for v in range(VARIANTS)]
        of_teacher, teacher_diversity = self.of_teacher
        images = [to_uint8(x.cpu()) for x in (self.batch.x_T, of_teacher, variants[0])]
        with atomic_file(file) as new:
            labelled_grid(dict(zip(("source", "teacher", "student"), images, strict=True))).save(new, format="png")
        if not student.config["sampling"]["noise"]["channels"]:
            return {}
        spread = float(diversity(torch.stack(variants)).mean())
        return {"diversity": spread, "teacher_diversity": teacher_diversity}

    def _streams(self, variant: int = 0) -> list[torch.Generator]:
        more = (variant,) if variant else ()
        return [stream(self.seed, "preview", i, *more) for i in range(len(self.batch.x_T))]
