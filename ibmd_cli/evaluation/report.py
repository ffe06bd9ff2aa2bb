"""`report.html`: an evaluation on one page, made of `results.json` and the pictures beside it.

One file that loads nothing: pictures lie inside it, and the page forbids itself the network. It is complete without
its script (`assets/web/report.js`), on a phone and on paper.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from ibmd_cli.evaluation import tables
from ibmd_cli.evaluation.album import picture_section
from ibmd_cli.files import atomic_file
from ibmd_cli.html import LEFT, RIGHT, WIDTH, Axis, across, asset, chart, polyline, upwards

SHAPES = {
    "b": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "a": "M0-6 6 0 0 6-6 0z",
    "c": "M-5-5h10v10h-10z",
    "d": "M0-6 6 5H-6z",
}
"""CSS class of a colour → the mark that goes with it, an SVG path: the teacher's, then those of students in turn."""

Data = Mapping[str, Any]


def write_report(out: Path, results: Data) -> None:
    """Write `report.html`, whole or not at all.

    Args:
        out: folder with the pictures that `results["shown"]` names.
        results: the content of `results.json`, see `evaluation`.
    """
    title = _title(results)
    script = asset("report.js")
    body = [
        *_summary(results, title),
        *_figures(results),
        *_charts(results),
        *picture_section(out, results),
        *_origins(results),
    ]
    parts = {
        "title": escape(title),
        "style": asset("style.css"),
        "script": script,
        "script_sha256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "body": "\n".join(body),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], asset("report.html"))
    with atomic_file(out / "report.html") as new:
        new.write_text(page, encoding="utf-8")


def _title(results: Data) -> str:
    names: dict[str, list[str]] = {"student": [], "teacher": []}
    for row in results["rows"]:
        if row["reference"] not in names[row["model"]]:
            names[row["model"]].append(row["reference"])
    sides = [f"{model} {' and '.join(found)}" for model, found in names.items() if found]
    return " against ".join(sides)


# ------------------------------------------------------------------------------------------------------- in words


def _summary(results: Data, title: str) -> Iterator[str]:
    settings = results["settings"]
    height, width = settings["size"]
    what = f"{settings['images']:,} pairs of {settings['data']}, {width}×{height} pixels"
    how = tables.draws(settings) + (f", protocol {settings['protocol']}" if settings["protocol"] else "")
    heading = escape(title).replace("/", "/<wbr>")  # where a long path may break
    yield f'<header><p class="kicker">ibmd eval: {escape(f"{what}, {how}")}</p><h1>{heading}</h1>'
    links = {"figures": "Figures", "charts": "Charts", "pictures": "Pictures", "origins": "How it was measured"}
    if not results["shown"]:
        del links["pictures"]
    yield "<nav>"
    yield from (f'<a href="#{name}">{text}</a>' for name, text in links.items())
    yield "</nav></header>"
    for gap in tables.against_best(results):
        yield f'<p class="lead">{_text(tables.sentence(results, gap))}</p><div class="facts">'
        for name, fact in _facts(results, gap).items():
            yield f"<div><b>{_text(fact)}</b><small>{_text(name)}</small></div>"
        yield "</div>"


def _facts(results: Data, gap: Data) -> dict[str, str]:
    """Return the main figures of a comparison: what they are → the figures."""
    name = tables.leading(results)
    assert name is not None
    metric, row, teacher = results["metrics"][name], results["rows"][gap["row"]], results["rows"][gap["against"]]
    bounds = tables.interval(gap[name], metric, "+")
    return {
        f"the speed of the {tables.named(teacher)}": f"{gap['speed_up']:.3g}×",
        f"per image, instead of {teacher['nfe']} NFE": f"{row['nfe']} NFE",
        f"per image, instead of {teacher['ms_per_image']:.3g} ms": f"{row['ms_per_image']:.3g} ms",
        f"{tables.heading(metric)} minus the teacher's" + (f", 95 % interval {bounds}" if bounds else ""): (
            tables.number(gap[name]["value"], metric, "+")
        ),
    }


def _text(text: str) -> str:
    """Escape a text, and set its numbers: true minus signs, and a space within intervals."""
    text = re.sub(r"\[([^][,]+),([^][,]+)\]", r"[\1, \2]", escape(text))
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)


# --------------------------------------------------------------------------------------------------------- tables


def _figures(results: Data) -> Iterator[str]:
    rows, metrics = results["rows"], results["metrics"]
    yield '<section id="figures"><h2>Figures</h2>'
    heads = [f"{escape(row['label'])}<br><small>{row['nfe']} NFE</small>" for row in rows]
    lines = {name: _scores(results, name) for name in metrics}
    if results["floor"]:
        heads.append("real images<br><small>against real images</small>")
        for name, cells in lines.items():
            floor = results["floor"].get(name)
            cells.append(_cell(floor, metrics[name], word=floor["kind"]) if floor else "<td></td>")
    empty = ["<td></td>"] * (len(heads) - len(rows))
    lines |= {name: [f"<td>{cost}</td>" for cost in line] + empty for name, line in tables.costs(results).items()}
    yield from _table(results, heads, lines)
    yield f'<ul class="note">{"".join(f"<li>{_text(note)}</li>" for note in _notes(results))}</ul>'
    if results["differences"]:
        yield from _differences(results)
    yield "</section>"


def _notes(results: Data) -> Iterator[str]:
    """Yield what one has to know to read the table."""
    yield "↓ lower is better, ↑ higher is better. The best of a row is bold; below a value is its 95 % interval."
    yield from tables.legend(results)
    if results["floor"]:
        yield (
            "Real images against real images: random halves of the truth (what chance alone makes of a perfect model), "
            "or unrelated images in pairs (what a model gets that ignores its source)."
        )
    yield tables.conditions(results)
    yield from tables.cautions(results)


def _scores(results: Data, name: str) -> list[str]:
    metric, winners = results["metrics"][name], tables.best(results, name)
    return [_cell(row.get(name), metric, "best" if i in winners else "") for i, row in enumerate(results["rows"])]


def _cell(score: Data | None, metric: Data, kind: str = "", sign: str = "", word: str = "") -> str:
    if score is None:
        return "<td>–</td>"
    small = " ".join(part for part in (tables.interval(score, metric, sign), word) if part)
    return f'<td class="{kind}">{_text(tables.value(score, metric, sign))}<small>{_text(small)}</small></td>'


def _differences(results: Data) -> Iterator[str]:
    """Yield a table for each model that others are subtracted from."""
    rows, metrics = results["rows"], results["metrics"]
    for first in sorted({gap["row"] for gap in results["differences"]}):
        gaps = [gap for gap in results["differences"] if gap["row"] == first]
        yield f"<h3>{escape(tables.named(rows[first]))}, minus the others on the same pairs</h3>"
        heads = [
            f"− {escape(rows[g['against']]['label'])}<br><small>{rows[g['against']]['nfe']} NFE</small>" for g in gaps
        ]
        lines = {}
        for name, metric in metrics.items():
            words = [tables.verdict(gap[name], metric) if name in gap else "" for gap in gaps]
            lines[name] = [_cell(gap.get(name), metric, word, "+", word) for gap, word in zip(gaps, words, strict=True)]
        if "diversity" in metrics:
            ratios = [gap["diversity_ratio"] for gap in gaps]
            lines["diversity, ratio"] = ["<td>–</td>" if r is None else f"<td>{r:.2f}×</td>" for r in ratios]
        lines["times as fast"] = [f"<td>{gap['speed_up']:.3g}×</td>" for gap in gaps]
        yield from _table(results, heads, lines)
    yield '<p class="note">Better or worse: the 95 % interval leaves zero out. Elsewhere no difference is resolved.</p>'


def _table(results: Data, heads: Sequence[str], lines: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield a table of figures: columns of HTML heads, and lines of cells by the name of a score or of a cost."""
    yield '<div class="scroll" tabindex="0"><table class="figures"><thead><tr><th></th>'
    yield from (f'<th scope="col">{head}</th>' for head in heads)
    yield "</tr></thead><tbody>"
    for name, cells in lines.items():
        metric = results["metrics"].get(name)
        label = tables.label(metric) if metric else name
        yield f'<tr data-name="{escape(name)}"><th scope="row">{escape(label)}</th>{"".join(cells)}</tr>'
    yield "</tbody></table></div>"


# --------------------------------------------------------------------------------------------------------- charts


def _charts(results: Data) -> Iterator[str]:
    kinds = _kinds(results)
    yield '<section id="charts"><h2>Quality against evaluations and time</h2><ul class="legend">'
    for label, kind in kinds.items():
        mark = f'<svg class="{kind}" viewBox="-10 -7 20 14"><path class="mark" d="{SHAPES[kind]}"/></svg>'
        yield f"<li>{mark}{escape(label)}</li>"
    if any(_has_band(floor) for floor in results["floor"].values()):
        mark = '<svg viewBox="0 0 20 14"><rect class="band" width="20" height="14"/></svg>'
        yield f"<li>{mark}real images against real images</li>"
    yield '</ul><div class="plots">'
    for name, metric in results["metrics"].items():
        caption = escape(tables.heading(metric))
        yield f'<figure class="pair"><figcaption>{caption}</figcaption>'
        for axis, text in (("nfe", "network evaluations per image"), ("ms_per_image", "ms per image")):
            yield f"<div>{_chart(results, kinds, name, axis)}<small>{text}</small></div>"
        yield "</figure>"
    yield '</div><p class="note">Bars: 95 % intervals. Dotted: the level of a student. Axes below: logarithmic.</p>'
    yield "</section>"


def _kinds(results: Data) -> dict[str, str]:
    """Return for each model its colour: the teacher's always the same."""
    students = [row["label"] for row in results["rows"] if row["model"] == "student"]
    teacher, *others = SHAPES
    kinds = {"teacher": teacher} if len(students) < len(results["rows"]) else {}
    return kinds | {label: others[i % len(others)] for i, label in enumerate(students)}


def _has_band(floor: Data) -> bool:
    return floor["kind"] == "halves" and floor.get("low") is not None


def _chart(results: Data, kinds: Mapping[str, str], name: str, axis: str) -> str:
    """Draw a score over the network calls or the time of each model."""
    metric, floor = results["metrics"][name], results["floor"].get(name)
    rows = [row for row in results["rows"] if name in row]
    band = [floor["low"], floor["high"]] if floor and _has_band(floor) else []
    values = [row[name].get(end) for row in rows for end in ("low", "value", "high")] + band
    x = across(min(row[axis] for row in rows) / 1.6, max(row[axis] for row in rows) * 1.6, log=True)
    y = upwards(metric["scale"] * value for value in values if value is not None)
    drawn = []
    if band:
        low, high = (y(metric["scale"] * end) for end in band)
        drawn.append(
            f'<rect class="band" x="{LEFT}" y="{high:.1f}" width="{x.end - x.start}" height="{low - high:.1f}"/>'
        )
    line = sorted((row[axis], metric["scale"] * row[name]["value"]) for row in rows if row["model"] == "teacher")
    if line:
        drawn.append(polyline(kinds["teacher"], x, y, line))
    for row in reversed(rows):  # students lie above
        # a little aside, so that models with the same number of calls do not hide each other
        at = x(row[axis]) - (6 * list(kinds).index(row["label"]) if axis == "nfe" else 0)
        drawn += _mark(row, kinds[row["label"]], name, metric, at, y)
    return chart(f"{metric['label']} against {axis}", x, y, drawn)


def _mark(row: Data, kind: str, name: str, metric: Data, at: float, y: Axis) -> Iterator[str]:
    """Draw the score of a row with its interval, and the level of a student."""
    score = row[name]
    height = y(metric["scale"] * score["value"])
    hint = f"{tables.named(row)}: {tables.value(score, metric)} {tables.interval(score, metric)}"
    yield f'<g class="{kind}"><title>{_text(hint)}</title>'
    if row["model"] == "student":
        yield f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
    if score.get("low") is not None:
        low, high = y(metric["scale"] * score["low"]), y(metric["scale"] * score["high"])
        yield f'<line class="bar" x1="{at:.1f}" x2="{at:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
    yield f'<path class="mark" d="{SHAPES[kind]}" transform="translate({at:.1f} {height:.1f})"/></g>'


# ----------------------------------------------------------------------------------------------- how it was measured


def _origins(results: Data) -> Iterator[str]:
    yield '<section id="origins"><h2>How it was measured</h2>'
    yield f"<p>To measure it again:</p><pre>{escape(results['command'])}</pre>"
    yield '<h3>Protocol</h3><dl class="protocol">'
    yield from (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in results["protocol"].items())
    yield "</dl><h3>Models</h3>"
    models: dict[tuple[str, ...], list[str]] = {}
    for row in results["rows"]:
        weights = f"SHA-256 {row['sha256']}, {row['parameters']:,} parameters"
        models.setdefault((row["label"], row["reference"], weights), []).append(str(row["nfe"]))
    yield '<table class="settings">'
    for (label, *facts), nfe in models.items():
        yield f"<tr><th>{escape(label)}</th><td>{escape('; '.join((*facts, ', '.join(nfe) + ' NFE')))}</td></tr>"
    yield '</table><h3>Settings</h3><table class="settings">'
    for name, setting in results["settings"].items():
        if setting is None:
            continue
        text = setting if isinstance(setting, str) else json.dumps(setting, ensure_ascii=False)
        yield f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>"
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    yield f'</table><p class="note">Written by ibmd {escape(results["ibmd_version"])} on {now}.</p></section>'
