"""Translate image files: read, translate and write them, all three at the same time, and report on each.

Threads read ahead of the network and write behind it, never more than a few batches, so memory does not grow with the
number of files. All share Python's lock with the network, which wants it for each of hundreds of operations: so the
threads are few. Pictures are reported in the order of their inputs, as soon as they are written; what cannot be read,
or is done by another run, as soon as its turn has come to enter the network.
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
from io import RawIOBase
from pathlib import Path
from typing import Any, TypeVar, cast

from PIL import Image

from ibmd_cli import __version__
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.export.runner import is_exported, load_exported
from ibmd_cli.files import FULL, is_stream, why, write_file
from ibmd_cli.images.decode import Budget, own_limits, shown
from ibmd_cli.images.encode import encode
from ibmd_cli.images.find import passed_over
from ibmd_cli.images.grids import Sheet, thumbnail
from ibmd_cli.locks import Claims
from ibmd_cli.processes import AllGather, connect, this_process
from ibmd_cli.reporting import Reporter
from ibmd_cli.sampling.config import STUDENT, SampleConfig
from ibmd_cli.sampling.inputs import Inputs
from ibmd_cli.sampling.plan import Job, by_input, make_plan, stands
from ibmd_cli.sampling.results import Appeared, DiskFull, Results, Stop
from ibmd_cli.sampling.translator import Engine, Translator

MOST_READERS, MOST_WRITERS = 4, 4  # threads, at most
SLOW = 1.0  # seconds of the network for a picture, from which on it waits until that is written and reported
Made = TypeVar("Made")


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
    process, processes = (here := this_process()).rank, here.count
    if processes > 1 and ("-" in (*config.inputs, config.files_from) or config.to_stdout or config.grid):
        raise UsageError("several processes: stdin, stdout and --grid are for one; give files, or start one")
    reporter.quiet = reporter.quiet or process > 0
    with connect() as gather:
        plan = _together(process, gather, lambda: make_plan(config, process, processes))
        results = Results(config, reporter)
        try:
            if told := passed_over(plan.passed):
                (reporter.warn if "expected" in told else reporter.note)(told)
            for jobs in plan.failed:
                results.fail(jobs)
            for job in plan.skipped:
                results.skip(job)
            inputs = _together(process, gather, lambda: _prepare(config, reporter) if plan.jobs else None)
            if inputs is not None:
                results.model = {"model": _model_name(config), "model_sha256": inputs.translator.engine.digest()}
                _work(plan.jobs, inputs, config, results)
        except KeyboardInterrupt:
            reporter.warn(f"interrupted: {results.summary()}; the same command with --on-exists skip does the rest")
            raise
        except Stop:
            reporter.note(f"stopped: {results.summary()}")
            return 1
        results.warn_of_unlike()
        counts = gather((results.done, results.skipped, results.failed))
    if process > 0 and len(counts) > 1:
        return 0  # the first tells
    results.done, results.skipped, results.failed = map(sum, zip(*counts, strict=True))
    reporter.note(results.summary())
    if inputs is not None and results.done:
        reporter.note(_how_to_go_on(config, inputs.translator))
    return 3 if results.failed else 0


def _together(process: int, gather: AllGather, do: Callable[[], Made]) -> Made:
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
    return cast(Made, result)


def _prepare(config: SampleConfig, reporter: Reporter) -> Inputs:
    """Load the model, and check the settings against it."""
    engine = _load_model(config, reporter.quiet)
    if config.fit == "tile" and not _may_tile(engine, config):
        raise UsageError(
            f"--fit tile: {engine.name} ({engine.config.get('task')}) must see a whole image at once: choose pad, crop "
            'or stretch; or, if each part can stand alone, set "tiles": true in section "image" of its config.json'
        )
    own = engine.config.get("degradation")
    if config.degrade and own and config.degrade != own:
        reporter.warn(
            f"--degrade {config.degrade}: {engine.name} was trained with {own}; --degrade {own} is what it can mend"
        )
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
        f"{_model_name(config)} on {engine.device}: {engine.nfe} network call{'s' * (engine.nfe > 1)} an image, "
        f"{_result_size(config, translator)}"
    )
    return Inputs(config, translator)


def _may_tile(engine: Engine, config: SampleConfig) -> bool:
    """Tell whether a model may see parts of an image: as it says, or if it restores what each part shows."""
    restores = engine.config.get("degradation") or engine.config.get("mask") or engine.source_scale > 1
    return bool(engine.config["image"].get("tiles", restores or config.degrade))


def _work(jobs: Sequence[Job], inputs: Inputs, config: SampleConfig, results: Results) -> None:
    translator, reporter = inputs.translator, results.reporter
    sheet = Sheet(config.grid) if config.grid and not _keep(config.grid, config, results) else None
    whole = config.fit == "tile" or (config.restore_size and (config.alpha == "keep" or inputs.mask is not None))
    most = 1 if whole else 4 * translator.size  # images that are read ahead, and that wait to be written
    readers = ThreadPoolExecutor(max(1, min(MOST_READERS, (os.cpu_count() or 1) - 1)))
    writers = ThreadPoolExecutor(MOST_WRITERS)
    waiting: deque[Future[Job]] = deque()
    with ExitStack() as meters, own_limits(), Claims(reporter.warn) as claims, readers, writers:
        stream = None
        if is_stream(str(jobs[0].output)):  # opened here, because it may wait for a reader, and Ctrl-C ends that
            stream = meters.enter_context(open(str(jobs[0].output), "wb", buffering=0))
        meters.enter_context(translator.spread(len(jobs)))
        if len(jobs) > 1:
            results.meter = meters.enter_context(reporter.progress("sample", len(jobs), "images"))

        def ready() -> Iterator[Job]:
            for group in _read_ahead(readers, lambda group: inputs.read(group, claims), by_input(jobs), most):
                for job in results.unready(group):
                    if len(jobs) == 1 and len(job.tiles) > 1:
                        meter = meters.enter_context(reporter.progress("sample", len(job.tiles), "tiles"))
                        translator.advance = meter.advance
                    yield job

        outputs = _Outputs(config, translator, claims, sheet, stream, results.model["model_sha256"])
        try:
            for job in translator.run(ready()):
                waiting.append(writers.submit(outputs.write, job))
                _report(waiting, results, 0 if job.seconds > SLOW else most)
            _report(waiting, results, most=0)
        except BaseException as error:
            readers.shutdown(wait=False, cancel_futures=True)
            writers.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, (KeyboardInterrupt, Stop)):
                _report_rest(waiting, results)
            raise
        if sheet is not None and results.done:
            try:
                _put(sheet.encode(), Path(sheet.name), config)
            except IbmdError as error:
                results.fail([Job(sheet.name, Path(sheet.name), variant=0, error=error)])


def _read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[list[Job]], list[Job]], groups: Iterable[list[Job]], ahead: int
) -> Iterator[list[Job]]:
    """Read inputs in threads, at most `ahead` of them before the one that is asked for."""
    waiting: deque[Future[list[Job]]] = deque()
    for group in groups:
        waiting.append(pool.submit(read, group))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _report(waiting: deque[Future[Job]], results: Results, most: int) -> None:
    """Report what is written, in order, and wait while there are more than `most` pictures that are not."""
    while waiting and (len(waiting) > most or waiting[0].done()):
        results.finish(waiting[0].result())  # if one of the two is interrupted, it is still waiting
        waiting.popleft()


def _report_rest(waiting: deque[Future[Job]], results: Results) -> None:
    """Report what was written when the run had to end. That the disk is full was said."""
    for future in waiting:
        if not future.cancelled() and future.exception() is None:
            job = future.result()
            if not isinstance(job.error, DiskFull):
                with suppress(Stop):
                    results.finish(job)


# ------------------------------------------------------------------------------------------------------- model


def _load_model(config: SampleConfig, quiet: bool) -> Engine:
    if config.student is not None and is_exported(config.student):
        if config.device not in ("auto", "cpu"):
            raise UsageError(f"--device {config.device}: {shown(config.student)} runs on the CPU; leave --device out")
        student = load_exported(config.student, quiet)
        if config.nfe not in (None, student.nfe):
            raise UsageError(f"--nfe {config.nfe}: {shown(config.student)} holds {student.nfe}; leave --nfe out")
        return student
    # PyTorch takes seconds to import, and exported students do without it.
    from ibmd_cli.models.references import TeacherRef
    from ibmd_cli.sampling.engine import load_engine

    return load_engine(
        TeacherRef(config.teacher, config.preset, config.head_channels, config.attention_order)
        if config.teacher
        else config.student or STUDENT,
        device=config.device,
        nfe=config.nfe,
        sampler=config.sampler,
        options=_options(config.sampler_options),
        quiet=quiet,
    )


def _model_name(config: SampleConfig) -> str:
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


def _result_size(config: SampleConfig, translator: Translator) -> str:
    if config.restore_size:
        return f"results of {translator.side}×{translator.side} pixels, scaled to the size of their inputs"
    if config.fit == "tile":
        return f"results {translator.scale} times the size of their inputs"
    return f"results of {translator.side}×{translator.side} pixels"


def _how_to_go_on(config: SampleConfig, translator: Translator) -> str:
    """Say in what size results came out, and how to get others."""
    side, other = translator.side, f"other results: --seed {config.seed + 1}, or --variants 4"
    if config.fit == "tile":
        return other
    if config.restore_size:
        return f"made at {side}×{side} pixels and scaled, so lines finer than that are blurred; {other}"
    return f"results have the model's {side}×{side} pixels (--restore-size scales them to their inputs' size); {other}"


# ----------------------------------------------------------------------------------------------------- outputs


class _Outputs:
    """Encodes translated pictures, and writes them."""

    def __init__(
        self,
        config: SampleConfig,
        translator: Translator,
        claims: Claims,
        sheet: Sheet | None,
        stream: RawIOBase | None,
        sha256: str,
    ) -> None:
        self.config, self.translator, self.claims, self.sheet = config, translator, claims, sheet
        self.stream, self.budget = stream, Budget()
        nfe = translator.engine.nfe
        model = f"{shown(_model_name(config))} sha256={sha256[:16]}"
        self.made_by = f"ibmd {__version__} {model} nfe={nfe} seed={config.seed}"

    def write(self, job: Job) -> Job:
        """Encode a picture and write it; returns the job, with the error if that fails."""
        began = time.monotonic()
        try:
            with self.budget.take(math.prod(self.translator.result_size(job.geometry))):
                data, made, after = self._encode(job)
            job.drop_pixels()
            _put(data, job.output, self.config, self.stream)
            job.made = made
            if self.sheet is not None and job.before is not None and after is not None:
                self.sheet.add((job.source, job.place), job.place, job.variant, job.before, after)
        except IbmdError as error:
            job.error = error
        finally:
            job.drop_pixels()
            if job.output is not None:
                self.claims.give_back(job.output)
        job.seconds += time.monotonic() - began
        return job

    def _encode(self, job: Job) -> tuple[bytes, tuple[int, int], Image.Image | None]:
        """Return the bytes of the finished picture, its size, and its thumbnail for the sheet."""
        image = self.translator.finish(job)
        dpi = job.dpi if image.size == job.size else None
        made_by = f"{self.made_by} variant={job.variant} name={shown(job.name)}"
        data = encode(image, self.config.suffix, self.config.quality, dpi, job.metadata, made_by)
        return data, image.size, thumbnail(image) if self.sheet is not None else None


def _put(data: bytes, output: Path | None, config: SampleConfig, stream: RawIOBase | None = None) -> None:
    """Write a file, or into a stream that stands where the file was wanted."""
    name = "stdout" if output is None else shown(output)
    try:
        if stream is not None:
            left = memoryview(data)
            while left:
                left = left[stream.write(left) :]
        elif output is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            write_file(output, data, replace=config.on_exists == "overwrite")
    except FileExistsError as error:
        raise Appeared(
            f"{name}: appeared meanwhile and stays as it is; choose --on-exists skip or overwrite"
        ) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise IbmdError(f"{name}: cannot be written {why(error)}") from error
        rest = "" if output is None or stream else "; the same command with --on-exists skip then does the rest"
        raise DiskFull(f"disk full while writing {name} ({error.strerror}): free some space{rest}") from error


def _keep(grid: str, config: SampleConfig, results: Results) -> bool:
    """Tell whether the contact sheet exists and is to stay."""
    keep = config.on_exists == "skip" and stands(grid)
    if keep:
        results.reporter.note(f"{shown(grid)}: exists already and stays as it is")
    return keep
