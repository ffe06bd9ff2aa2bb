"""The user's stderr: notes, warnings, errors, progress. Results alone go to stdout.

On a terminal, a bar; elsewhere a plain line every few seconds and no escape code at all.
"""

import codecs
import io
import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

BAR = 24  # columns of the bar, at most


def is_plain(stream: IO[str] | None = None) -> bool:
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


_PLAIN = {"…": "...", "×": "x", "–": "-", "→": "->", "≤": "<=", "≥": ">=", "·": "*"}


def counted(count: int, noun: str) -> str:
    """Write a number of things: "1 pair", "1,234 pairs", "2 processes"."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def rounded(value: float) -> str:
    """Write a positive number with two digits that count."""
    short = float(f"{value:.2g}")
    digits = max(0, 1 - math.floor(math.log10(short))) if short else 0
    return f"{short:,.{digits}f}"


def is_unicode(stream: IO[str] | None) -> bool:
    """Tell whether a stream takes every character."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")


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
            soft_wrap=sys.stderr is None or not sys.stderr.isatty(),  # a terminal would break words
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
            yield Meter(what, total, unit, done, self.note)
        else:
            meter, fancy = Meter(what, total, unit, done), is_unicode(self.console.file)
            with Live(get_renderable=lambda: meter.line(self.console.width, fancy), console=self.console):
                yield meter


class Meter:
    """Progress: what, how much of it, the time that is left, then speed and other values.

    The speed is that since the first unit was done, so that preparations do not count.

    Args:
        what: is done.
        total: units of work.
        unit: name of one.
        done: units that were done before.
        tell: where lines go, every few seconds; None: a bar shows the progress, or nothing does.
    """

    SECONDS = 5.0

    def __init__(
        self, what: str = "", total: int = 0, unit: str = "", done: int = 0, tell: Callable[[str], None] | None = None
    ) -> None:
        self.what, self.total, self.unit, self.done, self.tell = what, total, unit, done, tell
        self.began = self.first = self.told = time.monotonic()
        self.count = self.first_count = 0
        self.starting = "starting"
        self.details: dict[str, Any] = {}

    def advance(self, n: int = 1, **details: Any) -> None:
        """Report `n` units done, and values to show beside them if there is room."""
        now = time.monotonic()
        if self.count == 0:
            self.first, self.first_count = now, n
        self.count += n
        self.done += n
        self.details = details or self.details
        self._tell(now)

    def prepare(self, what: str) -> None:
        """Report what goes on before the first unit."""
        self.starting = what
        self._tell(time.monotonic())

    def _tell(self, now: float) -> None:
        if self.tell and (now - self.told >= self.SECONDS or self.done >= self.total):
            self.told = now
            self.tell("  ".join([f"{self.what} {self.done}/{self.total}", self.left(), *self.rest()]))

    @property
    def rate(self) -> float:
        """Units per second."""
        now = time.monotonic()
        if now - self.first > 0.5 and self.count > self.first_count:
            return (self.count - self.first_count) / (now - self.first)
        return self.count / max(1e-9, now - self.began)

    def left(self) -> str:
        """Return the time that is left, as soon as one unit is done; at the end, the time that it took."""
        if self.done >= self.total:
            return f"in {_clock(time.monotonic() - self.began)}"
        return f"{_clock((self.total - self.done) / self.rate)} left" if self.count else self.starting

    def rest(self) -> list[str]:
        """Return what is said if there is room."""
        rate = f"{self.rate:,.0f}" if self.rate >= 100 else f"{self.rate:.3g}"
        shown = [f"{rate} {self.unit}/s"] if self.count else []
        return shown + [f"{key.replace('_', ' ')} {value}" for key, value in self.details.items()]

    def line(self, width: int, fancy: bool) -> Text:
        """Return a line of at most `width` columns: bar, count, time left, and then what there is room for."""
        must = f" {self.done:>{len(str(self.total))}}/{self.total}  {self.left()}"
        what = self.what if len(self.what) + len(must) + 8 <= width else self.what[: max(0, width - len(must) - 1)]
        bar = max(0, min(BAR, width - len(what) - len(must) - 1))
        full = min(bar, bar * self.done // max(1, self.total))
        text = Text(f"{what} ", no_wrap=True, overflow="crop")
        text.append(("━" if fancy else "#") * full, style="cyan")
        text.append(("━" if fancy else ".") * (bar - full), style="dim").append(must)
        for part in self.rest():
            if text.cell_len + 2 + len(part) >= width:
                break
            text.append(f"  {part}", style="dim")
        return text


def _clock(seconds: float) -> str:
    """Spell a time: 0:07, 12:30, 3:05:00."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
