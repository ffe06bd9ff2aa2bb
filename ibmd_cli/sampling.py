"""Translate image files: read, translate and write them batch by batch, and report on each.

Every picture has noise of its own, a stream named by seed, name and variant; and on a CPU the network always takes
the same number of images at once. So a picture depends neither on its batch nor on the order of the inputs.
"""

import errno
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ibmd_cli.devices import resolve_device
from ibmd_cli.distillation import Sources
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import atomic_file
from ibmd_cli.images import Geometry, decode, encode, fit, own_limits, read_image, shown, to_image, unfit
from ibmd_cli.jobs import Job, SampleConfig, make_plan
from ibmd_cli.models import Student, Teacher, load_model
from ibmd_cli.noise import stream
from ibmd_cli.reporting import Meter, Reporter

STUDENT = "builtin:outline2emoji"
CPU_BATCH_PIXELS = 8 * 32 * 32  # fills a core with small images; large ones go one by one


def sample(config: SampleConfig, reporter: Reporter) -> int:
    """Translate images.

    stdout gets the path of each output as it is finished (or JSON lines, or image bytes), stderr the failures.

    Returns:
        Exit code: 0, or 3 if some inputs failed.

    Raises:
        UsageError: inputs, outputs and settings do not go together; nothing was done.
        NotAvailable: there is no such model.
        IbmdError: an output exists (nothing was done), or the first failure with `fail_fast`.
    """
    plan = make_plan(config)
    results = _Results(config, reporter)
    for text, problem in plan.problems:
        results.fail(text, [], problem)
    for job in plan.skipped:
        results.skip(job)
    try:
        if plan.jobs:
            _work(plan.jobs, config, results)
    except KeyboardInterrupt:
        reporter.warn(f"interrupted: {results.summary()}; the same command with --on-exists skip does the rest")
        raise
    reporter.note(results.summary())
    return 3 if results.failed else 0


class _Piece(NamedTuple):
    """A job with its image, (3, H, W), and the seconds spent on it."""

    job: Job
    x_T: Tensor
    geometry: Geometry
    seconds: float


def _work(jobs: Sequence[Job], config: SampleConfig, results: "_Results") -> None:
    device = resolve_device(config.device)
    model, nfe = _load(config)
    model.to(device)
    side, fixed = model.image_size, device.type == "cpu"
    size = max(1, CPU_BATCH_PIXELS // side**2) if fixed else config.batch_size
    results.reporter.note(
        f"{config.teacher or config.student or STUDENT} on {device}: {nfe} network call{'s' * (nfe > 1)} an image, "
        f"{'results in the size of their inputs' if config.restore_size else f'results of {side}×{side} pixels'}"
    )
    several = len(jobs) > 1
    progress = results.reporter.progress("sample", len(jobs), "images") if several else nullcontext(Meter())
    with own_limits(), progress as results.meter:
        pieces = _read(jobs, config, side, results)
        while group := list(islice(pieces, size)):
            began = time.monotonic()
            x_0 = _translate(model, nfe, group, config.seed, size if fixed else len(group))
            seconds = (time.monotonic() - began) / len(group)
            for piece, image in zip(group, x_0, strict=True):
                _write(piece._replace(seconds=piece.seconds + seconds), image, config, results)


def _load(config: SampleConfig) -> tuple[Student | Teacher, int]:
    """Load the model that translates, and find how many network calls it makes for an image."""
    if config.teacher is not None:
        model = load_model(config.teacher, "teacher")
        nfe = config.nfe or int(model.config["sampling"]["nfe"])
    else:
        model = load_model(config.student or STUDENT, "student")
        nfe = len(model.config["sampling"]["timesteps"])
        if config.nfe not in (None, nfe):
            raise UsageError(f"--nfe {config.nfe}: {model.name} was distilled for {nfe}; leave --nfe out")
    for needs in ("classes", "mask"):
        if model.config.get(needs):
            raise IbmdError(f"{model.name}: takes {needs} beside the image, which this version of sample cannot give")
    return model, nfe


def _read(jobs: Sequence[Job], config: SampleConfig, side: int, results: "_Results") -> Iterator[_Piece]:
    for source, group in groupby(jobs, key=lambda job: job.source):
        began, variants = time.monotonic(), list(group)
        try:
            image = read_image(source.path, config.max_pixels) if source.path else _read_stdin(config.max_pixels)
        except IbmdError as error:
            results.fail(str(source), variants, error)
            continue
        x_T, geometry = fit(image, side, config.fit)
        seconds = (time.monotonic() - began) / len(variants)
        yield from (_Piece(job, x_T, geometry, seconds) for job in variants)


def _read_stdin(max_pixels: int) -> Image.Image:
    limit = 8 * max_pixels  # bytes: four channels of 16 bits
    content = sys.stdin.buffer.read(limit + 1)
    if len(content) > limit:
        raise IbmdError(f"stdin: more than {limit:,} bytes: make the image smaller or raise --max-pixels")
    return decode(io.BytesIO(content), "stdin", max_pixels)


def _translate(model: Student | Teacher, nfe: int, pieces: Sequence[_Piece], seed: int, size: int) -> Tensor:
    """Run the network on `size` images, the last one repeated if there are fewer; returns (len(pieces), 3, H, W).

    The kernels that PyTorch chooses depend on the size of the batch, and their last bits differ.
    """
    missing = size - len(pieces)
    x_T = torch.stack([piece.x_T for piece in pieces] + [pieces[-1].x_T] * missing)
    rng = [stream(seed, piece.job.source.name, piece.job.variant) for piece in pieces]
    rng += [torch.Generator() for _ in range(missing)]
    batch = Sources(x_T.to(next(model.predictor.parameters()).device))
    x_0 = model.translate(batch, rng, nfe) if isinstance(model, Teacher) else model.translate(batch, rng)
    return x_0[: len(pieces)].cpu()


def _write(piece: _Piece, x_0: Tensor, config: SampleConfig, results: "_Results") -> None:
    began, output = time.monotonic(), piece.job.output
    image = to_image(x_0)
    if config.restore_size:
        image = unfit(image, piece.geometry)
    try:
        _put(encode(image, output.suffix if output else ".png"), output)
    except IbmdError as error:
        results.fail(str(piece.job.source), [piece.job], error)
    else:
        results.finish(piece.job, image.size, piece.seconds + time.monotonic() - began)


def _put(data: bytes, output: Path | None) -> None:
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        with atomic_file(output) as new:
            new.write_bytes(data)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # no other file can be written either
            error.filename = shown(output)
            raise
        raise IbmdError(f"{shown(output)}: cannot be written ({error.strerror})") from error


class _Results:
    """What became of each picture: counts, a line on stdout if it is there, a line on stderr if it failed."""

    def __init__(self, config: SampleConfig, reporter: Reporter) -> None:
        self.config, self.reporter, self.meter = config, reporter, Meter()
        self.done = self.skipped = self.failed = 0

    def summary(self) -> str:
        return f"{self.done} done, {self.skipped} skipped, {self.failed} failed"

    def finish(self, job: Job, size: tuple[int, int], seconds: float) -> None:
        self.done += 1
        self.meter.advance()
        if self.config.as_json:
            self._json("done", str(job.source), job.output, width=size[0], height=size[1], seconds=round(seconds, 4))
        elif job.output is not None:
            _print(str(job.output))

    def skip(self, job: Job) -> None:
        self.skipped += 1
        if self.config.as_json:
            self._json("skipped", str(job.source), job.output)

    def fail(self, source: str, jobs: Sequence[Job], error: IbmdError) -> None:
        """Count the pictures that an input would have become; one, if it has no jobs because it is not there."""
        self.failed += len(jobs) or 1
        self.meter.advance(len(jobs))
        if self.config.as_json:
            for output in [job.output for job in jobs] or [None]:
                self._json("failed", source, output, error=str(error))
        if self.config.fail_fast:
            raise error
        self.reporter.error(str(error))

    def _json(self, status: str, source: str, output: Path | None, **known: Any) -> None:
        line = {"schema": 1, "status": status, "input": source, "output": None if output is None else str(output)}
        line |= {"width": None, "height": None, "seconds": None, "seed": self.config.seed, "error": None}
        _print(json.dumps(line | known))


def _print(line: str) -> None:
    """Write a line to stdout: on a terminal, readably and above the progress bar; elsewhere, the very bytes."""
    if sys.stdout.isatty():
        sys.stdout.write(shown(line) + "\n")
    else:
        sys.stdout.buffer.write(os.fsencode(line) + b"\n")
    sys.stdout.flush()
