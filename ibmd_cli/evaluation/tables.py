"""How the figures of an evaluation are written: numbers, a sentence, and tables for a terminal.

`results` is the content of `results.json`, see `evaluation`; its part `metrics` says how each score is shown.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ibmd_cli.metrics.scores import FEWEST
from ibmd_cli.reporting import counted

ARROWS = {"low": "↓", "high": "↑", "": ""}
"""Where the better values of a score are."""

Data = Mapping[str, Any]


# ----------------------------------------------------------------------------------------------- numbers and words


def heading(metric: Data) -> str:
    """Name a score, its unit, and where its better values are."""
    return " ".join(part for part in (metric["label"], metric["unit"], ARROWS[metric["direction"]]) if part)


def number(value: float, metric: Data, sign: str = "") -> str:
    """Write a value as its score is shown, without a minus before zero."""
    return f"{round(metric['scale'] * value, metric['digits']) + 0.0:{sign}.{metric['digits']}f}"


def value(score: Data, metric: Data, sign: str = "") -> str:
    """Write the value of a score, with its deviation over seeds if there are several."""
    deviation = score.get("deviation")
    return number(score["value"], metric, sign) + ("" if deviation is None else f" ±{number(deviation, metric)}")


def interval(score: Data, metric: Data, sign: str = "") -> str:
    """Write the interval of a score, or nothing if it has none."""
    if score.get("low") is None:
        return ""
    return f"[{number(score['low'], metric, sign)},{number(score['high'], metric, sign)}]"


def named(row: Data) -> str:
    """Name a row: a model and its network calls."""
    return f"{row['label']}, {row['nfe']} NFE"


def verdict(gap: Data, metric: Data) -> str:
    """Say what a difference means: "better" or "worse" if its interval leaves zero out, else nothing."""
    if not metric["direction"] or gap.get("low") is None or gap["low"] <= 0 <= gap["high"]:
        return ""
    return "better" if (gap["value"] < 0) == (metric["direction"] == "low") else "worse"


def best(results: Data, name: str) -> list[int]:
    """Return the rows that are best by a score, as it is shown; none where no value is better."""
    metric = results["metrics"][name]
    shown = {i: float(number(row[name]["value"], metric)) for i, row in enumerate(results["rows"]) if name in row}
    if not metric["direction"] or len(shown) < 2:
        return []
    winner = min(shown.values()) if metric["direction"] == "low" else max(shown.values())
    return [i for i, one in shown.items() if one == winner]


def leading(results: Data) -> str | None:
    """Return the score that decides between models: the first one with better values, if there is one."""
    return next((name for name, metric in results["metrics"].items() if metric["direction"]), None)


def against_best(results: Data) -> list[Data]:
    """Return for each student its difference to the teacher at its best, by the leading score."""
    name, rows, found = leading(results), results["rows"], []
    if name is None:
        return []
    sign = 1 if results["metrics"][name]["direction"] == "low" else -1
    for student in range(len(rows)):
        gaps = [gap for gap in results["differences"] if gap["row"] == student and "teacher_nfe" in gap and name in gap]
        if gaps:
            found.append(min(gaps, key=lambda gap: sign * rows[gap["against"]][name]["value"]))
    return found


def sentence(results: Data, gap: Data) -> str:
    """Tell a difference of `against_best` in words."""
    name, student, teacher = leading(results), results["rows"][gap["row"]], results["rows"][gap["against"]]
    assert name is not None
    metric = results["metrics"][name]
    who = "the student" if student["label"] == "student" else student["label"]
    difference = f"The difference is {number(gap[name]['value'], metric, '+')}"
    if bounds := interval(gap[name], metric, "+"):
        found = {"better": f"in favour of {who}", "worse": "in favour of the teacher", "": "not resolved"}
        difference += f" {bounds}, {found[verdict(gap[name], metric)]}"
    own, best_of_teacher = value(student[name], metric), value(teacher[name], metric)
    return (
        f"The {metric['label']} of {who} is {own} with {evaluations(student['nfe'])} per image; "
        f"the teacher's best is {best_of_teacher} with {evaluations(teacher['nfe'])}. {difference}. {speed(who, gap)}."
    )


def speed(who: str, gap: Data) -> str:
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


def resolved(gap: Data) -> float | None:
    """Return how many times as fast a model is, or None if the timed calls or two digits show no difference."""
    ratio, spread = gap["speed_up"], gap["speed_up_range"]
    shown = spread is not None and not spread[0] <= 1 <= spread[1] and rounded(max(ratio, 1 / ratio)) != "1.0"
    return ratio if shown else None


def rounded(value: float) -> str:
    """Write a positive number with two digits that count."""
    short = float(f"{value:.2g}")
    digits = max(0, 1 - math.floor(math.log10(short))) if short else 0
    return f"{short:,.{digits}f}"


def between(ends: Sequence[float] | None) -> str:
    """Write a range of positive numbers, or nothing for None."""
    return "–".join(dict.fromkeys(map(rounded, ends))) if ends else ""


def evaluations(nfe: int) -> str:
    """Write a number of network calls."""
    return "one evaluation" if nfe == 1 else f"{nfe} evaluations"


def draws(settings: Data) -> str:
    """Write how many samples there are."""
    return "one sample each" if settings["samples"] == 1 else f"{settings['samples']} samples each"


def floors(results: Data) -> Iterator[str]:
    """Tell for each score that has a floor what real images get, so that the other values can be judged."""
    for name, floor in results["floor"].items():
        metric = results["metrics"][name]
        kind = f"real images, halves of {floor['images']}" if floor["kind"] == "halves" else "unrelated real images"
        yield f"{metric['label']} of {kind}: {value(floor, metric)} {interval(floor, metric)}".rstrip()


def costs(results: Data) -> dict[str, list["Cell"]]:
    """Write what the rows cost: kind of cost → a figure for each row."""
    rows = results["rows"]
    lines = {
        "ms/image": [Cell(rounded(row["ms_per_image"]), between(row["ms_range"])) for row in rows],
        "images/s": [Cell(rounded(row["images_per_second"])) for row in rows],
        "peak MiB": [EMPTY if row["peak_mib"] is None else Cell(f"{row['peak_mib']:,.0f}") for row in rows],
    }
    return {name: cells for name, cells in lines.items() if any(cell != EMPTY for cell in cells)}


def label(metric: Data) -> str:
    """Return the heading of a score, with an asterisk if `cautions` tells why it is not comparable."""
    return heading(metric) + ("*" if metric["not_comparable"] else "")


def legend(results: Data) -> Iterator[str]:
    """Tell which student is which if there are several, and what ± is if it is there."""
    students = {row["label"]: row["reference"] for row in results["rows"] if row["model"] == "student"}
    if len(students) > 1:
        yield from (f"{name}: {reference}" for name, reference in students.items())
    if (seeds := results["settings"]["seeds"]) > 1:
        yield f"±: standard deviation over {seeds} seeds"


def cautions(results: Data) -> Iterator[str]:
    """Tell why scores are not comparable with published figures, and what was not measured."""
    reasons: dict[str, list[str]] = {}
    for metric in results["metrics"].values():
        if metric["not_comparable"]:
            reasons.setdefault(metric["not_comparable"], []).append(metric["label"])
    if reasons:
        told = "; ".join(f"{', '.join(of)} ({why})" for why, of in reasons.items())
        yield f"* not comparable with published figures: {told}"
    yield from (f"not measured: {name}: {reason}" for name, reason in results["left_out"].items())


def conditions(results: Data) -> str:
    """Say under which conditions times were taken."""
    settings, threads = results["settings"], counted(results["settings"]["threads"], "thread")
    where = f"in batches of {settings['batch_size']} on {settings['device']}, {threads}"
    return f"times {where}; below them the range of the timed calls"


def intervals(results: Data) -> str:
    """Say what the brackets in the table are, or why there are none."""
    if any(
        isinstance(score, Mapping) and score.get("low") is not None for row in results["rows"] for score in row.values()
    ):
        return "[95 % interval]"
    return f"no intervals: {counted(results['settings']['images'], 'pair')}, {FEWEST} are needed"


# --------------------------------------------------------------------------------------------------------- tables


class Cell(NamedTuple):
    """A figure of a table.

    Attributes:
        text: the figure.
        small: stands below it.
        kind: "best", "better", "worse" or "".
    """

    text: str
    small: str = ""
    kind: str = ""


class Column(NamedTuple):
    """A column of a table: what it is of, in two lines, and a cell for each label."""

    head: str
    below: str
    cells: list[Cell]


class Figures(NamedTuple):
    """A table: labels of its rows, and its columns."""

    labels: list[str]
    columns: list[Column]


EMPTY = Cell("–")


def scores(results: Data) -> Figures:
    """Return the table of scores and costs, a column for each model."""
    metrics, spent = results["metrics"], costs(results)
    winners = {name: best(results, name) for name in metrics}
    columns = []
    for i, row in enumerate(results["rows"]):
        cells = [_cell(row.get(name), metrics[name], "best" if i in winners[name] else "") for name in metrics]
        columns.append(Column(row["label"], f"{row['nfe']} NFE", [*cells, *(line[i] for line in spent.values())]))
    return Figures([*map(label, metrics.values()), *spent], columns)


def floor_column(results: Data) -> list[Column]:
    """Return the column of what real images score, if anything is known of that."""
    if not results["floor"]:
        return []
    cells = []
    for name, metric in results["metrics"].items():
        floor = results["floor"].get(name)
        cell = _cell(floor, metric) if floor else Cell("")
        cells.append(cell._replace(small=f"{cell.small} {floor['kind']}".strip()) if floor else cell)
    return [Column("real images", "against real images", cells + [Cell("")] * len(costs(results)))]


def differences(results: Data) -> dict[int, Figures]:
    """Return the tables of differences: number of the row that others are subtracted from → a column for each other."""
    metrics, rows = results["metrics"], results["rows"]
    ratio = ["diversity, ratio"] if "diversity" in metrics else []
    tables: dict[int, Figures] = {}
    for gap in sorted(results["differences"], key=lambda gap: gap["row"]):
        other = rows[gap["against"]]
        cells = [
            _cell(gap.get(name), m, verdict(gap[name], m) if name in gap else "", "+") for name, m in metrics.items()
        ]
        if ratio:
            cells.append(EMPTY if gap["diversity_ratio"] is None else Cell(f"{gap['diversity_ratio']:.2f}×"))
        cells.append(Cell(f"{rounded(gap['speed_up'])}×", between(gap["speed_up_range"])))
        labels = [*map(label, metrics.values()), *ratio, "times as fast"]
        table = tables.setdefault(gap["row"], Figures(labels, []))
        table.columns.append(Column(f"{rows[gap['row']]['label']} −", named(other).replace(",", ""), cells))
    return tables


def _cell(score: Data | None, metric: Data, kind: str = "", sign: str = "") -> Cell:
    return Cell(value(score, metric, sign), interval(score, metric, sign), kind) if score else EMPTY


# ------------------------------------------------------------------------------------------------- on a terminal


def tables(results: Data) -> Group:
    """Lay out the results of `evaluate`: the scores of each model, the differences between models, and a sentence."""
    settings = results["settings"]
    title = f"{settings['data']}: {counted(settings['images'], 'pair')}, {draws(settings)}"
    notes = "\n".join([*legend(results), intervals(results), *floors(results), *cautions(results), conditions(results)])
    # texts, not strings, whose brackets would be taken for styles
    parts: list[RenderableType] = [Text(title, "bold"), Fitting(scores(results)), Text(notes, "dim")]
    if gaps := list(differences(results).values()):
        columns = [column for table in gaps for column in table.columns]
        parts += [Text("\ndifferences, on the same pairs", "bold"), Fitting(Figures(gaps[0].labels, columns))]
    parts += [Text("\n" + sentence(results, gap)) for gap in against_best(results)]
    return Group(*parts)


class Fitting:
    """A table that is cut into several, each with some of the columns, where the terminal is narrow.

    Args:
        table: what it holds.
    """

    STYLES = {"best": "bold", "better": "green", "worse": "red"}

    def __init__(self, table: Figures) -> None:
        self.labels, self.columns = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Yield as few tables as fit."""
        unbounded = options.update(width=10_000)
        for size in range(len(self.columns), 0, -1):
            parts = [self._table(self.columns[i : i + size]) for i in range(0, len(self.columns), size)]
            if all(console.measure(part, options=unbounded).maximum <= options.max_width for part in parts):
                break
        yield from parts

    def _table(self, columns: Sequence[Column]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
        table.add_column("")
        for column in columns:
            table.add_column(f"{column.head}\n{column.below}", justify="right")
        for i, name in enumerate(self.labels):
            table.add_row(name, *(self._text(column.cells[i]) for column in columns))
        return table

    def _text(self, cell: Cell) -> Text:
        text = Text(cell.text, self.STYLES.get(cell.kind, ""))
        return text.append("\n" + cell.small, "dim") if cell.small else text
