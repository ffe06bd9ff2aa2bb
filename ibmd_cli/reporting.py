"""What the user sees on stderr: notes, warnings, progress. Results alone go to stdout.

On a terminal, a bar; elsewhere a plain line every few seconds and no escape code at all.
"""

import codecs
import io
import os
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text


def is_plain(stream: TextIO | None = None) -> bool:
    """Tell whether `stream` (stderr, unless given) must get no escape codes."""
    environ = os.environ
    asked = environ.get("TERM") == "dumb" or "NO_COLOR" in environ or environ.get("CI", "") not in ("", "0", "false")
    stream = stream or sys.stderr
    return asked or stream is None or not stream.isatty()  # None: closed


def accept_any_text() -> None:
    """Have stdout and stderr never die of a character, and give the bytes of files' names back as they are.

    In an ASCII locale they become UTF-8; in others, characters that are not of the locale become plain ones, or `?`.
    """
    codecs.register_error("ibmd", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            if codecs.lookup(stream.encoding).name == "ascii":
                stream.reconfigure(encoding="utf-8", errors="surrogateescape")
            else:
                stream.reconfigure(errors="ibmd")


def _plain(error: UnicodeError) -> tuple[bytes, int]:
    """Return what stands for characters that an encoding does not have, see `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    plain = bytearray()
    for character in error.object[error.start : error.end]:
        if "\udc80" <= character <= "\udcff":  # a byte of a file's name
            plain.append(ord(character) - 0xDC00)
        else:
            plain += unicodedata.normalize("NFKD", _PLAIN.get(character, character)).encode("ascii", "ignore") or b"?"
    return bytes(plain), error.end


_PLAIN = {"×": "x", "–": "-", "→": "->", "≤": "<=", "≥": ">=", "·": "*"}


def counted(count: int, noun: str) -> str:
    """Write a number of things: "1 pair", "1,234 pairs", "2 processes"."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


class Reporter:
    """Notes, warnings and progress of one command.

    Args:
        quiet: no notes and no progress; warnings and errors still appear.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.plain = is_plain()
        self.console = Console(
            stderr=True,
            force_terminal=None if not self.plain else False,
            no_color=self.plain,
            highlight=False,
            soft_wrap=True,
        )

    def note(self, message: str) -> None:
        """Say something that is good to know."""
        if not self.quiet:
            self.console.print(message, markup=False, style="dim" if not self.plain else None)

    def warn(self, message: str) -> None:
        """Say something that the user should look at."""
        self.console.print(Text("warning: ", style="yellow").append(message, style="default"))

    def error(self, message: str) -> None:
        """Say why something failed."""
        self.console.print(Text("error: ", style="bold red").append(message, style="default"))

    @contextmanager
    def progress(self, what: str, total: int, unit: str, done: int = 0) -> Iterator["Meter"]:
        """Show the progress of `total` units of work, `done` of which were done before."""
        if self.quiet:
            yield Meter()
        elif self.plain:
            yield _PlainMeter(self, what, total, unit, done)
        else:
            columns: list[ProgressColumn] = [
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("{task.fields[details]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(compact=True),
            ]
            with Progress(*columns, console=self.console) as bar:
                yield _BarMeter(bar, what, total, unit, done)


class Meter:
    """Progress that is not shown."""

    def advance(self, n: int = 1, **details: Any) -> None:
        """Report `n` units done, and values to show beside them."""


class _Rate:
    """Units per second since the first of them was done, so that preparations do not count."""

    def __init__(self) -> None:
        self.began = self.first = time.monotonic()
        self.count = self.first_count = 0

    def add(self, n: int) -> float:
        now = time.monotonic()
        if self.count == 0:
            self.first, self.first_count = now, n
        self.count += n
        if now - self.first > 0.5:
            return (self.count - self.first_count) / (now - self.first)
        return self.count / max(1e-9, now - self.began)


class _BarMeter(Meter):
    def __init__(self, bar: Progress, what: str, total: int, unit: str, done: int) -> None:
        self.bar, self.unit, self.rate = bar, unit, _Rate()
        self.task = bar.add_task(what, total=total, completed=done, rate="", details="")

    def advance(self, n: int = 1, **details: Any) -> None:
        rate = f"{self.rate.add(n):.3g} {self.unit}/s"
        self.bar.update(self.task, advance=n, rate=rate, details=_join(details))


class _PlainMeter(Meter):
    SECONDS = 5.0

    def __init__(self, reporter: Reporter, what: str, total: int, unit: str, done: int) -> None:
        self.reporter, self.what, self.total, self.unit, self.done = reporter, what, total, unit, done
        self.rate, self.shown = _Rate(), time.monotonic()

    def advance(self, n: int = 1, **details: Any) -> None:
        self.done += n
        rate = self.rate.add(n)
        now = time.monotonic()
        if now - self.shown < self.SECONDS and self.done < self.total:
            return
        self.shown = now
        left = (self.total - self.done) / rate
        self.reporter.note(
            f"{self.what} {self.done}/{self.total}  {rate:.3g} {self.unit}/s  {_join(details)}  "
            f"ETA {int(left // 60)}:{int(left % 60):02d}"
        )


def _join(details: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value}" for key, value in details.items())
