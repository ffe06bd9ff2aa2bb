"""Settings of `ibmd export`, and the formats that there are. Nothing heavy is imported here."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import unwritable
from ibmd_cli.settings import Record, setting

STUDENT = "builtin:outline2emoji"


class Format(NamedTuple):
    """A file format: the ending of its names, the dtypes that its weights may have, and the steps until it is there."""

    suffix: str
    dtypes: tuple[str, ...]
    steps: int


FORMATS = {
    "safetensors": Format(".safetensors", ("fp32", "fp16", "bf16"), 2),
    "onnx": Format(".onnx", ("fp32", "fp16", "bf16", "int8"), 5),
    "torch-export": Format(".pt2", ("fp32", "fp16", "bf16"), 3),
    "web": Format(".html", ("fp32", "fp16", "int8"), 6),
}
"""`web` is a page that holds the student as ONNX."""


_file, _hub, _run = (partial(setting, panel=panel) for panel in ("File", "Hub", "Run"))


@dataclass(frozen=True)
class ExportConfig(Record):
    """What is to be exported. `files` tells which files that is; each is exported with a record of its own."""

    # fmt: off
    student: str = _file(STUDENT, "builtin:NAME, a model folder or a run folder", metavar="REF",
        also=("model", "checkpoint", "run"))
    format: str | None = _file(None, "safetensors, onnx, torch-export (.pt2) or web (.html: a page to draw on)",
        shown="by the output's name, or safetensors", choices=tuple(FORMATS), also=("to", "type"))
    dtype: str = _file("fp32",
        "Numbers of the weights: fp32, fp16, bf16, or int8 for onnx and web; the file computes in float32",
        choices=("fp32", "fp16", "bf16", "int8"), also=("precision", "quantize", "half"))
    output: Path | None = _file(None, "File; a folder with --all", flags=("--output", "-o"), metavar="PATH",
        shown="STUDENT-DTYPE.safetensors", also=("out", "to"))
    everything: bool = _file(False, "Write every format with every dtype, and compare them", flags=("--all",))
    opset: int | None = _file(None, "Version of ONNX's operators, 18 to 20", shown="20", also=("opset-version",))
    noise_inside: bool = _file(False, "Have the file draw its noise itself, so that it takes images alone")
    on_exists: str = _file("error", "If an output exists: error or overwrite", metavar="DO",
        choices=("error", "overwrite"), also=("overwrite", "force"))
    push_to: str | None = _hub(None, "Upload the model folder and its card to the Hub instead", metavar="OWNER/REPO",
        also=("push", "push-to-hub", "repo", "upload"))
    public: bool = _hub(False, "Make the repository public", flags=("--public",))
    results: Path | None = _hub(None, "results.json of ibmd eval, for the card's figures and grid", metavar="FILE")
    dry_run: bool = _hub(False, "Show what would be uploaded, and the card", flags=("--dry-run",))
    seed: int = _run(0, "Seed of the noise with which file and student are compared")
    # fmt: on

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant together."""
        super().__post_init__()
        if self.push_to is None and (self.public or self.dry_run or self.results):
            raise UsageError("--public, --dry-run and --results go with --push-to")
        if self.push_to is not None and (self.output or self.everything or self.format):
            raise UsageError("--push-to: uploads the model folder; leave out --output, --format and --all")
        if self.everything and (self.format or self.opset or self.noise_inside or self.dtype != "fp32"):
            raise UsageError(
                "--all: writes every format and dtype; leave out --format, --dtype, --opset, --noise-inside"
            )

    def files(self) -> list["ExportConfig"]:
        """Return the record of each file: format and name told by one another, or, with `everything`, all there are.

        Raises:
            UsageError: settings do not go together, or a file exists.
        """
        if self.everything:
            folder, name = self.output or Path("exported"), short_name(self.student)
            one = replace(self, everything=False)
            return [
                replace(one, output=folder / f"{name}-{dtype}{row.suffix}", format=format, dtype=dtype)._checked()
                for format, row in FORMATS.items()
                if format != "web"
                for dtype in row.dtypes
            ]
        by_name = [
            name for name, row in FORMATS.items() if self.output is not None and self.output.suffix == row.suffix
        ]
        format = self.format or (by_name[0] if by_name else "safetensors")
        output = self.output or Path(f"{short_name(self.student)}-{self.dtype}{FORMATS[format].suffix}")
        return [replace(self, output=output, format=format)._checked()]

    @property
    def path(self) -> Path:
        """The file, of a record that `files` returned."""
        return self.output or Path()

    def _checked(self) -> "ExportConfig":
        suffix, dtypes, _ = FORMATS[str(self.format)]
        output = self.path
        if self.dtype not in dtypes:
            raise UsageError(f"--dtype {self.dtype}: is not one of {', '.join(dtypes)}, which {self.format} has")
        if output.suffix != suffix:
            raise UsageError(f"--output {output}: expected a name that ends in {suffix} for {self.format}")
        if self.opset is not None and self.format not in ("onnx", "web"):
            raise UsageError(f"--opset {self.opset}: {self.format} has none; add --format onnx")
        if self.noise_inside and self.format not in ("onnx", "torch-export"):
            raise UsageError(f"--noise-inside: {self.format} has no noise inside; add --format onnx or torch-export")
        if reason := unwritable(output):
            raise IbmdError(f"--output {output}: {reason}")
        if output.exists() and self.on_exists != "overwrite":
            raise UsageError(f"{output}: exists; give another --output, or --on-exists overwrite")
        return self


def short_name(reference: str) -> str:
    """Return what files of a student are called: NAME of builtin:NAME, or the last part of a path."""
    return Path(reference.rpartition(":")[2]).name
