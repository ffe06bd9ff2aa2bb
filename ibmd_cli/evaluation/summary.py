"""Results of an evaluation: scores with intervals, differences on the same pairs, floors, and their protocols."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibmd_cli import __version__
from ibmd_cli.evaluation import protocols
from ibmd_cli.evaluation.measure import Entry, Measurement, Parts
from ibmd_cli.evaluation.protocols import Protocol
from ibmd_cli.files import atomic_file
from ibmd_cli.images.decode import shown
from ibmd_cli.method.noise import stream
from ibmd_cli.metrics.distances import Moments, frechet, frechet_terms, inception_score, kid_blocks, kid_floor, moments
from ibmd_cli.metrics.features import Network
from ibmd_cli.metrics.scores import KID_IMAGES, METRICS, RESAMPLES, Estimate, estimate, resamples

MOST_WEIGHTS = 20_000_000
"""Of the bootstrap: fewer resamples are drawn of many images."""
FRECHET = ("fid", "fd_efflite0")


class Bootstrap:
    """The resamples, the same for all scores of as many terms, so that differences are of the same images."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.weights: dict[int, Tensor] = {}

    def __call__(self, terms: Tensor) -> Estimate:
        """Estimate the mean of terms; without an interval if there are fewer than three."""
        n = len(terms)
        if n < 3:
            return Estimate(float(terms.mean()))
        if n not in self.weights:
            repeats = max(200, min(RESAMPLES, MOST_WEIGHTS // n))
            self.weights[n] = resamples(n, repeats, stream(self.seed, "bootstrap"))
        return estimate(terms, self.weights[n])


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
    bootstrap = Bootstrap(measurement.seed)
    settings = context["settings"]
    laws: dict[str, Moments] = {}
    terms = [_terms(k, measurement, parts, reference, laws) for k in range(len(entries))]
    rows = []
    for k, (entry, scores) in enumerate(zip(entries, terms, strict=True)):
        milliseconds = 1000 * statistics.median(parts.read(f"{k}.seconds").tolist())
        rows.append(
            {
                "model": entry.kind,
                "label": entry.label,
                "reference": entry.reference,
                "sha256": entry.sha256,
                "nfe": entry.nfe,
                "samples": entry.samples,
                **{name: _score(values, bootstrap) for name, values in scores.items()},
                "ms_per_image": milliseconds,
                "images_per_second": 1000 / milliseconds,
                "peak_mib": float(parts.read(f"{k}.peak").max()),
                "parameters": sum(p.numel() for p in entry.model.predictor.parameters()),
            }
        )
    reference_path = settings["reference"]
    cautions = protocols.cautions(
        measurement.metrics,
        protocol,
        images=len(names),
        size=settings["size"][0],
        samples=settings["samples"],
        reference=Path(reference_path) if reference_path else None,
    )
    results = {
        "schema": 1,
        "ibmd_version": __version__,
        **context,
        "metrics": {name: _shown(name, cautions[name]) for name in measurement.metrics},
        "protocol": _protocol_texts(measurement, networks, settings, protocol),
        "rows": rows,
        "differences": _differences(rows, terms, bootstrap),
        "floor": _floors(measurement, parts, bootstrap),
        "shown_by": None,
        "shown": [],
    }
    paired = {
        f"{k}.{name}": torch.stack(list(values)).mean(0)
        for k, scores in enumerate(terms)
        for name, values in scores.items()
        if METRICS[name].paired
    }
    return results, paired


def _terms(
    k: int, measurement: Measurement, parts: Parts, reference: Moments | None, laws: dict[str, Moments]
) -> dict[str, list[Tensor]]:
    """Return the terms of each score of an entry, one tensor for each seed; `laws` keeps the targets' moments."""
    found: dict[str, list[Tensor]] = {}
    for name in measurement.metrics:
        metric = METRICS[name]
        if metric.paired:
            found[name] = list(parts.read(f"{k}.{name}"))
        elif metric.compares == "logits":
            logits = parts.read(f"{k}.{metric.network}.logits")
            found[name] = [torch.tensor([inception_score(x) for x in draws]).mean(0, True) for draws in logits]
        elif name in FRECHET:
            found[name] = _frechet(k, metric.network, parts, reference if name == "fid" else None, laws)
        else:
            features = parts.read(f"{k}.{metric.network}.features")
            truth = parts.read(f"truth.{metric.network}.features")
            found[name] = [kid_blocks(x, truth, measurement.seed, usual=name == "kid") for x in features]
    return found


def _frechet(k: int, network: str, parts: Parts, reference: Moments | None, laws: dict[str, Moments]) -> list[Tensor]:
    truth = None if reference else parts.read(f"truth.{network}.features")
    if truth is not None and network not in laws:
        laws[network] = moments([truth])
    law = reference or laws[network]
    by_seed = []
    for draws in parts.read(f"{k}.{network}.features"):
        by_seed.append(torch.stack([frechet_terms(x, moments([x]), law, truth) for x in draws]).mean(0))
    return by_seed


def _score(by_seed: list[Tensor], bootstrap: Bootstrap) -> dict[str, float | None]:
    """Average over seeds: the interval is that of the images, the deviation that of the seeds."""
    score: dict[str, float | None] = bootstrap(torch.stack(by_seed).mean(0))._asdict()
    if len(by_seed) > 1:
        score["deviation"] = statistics.stdev(bootstrap(values).value for values in by_seed)
    return score


def _differences(rows: list[dict[str, Any]], terms: list[dict[str, list[Tensor]]], bootstrap: Bootstrap) -> list[Any]:
    """Compare each student with the teacher at each number of calls, then students with each other."""
    students = [k for k, row in enumerate(rows) if row["model"] == "student"]
    teachers = [k for k, row in enumerate(rows) if row["model"] == "teacher"]
    compared = [(i, k) for i in students for k in teachers] + [(i, k) for i in students for k in students if i < k]
    differences = []
    for i, k in compared:
        means = [{name: torch.stack(values).mean(0) for name, values in terms[j].items()} for j in (i, k)]
        mine, other = rows[i], rows[k]
        spread = other.get("diversity", {}).get("value")
        differences.append(
            {
                "row": i,
                "against": k,
                **({"teacher_nfe": other["nfe"]} if k in teachers else {}),
                **{name: bootstrap(values - means[1][name])._asdict() for name, values in means[0].items()},
                "diversity_ratio": mine["diversity"]["value"] / spread if spread else None,
                "speed_up": other["ms_per_image"] / mine["ms_per_image"],
            }
        )
    return differences


def _floors(measurement: Measurement, parts: Parts, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return what real images score: halves of the targets against each other, or a target against another one."""
    floors: dict[str, Any] = {}
    keys = parts.keys()
    for name in measurement.metrics:
        metric = METRICS[name]
        if f"floor.{name}" in keys:
            unrelated = parts.read(f"floor.{name}")
            floors[name] = {**bootstrap(unrelated)._asdict(), "images": len(unrelated), "kind": "unrelated"}
        elif metric.compares == "features":
            truth = parts.read(f"truth.{metric.network}.features")
            order = torch.randperm(len(truth), generator=stream(measurement.seed, "halves"))
            half = len(truth) // 2
            if name in FRECHET:
                if half < metric.needs:
                    continue
                value = frechet(moments([truth[order[:half]]]), moments([truth[order[half : 2 * half]]]))
                floors[name] = {**Estimate(value)._asdict(), "images": half, "kind": "halves"}
            else:
                few = truth if half <= KID_IMAGES else truth[order[: 2 * KID_IMAGES]]
                found = kid_floor(few, RESAMPLES, stream(measurement.seed, "floor"))
                floors[name] = {**found._asdict(), "images": len(few) // 2, "kind": "halves"}
    return floors


# ------------------------------------------------------------------------------------------------------ descriptions


def _shown(name: str, caution: str | None) -> dict[str, Any]:
    """Return how a score is shown."""
    metric = METRICS[name]
    return {
        "label": metric.label,
        "unit": metric.unit,
        "scale": metric.scale,
        "digits": metric.digits,
        "direction": metric.direction,
        "paired": metric.paired,
        "not_comparable": caution,
    }


def _protocol_texts(
    measurement: Measurement, networks: Mapping[str, Network], settings: Mapping[str, Any], protocol: Protocol | None
) -> dict[str, str]:
    """Return, for each score, all that has to be equal for two of its values to be comparable."""
    height, width = settings["size"]
    n, m, data = settings["images"], settings["samples"], settings["data"]
    made = f", sources by {settings['degrade']}" if settings["degrade"] else ""
    pixels = "truncated" if measurement.truncate else "rounded"
    images = (
        f"n={n} pairs of {data}{made}, m={m} samples each (1 without randomness), {width}×{height} RGB uint8, {pixels}"
    )
    texts = {
        "interval": f"95 %, percentile bootstrap over pairs, {RESAMPLES} resamples (fewer of more than "
        f"{MOST_WEIGHTS // RESAMPLES} pairs); differences are paired"
    }
    for name in measurement.metrics:
        metric = METRICS[name]
        parts = [metric.text.format(pool=measurement.pool)]
        if metric.network:
            parts.append(networks[metric.network].about)
        elif measurement.enlarge and name in ("psnr", "ssim", "mse"):
            parts.append(f"after bilinear enlargement to {measurement.enlarge} px")
        if name == "fid":
            parts.append(f"reference {settings['reference'] or 'these targets'}")
        if not metric.paired:
            parts.append("n samples to n targets, mean over m" if name != "is" else "mean over m")
        texts[name] = "; ".join([*parts, images])
    texts["ms_per_image"] = (
        f"median over batches, {settings['processes']} process(es), noise and copies included, files and features not"
    )
    texts["peak_mib"] = "weights, and the peak of one call on one batch above what the process held before"
    texts["floor"] = (
        "real against real: sets by random halves of the targets, whose sources differ, so that it varies more than a "
        "perfect model on the same sources would, and a Fréchet distance of fewer images is biased upwards; paired "
        "scores of a target against another one (unrelated)"
    )
    texts["data"] = protocols.describe(protocol)
    return texts


def write_scores(file: Path, names: Sequence[str], terms: Mapping[str, Tensor]) -> None:
    """Write the score of each image, mean over draws, as CSV in UTF-8: name as in results.json, then `ROW.METRIC`."""
    with atomic_file(file) as new, new.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerow(["name", *terms])
        columns = [values.tolist() for values in terms.values()]
        writer.writerows([shown(name), *(f"{v:.6g}" for v in row)] for name, *row in zip(names, *columns, strict=True))
