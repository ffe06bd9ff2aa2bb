"""Read inputs for `ibmd sample`, each with its mask and its class, ready for the model."""

import io
import os
import sys
import time
from dataclasses import replace
from functools import reduce
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageChops

from ibmd_cli.data.labels import label_of, read_labels
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import is_stream, why
from ibmd_cli.images.decode import Picture, decode, read_picture, shown
from ibmd_cli.images.grids import thumbnail
from ibmd_cli.locks import Claims
from ibmd_cli.sampling.config import SampleConfig
from ibmd_cli.sampling.plan import Job
from ibmd_cli.sampling.translator import Translator


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

    def read(self, jobs: list[Job], claims: Claims) -> list[Job]:
        """Read the input of some jobs, which is one, and return them ready for the model, skipped, or failed."""
        began = time.monotonic()
        skipped: list[Job] = []
        try:
            if self.config.on_exists == "skip":
                skipped = [job for job in jobs if job.output is not None and not _claim(claims, job.output)]
            wanted = [job for job in jobs if job not in skipped]
            ready = self._prepare(wanted) if wanted else []
        except IbmdError as error:
            ready = [job for job in jobs if job not in skipped]
            for job in ready:
                job.error = error
                if job.output is not None:
                    claims.give_back(job.output)
        for job in skipped:
            job.skipped = True
        for job in ready:
            job.seconds = (time.monotonic() - began) / len(ready)
        return skipped + ready

    def _prepare(self, jobs: list[Job]) -> list[Job]:
        """Read and fit an input; its variants share the pixels, which the jobs of the plan never hold."""
        first = jobs[0]
        picture = self._picture(first.source)
        read = replace(first, size=picture.rgb.size, notes=picture.notes, dpi=picture.dpi)
        read.unlike = unlike(picture.rgb) if self.translator.draws else ""
        if self.config.metadata == "keep":
            read.metadata = picture.metadata
        read.before = thumbnail(picture.rgb) if self.config.grid else None
        self.translator.prepare(picture, read, self._mask(first, picture), self._label(first))
        return [replace(read, variant=job.variant, output=job.output) for job in jobs]

    def _picture(self, path: Path | None) -> Picture:
        limit, alpha = self.config.max_pixels, self.config.alpha
        if path is not None:
            return read_picture(path, limit, alpha)
        most = 8 * limit  # bytes: four channels of 16 bits
        content = sys.stdin.buffer.read(most + 1)
        if len(content) > most:
            raise IbmdError(f"stdin: more than {most:,} bytes: make the image smaller or raise --max-pixels")
        return decode(io.BytesIO(content), "stdin", limit, alpha)

    def _label(self, job: Job) -> int | None:
        if isinstance(self.label, dict):
            return label_of(self.label, job.path, job.place, str(self.config.label))
        return self.label

    def _mask(self, job: Job, picture: Picture) -> Image.Image | None:
        if self.mask is None:
            return None
        width, height = picture.rgb.size
        if self.mask == "center":
            mask = Image.new("1", (width, height))
            mask.paste(1, (width // 4, height // 4, 3 * width // 4, 3 * height // 4))
            return mask
        file = Path(self.mask)
        if file.is_dir():
            name = PurePath(job.place)
            alike = [file / name, *(file / name.with_suffix(suffix) for suffix in (".png", ".webp", ".tif", ".bmp"))]
            found = [path for path in alike if path.is_file()]
            if not found:
                raise IbmdError(f"{shown(job.place)}: no mask of that name in {shown(file)}")
            file = found[0]
        grey = read_picture(file, self.config.max_pixels, "drop").rgb.convert("L")
        return grey.point(lambda value: 255 * (value > 127), "1")


def _claim(claims: Claims, output: Path) -> bool:
    try:
        return is_stream(output) or claims.take(output)
    except OSError as error:
        raise IbmdError(f"{shown(output)}: cannot be written {why(error)}") from error


def _labels(label: str | None) -> int | dict[str, int] | None:
    """Read `--label`: a class, or a CSV file with lines PATH,CLASS."""
    if label is None or label.lstrip("-").isdigit():
        return None if label is None else int(label)
    return read_labels(label, "--label")


def unlike(image: Image.Image) -> str:
    """Say what an image is that is no drawing of dark lines on light paper; nothing if it is one.

    The noise of paper vanishes where an image is reduced to little, but so do hatching and fine lines: what looks wrong
    there is looked at again, larger.
    """
    if not (kind := _kind(image.resize((64, 64), Image.Resampling.BOX), contrast=16)):
        return ""
    larger = _kind(image.reduce(max(1, max(image.size) // 1024)), contrast=96)
    return kind if larger == "empty" else larger


def _kind(image: Image.Image, contrast: int) -> str:
    """Return what the shares of dark, light and coloured pixels say of an image, see `unlike`."""
    up_to = np.cumsum(image.convert("L").histogram()) / (image.width * image.height)  # share of pixels, by grey
    dark, light, paper = up_to[95], 1 - up_to[160], 1 - up_to[192]
    if np.diff(np.searchsorted(up_to, (1e-4, 1 - 1e-4))) < contrast:
        return "empty"
    if dark > 0.5 and light < 0.4:
        return "light on dark" if dark > 0.6 and light > 0.25 * (1 - dark - light) else "photo"
    most, least = (reduce(choose, image.split()) for choose in (ImageChops.lighter, ImageChops.darker))
    vivid = sum(ImageChops.subtract(most, least).histogram()[33:]) > 0.5 * image.width * image.height
    return "photo" if paper < 0.4 or vivid else ""
