"""How the figures of an evaluation are written: numbers, a sentence, and tables for a terminal.

`results` is the content of `results.json`; its part `metrics` says how each score is shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ibmd_cli.metrics.intervals import FEWEST
from ibmd_cli.reporting import counted, rounded

ARROWS = {"low": "↓", "high": "↑", "": ""}
"""Where the better values of a score are."""
STYLES = {"best": "bold", "better": "green", "worse": "red", "": ""}
"""Kind of a figure → its style on a terminal."""

Results = Mapping[str, Any]


# ----------------------------------------------------------------------------------------------- numbers and words


def heading_of(metric: Results) -> str:
    """Name a score, its unit, and where its better values are."""
    return " ".join(part for part in (metric["label"], metric["unit"], ARROWS[metric["direction"]]) if part)


def number(value: float, metric: Results, sign: str = "") -> str:
    """Write a value as its score is shown, without a minus before zero."""
    return f"{round(metric['scale'] * value, metric['digits']) + 0.0:{sign}.{metric['digits']}f}"


def value(score: Results, metric: Results, sign: str = "") -> str:
    """Write the value of a score, with its deviation over seeds if there are several."""
    deviation = score.get("deviation")
    return number(score["value"], metric, sign) + ("" if deviation is None else f" ±{number(deviation, metric)}")


def bounds(score: Results, metric: Results, sign: str = "") -> str:
    """Write the interval of a score, or nothing if it has none."""
    if score.get("low") is None:
        return ""
    return f"[{number(score['low'], metric, sign)},{number(score['high'], metric, sign)}]"


def named(row: Results) -> str:
    """Name a row: a model and its network calls."""
    return f"{row['label']}, {row['nfe']} NFE"


def verdict(gap: Results, metric: Results) -> str:
    """Say what a difference means: "better" or "worse" if its interval leaves zero out, else nothing."""
    if not metric["direction"] or gap.get("low") is None or gap["low"] <= 0 <= gap["high"]:
        return ""
    return "better" if (gap["value"] < 0) == (metric["direction"] == "low") else "worse"


def best(results: Results, name: str) -> list[int]:
    """Return the rows that are best by a score, as it is shown; none where no value is better."""
    metric = results["metrics"][name]
    shown = {i: float(number(row[name]["value"], metric)) for i, row in enumerate(results["rows"]) if name in row}
    if not metric["direction"] or len(shown) < 2:
        return []
    winner = min(shown.values()) if metric["direction"] == "low" else max(shown.values())
    return [i for i, one in shown.items() if one == winner]


def against_best(results: Results) -> list[tuple[Results, str]]:
    """Return for each student its difference to the teacher at its best, and the score that tells: the first one."""
    name = next((name for name, metric in results["metrics"].items() if metric["direction"]), None)
    found: dict[int, Results] = {}
    for gap in results["differences"] if name else ():
        if "teacher_nfe" in gap:
            sign = 1 if results["metrics"][name]["direction"] == "low" else -1
            both = (found.get(gap["row"], gap), gap)
            found[gap["row"]] = min(both, key=lambda one: sign * results["rows"][one["against"]][name]["value"])
    return [(gap, str(name)) for gap in found.values()]


def sentence(results: Results, gap: Results, name: str) -> str:
    """Tell a difference of `against_best` in words."""
    metric, student, teacher = results["metrics"][name], results["rows"][gap["row"]], results["rows"][gap["against"]]
    who = "the student" if student["label"] == "student" else student["label"]
    difference = f"The difference is {number(gap[name]['value'], metric, '+')}"
    if ends := bounds(gap[name], metric, "+"):
        found = {"better": f"in favour of {who}", "worse": "in favour of the teacher", "": "not resolved"}
        difference += f" {ends}, {found[verdict(gap[name], metric)]}"
    calls, most = ("one evaluation" if row["nfe"] == 1 else f"{row['nfe']} evaluations" for row in (student, teacher))
    return (
        f"The {metric['label']} of {who} is {value(student[name], metric)} with {calls} per image; "
        f"the teacher's best is {value(teacher[name], metric)} with {most}. {difference}. {speed(who, gap)}."
    )


def speed(who: str, gap: Results) -> str:
    """Say how much faster a model is than another one, as far as the timed calls of both tell."""
    spread = gap["speed_up_range"]
    if spread is None:
        return "There are too few timed calls to compare speeds"
    if (ratio := resolved(gap)) is None:
        return f"No difference in speed is resolved ({between(spread)} times as fast over the timed calls)"
    name = who[0].upper() + who[1:]
    if ratio > 1:
        return f"{name} is {rounded(ratio)} times as fast ({between(spread)} over the timed calls)"
    return f"{name} takes {rounded(1 / ratio)} times as long ({between([1 / end for end in spread[::-1]])})"


def resolved(gap: Results) -> float | None:
    """Return how many times as fast a model is, or None if the timed calls or two digits show no difference."""
    ratio, spread = gap["speed_up"], gap["speed_up_range"]
    shown = spread is not None and not spread[0] <= 1 <= spread[1] and rounded(max(ratio, 1 / ratio)) != "1.0"
    return ratio if shown else None


def between(ends: Sequence[float] | None) -> str:
    """Write a range of positive numbers, or nothing for None."""
    return "–".join(dict.fromkeys(map(rounded, ends))) if ends else ""


def sampled(settings: Results) -> str:
    """Write how many samples there are."""
    return "one sample each" if settings["samples"] == 1 else f"{settings['samples']} samples each"


def notes(results: Results) -> Iterator[str]:
    """Yield what one has to know to read the tables."""
    settings, metrics, rows = results["settings"], results["metrics"], results["rows"]
    students = {row["label"]: row["reference"] for row in rows if row["model"] == "student"}
    yield from (f"{label}: {reference}" for label, reference in students.items() if len(students) > 1)
    if any(row[name].get("low") is not None for row in rows for name in metrics if name in row):
        yield "below a value: [95 % interval]"
    else:
        yield f"no intervals: {counted(settings['images'], 'pair')}, {FEWEST} are needed"
    if settings["seeds"] > 1:
        yield f"±: standard deviation over {settings['seeds']} seeds"
    for name, floor in results["floor"].items():
        kind = f"real images, halves of {floor['images']}" if floor["kind"] == "halves" else "unrelated real images"
        metric = metrics[name]
        yield f"{metric['label']} of {kind}: {value(floor, metric)} {bounds(floor, metric)}".rstrip()
    reasons: dict[str, list[str]] = {}
    for metric in metrics.values():
        if metric["not_comparable"]:
            reasons.setdefault(metric["not_comparable"], []).append(metric["label"])
    if reasons:
        told = "; ".join(f"{', '.join(of)} ({why})" for why, of in reasons.items())
        yield f"* not comparable with published figures: {told}"
    yield from (f"not measured: {name}: {reason}" for name, reason in results["left_out"].items())
    times = f"times in batches of {settings['batch_size']} on {settings['device']}"
    known = [row["ms_range"] is not None for row in rows]
    spread = ("; below them the range of the timed calls" if any(known) else "") + (
        "" if all(known) else "; of fewer than three timed calls, no range and no comparison"
    )
    yield f"{times}, {counted(settings['threads'], 'thread')}{spread}"


# --------------------------------------------------------------------------------------------------------- tables


class Cell(NamedTuple):
    """A figure of a table.

    Attributes:
        text: the figure.
        small: stands below it.
        kind: key of `STYLES`.
    """

    text: str
    small: str = ""
    kind: str = ""

    def __rich__(self) -> Text:
        """Return it for a terminal."""
        text = Text(self.text, STYLES[self.kind])
        return text.append("\n" + self.small, "dim") if self.small else text


class Column(NamedTuple):
    """A column of a table: what it is of, in two lines, and a cell for each label."""

    head: str
    below: str
    cells: list[Cell]


class Figures(NamedTuple):
    """A table: labels of its rows, and its columns."""

    labels: list[str]
    columns: list[Column]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Yield as few tables as fit into a terminal, each with some of the columns."""
        for size in range(len(self.columns), 0, -1):
            parts = [self._part(self.columns[i : i + size]) for i in range(0, len(self.columns), size)]
            widths = [console.measure(part, options=options.update(width=10_000)).maximum for part in parts]
            if max(widths) <= options.max_width:
                break
        yield from parts

    def _part(self, columns: Sequence[Column]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
        table.add_column("")
        for column in columns:
            table.add_column(f"{column.head}\n{column.below}", justify="right")
        for i, label in enumerate(self.labels):
            table.add_row(label, *(column.cells[i] for column in columns))
        return table


EMPTY = Cell("–")


def _figure(score: Results | None, metric: Results, kind: str = "", sign: str = "") -> Cell:
    return Cell(value(score, metric, sign), bounds(score, metric, sign), kind) if score else EMPTY


def _labels(results: Results) -> list[str]:
    """Return the names of the scores, with an asterisk where `notes` tells why one is not comparable."""
    return [heading_of(metric) + ("*" if metric["not_comparable"] else "") for metric in results["metrics"].values()]


def score_table(results: Results, floors: bool = False) -> Figures:
    """Return the table of scores and costs: a column for each model and, with `floors`, one for real images."""
    metrics, rows = results["metrics"], results["rows"]
    costs = {
        "ms/image": [Cell(rounded(row["ms_per_image"]), between(row["ms_range"])) for row in rows],
        "images/s": [Cell(rounded(row["images_per_second"])) for row in rows],
        "peak MiB": [EMPTY if row["peak_mib"] is None else Cell(f"{row['peak_mib']:,.0f}") for row in rows],
    }
    costs = {name: cells for name, cells in costs.items() if any(cell != EMPTY for cell in cells)}
    winners = {name: best(results, name) for name in metrics}
    columns = []
    for i, row in enumerate(rows):
        cells = [_figure(row.get(name), metrics[name], "best" if i in winners[name] else "") for name in metrics]
        columns.append(Column(row["label"], f"{row['nfe']} NFE", [*cells, *(line[i] for line in costs.values())]))
    if floors and results["floor"]:
        real = [Cell("")] * (len(metrics) + len(costs))
        for i, (name, metric) in enumerate(metrics.items()):
            if floor := results["floor"].get(name):
                real[i] = Cell(value(floor, metric), f"{bounds(floor, metric)} {floor['kind']}".strip())
        columns.append(Column("real images", "against real images", real))
    return Figures([*_labels(results), *costs], columns)


def gap_tables(results: Results) -> dict[int, Figures]:
    """Return the tables of differences: number of the row that others are subtracted from → a column for each other."""
    metrics, rows, tables = results["metrics"], results["rows"], dict[int, Figures]()
    ratio = ["diversity, ratio"] if "diversity" in metrics else []
    for gap in sorted(results["differences"], key=lambda gap: gap["row"]):
        cells = [
            _figure(gap.get(name), metric, verdict(gap[name], metric) if name in gap else "", "+")
            for name, metric in metrics.items()
        ]
        if ratio:
            cells.append(EMPTY if gap["diversity_ratio"] is None else Cell(f"{gap['diversity_ratio']:.2f}×"))
        spread = gap["speed_up_range"]  # without one, the ratio may be chance
        cells.append(Cell(f"{rounded(gap['speed_up'])}×", between(spread)) if spread else EMPTY)
        table = tables.setdefault(gap["row"], Figures([*_labels(results), *ratio, "times as fast"], []))
        other = named(rows[gap["against"]]).replace(",", "")
        table.columns.append(Column(f"{rows[gap['row']]['label']} −", other, cells))
    return tables


def layout(results: Results) -> Group:
    """Lay out results for a terminal: the scores of each model, the differences between models, and a sentence."""
    settings = results["settings"]
    title = f"{settings['data']}: {counted(settings['images'], 'pair')}, {sampled(settings)}"
    # texts, not strings, whose brackets would be taken for styles
    parts: list[RenderableType] = [Text(title, "bold"), score_table(results), Text("\n".join(notes(results)), "dim")]
    if gaps := list(gap_tables(results).values()):
        columns = [column for table in gaps for column in table.columns]
        parts += [Text("\ndifferences, on the same pairs", "bold"), Figures(gaps[0].labels, columns)]
    parts += [Text("\n" + sentence(results, *gap)) for gap in against_best(results)]
    return Group(*parts)
