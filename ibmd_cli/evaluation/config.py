"""Settings of `ibmd eval`. Nothing heavy is imported here."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ibmd_cli.errors import UsageError, nearest
from ibmd_cli.settings import Record, setting

BUILTIN = "builtin:outline2emoji"
_models, _data, _metrics, _run = (partial(setting, panel=panel) for panel in ("Models", "Data", "Metrics", "Run"))


@dataclass(frozen=True)
class EvalConfig(Record):
    """What is evaluated, and how."""

    # fmt: off
    student: tuple[str, ...] = _models((BUILTIN,), "builtin:NAME, a model folder or a run folder (repeatable); or none",
        metavar="REF", also=("model", "checkpoint", "run"))
    teacher: str | None = _models(None, "Teacher to compare with, or none", metavar="REF",
        shown="the one that the student was distilled from")
    teacher_nfe: tuple[int, ...] = _models((1, 5, 20, 100), "Network calls of the teacher", metavar="N,...", at_least=1,
        also=("nfe", "steps"))
    preset: str | None = _models(None, "The published teacher that the file of --teacher is", metavar="ALIAS")
    data: str | None = _data(None,
        "builtin:NAME, a folder with source/ and target/, or, with --degrade, a folder of clean images", metavar="DATA",
        shown="the embedded test pairs", also=("input", "pairs", "dataset"))
    degrade: str | None = _data(None, "Make sources of clean images, e.g. jpeg-10; none: they are pairs")
    masks: str = _data("", "File of free-form masks (.npz)", metavar="FILE")
    labels: str = _data("", "CSV file of PATH,CLASS", metavar="FILE")
    fit: str = _data("none",
        "Pairs of another size: refused (none), or brought to the size as ibmd sample and distill do", metavar="HOW",
        choices=("none", "pad", "stretch", "crop"))
    protocol: str | None = _metrics(None,
        "Measure as published: ddbm-e2h, ddbm-diode, dbim-inpaint, i2sb-sr or i2sb-restore")
    metrics: tuple[str, ...] = _metrics((), "What to measure (repeatable), e.g. fid,lpips_vgg", flags=("--metric",),
        metavar="NAME,...", shown="what needs no download", also=("metrics",))
    weights: tuple[Path, ...] = _metrics((), "File or folder of weights of Inception, VGG16, ... (repeatable)",
        metavar="PATH")
    fetch: bool = _metrics(False, "Download weights that are not there", also=("download",))
    reference: Path | None = _metrics(None, "Reference of the FID: .npz file or folder", metavar="PATH",
        shown="the targets")
    samples: int | None = _metrics(None, "Samples for each source", at_least=1, shown="4; 1 with --protocol",
        also=("variants", "num-samples", "n"))
    seeds: int = _metrics(1, "Times that all samples are drawn, to tell how results vary", at_least=1)
    batch_size: int = _run(64, "Images at a time", at_least=1, also=("batch", "bs", "b"))
    seed: int = _run(0, "Seed of all randomness")
    device: str = _run("auto", "auto, cpu, cuda, cuda:N or mps", also=("gpu", "cuda", "cpu"))
    out: Path | None = _run(None, "Folder for report.html, results.json and pictures; the same command again continues",
        metavar="FOLDER", also=("output", "report", "o"))
    # fmt: on

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant together."""
        super().__post_init__()
        for flag, given in (("--student", self.student), ("--teacher", (self.teacher,)), ("--data", (self.data,))):
            if "" in given:
                raise UsageError(f"{flag} '': an empty name")
        from ibmd_cli.images.find import named_data  # imports Pillow

        object.__setattr__(self, "data", self.data and named_data(self.data))
        if self.student == ("none",) and self.teacher == "none":
            raise UsageError("--student none --teacher none: nothing to evaluate: name one of them")
        if len(set(self.student)) < len(self.student) or ("none" in self.student and len(self.student) > 1):
            raise UsageError(f"--student {' --student '.join(self.student)}: expected different students")
        if self.metrics:
            from ibmd_cli.metrics.scores import METRICS  # imports PyTorch

            for name in self.metrics:
                if not name:
                    raise UsageError(f"--metric {','.join(self.metrics)}: an empty name: expected e.g. fid,lpips_vgg")
                if name not in METRICS:
                    raise UsageError(f"--metric {name}: no such metric: {nearest(name, METRICS)}")
