"""`run.html`: a run on one page, made of what is in its folder. One file, no scripts, nothing loaded from elsewhere."""

import base64
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ibmd_cli.files import atomic_file
from ibmd_cli.logs import LAG, read_log

PREVIEWS = 6
"""On the page, evenly spaced over the run."""
WIDEST = 1024
"""Pixels; wider previews are scaled down."""
REFRESH = 30
"""Seconds after which a browser loads the page of a running run again."""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 48, 8, 8, 20

Points = list[tuple[float, float]]

STYLE = """
:root { color-scheme: light dark; --line: #8886; --a: #2a78d6; --b: #c2571a; --warn: #b3261e }
@media (prefers-color-scheme: dark) { :root { --a: #6aa9f4; --b: #f0975f; --warn: #ff8a80 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem }
.facts, .charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 8rem), 1fr)) }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)) }
.facts b { display: block; font-size: 1.2rem } figure { margin: 0 } figcaption { font-weight: 600 }
.warning { color: var(--warn) } small.b { white-space: nowrap } small, .note { opacity: 0.75; font-weight: 400 }
svg, img { width: 100%; height: auto; display: block } img { max-width: 56rem; image-rendering: pixelated }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; opacity: 0.75 }
.a { stroke: var(--a); color: var(--a) } .b { stroke: var(--b); color: var(--b) }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round } .raw { opacity: 0.3; stroke-width: 1 }
.b:is(polyline) { stroke-dasharray: 5 4 } .grid { stroke: var(--line) } .zero { stroke: currentColor; opacity: 0.5 }
table { border-collapse: collapse } td, th { text-align: left; padding: 0.15rem 0.8rem 0.15rem 0; vertical-align: top }
td { border-top: 1px solid var(--line) } td:nth-child(2) { overflow-wrap: anywhere } .default { opacity: 0.6 }
"""


@contextmanager
def run_page(out: Path) -> Iterator[None]:
    """Keep the status on the page of a run right: running inside; then finished, interrupted, or stopped and why."""
    write_page(out, "running")
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else f"stopped: {error}"
        with suppress(OSError):  # the disk may be full: what stopped the run is what the user must see
            write_page(out, status)
        raise
    write_page(out, "finished")


def write_page(out: Path, status: str) -> None:
    """Write `run.html` of a run folder, whole or not at all.

    Args:
        out: with `config.json`, and what there is of `metrics.jsonl` and `previews/`.
        status: "running", "finished", "interrupted" or "stopped: …".
    """
    run = json.loads((out / "config.json").read_text())
    lines = read_log(out)
    settings = run["settings"]
    title = f"{settings['teacher']} → {out.name}"
    refresh = f'<meta http-equiv="refresh" content="{REFRESH}">' if status == "running" else ""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p><b>{escape(status)}</b> <small>at {now}",
        "; if this time stays, the run was killed, and the same command continues it" if status == "running" else "",
        "</small></p>",
        *(f'<p class="warning">{escape(text)}</p>' for line in lines for text in line.get("warnings", ())),
        *_facts(lines, settings["steps"]),
        *_charts(lines),
        *_previews(out),
        *_settings(settings, run["origins"]),
        f"<p class=note>ibmd {escape(run['ibmd_version'])}, {run['processes']} process(es)</p></body></html>\n",
    ]
    with atomic_file(out / "run.html") as new:
        new.write_text("".join(parts), encoding="utf-8")


def _facts(lines: Sequence[Mapping[str, Any]], steps: int) -> Iterator[str]:
    """The latest figures in words."""
    step = lines[-1]["step"] if lines else 0
    facts = {"student updates": f"{step} of {steps}"}
    if lines:
        last = lines[-1]
        facts["time spent"] = _duration(last["seconds"])
        facts["time left, about"] = _duration(last["seconds"] / step * (steps - step))
        facts["images"] = f"{last['images']:,}"
        facts["peak memory"] = f"{last['peak_memory_bytes'] / 2**20:,.0f} MiB"
        facts["steps skipped"] = str(last["skipped"])
    yield '<div class="facts">'
    for name, value in facts.items():
        yield f"<div><b>{value}</b><small>{name}</small></div>"
    yield "</div>"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _charts(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    def points(name: str) -> Points:
        return [(line["step"], line[name]) for line in lines if line.get(name) is not None]

    if not lines:
        return
    yield '<h2>Curves <small>over student updates</small></h2><div class="charts">'
    yield _chart("Loss of the bridge model", points("bridge_loss"))
    yield _chart("Loss of the student", points("student_loss"), "a difference: negative if the bridge model lags")
    yield _chart("Lag of the bridge model", points("bridge_lag"), f"trouble above {LAG}")
    yield _chart(
        "Diversity over z", points("diversity"), "mean deviation in [-1, 1]", ("teacher", points("teacher_diversity"))
    )
    yield _chart("Learning rate of the student", points("lr"))
    yield _chart("Images per second", points("images_per_second"))
    yield "</div>"


def _previews(out: Path) -> Iterator[str]:
    files = sorted((out / "previews").glob("step-*.png"))
    if len(files) > PREVIEWS:
        files = [files[round(i * (len(files) - 1) / (PREVIEWS - 1))] for i in range(PREVIEWS)]
    if files:
        yield "<h2>Previews <small>the same sources and z each time, newest first</small></h2>"
    for file in reversed(files):
        step = int(file.stem.removeprefix("step-"))
        yield f'<figure><figcaption>step {step}</figcaption><img alt="source, teacher and student at step {step}" '
        yield f'src="data:image/png;base64,{base64.b64encode(_png(file)).decode()}"></figure>'


def _png(file: Path) -> bytes:
    with Image.open(file) as image:
        if image.width <= WIDEST:
            return file.read_bytes()
        small = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="png")
    return buffer.getvalue()


def _settings(settings: Mapping[str, Any], origins: Mapping[str, str]) -> Iterator[str]:
    yield "<h2>Settings</h2><table><tr><th>setting</th><th>value</th><th>origin</th></tr>"
    for name, value in settings.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        origin = origins.get(name, "default")
        yield f'<tr class="{escape(origin.split()[0])}"><td>{name}</td><td>{escape(text) or "–"}</td>'
        yield f"<td>{escape(origin)}</td></tr>"
    yield "</table>"


def _chart(title: str, points: Points, note: str = "", other: tuple[str, Points] | None = None) -> str:
    """Draw a curve, its points faint and their means bold, and perhaps a second one for comparison."""
    raw, bold = _means(points, 600), _means(points, 40)
    second = other[1] if other else []
    legend = f' <small class="b">- - {other[0]}</small>' if other and second else ""
    caption = f"<figcaption>{title} <small>{note}</small>{legend}</figcaption>"
    if not points:
        return f'<figure>{caption}<p class="note">no values yet</p></figure>'
    last = points[-1][0]
    ticks = _ticks(*_range([y for _, y in (*bold, *second)]))
    low, high = ticks[0], ticks[-1]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    def line(kind: str, values: Iterable[tuple[float, float]]) -> str:
        text = " ".join(f"{x(a):.1f},{y(min(max(b, low), high)):.1f}" for a, b in values)
        return f'<polyline class="{kind}" points="{text}"/>'

    svg = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">']
    for tick in ticks:
        kind = "zero" if tick == 0 and low < 0 else "grid"
        svg.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        svg.append(f'<text x="{LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    svg.append(f'<text x="{LEFT}" y="{HEIGHT - 5}">0</text>')
    svg.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{last}</text>')
    svg += [line("a raw", raw), line("a", bold), line("b", second), "</svg>"]
    return f"<figure>{caption}{''.join(svg)}</figure>"


def _means(points: Points, most: int) -> Points:
    """Average neighbouring points so that at most `most` remain."""
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), max(1, size))]
    return [(sum(a for a, _ in group) / len(group), sum(b for _, b in group) / len(group)) for group in groups]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the least and the greatest value, a little apart where they are the same."""
    low, high = min(values), max(values)
    margin = 0.0 if high > low else abs(high) / 10 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers, evenly spaced, from at most `low` to at least `high`."""
    unit = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(unit * factor for factor in (1, 2, 5) if (high - low) / (unit * factor) <= 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]
