"""Settings of `ibmd export`, and the formats that there are. Nothing heavy is imported here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import unwritable
from ibmd_cli.settings import Record, setting

STUDENT = "builtin:outline2emoji"


Say = Callable[[str], None]


class Format(NamedTuple):
    """A row of `FORMATS`, which is all that a file format needs.

    Attributes:
        suffix: ending of its names.
        dtypes: that its weights may have.
        steps: until it is there.
        write: write(exporter, config, file, say); the file is run back and compared (`exporter.compare`).
        run: run(file) → a function of inputs by name that returns the outputs; None: by the file's ending.
        options: of "opset" and "noise_inside", those that it has.
        pack: pack(student, file, page): what the file that was compared is made into, an ONNX file; None: nothing.
        use: how the output is used.
    """

    suffix: str
    dtypes: tuple[str, ...]
    steps: int
    write: Callable[[Any, "ExportConfig", Path, Say], None]
    run: Callable[[Path], Callable[[dict[str, Any]], list[Any]]] | None = None
    options: tuple[str, ...] = ()
    pack: Callable[[Any, Path, Path], None] | None = None
    use: str = "ibmd sample --student {output} --input IMAGE"


def _write_safetensors(exporter: Any, config: "ExportConfig", file: Path, say: Say) -> None:
    from ibmd_cli.models.folder import save_weights
    from ibmd_cli.models.interface import describe_student

    say("writing")
    save_weights(exporter.student, file, config.dtype, describe_student(exporter.student))


def _write_program(exporter: Any, config: "ExportConfig", file: Path, say: Say) -> None:
    from ibmd_cli.export.torch_export import export_program

    export_program(exporter.student, file, config.dtype, config.noise_inside, say)


def _write_onnx(exporter: Any, config: "ExportConfig", file: Path, say: Say) -> None:
    from ibmd_cli.export import onnx

    opset = onnx.OPSET if config.opset is None else config.opset
    if opset not in onnx.OPSETS:
        raise UsageError(f"--opset {opset}: expected {onnx.OPSETS[0]} to {onnx.OPSETS[-1]}")
    key = opset, config.noise_inside
    if key not in exporter.graphs:
        exporter.graphs[key] = onnx.make_graph(exporter.student, *key, say)
    say("writing")
    onnx.save_graph(exporter.graphs[key], file, config.dtype)


def _pack_page(student: Any, file: Path, page: Path) -> None:
    from ibmd_cli.export.demo_page import write_demo_page

    write_demo_page(student, file, page)


FORMATS = {
    "safetensors": Format(".safetensors", ("fp32", "fp16", "bf16"), 2, _write_safetensors),
    "onnx": Format(
        ".onnx", ("fp32", "fp16", "bf16", "int8"), 5, _write_onnx, options=("opset", "noise_inside")
    ),
    "torch-export": Format(".pt2", ("fp32", "fp16", "bf16"), 3, _write_program, options=("noise_inside",)),
    "web": Format(
        ".html", ("fp32", "fp16", "int8"), 6, _write_onnx,
        options=("opset",), pack=_pack_page, use="open {output} in a browser",
    ),
}  # fmt: skip
"""`web` is a page that holds the student as ONNX."""


_file, _hub, _run = (partial(setting, panel=panel) for panel in ("File", "Hub", "Run"))


@dataclass(frozen=True)
class ExportConfig(Record):
    """What is to be exported. `files` tells which files that is; each is exported with a record of its own."""

    # fmt: off
    student: str = _file(STUDENT, "builtin:NAME, a model folder or a run folder", metavar="REF",
        also=("model", "checkpoint", "run"))
    format: str | None = _file(None, "safetensors, onnx, torch-export (.pt2) or web (.html: a page to draw on)",
        shown="by the output's name, or safetensors", choices=FORMATS, also=("to", "type"))
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
                if row.pack is None
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
        row = FORMATS[str(self.format)]
        suffix, dtypes = row.suffix, row.dtypes
        output = self.path
        if self.dtype not in dtypes:
            raise UsageError(f"--dtype {self.dtype}: is not one of {', '.join(dtypes)}, which {self.format} has")
        if output.suffix != suffix:
            raise UsageError(f"--output {output}: expected a name that ends in {suffix} for {self.format}")
        if self.opset is not None and "opset" not in row.options:
            raise UsageError(f"--opset {self.opset}: {self.format} has none; add --format onnx")
        if self.noise_inside and "noise_inside" not in row.options:
            raise UsageError(f"--noise-inside: {self.format} has no noise inside; add --format onnx or torch-export")
        if reason := unwritable(output):
            raise IbmdError(f"--output {output}: {reason}")
        if output.exists() and self.on_exists != "overwrite":
            raise UsageError(f"{output}: exists; give another --output, or --on-exists overwrite")
        return self


def short_name(reference: str) -> str:
    """Return what files of a student are called: NAME of builtin:NAME, or the last part of a path."""
    return Path(reference.rpartition(":")[2]).name
