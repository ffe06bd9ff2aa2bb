"""Translate image files: read, translate and write them, all three at the same time, and report on each.

Threads read ahead of the network and write behind it, never more than a few batches, so memory does not grow with the
number of files. Results are reported in the order of the inputs.
"""

import errno
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ibmd_cli import __version__
from ibmd_cli.decoding import own_limits, shown
from ibmd_cli.devices import resolve_device
from ibmd_cli.encoding import SOFTWARE, encode
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import atomic_file
from ibmd_cli.jobs import Job, Plan, SampleConfig, make_plan
from ibmd_cli.models import Student, Teacher, load_model
from ibmd_cli.programs import ExportedModel
from ibmd_cli.reading import Inputs, Read
from ibmd_cli.reporting import Meter, Reporter
from ibmd_cli.runners import SUFFIXES, load_exported
from ibmd_cli.sharing import Claims, company, place
from ibmd_cli.sheets import Sheet
from ibmd_cli.teachers import load_teacher
from ibmd_cli.translating import Piece, Translator

STUDENT = "builtin:outline2emoji"
READERS, WRITERS = 4, 16  # threads; those that write mostly wait for the disk, and the disk serves many at once
In = TypeVar("In")
Out = TypeVar("Out")


def sample(config: SampleConfig, reporter: Reporter) -> int:
    """Translate images.

    stdout gets the path of each output as it is finished (or JSON lines, or image bytes), stderr the failures.
    Processes that were started together share the inputs; the first returns when the last is done.

    Returns:
        Exit code: 0, or 3 if some inputs failed.

    Raises:
        UsageError: inputs, outputs and settings do not go together; nothing was done.
        NotAvailable: there is no such model.
        IbmdError: an output exists (nothing was done), or the first failure with `fail_fast`.
    """
    process, processes = place()
    if processes > 1 and ("-" in (*config.inputs, config.files_from, config.output) or config.grid):
        raise UsageError("several processes: stdin, stdout and --grid are for one; give files, or start one")
    reporter.quiet = reporter.quiet or process > 0
    with company() as total:
        plan = make_plan(config, process, processes)
        total([0])  # nothing is written before every process has found its outputs free
        results = _Results(config, reporter)
        try:
            _work(plan, config, results)
        except KeyboardInterrupt:
            reporter.warn(f"interrupted: {results.summary()}; the same command with --on-exists skip does the rest")
            raise
        results.done, results.skipped, results.failed = total([results.done, results.skipped, results.failed])
    reporter.note(results.summary())
    return 3 if results.failed else 0


def _work(plan: Plan, config: SampleConfig, results: "_Results") -> None:
    for text, problem in plan.problems:
        results.fail(text, [], problem)
    for job in plan.skipped:
        results.skip(job)
    if not plan.jobs:
        return
    model = _load(config, results.reporter.quiet)
    translator = Translator(
        model,
        seed=config.seed,
        fit=config.fit,
        restore_size=config.restore_size,
        batch_size=config.batch_size,
        nfe=config.nfe,
        sampler=config.sampler,
        options=_options(config.sampler_options),
        degradation=config.degrade,
        warn=results.reporter.warn,
    )
    inputs = Inputs(config, translator)
    name = config.teacher or config.student or STUDENT
    results.reporter.note(
        f"{name} on {translator.device}: {translator.nfe} network call{'s' * (translator.nfe > 1)} an image, "
        f"{_size(config, translator)}"
    )
    several = len(plan.jobs) > 1
    progress = results.reporter.progress("sample", len(plan.jobs), "images") if several else nullcontext(Meter())
    sheet = Sheet(config.grid) if config.grid and not _keep(config.grid, config, results) else None
    ahead = 1 if config.fit == "tile" else translator.size + WRITERS  # whole images are large
    made_by = f"ibmd {__version__} {shown(name)} nfe={translator.nfe} seed={config.seed}"
    with own_limits(), Claims() as claims, progress as results.meter:
        outputs = _Outputs(config, translator, claims, sheet, made_by)
        with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(WRITERS) as writers:
            try:
                groups = [(source, list(jobs)) for source, jobs in groupby(plan.jobs, key=lambda job: job.source)]
                read = _ahead(readers, partial(inputs.read, claims=claims), groups, ahead)
                written = _ahead(writers, outputs.write, translator.run(_pieces(read, results)), ahead)
                for outcome in written:
                    results.finish(outcome)
            except BaseException:
                for pool in (readers, writers):
                    pool.shutdown(wait=False, cancel_futures=True)
                raise
        if sheet is not None and results.done:
            _put(sheet.encode(), Path(sheet.name))


def _ahead(pool: ThreadPoolExecutor, do: Callable[[In], Out], items: Iterable[In], ahead: int) -> Iterator[Out]:
    """Do something for each item in threads, at most `ahead` items before the one that is asked for."""
    waiting: deque[Future[Out]] = deque()
    for item in items:
        waiting.append(pool.submit(do, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ------------------------------------------------------------------------------------------------------- model


def _load(config: SampleConfig, quiet: bool) -> Student | Teacher | ExportedModel:
    device = resolve_device(config.device)
    if config.student is not None and config.student.endswith(SUFFIXES) and not config.student.startswith("hf://"):
        if config.device not in ("auto", "cpu"):
            raise UsageError(f"--device {config.device}: {shown(config.student)} runs on the CPU; leave --device out")
        return ExportedModel(load_exported(Path(config.student)))
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if config.teacher is not None:
        return load_teacher(config.teacher, preset=config.preset, device=device, quiet=quiet)
    student = load_model(config.student or STUDENT, "student")
    assert isinstance(student, Student)
    student.to(device)
    return student


def _options(texts: Sequence[str]) -> dict[str, Any]:
    """Read the options of a sampler: numbers and true or false by their spelling."""
    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise UsageError(f"--sampler-option {text!r}: expected KEY=VALUE, e.g. eta=0")
        try:
            options[key] = json.loads(value.lower() if value.lower() in ("true", "false") else value)
        except ValueError:
            options[key] = value
    return options


def _size(config: SampleConfig, translator: Translator) -> str:
    if config.restore_size:
        return "results in the size of their inputs"
    if config.fit == "tile":
        return f"results {translator.scale} times the size of their inputs"
    return f"results of {translator.side}×{translator.side} pixels"


def _pieces(read: Iterable[Read], results: "_Results") -> Iterator[Piece]:
    """Report inputs that cannot be translated, and yield a piece for each picture that is to be made of the others."""
    for one in read:
        for job in one.skipped:
            results.skip(job)
        if one.error is not None:
            results.fail(str(one.source), one.jobs, one.error)
        if one.several:
            results.say_once(f"{shown(str(one.source))}: several frames or pages: of such files the first one counts")
        if one.piece is not None:
            for task in one.tasks:  # which share the pixels
                yield replace(one.piece, variant=task.job.variant, task=task, seconds=one.seconds / len(one.tasks))


# ----------------------------------------------------------------------------------------------------- outputs


class _Outputs:
    """Writes translated pieces."""

    def __init__(
        self, config: SampleConfig, translator: Translator, claims: Claims, sheet: Sheet | None, made_by: str
    ) -> None:
        self.config, self.translator, self.claims, self.sheet, self.made_by = config, translator, claims, sheet, made_by

    def write(self, piece: Piece) -> "_Outcome":
        """Write a translated piece."""
        began, task, error, size = time.monotonic(), piece.task, None, (0, 0)
        assert piece.geometry is not None
        try:
            image = self.translator.finish(piece)
            size = image.size
            dpi = task.dpi if size == piece.geometry.size else None
            tags = task.credits | {SOFTWARE: f"{self.made_by} variant={piece.variant}"}
            _put(encode(image, self.config.suffix, self.config.quality, dpi, tags), task.job.output)
            if self.sheet is not None:
                self.sheet.add(task.job.source, task.job.source.name, piece.variant, task.thumbnail, image)
        except IbmdError as failure:
            error = failure
        finally:
            if task.job.output is not None:
                self.claims.give_back(task.job.output)
        return _Outcome(task.job, piece.geometry.size, size, piece.seconds + time.monotonic() - began, error)


class _Outcome(NamedTuple):
    """What became of a job: sizes (width, height) of input and output, and the reason if it failed."""

    job: Job
    before: tuple[int, int]
    after: tuple[int, int]
    seconds: float
    error: IbmdError | None


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


def _keep(grid: str, config: SampleConfig, results: "_Results") -> bool:
    """Tell whether the contact sheet exists and is to stay."""
    keep = config.on_exists == "skip" and os.path.lexists(grid)
    if keep:
        results.reporter.note(f"{shown(grid)}: exists already and stays as it is")
    return keep


# ----------------------------------------------------------------------------------------------------- reports


class _Results:
    """What became of each picture: counts, a line on stdout if it is there, a line on stderr if it failed."""

    def __init__(self, config: SampleConfig, reporter: Reporter) -> None:
        self.config, self.reporter, self.meter = config, reporter, Meter()
        self.done = self.skipped = self.failed = 0
        self.said = False

    def summary(self) -> str:
        return f"{self.done} done, {self.skipped} skipped, {self.failed} failed"

    def finish(self, outcome: _Outcome) -> None:
        job = outcome.job
        if outcome.error is not None:
            self.fail(str(job.source), [job], outcome.error)
            return
        self.done += 1
        self.meter.advance()
        if self.config.as_json:
            (input_width, input_height), (width, height) = outcome.before, outcome.after
            sizes = {"input_width": input_width, "input_height": input_height, "width": width, "height": height}
            self._json("done", str(job.source), job, **sizes, seconds=round(outcome.seconds, 4))
        elif job.output is not None:
            _print(str(job.output), "\0" if self.config.print0 else "\n")

    def skip(self, job: Job) -> None:
        self.skipped += 1
        if self.config.as_json:
            self._json("skipped", str(job.source), job)

    def fail(self, source: str, jobs: Sequence[Job], error: IbmdError) -> None:
        """Count the pictures that an input would have become; one, if it has no jobs because it is not there."""
        self.failed += len(jobs) or 1
        self.meter.advance(len(jobs))
        if self.config.as_json:
            for job in jobs:
                self._json("failed", source, job, error=str(error))
            if not jobs:
                self._json("failed", source, None, error=str(error))
        if self.config.fail_fast:
            raise error
        self.reporter.error(str(error))

    def say_once(self, message: str) -> None:
        if not self.said:
            self.reporter.note(message)
        self.said = True

    def _json(self, status: str, source: str, job: Job | None, **known: Any) -> None:
        output = None if job is None or job.output is None else str(job.output)
        line = {"schema": 1, "status": status, "input": source, "output": output}
        line |= {"input_width": None, "input_height": None, "width": None, "height": None, "seconds": None}
        line |= {"seed": self.config.seed, "variant": None if job is None else job.variant, "error": None}
        _print(json.dumps(line | known))


def _print(line: str, end: str = "\n") -> None:
    """Write a line to stdout: on a terminal, readably and above the progress bar; elsewhere, the very bytes."""
    if sys.stdout.isatty():
        sys.stdout.write(shown(line) + "\n")
    else:
        sys.stdout.buffer.write(os.fsencode(line + end))
    sys.stdout.flush()
