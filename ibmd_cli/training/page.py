"""`run.html`: a run on one page, made of what is in its folder. One file, no scripts, nothing loaded from elsewhere."""

import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ibmd_cli.files import atomic_file
from ibmd_cli.html import Points, across, asset, chart, data_uri, polyline, upwards
from ibmd_cli.training.log import LAG, read_log

PREVIEWS = 6
"""On the page, evenly spaced over the run."""
WIDEST = 1024
"""Pixels; wider previews are scaled down."""
REFRESH = 30
"""Seconds after which a browser loads the page of a running run again."""

STYLE = """
img { max-width: 56rem } td:nth-child(2) { min-width: 5rem; overflow-wrap: anywhere } .default { color: var(--soft) }
small.b { white-space: nowrap }
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
    run = json.loads((out / "config.json").read_text(encoding="utf-8"))
    lines = read_log(out)
    settings = run["settings"]
    title = f"{settings['teacher']} → {out.name}"
    refresh = f'<meta http-equiv="refresh" content="{REFRESH}">' if status == "running" else ""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{refresh}',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{asset('style.css')}{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p><b>{escape(status)}</b> <small>at {now}",
        "; if this time stays, the run was killed, and the same command continues it" if status == "running" else "",
        "</small></p>",
        *(f'<p class="warning">{escape(text)}</p>' for line in lines for text in line.get("warnings", ())),
        *_facts(lines, settings["steps"]),
        *_charts(lines),
        *_previews(out),
        *_settings(settings, run["origins"]),
        *(f'<p class="note">{escape(name)}: {escape(found)}</p>' for name, found in run.get("inputs", {}).items()),
        f'<p class="note">ibmd {escape(run["ibmd_version"])}</p></body></html>\n',
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
        yield f'<figure><figcaption>step {step}</figcaption><img class="pixels" src="{data_uri(_png(file))}" '
        yield f'alt="source, teacher and student at step {step}"></figure>'


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
    x, y = across(0, points[-1][0]), upwards(value for _, value in (*bold, *second))
    lines = [polyline("a raw", x, y, raw), polyline("a", x, y, bold), polyline("b dashed", x, y, second)]
    return f"<figure>{caption}{chart(title, x, y, lines)}</figure>"


def _means(points: Points, most: int) -> Points:
    """Average neighbouring points so that at most `most` remain."""
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), max(1, size))]
    return [(sum(a for a, _ in group) / len(group), sum(b for _, b in group) / len(group)) for group in groups]
