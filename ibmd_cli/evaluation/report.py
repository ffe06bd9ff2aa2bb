"""`report.html`: an evaluation on one page, made of `results.json` and the pictures beside it.

One file that loads nothing: pictures lie inside it, and the page forbids itself the network. It is complete without
its script (`assets/web/report.js`), on a phone and on paper.
"""

import base64
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ibmd_cli.evaluation import tables
from ibmd_cli.files import atomic_file
from ibmd_cli.html import Chart, Line, Mark, across, asset, data_uri, render, upwards

SHAPES = {
    "b": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "a": "M0-6 6 0 0 6-6 0z",
    "c": "M-5-5h10v10h-10z",
    "d": "M0-6 6 5H-6z",
}
"""CSS class of a colour → the mark that goes with it, an SVG path: the teacher's, then those of students in turn."""
MOST_BYTES = 8_000_000
"""Of all pictures on the page."""
WIDEST = 512
"""Pixels; wider pictures are scaled down."""
SMALL = 128
"""Pixels; pictures up to this size stay as they are and are enlarged by repetition of pixels."""
SEVERAL = 4
"""Sources of which several draws are shown."""

Data = Mapping[str, Any]


def write_report(out: Path, results: Data) -> None:
    """Write `report.html`, whole or not at all.

    Args:
        out: folder with the pictures that `results["shown"]` names.
        results: the content of `results.json`.
    """
    kinds, script = _kinds(results), asset("report.js")
    scores = tables.scores(results)
    albums = [album for album in (*_by_model(results), *_by_draw(results)) if album.rows]
    page = render(
        "report.html",
        results=results,
        settings=results["settings"],
        tables=tables,
        title=_title(results),
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        summaries=[(tables.sentence(results, gap), _facts(results, gap)) for gap in tables.against_best(results)],
        scores=scores._replace(columns=scores.columns + tables.floor_column(results)),
        notes=list(_notes(results)),
        differences={tables.named(results["rows"][i]): table for i, table in tables.differences(results).items()},
        kinds={label: (kind, SHAPES[kind]) for label, kind in kinds.items()},
        has_band=any(map(_band, results["floor"].values())),
        charts={name: _charts(results, kinds, name) for name in results["metrics"]},
        albums=albums,
        pictures=_embed(out, albums),
        student=next((i for i, head in enumerate(albums[0].heads) if head.startswith("student")), 1) if albums else 0,
        models=_models(results),
        texts={
            k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in results["settings"].items()
        },
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    with atomic_file(out / "report.html") as new:
        new.write_text(page, encoding="utf-8", errors="surrogateescape")


# ------------------------------------------------------------------------------------------------------- in words


def _title(results: Data) -> str:
    sides = []
    for model in ("student", "teacher"):
        names = dict.fromkeys(row["reference"] for row in results["rows"] if row["model"] == model)
        sides += [f"{model} {' and '.join(names)}"] if names else []
    return " against ".join(sides)


def _facts(results: Data, gap: Data) -> dict[str, str]:
    """Return the main figures of a comparison: what they are → the figures."""
    name = tables.leading(results)
    assert name is not None
    metric, row, teacher = results["metrics"][name], results["rows"][gap["row"]], results["rows"][gap["against"]]
    facts = {}
    if ratio := tables.resolved(gap):
        what = "speed" if ratio > 1 else "time"
        spread = gap["speed_up_range"] if ratio > 1 else [1 / end for end in gap["speed_up_range"][::-1]]
        facts[f"the {what} of the {tables.named(teacher)} ({tables.between(spread)})"] = (
            f"{tables.rounded(max(ratio, 1 / ratio))}×"
        )
    same = row["nfe"] == teacher["nfe"]
    facts["per image, as the teacher" if same else f"per image, instead of {teacher['nfe']} NFE"] = f"{row['nfe']} NFE"
    took, instead = (tables.rounded(one["ms_per_image"]) for one in (row, teacher))
    facts["per image" + (f", instead of {instead} ms" if ratio else "")] = f"{took} ms"
    bounds = tables.interval(gap[name], metric, "+")
    words = f"{tables.heading(metric)} minus the teacher's" + (f", 95 % interval {bounds}" if bounds else "")
    return facts | {words: tables.number(gap[name]["value"], metric, "+")}


def _notes(results: Data) -> Iterator[str]:
    """Yield what one has to know to read the table."""
    yield "↓ lower is better, ↑ higher is better. The best of a row is bold."
    yield f"Below a value: {tables.intervals(results)}"
    yield from tables.legend(results)
    if results["floor"]:
        yield (
            "Real images against real images: random halves of the truth (what chance alone makes of a perfect model), "
            "or unrelated images in pairs (what a model gets that ignores its source)."
        )
    yield tables.conditions(results)
    yield from tables.cautions(results)


def _models(results: Data) -> list[tuple[str, str]]:
    """Return the label of each model, and what it was loaded from."""
    calls: dict[tuple[str, str], list[str]] = {}
    for row in results["rows"]:
        about = f"{row['reference']}; SHA-256 {row['sha256']}, {row['parameters']:,} parameters"
        calls.setdefault((row["label"], about), []).append(str(row["nfe"]))
    return [(label, f"{about}; {', '.join(nfe)} NFE") for (label, about), nfe in calls.items()]


# --------------------------------------------------------------------------------------------------------- charts


def _kinds(results: Data) -> dict[str, str]:
    """Return for each model its colour: the teacher's always the same."""
    students = [row["label"] for row in results["rows"] if row["model"] == "student"]
    teacher, *others = SHAPES
    kinds = {"teacher": teacher} if len(students) < len(results["rows"]) else {}
    return kinds | {label: others[i % len(others)] for i, label in enumerate(students)}


def _band(floor: Data | None) -> list[float]:
    """Return the range of what real images score against real images."""
    shown = floor is not None and floor["kind"] == "halves" and floor.get("low") is not None
    return [floor["low"], floor["high"]] if floor is not None and shown else []


def _charts(results: Data, kinds: Mapping[str, str], name: str) -> dict[str, Chart]:
    """Return the charts of a score over network calls and over time: words for the axis → the chart."""
    metric, rows = results["metrics"][name], [row for row in results["rows"] if name in row]
    band = [metric["scale"] * end for end in _band(results["floor"].get(name))]
    values = [
        metric["scale"] * v for row in rows for v in map(row[name].get, ("low", "value", "high")) if v is not None
    ]
    charts = {}
    for key, words in (("nfe", "network evaluations per image"), ("ms_per_image", "ms per image")):
        x = across(min(row[key] for row in rows) / 1.6, max(row[key] for row in rows) * 1.6, log=True)
        teacher = sorted((row[key], metric["scale"] * row[name]["value"]) for row in rows if row["model"] == "teacher")
        marks = []
        for row in reversed(rows):  # students lie above
            kind, score = kinds[row["label"]], row[name]
            # a little aside, so that models with the same number of calls do not hide each other
            at = x(row[key]) - (6 * list(kinds).index(row["label"]) if key == "nfe" else 0)
            hint = f"{tables.named(row)}: {tables.value(score, metric)} {tables.interval(score, metric)}"
            low, high = (None if score.get(end) is None else metric["scale"] * score[end] for end in ("low", "high"))
            middle, level = metric["scale"] * score["value"], row["model"] == "student"
            marks.append(Mark(kind, SHAPES[kind], hint, at, middle, low, high, level))
        charts[words] = Chart(
            label=f"{metric['label']} against {key}",
            x=x,
            y=upwards([*values, *band]),
            lines=[Line(kinds["teacher"], teacher)] if teacher else [],
            marks=marks,
            band=(band[0], band[1]) if band else None,
        )
    return charts


# ------------------------------------------------------------------------------------------------------- pictures


class Picture(NamedTuple):
    """A picture in a table.

    Attributes:
        file: relative to the folder of the evaluation.
        alt: what it is.
        note: stands below it.
    """

    file: str
    alt: str
    note: str = ""


@dataclass
class Album:
    """Pictures of sources, a row each.

    Attributes:
        title: stands above it.
        heads: of the columns.
        rows: pictures, as many as heads.
        left_out: rows for which there was no room.
    """

    title: str
    heads: list[str]
    rows: list[list[Picture]]
    left_out: int = 0


def _by_model(results: Data) -> Iterator[Album]:
    """Yield the teacher at fewest and at most calls beside the students: for sources by chance, the best, the worst."""
    columns = [*_rows(results, "teacher")[:1], *_rows(results, "teacher")[1:][-1:], *_rows(results, "student")]
    names = [tables.named(results["rows"][i]) for i in columns]
    metric = results["metrics"].get(results["shown_by"])
    for why in ("even", "best", "worst"):
        album = Album("evenly spaced over the pairs", ["source", *names, "truth"], [])
        if why != "even":
            album.title = f"{why} {tables.heading(metric)} of {tables.named(results['rows'][0])}" if metric else why
        for entry in (entry for entry in results["shown"] if entry["why"] == why):
            files = [entry["rows"][i][0] for i in columns]
            scored = metric is not None and entry["score"] is not None and why != "even"
            note = tables.number(entry["score"], metric or {}) if scored else ""
            album.rows.append(_row(entry, names, files, columns.index(0), note))
        yield album


def _by_draw(results: Data) -> Iterator[Album]:
    """Yield for each student, and for the teacher at most calls, several draws of some sources."""
    for i in [*_rows(results, "student"), *_rows(results, "teacher")[-1:]]:
        entries = [entry for entry in results["shown"] if entry["why"] == "even" and len(entry["rows"][i]) > 1]
        name = tables.named(results["rows"][i])
        draws = [f"z {k + 1}" for k in range(len(entries[0]["rows"][i]))] if entries else []
        rows = [_row(entry, [f"{name}, {draw}" for draw in draws], entry["rows"][i]) for entry in entries[:SEVERAL]]
        yield Album(f"one source, several z: {name}", ["source", *draws, "truth"], rows)


def _rows(results: Data, model: str) -> list[int]:
    return [i for i, row in enumerate(results["rows"]) if row["model"] == model]


def _row(entry: Data, names: Sequence[str], files: Sequence[str], noted: int = 0, note: str = "") -> list[Picture]:
    """Return the pictures of a source: itself, files, the one of number `noted` with a note, and the truth."""
    name = entry["name"]
    middle = [Picture(file, f"{name}: {of}") for of, file in zip(names, files, strict=True)]
    if middle:
        middle[noted] = middle[noted]._replace(note=note)
    return [Picture(entry["source"], f"{name}: source", name), *middle, Picture(entry["truth"], f"{name}: truth")]


def _embed(out: Path, albums: Sequence[Album]) -> dict[str, tuple[bool, str]]:
    """Read the pictures, and shorten the albums until they fit on the page.

    Returns:
        file → whether its pixels are repeated, and its content as an address.
    """
    files = [picture.file for album in albums for row in album.rows for picture in row]
    images = {file: _image(out / file) for file in set(files)}
    share = MOST_BYTES / max(1, sum(len(images[file][1]) for file in files))
    for album in albums:
        room = max(1, min(len(album.rows), int(share * len(album.rows))))
        album.rows, album.left_out = album.rows[:room], len(album.rows) - room
    return images


def _image(file: Path) -> tuple[bool, str]:
    with Image.open(file) as image:
        if max(image.size) <= SMALL:
            return True, data_uri(file.read_bytes())
        image.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="webp", quality=90)
    return False, data_uri(buffer.getvalue(), "image/webp")
