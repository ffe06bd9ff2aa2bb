"""Read inputs for `ibmd sample`, each with its mask and its class, ready for the model."""

import io
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from PIL import Image

from ibmd_cli.data.labels import label_of, read_labels
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import why
from ibmd_cli.images.decode import Picture, decode, read_picture, shown
from ibmd_cli.images.grids import thumbnail
from ibmd_cli.sampling.claims import Claims
from ibmd_cli.sampling.plan import Job, SampleConfig, Source
from ibmd_cli.sampling.translator import Piece, Translator


@dataclass
class Read:
    """An input that was read, or why it was not.

    Attributes:
        source: where it is.
        jobs: the pictures to make of it.
        skipped: those that another process is making or has made.
        piece: it, fitted for the model; None if it was not read.
        error: why not.
        several: whether there are more frames or pages.
        dpi: see `decoding.Picture`.
        credits: see `decoding.Picture`.
        thumbnail: for the contact sheet, if there is to be one.
        seconds: spent on it.
    """

    source: Source
    jobs: list[Job]
    skipped: list[Job] = field(default_factory=list)
    piece: Piece | None = None
    error: IbmdError | None = None
    several: bool = False
    dpi: tuple[float, float] | None = None
    credits: dict[int, str] = field(default_factory=dict)
    thumbnail: Image.Image | None = None
    seconds: float = 0.0


class Inputs:
    """Reads an input with all that belongs to it, and fits it for the model."""

    def __init__(self, config: SampleConfig, translator: Translator) -> None:
        self.config, self.translator = config, translator
        self.label = _labels(config.label)
        self.mask = config.mask
        if config.degrade == "inpaint-center" and translator.fill and self.mask is None:
            self.mask = "center"
        for option, given, needed in (
            ("--label N, or --label FILE.csv,", config.label, translator.classes),
            ("--mask FILE, --mask FOLDER or --mask center,", self.mask, translator.fill),
        ):
            if needed and given is None:
                raise UsageError(f"{translator.engine.name}: takes {option} beside the image")
            if given is not None and not needed:
                raise UsageError(f"{translator.engine.name}: takes no {option.split()[0]}; leave it out")
        if self.mask not in (None, "center") and not os.path.exists(str(self.mask)):
            raise UsageError(f"--mask {shown(str(self.mask))}: no such file or folder")

    def read(self, group: tuple[Source, list[Job]], claims: Claims) -> Read:
        """Read one input for its jobs, without those that another process is doing or has done."""
        began = time.monotonic()
        source, jobs = group
        read = Read(source, jobs)
        try:
            if self.config.on_exists == "skip":
                read.jobs = [job for job in jobs if job.output is None or _claim(claims, job.output)]
                read.skipped = [job for job in jobs if job not in read.jobs]
            if read.jobs:
                picture = self._picture(source.path)
                read.several, read.dpi, read.credits = picture.several, picture.dpi, picture.credits
                read.thumbnail = thumbnail(picture.rgb) if self.config.grid else None
                mask, label = self._mask(source, picture), self._label(source)
                read.piece = self.translator.prepare(picture, PurePath(source.name).name, mask, label)
        except IbmdError as error:
            read.error = error
            for job in read.jobs:
                if job.output is not None:
                    claims.give_back(job.output)
        read.seconds = time.monotonic() - began
        return read

    def _picture(self, path: Path | None) -> Picture:
        limit, alpha = self.config.max_pixels, self.config.alpha
        if path is not None:
            return read_picture(path, limit, alpha)
        most = 8 * limit  # bytes: four channels of 16 bits
        content = sys.stdin.buffer.read(most + 1)
        if len(content) > most:
            raise IbmdError(f"stdin: more than {most:,} bytes: make the image smaller or raise --max-pixels")
        return decode(io.BytesIO(content), "stdin", limit, alpha)

    def _label(self, source: Source) -> int | None:
        if isinstance(self.label, dict):
            return label_of(self.label, str(source), source.name, str(self.config.label))
        return self.label

    def _mask(self, source: Source, picture: Picture) -> Image.Image | None:
        if self.mask is None:
            return None
        width, height = picture.rgb.size
        if self.mask == "center":
            mask = Image.new("1", (width, height))
            mask.paste(1, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
            return mask
        file = Path(self.mask)
        if file.is_dir():
            name = PurePath(source.name)
            alike = [file / name, *(file / name.with_suffix(suffix) for suffix in (".png", ".webp", ".tif", ".bmp"))]
            found = [path for path in alike if path.is_file()]
            if not found:
                raise IbmdError(f"{shown(source.name)}: no mask of that name in {shown(file)}")
            file = found[0]
        grey = read_picture(file, self.config.max_pixels, "drop").rgb.convert("L")
        return grey.point(lambda value: 255 * (value > 127), "1")


def _claim(claims: Claims, output: Path) -> bool:
    try:
        return claims.take(output)
    except OSError as error:
        raise IbmdError(f"{shown(output)}: cannot be written {why(error)}") from error


def _labels(label: str | None) -> int | dict[str, int] | None:
    """Read `--label`: a class, or a CSV file with lines PATH,CLASS."""
    if label is None or label.lstrip("-").isdigit():
        return None if label is None else int(label)
    return read_labels(label, "--label")
