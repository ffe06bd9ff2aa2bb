"""`run.html`: a run on one page, made of what is in its folder. One file, no scripts, nothing loaded from elsewhere."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from ibmd_cli.html import Chart, Line, Points, across, picture_uri, render, upwards, write_html
from ibmd_cli.training.heldout import verdict
from ibmd_cli.training.log import LAG, WINDOW, read_log

PREVIEWS = 6
"""On the page, evenly spaced over the run."""
WIDEST = 1024
"""Pixels; larger previews are scaled down."""
REFRESH = 30
"""Seconds after which a browser loads the page of a running run again."""


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
    lines, first, settings = read_log(out), read_log(out, "teacher.jsonl"), run["settings"]
    page = render(
        "run.html",
        title=f"{settings['teacher']} → {out.name}",
        status=status,
        refresh=REFRESH,
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        warnings=[
            *(text for line in (*first, *lines) for text in line.get("warnings", ())),
            *(f"teacher: {text}" for text in verdict(first) if lines or status == "finished"),
            *(f"student: {text}" for text in verdict(lines) if status == "finished"),
        ],
        facts=_latest(first, first[-1]["steps"], "teacher")
        if first and not lines
        else _latest(lines, settings["steps"]),
        halves=[
            {"player": player, "curves": _curves(player, log, status), "previews": _previews(out, prefix)}
            for player, log, prefix in (("teacher", first, "teacher"), ("student", lines, "step"))
        ],
        settings=[
            (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value), origin)
            for name, value in settings.items()
            for origin in [run["origins"].get(name, "default")]
        ],
        inputs=run.get("inputs", {}),
        version=run["ibmd_version"],
    )
    write_html(out / "run.html", page)


def _latest(lines: Sequence[Mapping[str, Any]], steps: int, player: str = "student") -> dict[str, str]:
    """Return the latest figures: what they are → the figures."""
    if not lines:
        return {f"{player} updates": f"0 of {steps}"}
    last, step = lines[-1], lines[-1]["step"]
    spent, left = (timedelta(seconds=round(last["seconds"] * share)) for share in (1, (steps - step) / step))
    return {
        f"{player} updates": f"{step} of {steps}",
        "time spent": str(spent),
        **({"time left, about": str(left)} if step < steps else {}),
        "images": f"{last['images']:,}",
        "peak memory": f"{last['peak_memory_bytes'] / 2**20:,.0f} MiB",
        "steps skipped": str(last["skipped"]),
    }


def _previews(out: Path, prefix: str) -> dict[int, str]:
    """Return some of the previews, newest first: step → address of the picture."""
    files = sorted((out / "previews").glob(f"{prefix}-*.png"), reverse=True)
    if len(files) > PREVIEWS:
        files = [files[round(i * (len(files) - 1) / (PREVIEWS - 1))] for i in range(PREVIEWS)]
    return {int(file.stem.removeprefix(f"{prefix}-")): picture_uri(file, WIDEST, WIDEST)[1] for file in files}


# --------------------------------------------------------------------------------------------------------- curves


class Figure(NamedTuple):
    """A figure of the page: its chart, or why there is none yet; `other` names the dashed line."""

    title: str
    note: str
    chart: Chart | None
    other: str
    missing: str


ONE = "at one call"
HELD_OUT: list[tuple[str, ...]] = [
    ("Energy score", "energy_score", "on held-out pairs; the least is kept", "energy_score_1", "", ONE),
    ("Squared error", "mse", "on held-out pairs", "mse_1", "", ONE),
]
CURVES: dict[str, list[tuple[str, ...]]] = {
    "teacher": [("Loss of the teacher", "loss"), ("Learning rate of the teacher", "lr")],
    "student": [
        ("Loss of the bridge model", "bridge_loss"),
        ("Loss of the student", "student_loss", "a difference: negative if the bridge model lags"),
        ("Lag of the bridge model", "bridge_lag", f"trouble above {LAG}", "", f"from step {WINDOW} on"),
        ("Diversity over z", "diversity", "mean deviation in [-1, 1]", "teacher_diversity", "with each preview"),
        ("Learning rate of the student", "lr"),
    ],
}
"""For each player the curves: title, name in the log, a note, the name of the dashed curve, why there is none yet."""


def _curves(player: str, lines: Sequence[Mapping[str, Any]], status: str) -> list[Figure]:
    """Return the curves of a half; those without values only while it runs, and scores only where there are any."""

    def curve(
        title: str, name: str, note: str = "", second: str = "", missing: str = "no values yet", other: str = "teacher"
    ) -> Figure:
        points, dashed = (
            [(line["step"], v) for line in lines if (v := line.get(key)) is not None] for key in (name, second)
        )
        if not points:
            return Figure(title, note, None, "", missing)
        raw, bold = _means(points, 600), _means(points, 40)
        x, y = across(0, points[-1][0]), upwards(value for _, value in (*bold, *dashed))
        drawn = [Line("a raw", raw), Line("a", bold), Line("b dashed", dashed)]
        return Figure(title, note, Chart(title, x, y, drawn), other if dashed else "", "")

    rows = [*CURVES[player], ("Images per second", "images_per_second")] if lines else []
    figures = [curve(*row) for row in [*rows, *HELD_OUT]]
    return [figure for figure in figures if figure.chart or (figure.missing and status == "running")]


def _means(points: Points, most: int) -> Points:
    """Average neighbouring points so that at most `most` remain."""
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(a for a, _ in group) / len(group), sum(b for _, b in group) / len(group)) for group in groups]
