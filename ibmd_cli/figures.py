"""How the figures of an evaluation are shown on a terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table


def tables(results: dict[str, Any]) -> Group:
    """Lay out the results of `evaluate`: the scores of each model, then the differences student − teacher."""
    settings, floor = results["settings"], results["floor"]["kid_efflite0"]
    scores = _table(
        f"{settings['data']}: {settings['images']} pairs, {settings['samples']} samples each",
        *("model", "NFE", "energy\nscore ↓", "kid_efflite0\n×1000 ↓", "efflite0_\ndistance ↓"),
        *("PSNR ↑", "diversity", "ms/image"),
    )
    for row in results["rows"]:
        scores.add_row(
            row["model"],
            str(row["nfe"]),
            _interval(row["energy_score"], 2),
            _interval(row["kid_efflite0"], 1, 1000),
            f"{row['efflite0_distance']['value']:.3f}",
            f"{row['psnr']['value']:.2f}",
            f"{row['diversity']['value']:.3f}",
            f"{row['ms_per_image']:.3g}",
        )
    scores.caption = (
        f"[95 % interval]; kid_efflite0 of real against real, halves of {floor['images']}: "
        f"{_interval(floor, 1, 1000)}\nms/image in batches of {settings['batch_size']} on {settings['device']}, "
        f"{settings['threads']} thread(s)"
    )
    if not results["differences"]:
        return Group(scores)
    gaps = _table(
        "student − teacher, on the same pairs",
        *("teacher at", "energy score", "kid_efflite0 ×1000", "diversity", "faster"),
    )
    for gap in results["differences"]:
        ratio = gap["diversity_ratio"]
        gaps.add_row(
            f"{gap['teacher_nfe']} NFE",
            _interval(gap["energy_score"], 3, sign="+"),
            _interval(gap["kid_efflite0"], 1, 1000, sign="+"),
            "–" if ratio is None else f"{ratio:.2f}×",
            f"{gap['speed_up']:.3g}×",
        )
    return Group(scores, "", gaps)


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", caption_justify="left", caption_style="dim",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False,
    )  # fmt: skip
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _interval(score: Mapping[str, float], digits: int, factor: float = 1, sign: str = "") -> str:
    """Write `value [low, high]`, without a minus before zero."""
    value, low, high = (f"{round(factor * score[k], digits) + 0.0:{sign}.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} [{low},{high}]"  # no space inside: a narrow terminal breaks before it
