"""Results of an evaluation that nobody ran: small, with every case that a table, a chart or a page must show."""

from pathlib import Path
from typing import Any

from html_page import HOSTILE
from PIL import Image

METRICS = {
    # name: (label, unit, scale, digits, direction, paired, why it is not comparable)
    "energy_score": ("energy score", "", 1, 2, "low", True, "no published figure uses it"),
    "kid": ("KID", "×1000", 1000, 1, "low", False, None),
    "psnr": ("PSNR", "dB", 1, 2, "high", True, "no published figure uses it"),
    "fid": ("FID", "", 1, 1, "low", False, None),
    "diversity": ("diversity", "", 1, 3, "", True, None),
}
KEYS = ("label", "unit", "scale", "digits", "direction", "paired", "not_comparable")

MODELS = [("student A", 1), ("student B", 2), ("teacher", 1), ("teacher", 10), ("teacher", 100)]
VALUES = {
    "energy_score": [(2.06, 0.2), (2.46, 0.2), (2.72, 0.2), (2.0, 0.2), (2.001, 0.2)],
    "kid": [(0.0968, 0.01), (-0.00001, 0.01), (0.0744, 0.01), (0.14, 0.02), (0.115, 0.02)],
    "psnr": [(17.33, 0.6), (16.0, 0.6), (19.13, 0.6), (18.0, 0.6), (17.5, 0.6)],
    "fid": [(12.34, None), (15.0, None), (30.0, None), (12.0, None), (11.0, None)],
    "diversity": [(0.113, 0.01), (0.1, 0.01), (0.0, 0.0), (0.1, 0.01), (0.108, 0.01)],
}
GAPS = [(0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 4), (0, 1)]
"""Rows that are compared."""


def score(value: float, half: float | None) -> dict[str, float | None]:
    return {
        "value": value,
        "low": None if half is None else value - half,
        "high": None if half is None else value + half,
    }


def results(shown: int = 0) -> dict[str, Any]:
    """Return the content of results.json for two students and a teacher, and for `shown` sources of each kind."""
    rows = []
    for i, (label, nfe) in enumerate(MODELS):
        model, *_ = label.split()
        rows.append(
            {
                "model": model, "label": label, "reference": f"runs/{HOSTILE}" if i == 1 else f"builtin:{model}",
                "sha256": f"{i}" * 64, "nfe": nfe, "samples": 4 if nfe > 1 or model == "student" else 1,
                "ms_per_image": 2.5 * nfe, "ms_range": [2.4 * nfe, 2.6 * nfe],
                "images_per_second": 400 / nfe, "peak_mib": 512.4 if i else None,
                "parameters": 4_300_000, **{name: score(*VALUES[name][i]) for name in METRICS},
            }
        )  # fmt: skip
    rows[3]["fid"]["deviation"] = 0.25
    differences = []
    for row, against in GAPS:
        gap = {"row": row, "against": against, "diversity_ratio": None if against == 2 else 1.05}
        mine, other = rows[row], rows[against]
        gap["speed_up"] = other["ms_per_image"] / mine["ms_per_image"]
        gap["speed_up_range"] = [a / b for a, b in zip(other["ms_range"], mine["ms_range"][::-1], strict=True)]
        for name in METRICS:
            (value, half), (other, _) = VALUES[name][row], VALUES[name][against]
            gap[name] = score(value - other, half)
        if rows[against]["model"] == "teacher":
            gap["teacher_nfe"] = rows[against]["nfe"]
        differences.append(gap)
    settings = {
        "data": HOSTILE, "images": 1234, "size": [8, 8], "samples": 4, "seed": 0, "seeds": 1, "device": "cpu",
        "threads": 2, "processes": 1, "batch_size": 58, "protocol": None, "torch": "2.13", "reference": None,
        "degrade": None,
    }  # fmt: skip
    return {
        "schema": 1, "ibmd_version": "0.1.0", "command": f"ibmd eval --data '{HOSTILE}'", "settings": settings,
        "metrics": {name: dict(zip(KEYS, values, strict=True)) for name, values in METRICS.items()},
        "left_out": {"is": "needs 5,000 images, there are 1,234"},
        "protocol": {name: f"how {name} is measured on {HOSTILE}" for name in METRICS},
        "rows": rows, "differences": differences,
        "floor": {"kid": {**score(0.0, 0.02), "images": 617, "kind": "halves"},
                  "psnr": {**score(8.0, 1.0), "kind": "unrelated"}},
        "shown": [_entry(k, ("even", "best", "worst")[k // shown], rows) for k in range(3 * shown)],
        "shown_by": "psnr" if shown else None,
    }  # fmt: skip


def _entry(k: int, why: str, rows: list[dict]) -> dict[str, Any]:
    return {
        "name": HOSTILE if k == 1 else f"image-{k}", "why": why, "score": 10.0 + k,
        "source": f"images/source/{k:03}.png", "truth": f"images/truth/{k:03}.png",
        "rows": [[f"images/{i}/{k:03}.{z + 1}.png" for z in range(row["samples"])] for i, row in enumerate(rows)],
    }  # fmt: skip


def files(entry: dict[str, Any]) -> list[str]:
    """List the pictures of a source."""
    return [entry["source"], entry["truth"], *(file for draws in entry["rows"] for file in draws)]


def write_pictures(out: Path, results: dict[str, Any], side: int = 8) -> None:
    """Write a picture of one colour for each that is shown; no two are the same."""
    for number, file in enumerate(file for entry in results["shown"] for file in files(entry)):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (number % 256, number // 256, 128)).save(out / file)
