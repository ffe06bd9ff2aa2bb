"""Results of an evaluation: scores with intervals, differences on the same pairs, floors, and their protocols."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibmd_cli import __version__
from ibmd_cli.evaluation import protocols
from ibmd_cli.evaluation.measure import Entry, Measurement, Parts
from ibmd_cli.evaluation.protocols import Protocol
from ibmd_cli.method.noise import stream
from ibmd_cli.metrics.distances import Moments, frechet, frechet_terms, inception_score, kid_blocks, kid_floor, moments
from ibmd_cli.metrics.features import Network
from ibmd_cli.metrics.intervals import FEWEST, HALVINGS, Estimate, estimate
from ibmd_cli.metrics.scores import KID_IMAGES, METRICS
from ibmd_cli.reporting import counted

SHOWN = ("label", "unit", "scale", "digits", "direction", "paired")
"""What results tell of a score, for tables."""
FRECHET = ("fid", "fd_efflite0")

Targets = Callable[[str], tuple[Tensor, Moments]]
"""Name of a network → features of the targets, and their moments."""


def summarise(
    entries: Sequence[Entry],
    names: Sequence[str],
    measurement: Measurement,
    networks: Mapping[str, Network],
    parts: Parts,
    context: dict[str, Any],
    protocol: Protocol | None = None,
    reference: Moments | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Turn what was measured into scores with intervals, and into differences on the same pairs.

    Args:
        entries: the models.
        names: of the pairs.
        measurement: how it was measured.
        networks: by name.
        parts: what was measured.
        context: `command`, `settings` and `left_out` of the results.
        protocol: that was followed.
        reference: of the FID; None for the targets.

    Returns:
        The content of results.json, without `shown`; and the score of each image, `ROW.METRIC` → (N,).
    """
    settings = context["settings"]

    @cache
    def targets(network: str) -> tuple[Tensor, Moments]:
        features = parts.read(f"truth.{network}.features")
        return features, moments([features])

    terms = [_terms(k, measurement, parts, reference, targets) for k in range(len(entries))]
    rows = [_told(k, entry, scores, parts) for k, (entry, scores) in enumerate(zip(entries, terms, strict=True))]
    cautions = protocols.cautions(
        measurement.metrics,
        protocol,
        images=len(names),
        size=settings["size"][0],
        samples=settings["samples"],
        reference=Path(settings["reference"]) if settings["reference"] else None,
    )
    results = {
        "schema": 1,
        "ibmd_version": __version__,
        **context,
        "metrics": {
            name: {**{key: getattr(METRICS[name], key) for key in SHOWN}, "not_comparable": cautions[name]}
            for name in measurement.metrics
        },
        "protocol": _protocol_texts(measurement, networks, settings, protocol),
        "rows": rows,
        "differences": _compared(rows, terms),
        "floor": _floors(measurement, parts, targets),
        "shown_by": None,
        "shown": [],
    }
    paired = {
        f"{k}.{name}": values.mean(0)
        for k, scores in enumerate(terms)
        for name, values in scores.items()
        if METRICS[name].paired
    }
    return results, paired


def _told(k: int, entry: Entry, scores: Mapping[str, Tensor], parts: Parts) -> dict[str, Any]:
    """Return what is told of an entry: what it is, its scores, and what it costs."""
    calls = 1000 * parts.read(f"{k}.seconds")
    milliseconds = statistics.median(calls.tolist())
    ends = torch.tensor([0.1, 0.9] if len(calls) >= 10 else [0, 1], dtype=calls.dtype)
    return {
        "model": entry.kind,
        "label": entry.label,
        "reference": entry.reference,
        "sha256": entry.sha256,
        "nfe": entry.nfe,
        "samples": entry.samples,
        **{name: _score(name, values) for name, values in scores.items()},
        "ms_per_image": milliseconds,
        "ms_range": calls.quantile(ends).tolist() if len(calls) > 2 else None,
        "images_per_second": 1000 / milliseconds,
        "peak_mib": float(parts.read(f"{k}.peak").max()),
        "parameters": sum(p.numel() for p in entry.model.predictor.parameters()),
    }


def _terms(
    k: int, measurement: Measurement, parts: Parts, reference: Moments | None, targets: Targets
) -> dict[str, Tensor]:
    """Return the terms of each score of an entry, for each seed: (S, N), or (S, N, N) of distances of sets."""
    found: dict[str, Tensor] = {}
    for name in measurement.metrics:
        metric = METRICS[name]
        if metric.paired:
            found[name] = parts.read(f"{k}.{name}")
            continue
        seen = parts.read(f"{k}.{metric.network}.{metric.compares}")
        if metric.compares == "logits":
            by_seed = [torch.tensor([inception_score(x) for x in draws]).mean(0, True) for draws in seen]
        elif name == "fid" and reference:
            by_seed = [torch.stack([frechet_terms(x, moments([x]), reference, None) for x in s]).mean(0) for s in seen]
        else:
            truth, expected = targets(metric.network)
            if name in FRECHET:
                by_draw = [[frechet_terms(x, moments([x]), expected, truth) for x in draws] for draws in seen]
                by_seed = [torch.stack(draws).mean(0) for draws in by_draw]
            else:
                by_seed = [kid_blocks(draws, truth, measurement.seed, usual=name == "kid") for draws in seen]
        found[name] = torch.stack(by_seed)
    return found


def _estimate(name: str, terms: Tensor) -> dict[str, float | None]:
    """Estimate a score; the ends of its interval lie within the range of its values."""
    metric, found = METRICS[name], estimate(terms, METRICS[name].ends)
    if found.low is None or found.high is None:
        return found._asdict()
    return {"value": found.value, "low": max(found.low, metric.least), "high": min(found.high, metric.most)}


def _score(name: str, by_seed: Tensor) -> dict[str, float | None]:
    """Average over seeds: the interval is that of the images, the deviation that of the seeds."""
    score = _estimate(name, by_seed.mean(0))
    if len(by_seed) > 1:
        score["deviation"] = statistics.stdev(estimate(values).value for values in by_seed)
    return score


def _difference(name: str, gap: Tensor) -> dict[str, float | None]:
    """Estimate the difference of two scores, from the differences of their terms."""
    ends = METRICS[name].ends
    return estimate(gap, (ends[0] - ends[1], ends[1] - ends[0]) if ends else None)._asdict()


def _compared(rows: list[dict[str, Any]], terms: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Compare each student with the teacher at each number of calls, then students with each other."""
    students, teachers = ([k for k, row in enumerate(rows) if row["model"] == m] for m in ("student", "teacher"))
    differences = []
    for i, k in [*product(students, teachers), *combinations(students, 2)]:
        mine, other = rows[i], rows[k]
        spread, above, below = other.get("diversity", {}).get("value"), other["ms_range"], mine["ms_range"]
        differences.append(
            {
                "row": i,
                "against": k,
                **({"teacher_nfe": other["nfe"]} if k in teachers else {}),
                **{
                    name: _difference(name, values.mean(0) - terms[k][name].mean(0))
                    for name, values in terms[i].items()
                },
                "diversity_ratio": mine["diversity"]["value"] / spread if spread else None,
                "speed_up": other["ms_per_image"] / mine["ms_per_image"],
                "speed_up_range": [above[0] / below[1], above[1] / below[0]] if above and below else None,
            }
        )
    return differences


def _floors(measurement: Measurement, parts: Parts, targets: Targets) -> dict[str, Any]:
    """Return what real images score: halves of the targets against each other, or a target against another one."""
    floors: dict[str, Any] = {}
    keys = parts.keys()
    for name in measurement.metrics:
        metric = METRICS[name]
        if f"floor.{name}" in keys:
            unrelated = parts.read(f"floor.{name}")
            floors[name] = {**_estimate(name, unrelated), "images": len(unrelated), "kind": "unrelated"}
        elif metric.compares == "features":
            truth, _ = targets(metric.network)
            order = torch.randperm(len(truth), generator=stream(measurement.seed, "halves"))
            half = len(truth) // 2
            if name not in FRECHET:
                few = truth if half <= KID_IMAGES else truth[order[: 2 * KID_IMAGES]]
                found, half = kid_floor(few, HALVINGS, stream(measurement.seed, "floor")), len(few) // 2
            elif half >= metric.needs:
                found = Estimate(frechet(moments([truth[order[:half]]]), moments([truth[order[half : 2 * half]]])))
            else:
                continue
            floors[name] = {**found._asdict(), "images": half, "kind": "halves"}
    return floors


# ------------------------------------------------------------------------------------------------------ descriptions


def _protocol_texts(
    measurement: Measurement, networks: Mapping[str, Network], settings: Mapping[str, Any], protocol: Protocol | None
) -> dict[str, str]:
    """Return, for each score, all that has to be equal for two of its values to be comparable."""
    height, width = settings["size"]
    n, m, data = settings["images"], settings["samples"], settings["data"]
    made = f", sources by {settings['degrade']}" if settings["degrade"] else ""
    pixels = "truncated" if measurement.truncate else "rounded"
    images = (
        f"n={counted(n, 'pair')} of {data}{made}, m={counted(m, 'sample')} each (1 without randomness), "
        f"{width}×{height} RGB uint8, {pixels}"
    )
    texts = {
        "interval": "95 %, Student's t over pairs with a third of the degrees of freedom, as scores are skewed; none "
        f"of fewer than {FEWEST} pairs; differences are paired"
    }
    for name in measurement.metrics:
        metric = METRICS[name]
        parts = [metric.text.format(pool=measurement.pool)]
        if metric.network:
            parts.append(networks[metric.network].about)
        elif measurement.enlarge and metric.compares == "pixels":
            parts.append(f"after bilinear enlargement to {measurement.enlarge} px")
        if name == "fid":
            parts.append(f"reference {settings['reference'] or 'these targets'}")
        if not metric.paired:
            parts.append("n samples to n targets, mean over m" if name != "is" else "mean over m")
        texts[name] = "; ".join([*parts, images])
    texts["ms_per_image"] = (
        "median of timed calls, each model in turn after an unmeasured call of each, "
        f"{counted(settings['processes'], 'process')}, noise and copies included, files and features not; "
        "range: the middle 80 % of the calls, all of fewer than ten"
    )
    texts["peak_mib"] = (
        "weights, and the peak of one call on one batch above what the process held before, after a call of each model"
    )
    texts["floor"] = (
        "real against real: sets by random halves of the targets, whose sources differ, so that it varies more than a "
        "perfect model on the same sources would, and a Fréchet distance of fewer images is biased upwards; paired "
        "scores of a target against another one (unrelated)"
    )
    texts["data"] = (
        f"{protocol.name}: {protocol.images} images of {protocol.data}; split (not checked): {protocol.split}"
        if protocol
        else "none"
    )
    return texts
