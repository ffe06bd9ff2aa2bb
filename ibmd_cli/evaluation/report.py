"""`report.html`: an evaluation on one page, made of `results.json` and the pictures beside it.

One file that loads nothing: pictures lie inside it, and the page forbids itself the network. It is complete without
its script (`assets/web/report.js`), on a phone and on paper.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from ibmd_cli.evaluation import tables
from ibmd_cli.evaluation.tables import Results
from ibmd_cli.html import Chart, Line, Mark, across, asset, picture_uri, render, upwards, write_html
from ibmd_cli.reporting import rounded

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
UNSCALED = 128
"""Pixels; pictures up to this size stay as they are and are enlarged by repetition of pixels."""
SEVERAL = 4
"""Sources of which several draws are shown."""


def write_report(out: Path, results: Results) -> None:
    """Write `report.html`, whole or not at all.

    Args:
        out: folder with the pictures that `results["shown"]` names.
        results: the content of `results.json`.
    """
    script, rows = asset("report.js"), results["rows"]
    students = list(dict.fromkeys(row["label"] for row in rows if row["model"] == "student"))
    teacher, *others = SHAPES
    kinds = {"teacher": teacher} if len(students) < len(rows) else {}
    kinds |= {label: others[i % len(others)] for i, label in enumerate(students)}
    albums = [album for album in (*_by_model(results), *_by_draw(results)) if album.rows]
    settings = results["settings"]
    page = render(
        "report.html",
        results=results,
        settings=settings,
        tables=tables,
        title=_title(results),
        script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        summaries=[(tables.sentence(results, *gap), _summary(results, *gap)) for gap in tables.against_best(results)],
        scores=tables.score_table(results, floors=True),
        notes=list(tables.notes(results)),
        differences={tables.named(rows[i]): table for i, table in tables.gap_tables(results).items()},
        kinds={label: (kind, SHAPES[kind]) for label, kind in kinds.items()},
        has_band=any(map(_has_band, results["floor"].values())),
        charts={name: _charts(results, kinds, name) for name in results["metrics"]},
        albums=albums,
        pictures=_embed(out, albums),
        student=next((i for i, head in enumerate(albums[0].heads) if head.startswith("student")), 1) if albums else 0,
        models=_origins(results),
        texts={k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in settings.items()},
        now=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_html(out / "report.html", page)


def _title(results: Results) -> str:
    names: dict[str, dict[str, None]] = {"student": {}, "teacher": {}}
    for row in results["rows"]:
        names[row["model"]][row["reference"]] = None
    return " against ".join(f"{model} {' and '.join(found)}" for model, found in names.items() if found)


def _summary(results: Results, gap: Results, name: str) -> dict[str, str]:
    """Return the main figures of a comparison: what they are → the figures."""
    metric, row, teacher = results["metrics"][name], results["rows"][gap["row"]], results["rows"][gap["against"]]
    facts = {}
    if ratio := tables.resolved(gap):
        what, spread = "speed", gap["speed_up_range"]
        if ratio < 1:
            what, spread = "time", [1 / end for end in spread[::-1]]
        times = f"{rounded(max(ratio, 1 / ratio))}×"
        facts[f"the {what} of the {tables.named(teacher)} ({tables.between(spread)})"] = times
    same = row["nfe"] == teacher["nfe"]
    facts["per image, as the teacher" if same else f"per image, instead of {teacher['nfe']} NFE"] = f"{row['nfe']} NFE"
    took, instead = (rounded(one["ms_per_image"]) for one in (row, teacher))
    facts["per image" + (f", instead of {instead} ms" if ratio else "")] = f"{took} ms"
    ends = tables.bounds(gap[name], metric, "+")
    words = f"{tables.heading_of(metric)} minus the teacher's" + (f", 95 % interval {ends}" if ends else "")
    return facts | {words: tables.number(gap[name]["value"], metric, "+")}


def _origins(results: Results) -> list[tuple[str, str]]:
    """Return the label of each model, and what it was loaded from."""
    calls: dict[tuple[str, str], list[str]] = {}
    for row in results["rows"]:
        about = f"{row['reference']}; SHA-256 {row['sha256']}, {row['parameters']:,} parameters"
        calls.setdefault((row["label"], about), []).append(str(row["nfe"]))
    return [(label, f"{about}; {', '.join(nfe)} NFE") for (label, about), nfe in calls.items()]


# --------------------------------------------------------------------------------------------------------- charts


def _has_band(floor: Results | None) -> bool:
    """Tell whether the range of what real images score against real images is known."""
    return floor is not None and floor["kind"] == "halves" and floor.get("low") is not None


def _charts(results: Results, kinds: Mapping[str, str], name: str) -> dict[str, Chart]:
    """Return the charts of a score over network calls and over time: words for the axis → the chart."""
    metric, rows = results["metrics"][name], [row for row in results["rows"] if name in row]

    def ends(score: Results) -> list[float]:
        known = (score.get(end) for end in ("low", "value", "high"))
        return [metric["scale"] * end for end in known if end is not None]

    floor = results["floor"].get(name)
    band = ends(floor) if _has_band(floor) else []
    values = [end for row in rows for end in ends(row[name])]
    charts = {}
    for key, words in (("nfe", "network evaluations per image"), ("ms_per_image", "ms per image")):
        x = across(min(row[key] for row in rows) / 1.6, max(row[key] for row in rows) * 1.6, log=True)
        teacher = sorted((row[key], metric["scale"] * row[name]["value"]) for row in rows if row["model"] == "teacher")
        marks = []
        for row in reversed(rows):  # students lie above
            kind, score = kinds[row["label"]], row[name]
            # a little aside, so that models with the same number of calls do not hide each other
            at = x(row[key]) - (6 * list(kinds).index(row["label"]) if key == "nfe" else 0)
            hint = f"{tables.named(row)}: {tables.value(score, metric)} {tables.bounds(score, metric)}"
            level = metric["scale"] * score["value"]
            low, _, high = found if len(found := ends(score)) == 3 else (None, None, None)
            marks.append(Mark(kind, SHAPES[kind], hint, at, level, low, high, row["model"] == "student"))
        charts[words] = Chart(
            label=f"{metric['label']} against {key}",
            x=x,
            y=upwards([*values, *band]),
            lines=[Line(kinds["teacher"], teacher)] if teacher else [],
            marks=marks,
            band=(band[0], band[-1]) if band else None,
        )
    return charts


# ------------------------------------------------------------------------------------------------------- pictures


class Tile(NamedTuple):
    """A picture in an album: its file in the folder of the evaluation, what it is, and what stands below it."""

    file: str
    alt: str
    note: str = ""


@dataclass
class Album:
    """Pictures of sources, a row each, in columns with heads; `left_out` more rows found no room."""

    title: str
    heads: list[str]
    rows: list[list[Tile]]
    left_out: int = 0


def _by_model(results: Results) -> Iterator[Album]:
    """Yield the teacher at fewest and at most calls beside the students: for sources by chance, the best, the worst."""
    teachers = _numbers(results, "teacher")
    columns = [*teachers[:1], *teachers[1:][-1:], *_numbers(results, "student")]
    names = [tables.named(results["rows"][i]) for i in columns]
    metric = results["metrics"].get(results["shown_by"])
    for why in ("even", "best", "worst"):
        by = f"{why} {tables.heading_of(metric)} of {tables.named(results['rows'][0])}" if metric else why
        album = Album("evenly spaced over the pairs" if why == "even" else by, ["source", *names, "truth"], [])
        for entry in (entry for entry in results["shown"] if entry["why"] == why):
            tiles = _tiles(entry, names, [entry["rows"][i][0] for i in columns])
            if metric and why != "even" and entry["score"] is not None:
                scored = 1 + columns.index(0)
                tiles[scored] = tiles[scored]._replace(note=tables.number(entry["score"], metric))
            album.rows.append(tiles)
        yield album


def _by_draw(results: Results) -> Iterator[Album]:
    """Yield for each student, and for the teacher at most calls, several draws of some sources."""
    for i in [*_numbers(results, "student"), *_numbers(results, "teacher")[-1:]]:
        entries = [entry for entry in results["shown"] if entry["why"] == "even" and len(entry["rows"][i]) > 1]
        name = tables.named(results["rows"][i])
        draws = [f"z {k + 1}" for k in range(len(entries[0]["rows"][i]))] if entries else []
        rows = [_tiles(entry, [f"{name}, {draw}" for draw in draws], entry["rows"][i]) for entry in entries[:SEVERAL]]
        yield Album(f"one source, several z: {name}", ["source", *draws, "truth"], rows)


def _numbers(results: Results, model: str) -> list[int]:
    return [i for i, row in enumerate(results["rows"]) if row["model"] == model]


def _tiles(entry: Results, names: Sequence[str], files: Sequence[str]) -> list[Tile]:
    """Return the pictures of a source: itself, `files`, which show what `names` say, and the truth."""
    name = entry["name"]
    middle = [Tile(file, f"{name}: {of}") for of, file in zip(names, files, strict=True)]
    return [Tile(entry["source"], f"{name}: source", name), *middle, Tile(entry["truth"], f"{name}: truth")]


def _embed(out: Path, albums: Sequence[Album]) -> dict[str, tuple[bool, str]]:
    """Read the pictures, and shorten the albums until they fit on the page.

    Returns:
        file → whether its pixels are repeated, and its content as an address.
    """
    files = [tile.file for album in albums for row in album.rows for tile in row]
    images = {file: picture_uri(out / file, WIDEST, UNSCALED) for file in set(files)}
    share = MOST_BYTES / max(1, sum(len(images[file][1]) for file in files))
    for album in albums:
        room = max(1, min(len(album.rows), int(share * len(album.rows))))
        album.rows, album.left_out = album.rows[:room], len(album.rows) - room
    return images
