"""What becomes of each picture of `ibmd sample`, and how that is told: counts, lines on stdout, failures on stderr."""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from ibmd_cli.errors import IbmdError
from ibmd_cli.images.decode import shown
from ibmd_cli.reporting import Meter, Reporter
from ibmd_cli.sampling.plan import Job, SampleConfig


class Outcome(NamedTuple):
    """What became of a job: sizes (width, height) of input and output, and the reason if it failed."""

    job: Job
    before: tuple[int, int]
    after: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    error: IbmdError | None = None


class Appeared(IbmdError):
    """An output is there that was not when the work began."""


class DiskFull(IbmdError):
    """No other picture can be written either."""


class Stop(Exception):
    """A picture failed, which was told, and no other is to be tried."""


class Results:
    """What became of each picture: counts, a line on stdout if it is there, a line on stderr if it failed."""

    def __init__(self, config: SampleConfig, reporter: Reporter) -> None:
        self.config, self.reporter, self.meter = config, reporter, Meter()
        self.done = self.skipped = self.failed = 0
        self.said = False
        self.told: Outcome | None = None
        self.on_terminal = sys.stdout is not None and sys.stdout.isatty()

    def summary(self) -> str:
        """Count them in words."""
        return f"{self.done} done, {self.skipped} skipped, {self.failed} failed"

    def finish(self, outcome: Outcome) -> None:
        """Tell what became of a picture: once, also if an interrupt comes in between and it is given again."""
        if outcome is self.told:
            return
        job, error, line = outcome.job, outcome.error, b""
        if self.config.as_json:
            (input_width, input_height), (width, height) = outcome.before, outcome.after
            sizes = {"input_width": input_width, "input_height": input_height, "width": width, "height": height}
            line = self._json("done", str(job.source), job, **sizes, seconds=round(outcome.seconds, 4))
        elif job.output is not None:
            path = str(job.output)
            line = self._line(f"./{path}" if path.startswith("-") else path, "\0" if self.config.print0 else "\n")
        self.told = outcome
        if isinstance(error, Appeared) and self.config.on_exists == "skip":  # a run without locks made it
            self.skip(job)
        elif error is not None:
            self.fail(str(job.source), [job], error)
        else:
            self.done += 1
            self._print(line)
            self.meter.advance()

    def skip(self, job: Job) -> None:
        """Count a picture that is there already, or that another run makes."""
        self.skipped += 1
        self.meter.advance()
        if self.config.as_json:
            self._print(self._json("skipped", str(job.source), job))

    def fail(self, text: str, jobs: Sequence[Job], error: IbmdError) -> None:
        """Count the pictures that an input would have become; one, if it has no jobs because it is not there.

        Raises:
            Stop: no other is to be tried.
        """
        self.failed += len(jobs) or 1
        if jobs:
            self.meter.advance(len(jobs))
        if self.config.as_json:
            for job in jobs:
                self._print(self._json("failed", str(job.source), job, error=str(error)))
            if not jobs:
                self._print(self._json("failed", text, None, error=str(error)))
        self.reporter.error(str(error))
        if self.config.fail_fast or isinstance(error, DiskFull):
            raise Stop

    def say_once(self, message: str) -> None:
        """Tell something of one input that may be true of many."""
        if not self.said:
            self.reporter.note(message)
        self.said = True

    def _json(self, status: str, source: str, job: Job | None, **known: Any) -> bytes:
        output = None if job is None or job.output is None else str(job.output)
        line = {"schema": 1, "status": status, "input": source, "output": output}
        line |= {"input_width": None, "input_height": None, "width": None, "height": None, "seconds": None}
        line |= {"seed": self.config.seed, "variant": None if job is None else job.variant, "error": None}
        return self._line(json.dumps(line | known))

    def _line(self, text: str, end: str = "\n") -> bytes:
        """Spell a line for stdout: readably on a terminal; elsewhere, the very bytes."""
        return (shown(text) + "\n").encode() if self.on_terminal else os.fsencode(text + end)

    def _print(self, line: bytes) -> None:
        """Write a line to stdout: on a terminal, above the progress bar; nowhere if it is closed."""
        if sys.stdout is None:
            return
        if self.on_terminal:
            sys.stdout.write(line.decode())
        else:
            sys.stdout.buffer.write(line)  # at once: an interrupt comes before or after it
        sys.stdout.flush()
