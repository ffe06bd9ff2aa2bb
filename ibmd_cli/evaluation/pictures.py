"""Pictures of an evaluation: a grid, and the images that a report shows, evenly spaced, best and worst.

They are translated again, because the pictures of all images would not fit anywhere: noise depends on seed, name and
sample alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ibmd_cli.data.pairs import Pairs, batches
from ibmd_cli.evaluation.measure import Entry, Measurement
from ibmd_cli.files import atomic_file
from ibmd_cli.images.decode import shown as printable
from ibmd_cli.images.fit import to_uint8
from ibmd_cli.images.grids import labelled_grid
from ibmd_cli.metrics.scores import METRICS

GRID_COLUMNS = 12
EXTREMES = 6
"""Best, and worst, images."""
AT_ONCE = 16
PREFERRED = ("lpips_vgg", "lpips_alex", "stlpips_alex", "efflite0_distance", "energy_score", "ssim", "psnr", "mse")
"""Paired scores, by the first of which images are best or worst."""


class Chosen(NamedTuple):
    """Images to be shown.

    Attributes:
        by: the paired score by which images are best or worst, or None.
        numbers: why → numbers of the pairs: "even", "best", "worst".
    """

    by: str | None
    numbers: dict[str, list[int]]


def choose(terms: Mapping[str, Tensor], count: int) -> Chosen:
    """Choose evenly spaced images, and those that are best and worst in the first row of the results.

    Args:
        terms: score of each image, `ROW.METRIC` → (N,).
        count: N.
    """
    even = torch.linspace(0, count - 1, min(count, GRID_COLUMNS)).round().long().tolist()
    by = next((name for name in PREFERRED if f"0.{name}" in terms), None)
    if by is None:
        return Chosen(None, {"even": even})
    order = terms[f"0.{by}"].argsort(descending=METRICS[by].direction == "high", stable=True).tolist()
    few = min(EXTREMES, count // 2)
    return Chosen(by, {"even": even, "best": order[:few], "worst": order[::-1][:few]})


def write(
    out: Path,
    chosen: Chosen,
    terms: Mapping[str, Tensor],
    entries: Sequence[Entry],
    pairs: Pairs,
    measurement: Measurement,
    device: torch.device,
) -> dict[str, Any]:
    """Write grid.png and images/: all draws of the evenly spaced images, and one of the best and worst.

    Returns:
        `shown_by` and `shown` of the results: each image with its files.
    """
    even = chosen.numbers["even"]
    others = sorted({row for rows in chosen.numbers.values() for row in rows} - set(even))
    files: dict[int, dict[str, Any]] = {}
    columns: dict[str, list[Tensor]] = {}
    for rows in _groups(even):
        pictures = _translate(rows, [entry.samples for entry in entries], entries, pairs, measurement, device)
        _save(out, rows, pictures, files)
        columns.setdefault("source", []).append(pictures.source)
        for k in _grid_rows(entries):
            columns.setdefault(f"{entries[k].label}, {entries[k].nfe} NFE", []).append(pictures.drawn[k][0])
        columns.setdefault("truth", []).append(pictures.truth)
    for rows in _groups(others):
        _save(out, rows, _translate(rows, [1] * len(entries), entries, pairs, measurement, device), files)
    with atomic_file(out / "grid.png") as new:
        labelled_grid({label: torch.cat(images) for label, images in columns.items()}).save(new, format="png")
    shown = [
        {
            "name": printable(pairs.names[row]),
            "why": why,
            "score": float(terms[f"0.{chosen.by}"][row]) if chosen.by else None,
            **files[row],
        }
        for why, rows in chosen.numbers.items()
        for row in rows
    ]
    return {"shown_by": chosen.by, "shown": shown}


def _groups(numbers: list[int]) -> list[list[int]]:
    return [[numbers[i] for i in rows] for rows in batches(len(numbers), AT_ONCE)] if numbers else []


def _grid_rows(entries: Sequence[Entry]) -> list[int]:
    """Choose the rows of the grid: the teacher at fewest and most calls, then the students."""
    teachers = [k for k, entry in enumerate(entries) if entry.kind == "teacher"]
    students = [k for k, entry in enumerate(entries) if entry.kind == "student"]
    return [*teachers[:1], *teachers[1:][-1:], *students]


class _Pictures(NamedTuple):
    """Sources, targets, and for each entry its draws, all uint8 (n, 3, H, W)."""

    source: Tensor
    truth: Tensor
    drawn: list[list[Tensor]]


def _translate(
    rows: list[int],
    draws: list[int],
    entries: Sequence[Entry],
    pairs: Pairs,
    measurement: Measurement,
    device: torch.device,
) -> _Pictures:
    """Translate a few sources again, with so many draws of each entry."""
    batch = pairs.read(rows)
    drawn = [
        [measurement.translate(entry, batch, device, 0, draw) for draw in range(count)]
        for entry, count in zip(entries, draws, strict=True)
    ]
    return _Pictures(to_uint8(batch.sources.x_T), batch.truth, drawn)


def _save(out: Path, rows: list[int], pictures: _Pictures, files: dict[int, dict[str, Any]]) -> None:
    """Write pictures, and note their files by the number of the pair."""

    def save(name: str, pixels: Tensor) -> str:
        with atomic_file(out / name) as new:
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(new, format="png")
        return name

    for i, row in enumerate(rows):
        name = f"{len(files):03d}"
        files[row] = {
            "source": save(f"images/source/{name}.png", pictures.source[i]),
            "truth": save(f"images/truth/{name}.png", pictures.truth[i]),
            "rows": [
                [save(f"images/{k}/{name}.{d + 1}.png", images[i]) for d, images in enumerate(draws)]
                for k, draws in enumerate(pictures.drawn)
            ],
        }
