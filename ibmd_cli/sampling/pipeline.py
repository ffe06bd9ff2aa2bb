"""Translate image files: read, translate and write them, all three at the same time, and report on each.

Threads read ahead of the network and write behind it, never more than a few batches, so memory does not grow with the
number of files. All share Python's lock with the network, which wants it for each of hundreds of operations. So where
images are small, a thread takes a batch at a time, few decode or encode at once, and the lock is given up soon when
another wants it; many may wait for the disk. Where they share the CPU, too, the network goes first.
Pictures are reported in the order of their inputs, as soon as they are written; what cannot be read, or is done by
another run, as soon as its turn has come to enter the network.
"""

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from threading import Semaphore, get_native_id
from typing import Any, NamedTuple, TypeVar, cast

from PIL import Image

from ibmd_cli import __version__
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.export.load import is_exported, load_exported
from ibmd_cli.files import FULL, why, write_file
from ibmd_cli.images.decode import Budget, own_limits, shown
from ibmd_cli.images.encode import SOFTWARE, encode
from ibmd_cli.images.grids import Sheet, thumbnail
from ibmd_cli.processes import Gather, company, place, share_freed_memory
from ibmd_cli.reporting import Reporter
from ibmd_cli.sampling.claims import Claims
from ibmd_cli.sampling.plan import Job, SampleConfig, Source, make_plan
from ibmd_cli.sampling.read import Inputs, Read
from ibmd_cli.sampling.results import Appeared, DiskFull, Outcome, Results, Stop
from ibmd_cli.sampling.translator import Engine, Piece, Translator

STUDENT = "builtin:outline2emoji"
READERS, WRITERS = 4, 16  # threads; those that write mostly wait for the disk, and the disk serves many at once
BATCH = 16  # images, at most, that a thread reads or encodes at a time
TURN = 500e-6  # seconds a thread may keep Python's lock from another; with its own 5 ms, the network waits longer
SLOW = 1.0  # seconds of the network for a picture, from which on it waits until that is written and reported
Group = tuple[Source, list[Job]]
T = TypeVar("T")


def sample(config: SampleConfig, reporter: Reporter) -> int:
    """Translate images.

    stdout gets the path of each output as it is finished (or JSON lines, or image bytes), stderr the failures.
    Processes that were started together share the inputs; the first returns when the last is done.

    Returns:
        Exit code: 0; 3 if some inputs failed; 1 if one did and no other was tried (`fail_fast`, or the disk is full).

    Raises:
        UsageError: inputs, outputs and settings do not go together; nothing was done.
        NotAvailable: there is no such model.
        IbmdError: an output exists; nothing was done.
    """
    process, processes = place()
    if processes > 1 and ("-" in (*config.inputs, config.files_from, config.output) or config.grid):
        raise UsageError("several processes: stdin, stdout and --grid are for one; give files, or start one")
    reporter.quiet = reporter.quiet or process > 0
    with company() as gather:
        plan = _together(process, gather, lambda: make_plan(config, process, processes))
        results = Results(config, reporter)
        try:
            for problem in plan.problems:
                results.fail(problem.text, problem.jobs, problem.error)
            for job in plan.skipped:
                results.skip(job)
            inputs = _together(process, gather, lambda: _prepare(config, reporter) if plan.jobs else None)
            if inputs is not None:
                _work(plan.jobs, inputs, config, results)
        except KeyboardInterrupt:
            reporter.warn(f"interrupted: {results.summary()}; the same command with --on-exists skip does the rest")
            raise
        except Stop:
            reporter.note(f"stopped: {results.summary()}")
            return 1
        counts = gather((results.done, results.skipped, results.failed))
    if process > 0 and len(counts) > 1:
        return 0  # the first tells
    results.done, results.skipped, results.failed = map(sum, zip(*counts, strict=True))
    reporter.note(results.summary())
    return 3 if results.failed else 0


def _together(process: int, gather: Gather, do: Callable[[], T]) -> T:
    """Do something in every process, and go on when all have done it; if one cannot, all end, and the first tells."""
    result, error = None, None
    try:
        result = do()
    except IbmdError as failure:
        error = failure
    errors = gather(error)
    if first := next(filter(None, errors), None):
        if process > 0 and len(errors) > 1:
            raise SystemExit(first.exit_code)
        raise first
    return cast(T, result)


def _prepare(config: SampleConfig, reporter: Reporter) -> Inputs:
    """Load the model, and check the settings against it."""
    share_freed_memory()
    engine = _load(config, reporter.quiet)
    own = engine.config.get("degradation")
    if config.degrade and own and config.degrade != own:
        reporter.warn(f"--degrade {config.degrade}: {engine.name} was trained with {own}")
    translator = Translator(
        engine,
        seed=config.seed,
        fit=config.fit,
        restore_size=config.restore_size,
        batch_size=config.batch_size,
        degradation=config.degrade,
        warn=reporter.warn,
    )
    reporter.note(
        f"{_name(config)} on {engine.device}: {engine.nfe} network call{'s' * (engine.nfe > 1)} an image, "
        f"{_size(config, translator)}"
    )
    return Inputs(config, translator)


def _work(jobs: Sequence[Job], inputs: Inputs, config: SampleConfig, results: Results) -> None:
    translator, reporter = inputs.translator, results.reporter
    sheet = Sheet(config.grid) if config.grid and not _keep(config.grid, config, results) else None
    whole = config.fit == "tile" or (config.restore_size and (config.alpha == "keep" or inputs.mask is not None))
    # Where images keep their own size, few wait at a time; elsewhere, one core is the network's.
    batch = 1 if whole else min(BATCH, translator.size)
    ahead, behind = (1, 1) if whole else (max(4, (translator.size + WRITERS) // batch), WRITERS)  # batches
    cores = os.cpu_count() or 1
    most = max(1, min(READERS, cores if whole else cores - 1))
    coders = Semaphore(most)
    made_by = f"ibmd {__version__} {shown(_name(config))} nfe={translator.engine.nfe} seed={config.seed}"
    groups = [(source, list(jobs)) for source, jobs in groupby(jobs, key=lambda job: job.source)]
    waiting: deque[_Writing] = deque()
    with own_limits(), Claims(reporter.warn) as claims, ExitStack() as meters:
        meters.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(TURN)
        meters.enter_context(translator.spread(len(jobs)))
        if len(jobs) > 1:
            results.meter = meters.enter_context(reporter.progress("sample", len(jobs), "images"))

        def pieces() -> Iterator[Piece]:
            for piece in _pieces(read, results):
                if len(jobs) == 1 and len(piece.tiles) > 1:
                    meter = meters.enter_context(reporter.progress("sample", len(piece.tiles), "tiles"))
                    translator.advance = meter.advance
                yield piece

        def read_all(some: Sequence[Group]) -> list[Read]:
            with coders:
                return [inputs.read(group, claims) for group in some]

        outputs = _Outputs(config, translator, claims, sheet, made_by, coders)
        start = _give_way if translator.fixed else None
        with (
            ThreadPoolExecutor(most, initializer=start) as readers,
            ThreadPoolExecutor(WRITERS, initializer=start) as writers,
        ):
            try:
                read = _read_ahead(readers, read_all, _batches(groups, batch), ahead)
                for done in _batches(translator.run(pieces()), batch):
                    unwritten = 0 if done[-1].seconds > SLOW else behind
                    outcomes: deque[Outcome] = deque()
                    waiting.append(_Writing(writers.submit(outputs.write, done, outcomes), outcomes))
                    _report(waiting, results, unwritten)
                _report(waiting, results, most=0)
            except (KeyboardInterrupt, Stop):
                readers.shutdown(wait=False, cancel_futures=True)
                writers.shutdown(wait=True, cancel_futures=True)
                for outcome in [outcome for writing in waiting for outcome in writing.outcomes]:
                    with suppress(Stop):
                        results.finish(outcome)
                raise
            except BaseException:
                for pool in (readers, writers):
                    pool.shutdown(wait=False, cancel_futures=True)
                raise
        if sheet is not None and results.done:
            try:
                _put(sheet.encode(), Path(sheet.name), config)
            except IbmdError as error:
                results.fail(sheet.name, [], error)


def _give_way() -> None:
    """Let the network's threads go before this one on the CPU: it often wakes up on a core of theirs."""
    if sys.platform == "linux":  # elsewhere, only processes have priorities
        with suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, get_native_id(), min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10))


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[list[Group]], list[Read]], batches: Iterable[list[Group]], ahead: int
) -> Iterator[Read]:
    """Read inputs in threads, at most `ahead` batches of them before the one that is asked for."""
    waiting: deque[Future[list[Read]]] = deque()
    for batch in batches:
        waiting.append(pool.submit(read, batch))
        if len(waiting) > ahead:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


class _Writing(NamedTuple):
    """A batch that is being written, and what became of those of its pictures that are, and are not reported."""

    future: Future[None]
    outcomes: deque[Outcome]


def _report(waiting: deque[_Writing], results: Results, most: int) -> None:
    """Report what is written, in order, and wait while there are more than `most` batches that are not."""
    while waiting and (len(waiting) > most or waiting[0].future.done()):
        future, outcomes = waiting[0]
        future.result()
        while outcomes:
            results.finish(outcomes[0])  # if one of the two is interrupted, it is still waiting
            outcomes.popleft()
        waiting.popleft()


# ------------------------------------------------------------------------------------------------------- model


def _load(config: SampleConfig, quiet: bool) -> Engine:
    if config.student is not None and is_exported(config.student):
        if config.device not in ("auto", "cpu"):
            raise UsageError(f"--device {config.device}: {shown(config.student)} runs on the CPU; leave --device out")
        student = load_exported(config.student, quiet)
        if config.nfe not in (None, student.nfe):
            raise UsageError(f"--nfe {config.nfe}: {shown(config.student)} holds {student.nfe}; leave --nfe out")
        return student
    from ibmd_cli.sampling.engine import (
        load_engine,  # PyTorch takes seconds to import, and exported students do without it
    )

    return load_engine(
        None if config.teacher else config.student or STUDENT,
        config.teacher,
        device=config.device,
        nfe=config.nfe,
        preset=config.preset,
        head_channels=config.head_channels,
        attention_order=config.attention_order,
        sampler=config.sampler,
        options=_options(config.sampler_options),
        quiet=quiet,
    )


def _name(config: SampleConfig) -> str:
    return config.teacher or config.student or STUDENT


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


def _pieces(read: Iterable[Read], results: Results) -> Iterator[Piece]:
    """Report inputs that cannot be translated, and yield a piece for each picture that is to be made of the others."""
    for one in read:
        for job in one.skipped:
            results.skip(job)
        if one.error is not None:
            results.fail(str(one.source), one.jobs, one.error)
        if one.several:
            results.say_once(f"{shown(str(one.source))}: several frames or pages: of such files the first one counts")
        if one.piece is not None:
            for job in one.jobs:  # they share the pixels
                yield replace(one.piece, variant=job.variant, task=(one, job))


# ----------------------------------------------------------------------------------------------------- outputs


class _Outputs:
    """Encodes translated pieces, and has them written."""

    def __init__(
        self,
        config: SampleConfig,
        translator: Translator,
        claims: Claims,
        sheet: Sheet | None,
        made_by: str,
        coders: Semaphore,
    ) -> None:
        self.config, self.translator, self.claims, self.sheet, self.made_by = config, translator, claims, sheet, made_by
        self.coders, self.budget = coders, Budget()

    def write(self, pieces: list[Piece], outcomes: deque[Outcome]) -> None:
        """Encode pieces and write them, and tell of each what became of it."""
        with self.coders:
            encoded = [self._encode(piece) for piece in pieces]
        pieces.clear()  # while they wait for the disk, they have no pixels
        for picture in encoded:
            outcomes.append(self._save(*picture))
            if isinstance(outcomes[-1].error, DiskFull):
                break

    def _encode(self, piece: Piece) -> tuple[Outcome, bytes, Read, Image.Image | None]:
        """Return what becomes of a piece, its bytes, its input, and its thumbnail for the sheet: no pixels are left."""
        began, (read, job) = time.monotonic(), piece.task
        geometry, data, small = piece.geometry, b"", None
        assert geometry is not None
        outcome = Outcome(job, geometry.size)
        try:
            with self.budget.take(math.prod(self.translator.result_size(geometry))):
                image = self.translator.finish(piece)
                dpi = read.dpi if image.size == geometry.size else None
                tags = read.credits | {SOFTWARE: f"{self.made_by} variant={job.variant}"}
                data = encode(image, self.config.suffix, self.config.quality, dpi, tags)
                small = thumbnail(image) if self.sheet is not None else None
            outcome = outcome._replace(after=image.size)
        except IbmdError as error:
            outcome = outcome._replace(error=error)
        seconds = read.seconds / len(read.jobs) + piece.seconds + time.monotonic() - began
        return outcome._replace(seconds=seconds), data, read, small

    def _save(self, outcome: Outcome, data: bytes, read: Read, small: Image.Image | None) -> Outcome:
        """Write an encoded picture."""
        began, job = time.monotonic(), outcome.job
        try:
            if outcome.error is None:
                _put(data, job.output, self.config)
                if self.sheet is not None and small is not None and read.thumbnail is not None:
                    self.sheet.add(read.source, read.source.name, job.variant, read.thumbnail, small)
        except IbmdError as error:
            outcome = outcome._replace(error=error, after=(0, 0))
        finally:
            if job.output is not None:
                self.claims.give_back(job.output)
        return outcome._replace(seconds=outcome.seconds + time.monotonic() - began)


def _put(data: bytes, output: Path | None, config: SampleConfig) -> None:
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        write_file(output, data, replace=config.on_exists == "overwrite")
    except FileExistsError as error:
        raise Appeared(
            f"{shown(output)}: appeared meanwhile and stays as it is; choose --on-exists skip or overwrite"
        ) from error
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(f"disk full while writing {shown(output)}: free some space and run again") from error
        raise IbmdError(f"{shown(output)}: cannot be written {why(error)}") from error


def _keep(grid: str, config: SampleConfig, results: Results) -> bool:
    """Tell whether the contact sheet exists and is to stay."""
    keep = config.on_exists == "skip" and os.path.lexists(grid)
    if keep:
        results.reporter.note(f"{shown(grid)}: exists already and stays as it is")
    return keep
