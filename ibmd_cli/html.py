"""What the HTML pages of this package share: their style, pictures inside the page, and charts as inline SVG."""

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 190, 44, 10, 8, 22
"""Of a chart, in pixels, and the room around what is drawn in it."""

Points = Sequence[tuple[float, float]]


def asset(name: str) -> str:
    """Return the text of a file in `assets/web`."""
    return (resources.files("ibmd_cli") / "assets" / "web" / name).read_text(encoding="utf-8")


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Return an address that is the content itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# --------------------------------------------------------------------------------------------------------- charts


class Axis(NamedTuple):
    """One side of a chart: which value lies at which pixel.

    Attributes:
        low: value at `start`.
        high: value at `end`.
        start: in pixels.
        end: in pixels.
        ticks: values to be written beside it.
        log: whether equal ratios, not equal differences, are equally far apart.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; one beyond the ends lies at the end."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = min(max((value - low) / (high - low), 0), 1)
        return self.start + (self.end - self.start) * share


def across(low: float, high: float, log: bool = False) -> Axis:
    """Return the horizontal axis of a chart."""
    marks = log_ticks(low, high) if log else [value for value in ticks(low, high) if low <= value <= high]
    return Axis(low, high, LEFT, WIDTH - RIGHT, marks, log)


def upwards(values: Iterable[float]) -> Axis:
    """Return the vertical axis of a chart, from a round number below all values to one above."""
    marks = ticks(*spread(values))
    return Axis(marks[0], marks[-1], HEIGHT - BOTTOM, TOP, marks)


def chart(label: str, x: Axis, y: Axis, drawn: Iterable[str]) -> str:
    """Draw a chart.

    Args:
        label: what it shows, for those who cannot see it.
        x: of `across`.
        y: of `upwards`.
        drawn: SVG elements, which lie over the grid.
    """
    svg = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for value in y.ticks:
        at, kind = y(value), "zero" if value == 0 and y.low < 0 else "grid"
        svg.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        svg.append(f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for value in x.ticks:
        anchor = "end" if x(value) > WIDTH - RIGHT - 10 else "middle"
        svg.append(f'<text x="{x(value):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{_short(value)}</text>')
    return "".join([*svg, *drawn, "</svg>"])


def polyline(kind: str, x: Axis, y: Axis, points: Points) -> str:
    """Draw a line through points, or a dot at the only one, of the CSS classes `kind`."""
    places = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in (points if len(points) > 1 else [*points, *points]))
    return f'<polyline class="{kind}" points="{places}" stroke-linecap="round"/>'


def spread(values: Iterable[float]) -> tuple[float, float]:
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


def _short(value: float) -> str:
    """Write a number in the room that is left of a chart."""
    text = f"{value:.4g}"
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "−")
