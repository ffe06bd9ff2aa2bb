"""Read inputs for `ibmd sample`, each with its mask and its class, ready for the model."""

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import TracebackType

from PIL import Image

from ibmd_cli.decoding import Picture, decode, own_limits, read_picture, shown
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.jobs import Job, SampleConfig, Source
from ibmd_cli.labels import label_of, read_labels
from ibmd_cli.sheets import thumbnail
from ibmd_cli.translating import Piece, Translator


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
                raise UsageError(f"{translator.name}: takes {option} beside the image")
            if given is not None and not needed:
                raise UsageError(f"{translator.name}: takes no {option.split()[0]}; leave it out")
        if self.mask not in (None, "center") and not os.path.exists(str(self.mask)):
            raise UsageError(f"--mask {shown(str(self.mask))}: no such file or folder")

    def read(self, read: Read) -> None:
        """Read an input, unless it has an error or no jobs."""
        began = time.monotonic()
        if read.jobs and read.error is None:
            try:
                picture = self._picture(read.source.path)
                read.several, read.dpi, read.credits = picture.several, picture.dpi, picture.credits
                read.thumbnail = thumbnail(picture.rgb) if self.config.grid else None
                mask, label = self._mask(read.source, picture), self._label(read.source)
                read.piece = self.translator.prepare(picture, PurePath(read.source.name).name, mask, label)
            except IbmdError as error:
                read.error = error
        read.seconds = time.monotonic() - began

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


class Reader:
    """Reads inputs in a process of its own, so that the network need not wait for Python's lock.

    It starts at once, beside the loading of the model; `take` tells it how to read.
    """

    def __init__(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin)
        self.pool.submit(int)

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.pool.shutdown(cancel_futures=True)

    def take(self, inputs: Inputs) -> None:
        """Have inputs read by these settings."""
        self.pool.submit(_take, inputs)

    def read(self, reads: list[Read]) -> list[Read]:
        """Read inputs, see `Inputs.read`.

        Raises:
            IbmdError: the process has ended.
        """
        try:
            return self.pool.submit(_read, reads).result()
        except BrokenProcessPool as error:
            raise IbmdError("the process that reads images was ended: run again with --on-exists skip") from error


# What follows runs in that process.


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent answers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    own_limits().__enter__()


def _end_with_parent() -> None:
    """Wait for the end of the parent: after a SIGKILL, nothing else tells."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _take(inputs: Inputs) -> None:
    global _inputs
    _inputs = inputs


def _read(reads: list[Read]) -> list[Read]:
    for read in reads:
        _inputs.read(read)
    return reads


_inputs: Inputs


def _labels(label: str | None) -> int | dict[str, int] | None:
    """Read `--label`: a class, or a CSV file with lines PATH,CLASS."""
    if label is None or label.lstrip("-").isdigit():
        return None if label is None else int(label)
    return read_labels(label, "--label")
