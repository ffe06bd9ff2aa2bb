"""Report results of `ibmd sample`: counts, lines on stdout, failures on stderr."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ibmd_cli import __version__
from ibmd_cli.errors import IbmdError
from ibmd_cli.images.decode import shown
from ibmd_cli.reporting import Meter, Reporter
from ibmd_cli.sampling.config import SampleConfig
from ibmd_cli.sampling.plan import Job

UNLIKE = {
    "empty": ("shows nothing", "give a drawing"),
    "light on dark": ("is light on dark", "invert it, e.g. magick IN -negate OUT"),
    "photo": ("looks like a photo, or a page in shadow or colour", "give a scan, or its lines alone"),
}
"""Kind of an input that a model of drawings was not made for → what it is, and what mends it."""


class Appeared(IbmdError):
    """An output is there that was not when the work began."""


class DiskFull(IbmdError):
    """No other picture can be written either."""


class Stop(Exception):
    """A picture failed, which was told, and no other is to be tried."""


class Results:
    """Results of a run: counts, a line on stdout for each picture that is made, a line on stderr for each failure."""

    def __init__(self, config: SampleConfig, reporter: Reporter) -> None:
        self.config, self.reporter, self.meter = config, reporter, Meter()
        self.done = self.skipped = self.failed = 0
        self.failures: set[tuple[Path | None, str]] = set()  # inputs
        self.said = set[str]()
        self.unlike: dict[str, list[str]] = {}  # kind → inputs
        self.model = {"model": "", "model_sha256": ""}
        self.told: Job | None = None
        self.on_terminal = sys.stdout is not None and sys.stdout.isatty()

    def summary(self) -> str:
        """Count pictures that are done or skipped, and inputs of which a picture failed."""
        return f"{self.done} done, {self.skipped} skipped, {self.failed} failed"

    def unready(self, jobs: Sequence[Job]) -> list[Job]:
        """Tell what is skipped or failed of the jobs of an input, and return the others."""
        for job in jobs:
            if job.skipped:
                self.skip(job)
        if failed := [job for job in jobs if job.error]:
            self.fail(failed)
        for note in set(jobs[-1].notes) - self.said:  # of each kind, one
            self.said.add(note)
            self.reporter.note(f"{shown(jobs[-1].path)}: {note}")
        if jobs[-1].unlike:
            self.unlike.setdefault(jobs[-1].unlike, []).append(jobs[-1].path)
        return [job for job in jobs if not (job.skipped or job.error)]

    def warn_of_unlike(self) -> None:
        """Tell of inputs that the model was not made for, once for each kind."""
        for kind, paths in self.unlike.items():
            is_what, mend = UNLIKE[kind]
            first = f"{shown(paths[0])} {is_what}" if len(paths) == 1 else f"{len(paths)} inputs, as {shown(paths[0])}"
            verb = "" if len(paths) == 1 else f": each {is_what}"
            self.reporter.warn(f"{first}{verb}, and the model was made for dark lines on white paper: {mend}")

    def finish(self, job: Job) -> None:
        """Tell what became of a picture: once, also if an interrupt comes in between and it is given again."""
        if job is self.told:
            return
        self.told = job
        if isinstance(job.error, Appeared) and self.config.on_exists == "skip":  # a run without locks made it
            self.skip(job)
        elif job.error is not None:
            self.fail([job])
        else:
            self.done += 1
            if self.config.as_json:
                self._print(self._json("done", job))
            elif job.output is not None:
                path = str(job.output)
                end = "\0" if self.config.print0 else "\n"
                self._print(self._line(f"./{path}" if path.startswith("-") else path, end))
            self.meter.advance()

    def skip(self, job: Job) -> None:
        """Count a picture that is there already, or that another run makes."""
        self.skipped += 1
        self.meter.advance()
        if self.config.as_json:
            self._print(self._json("skipped", job))

    def fail(self, jobs: Sequence[Job]) -> None:
        """Tell the error that some jobs have in common, and count their inputs.

        Raises:
            Stop: no other is to be tried.
        """
        inputs = {(job.source, job.place) for job in jobs}
        self.failed += len(inputs - self.failures)
        self.failures |= inputs
        self.meter.advance(sum(job.variant > 0 for job in jobs))
        if self.config.as_json:
            for job in jobs:
                self._print(self._json("failed", job))
        self.reporter.error(str(jobs[0].error))
        if self.config.fail_fast or isinstance(jobs[0].error, DiskFull):
            raise Stop

    def _json(self, status: str, job: Job) -> bytes:
        width, height = job.made or (None, None)
        input_width, input_height = (job.made and job.size) or (None, None)
        line = {
            "schema": 1,
            "status": status,
            "input": job.path,
            "output": None if job.output is None else str(job.output),
            "input_width": input_width,
            "input_height": input_height,
            "width": width,
            "height": height,
            "seconds": round(job.seconds, 4) if status == "done" else None,
            "seed": self.config.seed,
            "variant": job.variant or None,
            "name": job.name if job.variant else None,
            **self.model,
            "version": __version__,
            "unlike": job.unlike or None,
            "error": None if job.error is None else str(job.error),
        }
        return self._line(json.dumps(line))

    def _line(self, text: str, end: str = "\n") -> bytes:
        """Spell a line for stdout: readably on a terminal; elsewhere, the very bytes."""
        return (shown(text) + "\n").encode() if self.on_terminal else os.fsencode(text + end)

    def _print(self, line: bytes) -> None:
        """Write a line to stdout: on a terminal, above the progress bar; nowhere if it is closed."""
        if sys.stdout is None:
            return
        try:
            if self.on_terminal:
                sys.stdout.write(line.decode())
            else:
                sys.stdout.buffer.write(line)  # at once: an interrupt comes before or after it
            sys.stdout.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, "stdout") from error
