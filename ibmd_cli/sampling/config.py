"""Settings of `ibmd sample`. Nothing heavy is imported here."""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import TextIO

from ibmd_cli.errors import UsageError
from ibmd_cli.files import is_stream
from ibmd_cli.settings import Record, setting

STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
STUDENT = "builtin:outline2emoji"
_input, _output, _model, _size, _run = (
    partial(setting, panel=panel) for panel in ("Inputs", "Outputs", "Model", "Size and transparency", "Run")
)


@dataclass(frozen=True)
class SampleConfig(Record):
    """What `ibmd sample` is asked for."""

    # fmt: off
    inputs: tuple[str, ...] = _input((), "File, folder or glob (repeatable); - for an image on stdin",
        flags=("--input", "-i", "PATH"), metavar="PATH", also=("data", "image", "images", "source", "in"))
    files_from: str | None = _input(None, "File with a list of paths, one a line; - for stdin", metavar="FILE")
    null: bool = _input(False, "Paths in that list end in NUL, not in a new line", flags=("--null", "-0"))
    recursive: bool = _input(False, "Search folders in folders, too", flags=("--recursive", "-r"))
    max_pixels: int = _input(100_000_000, "Refuse images of more pixels", at_least=1)
    degrade: str | None = _input(None, "Inputs are clean: degrade them first, e.g. jpeg-10")
    mask: str | None = _input(None, "Hole (white) to fill in: a file, a folder of files, or center", metavar="PATH",
        also=("masks",))
    label: str | None = _input(None, "Class, or a CSV file of PATH,CLASS, for models with classes", metavar="N|FILE",
        also=("labels", "class"))
    output: str | None = _output(None, "File, folder, or - for image bytes on stdout", flags=("--output", "-o"),
        metavar="PATH", shown="NAME.ibmd.png beside the input", also=("out", "out-dir", "output-dir", "to"))
    on_exists: str = _output("error",
        "If an output exists: error, skip (continues an interrupted run) or overwrite (mode and links to it stay)",
        metavar="DO", choices=("error", "skip", "overwrite"), also=("overwrite", "skip", "force", "exist-ok"))
    keep_suffix: bool = _output(False, "Keep another ending of an input in its output's name: photo.avif.png",
        flags=("--keep-suffix",), also=("keep-extension", "keep-ext"))
    metadata: str = _output("keep",
        "Metadata of the input: keep camera, time, copyright, XMP and profile (never place, thumbnail, orientation), "
        "or drop", metavar="DO", choices=("keep", "drop"), also=("exif", "strip", "keep-metadata", "no-metadata"))
    variants: int = _output(1, "Pictures of each input: NAME.ibmd.1.png, ...", at_least=1,
        also=("n", "num-samples", "samples", "count"))
    grid: str | None = _output(None, "Contact sheet of inputs and results", metavar="FILE", also=("sheet",))
    format: str | None = _output(None, "png, jpg, webp, tiff, bmp or avif", shown="by the output's name, or png",
        also=("ext", "extension"))
    quality: int | None = _output(None, "1 to 100, for jpg, webp and avif", at_least=1, at_most=100,
        shown="95 for jpg, lossless webp, 90 for avif")
    as_json: bool = _output(False, "Print a line of JSON for each picture", flags=("--json",))
    print0: bool = _output(False, "End the paths on stdout in NUL, for xargs -0", flags=("--print0",))
    student: str | None = _model(None,
        "builtin:NAME, hf://OWNER/REPO, a model folder, a run folder, or a file that ibmd export wrote", metavar="REF",
        shown=STUDENT, also=("model", "checkpoint", "run"))
    teacher: str | None = _model(None, "Translate with this teacher instead, to compare", metavar="REF")
    preset: str | None = _model(None, "The published teacher that the file of --teacher is", metavar="ALIAS")
    head_channels: int | None = _model(None, "Channels per attention head", at_least=1, shown="as the family")
    attention_order: str | None = _model(None, "Order of a file's attention: new or legacy", choices=("new", "legacy"),
        shown="as the family")
    sampler: str | None = _model(None, "Sampler of the teacher: ddbm, dbim or i2sb", shown="the teacher's own")
    sampler_options: tuple[str, ...] = _model((), "Option of the sampler, e.g. eta=0 (repeatable)",
        flags=("--sampler-option",), metavar="KEY=VALUE")
    nfe: int | None = _model(None, "Network calls per image", at_least=1, shown="the model's",
        also=("steps", "num-steps", "calls"))
    seed: int = _model(0, "Seed of all randomness: another seed, another picture")
    fit: str = _size("pad",
        "Bring inputs to the model's square: pad, stretch, crop, or tile (many squares, for restoration)",
        metavar="HOW", choices=("pad", "stretch", "crop", "tile"), also=("resize", "tile", "crop", "pad"))
    restore_size: bool = _size(False, "Give results the size of their inputs, not the model's",
        also=("size", "width", "height", "resolution", "scale", "keep-size", "original-size"))
    alpha: str = _size("white", "Transparency: lay on white, keep, or drop", metavar="HOW",
        choices=("white", "keep", "drop"), also=("transparency",))
    batch_size: int = _run(16, "Images at a time on a GPU", at_least=1, also=("batch", "bs", "b"))
    device: str = _run("auto", "auto, cpu, cuda, cuda:N or mps", also=("gpu", "cuda", "cpu"))
    fail_fast: bool = _run(False, "Stop at the first image that fails", flags=("--fail-fast",))
    # fmt: on

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant together."""
        super().__post_init__()
        if not self.inputs and self.files_from is None:
            raise UsageError("no input: give files, folders or globs, or - for an image on stdin: --input drawing.png")
        for flag, given in (("--input", self.inputs), ("--output", [self.output]), ("--grid", [self.grid])):
            if "" in given:
                raise UsageError(f"{flag}: is empty, like an unset variable; give a path, or . for this folder")
        if "-" in self.inputs and self.files_from == "-":
            raise UsageError("--input - and --files-from -: stdin is an image or a list; give the list as a file")
        if "-" in self.inputs and (kind := _no_pipe(sys.stdin)):
            raise UsageError(f"--input -: stdin is {kind}; pipe an image in: ibmd sample --input - < drawing.png")
        if self.files_from == "-" and (kind := _no_pipe(sys.stdin)):
            raise UsageError(f"--files-from -: stdin is {kind}; pipe paths in: find . -print0 | ibmd sample …")
        if self.null and self.files_from is None:
            raise UsageError("--null: says how the list of --files-from is separated; for paths on stdout: --print0")
        if self.student is not None and self.teacher is not None:
            raise UsageError("--student and --teacher: only one of them translates; run the command once for each")
        for option in ("preset", "head_channels", "attention_order", "sampler", "sampler_options"):
            if getattr(self, option) and self.teacher is None:
                flag = option.replace("_", "-").replace("options", "option")
                raise UsageError(f"--{flag}: is for a teacher; give --teacher, too")
        if self.to_stdout and self.as_json:
            raise UsageError("--json: image bytes already go to stdout; give --output FILE")
        if self.print0 and self.as_json:
            raise UsageError("--print0: ends paths in NUL, and --json prints none; leave one of them out")
        if self.to_stdout and (kind := _no_pipe(sys.stdout)):
            raise UsageError(f"stdout is {kind}: expected a file for the image bytes; give --output FILE")
        self._check_format()

    def _check_format(self) -> None:
        from PIL import Image

        from ibmd_cli.images.decode import shown
        from ibmd_cli.images.encode import LOSSY, OPAQUE, WRITABLE

        known = ", ".join(suffix[1:] for suffix in WRITABLE)
        if self.format is not None and f".{self.format}" not in WRITABLE:
            raise UsageError(f"--format {self.format}: expected one of {known}")
        if self.output is not None and not self.to_stdout and not is_folder(self.output):
            ending = PurePath(self.output).suffix
            if (
                self.format
                and not is_stream(self.output)
                and WRITABLE.get(ending.lower()) != WRITABLE[f".{self.format}"]
            ):
                raise UsageError(f"--output {shown(self.output)}: ends in {ending}, but --format is {self.format}")
        if self.suffix not in WRITABLE:
            return  # told with the inputs in view
        form = WRITABLE[self.suffix][0]
        Image.init()
        if form not in Image.SAVE:
            raise UsageError(f"{form}: this Pillow cannot write it; choose another --format")
        if self.quality is not None and self.suffix not in LOSSY:
            raise UsageError(f"--quality {self.quality}: {form} has none; with --format {', '.join(LOSSY)} it has")
        if self.alpha == "keep" and self.suffix in OPAQUE:
            raise UsageError(f"--alpha keep: {form} holds no transparency; choose --format png or --alpha white")

    @property
    def suffix(self) -> str:
        """Ending of the outputs' names, in lower case."""
        if self.format is not None:
            return f".{self.format}"
        if self.output is None or self.to_stdout or is_folder(self.output):
            return ".png"
        return PurePath(self.output).suffix.lower() or ".png"  # streams need no ending

    @property
    def to_stdout(self) -> bool:
        """Whether image bytes go to stdout: asked for, or nothing was and the image comes from stdin."""
        return self.output in STDOUT or (self.output is None and "-" in self.inputs)


def _no_pipe(stream: TextIO | None) -> str:
    """Say why a stream can carry no bytes; nothing if it can."""
    return "closed" if stream is None else "a terminal" if stream.isatty() else ""


def is_folder(output: str) -> bool:
    """Tell whether the name of an output is meant as a folder's."""
    return (
        output.endswith(("/", os.sep))
        or os.path.isdir(output)
        or (not PurePath(output).suffix and not is_stream(output))
    )
