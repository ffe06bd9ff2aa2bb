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

from ibmd_cli.data.pairs import Pairs
from ibmd_cli.evaluation.measure import Entry, Measurement
from ibmd_cli.files import atomic_file
from ibmd_cli.images.decode import shown as printable
from ibmd_cli.images.fit import to_uint8
from ibmd_cli.images.grids import labelled_grid
from ibmd_cli.metrics.scores import METRICS

GRID_COLUMNS = 12
EXTREMES = 6
"""Best, and worst, images."""
BATCH = 16
PREFERRED = ("lpips_vgg", "lpips_alex", "stlpips_alex", "efflite0_distance", "energy_score", "ssim", "psnr", "mse")
"""Paired scores, by the first of which images are best or worst."""


class Chosen(NamedTuple):
    """Images to be shown: numbers of their pairs."""

    by: str | None  # the paired score by which images are best or worst
    numbers: dict[str, list[int]]  # "even", "best" and "worst"


def choose(terms: Mapping[str, Tensor], count: int) -> Chosen:
    """Choose of N = `count` images evenly spaced ones, and those that are best and worst in the first row of results.

    The scores are `terms`, `ROW.METRIC` → (N,).
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
    chosen = choose(terms, len(pairs.names))
    even = chosen.numbers["even"]
    rows = [*even, *sorted({row for rows in chosen.numbers.values() for row in rows} - set(even))]
    teachers = [k for k, entry in enumerate(entries) if entry.kind == "teacher"]
    students = [k for k, entry in enumerate(entries) if entry.kind == "student"]
    in_grid = [*teachers[:1], *teachers[1:][-1:], *students]  # the teacher at fewest and most calls, then the students
    files: dict[int, dict[str, Any]] = {}
    grid: dict[str, list[Tensor]] = {}
    for some in (rows[i : i + BATCH] for i in range(0, len(rows), BATCH)):
        batch = pairs.read(some)
        most = max(entry.samples for entry in entries) if set(some) & set(even) else 1
        drawn = [
            [measurement.translate(entry, batch, device, 0, draw) for draw in range(min(most, entry.samples))]
            for entry in entries
        ]
        source = to_uint8(batch.sources.x_T)
        for i, row in enumerate(some):
            draws = [[images[i] for images in (each if row in even else each[:1])] for each in drawn]
            files[row] = _save(out, f"{len(files):03d}", source[i], batch.truth[i], draws)
            if row in even:
                models = {f"{entries[k].label}, {entries[k].nfe} NFE": draws[k][0] for k in in_grid}
                for label, image in {"source": source[i], **models, "truth": batch.truth[i]}.items():
                    grid.setdefault(label, []).append(image)
    with atomic_file(out / "grid.png") as new:
        labelled_grid({label: torch.stack(images) for label, images in grid.items()}).save(new, format="png")
    shown = []
    for why, numbers in chosen.numbers.items():
        for row in numbers:
            score = float(terms[f"0.{chosen.by}"][row]) if chosen.by else None
            shown.append({"name": printable(pairs.names[row]), "score": score, "why": why, **files[row]})
    return {"shown_by": chosen.by, "shown": shown}


def _save(out: Path, name: str, source: Tensor, truth: Tensor, draws: list[list[Tensor]]) -> dict[str, Any]:
    """Write the pictures of a pair, uint8 (3, H, W), and return their files: `draws` are those of each model."""

    def save(file: str, pixels: Tensor) -> str:
        with atomic_file(out / file) as new:
            Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(new, format="png")
        return file

    return {
        "source": save(f"images/source/{name}.png", source),
        "truth": save(f"images/truth/{name}.png", truth),
        "rows": [
            [save(f"images/{k}/{name}.{d + 1}.png", image) for d, image in enumerate(images)]
            for k, images in enumerate(draws)
        ],
    }
