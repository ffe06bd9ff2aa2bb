"""HTML pages: jinja2 templates of `assets/web`, pictures inside a page, and charts for the macro in `charts.html`."""

import base64
import io
import math
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from ibmd_cli.files import assets, atomic_file
from ibmd_cli.reporting import counted

if TYPE_CHECKING:
    from jinja2 import Environment

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 190, 50, 10, 8, 22
"""Size of a chart and its margins, in pixels."""

Points = Sequence[tuple[float, float]]


def render(template: str, **content: Any) -> str:
    """Fill in a template of `assets/web`. Everything that is filled in is escaped."""
    return _environment().get_template(template).render(content)


def write_html(file: Path, page: str) -> None:
    """Write a page, whole or not at all; bytes of file names that are no UTF-8 stay as they are."""
    with atomic_file(file) as new:
        new.write_text(page, encoding="utf-8", errors="surrogateescape")


def draw(chart: "Chart") -> str:
    """Return a chart as an SVG element."""
    macros: Any = _environment().get_template("charts.html").module
    return str(macros.draw(chart))


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(assets() / "web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH, "height": HEIGHT}
    environment.globals["asset"] = lambda name: Markup(asset(name))  # noqa: S704 (our own style sheets and scripts)
    environment.globals["counted"] = counted
    environment.filters |= {"typeset": typeset, "short": short, "px": "{:.1f}".format}
    return environment


def asset(name: str) -> str:
    """Return the text of a file in `assets/web`."""
    return (assets() / "web" / name).read_text(encoding="utf-8")


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Return an address that is the content itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture_uri(file: Path, widest: int, unscaled: int) -> tuple[bool, str]:
    """Return whether a picture is as it was, which it is up to `unscaled` pixels, and its address; else in `widest`."""
    with Image.open(file) as image:
        if max(image.size) <= unscaled:
            return True, data_uri(file.read_bytes())
        image.thumbnail((widest, widest), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="webp", quality=90)
    return False, data_uri(buffer.getvalue(), "image/webp")


def typeset(text: str) -> str:
    """Set the numbers of a text: true minus signs; intervals and ranges stay on one line."""
    text = re.sub(r"\[([^][,]+),([^][,]+)\]", "[\\1,\N{NO-BREAK SPACE}\\2]", text)
    text = re.sub(r"(?<=\d)–(?=\d)", "–\N{WORD JOINER}", text)
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


def short(value: float) -> str:
    """Write a number in the room that is left of a chart."""
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    tiny = 0 < abs(value) < 1e-3
    return (f"{float(mantissa):g}e{int(exponent)}" if tiny else f"{value:.4g}").replace("-", "−")


# --------------------------------------------------------------------------------------------------------- charts


class Axis(NamedTuple):
    """One side of a chart: which value lies at which pixel."""

    low: float  # at `start`
    high: float  # at `end`
    start: float  # in pixels
    end: float
    ticks: Sequence[float]  # values to be written beside it
    log: bool = False  # equal ratios, not equal differences, are equally far apart

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; one beyond the ends lies at the end."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = min(max((value - low) / (high - low), 0), 1)
        return self.start + (self.end - self.start) * share


class Line(NamedTuple):
    """A line through points, or a dot at the only one, in the style of the CSS classes `kind`."""

    kind: str
    points: Points


class Mark(NamedTuple):
    """A value, with its interval if it has one, in a colour and shape."""

    kind: str  # CSS class
    shape: str  # SVG path around (0, 0)
    hint: str  # is shown when one points at it
    x: float  # in pixels
    value: float
    low: float | None
    high: float | None
    level: bool  # whether a line across the chart shows its height


class Chart(NamedTuple):
    """A chart: axes of `across` and `upwards`, and what is drawn over them."""

    label: str  # for those who cannot see it
    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    marks: Sequence[Mark] = ()
    band: tuple[float, float] | None = None  # range of values that is shaded


def across(low: float, high: float, log: bool = False) -> Axis:
    """Return the horizontal axis of a chart."""
    marks = log_ticks(low, high) if log else [value for value in ticks(low, high) if low <= value <= high]
    return Axis(low, high, LEFT, WIDTH - RIGHT, marks, log)


def upwards(values: Iterable[float]) -> Axis:
    """Return the vertical axis of a chart, from a round number below all values to one above."""
    marks = ticks(*value_range(values))
    return Axis(marks[0], marks[-1], HEIGHT - BOTTOM, TOP, marks)


def value_range(values: Iterable[float]) -> tuple[float, float]:
    """Return the least and the greatest value, a little apart where they are the same, but for rounding."""
    values = list(values)
    low, high = min(values), max(values)
    margin = 0.0 if high - low > 1e-9 * max(abs(low), abs(high)) else abs(high) / 10 or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers, evenly spaced, from at most `low` to at least `high`."""
    unit = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(unit * factor for factor in (1, 2, 5) if (high - low) / (unit * factor) <= 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten between two positive numbers, and multiples of them where there is room."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 3, 5), (1, 2, 5), (1,)):
        found = [f * 10.0**k for k in decades for f in factors if low <= f * 10.0**k <= high]
        if len(found) <= 7:
            break
    return found
