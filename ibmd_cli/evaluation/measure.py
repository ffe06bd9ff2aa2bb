"""What is measured of each batch of an evaluation, and the files in which it is kept until all are there."""

import ctypes
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, product
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ibmd_cli.data.pairs import Batch, Pairs, floats
from ibmd_cli.devices import forget_peak, peak_memory
from ibmd_cli.errors import IbmdError
from ibmd_cli.files import atomic_file
from ibmd_cli.images.fit import to_uint8
from ibmd_cli.method.distillation import Sources
from ibmd_cli.method.noise import stream
from ibmd_cli.metrics.features import Network, enlarged
from ibmd_cli.metrics.scores import METRICS
from ibmd_cli.models.model import StudentModel, TeacherModel
from ibmd_cli.reporting import Meter, Reporter, counted


@dataclass
class Entry:
    """A model at a number of network calls: a row of the results."""

    model: TeacherModel | StudentModel
    label: str  # "teacher", "student", "student A", …
    reference: str  # what it was loaded by
    sha256: str  # of its weights
    nfe: int  # network calls per image
    samples: int  # draws for each source

    @property
    def kind(self) -> str:
        """Return "teacher" or "student"."""
        return "teacher" if isinstance(self.model, TeacherModel) else "student"


@dataclass(frozen=True)
class Measurement:
    """How samples are drawn and compared."""

    metrics: tuple[str, ...]  # keys of `METRICS`
    seed: int = 0  # of all noise
    seeds: int = 1  # S, how many times all samples are drawn, with successive seeds
    pool: int = 4  # of the energy score
    truncate: bool = False  # samples become bytes by truncation, as in published evaluations, or are rounded
    enlarge: int | None = None  # side to which images lower than 256 pixels are enlarged before pixels are compared

    def translate(self, entry: Entry, batch: Batch, device: torch.device, number: int, draw: int) -> Tensor:
        """Draw sample `draw` of each source with seed `number`, both from 0; uint8 (B, 3, H, W) on the CPU.

        Raises:
            IbmdError: the output is not finite.
        """
        rng = [stream(self.seed + number, "eval", name, draw) for name in batch.names]
        given = batch.sources if entry.model.config["classes"] else batch.sources._replace(label=None)
        label, mask = (v if v is None else v.to(device) for v in given[1:])
        sources = Sources(given.x_T.to(device), label, mask)
        calls = (entry.nfe,) if isinstance(entry.model, TeacherModel) else ()
        x_0 = entry.model.translate(sources, rng, *calls).cpu()
        if not x_0.isfinite().all():
            raise IbmdError(f"{entry.kind} {entry.reference}: its output is not finite: the weights are damaged")
        return ((x_0 + 1) * 127.5).clamp(0, 255).to(torch.uint8) if self.truncate else to_uint8(x_0)


def measure(
    entries: list[Entry],
    pairs: Pairs,
    batches: list[list[int]],
    networks: Mapping[str, Network],
    measurement: Measurement,
    parts: "Parts",
    device: torch.device,
    reporter: Reporter,
    share: Sequence[int],
) -> None:
    """Measure batches of pairs, those that were not measured before.

    Args:
        entries: the models.
        pairs: the data.
        batches: numbers of the pairs of each batch.
        networks: by the names that `METRICS` has for them.
        measurement: how.
        parts: where it is kept.
        device: where models and networks run.
        reporter: for progress.
        share: numbers of the batches.
    """
    todo = [i for i in share if not parts.has(i)]
    calls = sum(entry.samples * entry.nfe for entry in entries) * measurement.seeds
    total, left = (sum(len(batches[i]) for i in some) for some in (share, todo))
    if left < total:
        reporter.note(f"{counted(total - left, 'pair')} measured before: continuing")
    peaks: list[float] = []
    with reporter.progress("evaluating", calls * total, "call", calls * (total - left)) as meter:
        for i in todo:
            batch = pairs.read(batches[i])
            peaks = peaks or _peaks(entries, batch, measurement, device)
            drawn, seconds = _take_turns(i, entries, batch, measurement, device, meter)
            part: dict[str, Tensor] = {}
            for k, peak in enumerate(peaks):
                part[f"{k}.seconds"] = torch.tensor(seconds[k], dtype=torch.float64)
                part[f"{k}.peak"] = torch.tensor([peak], dtype=torch.float64)
            part |= _compare_pixels(drawn, batch.truth, measurement)
            for name, network in networks.items():
                part |= _compare_seen(name, network, drawn, batch, measurement)
            parts.write(i, part)


def turns(count: int, number: int) -> list[int]:
    """Return the order of `count` models in round `number`: rotated every second round, reversed every other.

    So in 2 · `count` rounds each model stands twice at each position, and neighbours come equally often before and
    after each other.
    """
    order = [(k + number // 2) % count for k in range(count)]
    return order[::-1] if number % 2 else order


def _take_turns(
    number: int, entries: list[Entry], batch: Batch, measurement: Measurement, device: torch.device, meter: Meter
) -> tuple[list[Tensor], list[list[float]]]:
    """Draw all samples of a batch: one of each entry in turn, then the next of each.

    Returns:
        For each entry its samples, uint8 (S, m, B, 3, H, W), and the seconds per image of each call.
    """
    drawn: list[list[Tensor]] = [[] for _ in entries]
    seconds: list[list[float]] = [[] for _ in entries]
    most = max(entry.samples for entry in entries)
    for seed, draw in product(range(measurement.seeds), range(most)):
        for k in turns(len(entries), (number * measurement.seeds + seed) * most + draw):
            if draw < entries[k].samples:
                began = time.perf_counter()
                drawn[k].append(measurement.translate(entries[k], batch, device, seed, draw))
                seconds[k].append((time.perf_counter() - began) / len(batch.names))
                meter.advance(len(batch.names) * entries[k].nfe)
    return [torch.stack(images).unflatten(0, (measurement.seeds, -1)) for images in drawn], seconds


def _peaks(entries: list[Entry], batch: Batch, measurement: Measurement, device: torch.device) -> list[float]:
    """Call every entry once, so that no first call is measured; then measure the memory of each.

    Returns:
        MiB of the model of each entry: its weights, and the peak of a call above what the process held before. The
        lesser of two calls, in opposite orders, because what else the process does at the time only adds to it.
    """
    for entry in entries:
        measurement.translate(entry, batch, device, 0, 0)
    models = list({id(entry.model): entry for entry in reversed(entries)}.values())  # each at its fewest calls
    peaks = dict.fromkeys((id(entry.model) for entry in entries), math.inf)
    for entry in (*models, *reversed(models)):
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system: else it would hide the peak
        forget_peak(device)
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
        measurement.translate(entry, batch, device, 0, 0)
        weights = sum(p.numel() * p.element_size() for p in entry.model.predictor.parameters())
        peak = (max(0, peak_memory(device) - held) + weights) / 2**20
        peaks[id(entry.model)] = min(peaks[id(entry.model)], peak)
    return [peaks[id(entry.model)] for entry in entries]


def _compare_pixels(drawn: list[Tensor], truth: Tensor, how: Measurement) -> dict[str, Tensor]:
    """Return the scores of pixels: `ROW.METRIC` → (S, B), and `floor.METRIC` → (B,), a target against another one."""
    part: dict[str, Tensor] = {}
    y = floats(truth)
    large = enlarged(y, how.enlarge)
    of_draws, of_pixels = (
        {name: f for name in how.metrics if METRICS[name].compares == kind and (f := METRICS[name].function)}
        for kind in ("draws", "pixels")
    )
    for k, images in enumerate(drawn):
        by_seed = defaultdict(list)
        for samples in floats(images):
            for name, function in of_draws.items():
                by_seed[name].append(function(samples, y, how.pool))
            x = enlarged(samples.flatten(0, 1), how.enlarge).unflatten(0, samples.shape[:2])
            for name, function in of_pixels.items():
                by_seed[name].append(function(x, large))
        part |= {f"{k}.{name}": torch.stack(terms) for name, terms in by_seed.items()}
    if len(truth) > 1:
        other = large.roll(1, 0)[None]
        part |= {f"floor.{name}": function(other, large) for name, function in of_pixels.items()}
    return part


def _compare_seen(
    name: str, network: Network, drawn: list[Tensor], batch: Batch, how: Measurement
) -> dict[str, Tensor]:
    """Return what a network tells of a batch, for the scores that need it.

    `ROW.METRIC` → (S, B) and `floor.METRIC` → (B,); `ROW.NETWORK.features` and `.logits` → (S, m, B, D);
    `truth.NETWORK.features` → (B, D).
    """
    kinds = {METRICS[m].compares: m for m in how.metrics if METRICS[m].network == name}
    pieces: dict[str, list[Tensor]] = defaultdict(list)
    for rows in torch.arange(len(batch.truth)).split(network.at_once):
        truth = network(batch.truth[rows])
        label = batch.sources.label if name == "resnet50" else None
        if "classes" in kinds:
            expected = _known(truth.logits).argmax(1) if label is None else label[rows]
        if "features" in kinds:
            pieces[f"truth.{name}.features"].append(_known(truth.pooled))
        if "maps" in kinds and len(rows) > 1:
            others = [layer.roll(1, 0) for layer in truth.maps or []]
            pieces[f"floor.{kinds['maps']}"].append(network.distance(others, truth.maps or []))
        for k, images in enumerate(drawn):
            found: dict[str, list[Tensor]] = defaultdict(list)
            for x in images[:, :, rows].flatten(0, 1):
                seen = network(x)
                if "features" in kinds:
                    found[f"{name}.features"].append(_known(seen.pooled))
                if "logits" in kinds:
                    found[f"{name}.logits"].append(_known(seen.logits))
                if "maps" in kinds:
                    found[kinds["maps"]].append(network.distance(seen.maps or [], truth.maps or []))
                if "classes" in kinds:
                    found[kinds["classes"]].append((_known(seen.logits).argmax(1) == expected).float())
            for key, values in found.items():
                stacked = torch.stack(values).unflatten(0, images.shape[:2])
                pieces[f"{k}.{key}"].append(stacked if "." in key else stacked.mean(1))
    return {key: torch.cat(found, dim=_images_dim(key)) for key, found in pieces.items()}


def _images_dim(key: str) -> int:
    """Return the dimension of a tensor of a part that its images lie along."""
    return -2 if key.endswith((".features", ".logits")) else -1


def _known(values: Tensor | None) -> Tensor:
    assert values is not None
    return values


# ------------------------------------------------------------------------------------------------------------ parts


def _words(value: Any) -> str:
    value = ", ".join(map(str, value)) if isinstance(value, list) else value
    return "none" if value in (None, "") else str(value)


class Parts:
    """The files of an evaluation: one for each batch, and what they belong to.

    Args:
        folder: where they are.
        plan: all that the files depend on, flags first; files of another plan are never mixed with these.
        count: of batches.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], count: int) -> None:
        self.count = count
        self.folder, self.plan = folder, json.loads(json.dumps(plan))
        self.digest = sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    def begin(self) -> None:
        """Begin an evaluation, or continue one of the same plan.

        Raises:
            IbmdError: what is there is of another one; the message says in which respect.
        """
        file = self.folder / "plan.json"
        if not (any(self.folder.glob("*.safetensors")) and file.is_file()):
            with atomic_file(file) as new:
                new.write_text(json.dumps(self.plan, indent=2), encoding="utf-8")
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        if other := [key for key in self.plan if self.plan[key] != before.get(key)]:
            flags = [key for key in other if key.startswith("--") and key in before]  # which may be why others differ
            changes = [f"{key} {_words(before[key])} before, {_words(self.plan[key])} now" for key in flags]
            raise IbmdError(
                f"{self.folder.parent}: holds a part of another evaluation: "
                f"{'; '.join(changes) or 'other ' + ', '.join(other)}: "
                "give the same settings to continue it, or another --out"
            )

    def has(self, number: int) -> bool:
        """Tell whether a batch was measured by this plan."""
        try:
            with safe_open(self._file(number), framework="pt") as file:
                return (file.metadata() or {}).get("plan") == self.digest
        except (OSError, SafetensorError):
            return False

    def write(self, number: int, part: dict[str, Tensor]) -> None:
        """Keep what was measured of a batch."""
        with atomic_file(self._file(number)) as new:
            save_file({key: v.contiguous() for key, v in part.items()}, new, {"plan": self.digest})

    def keys(self) -> set[str]:
        """Return the names of what was measured."""
        with safe_open(self._file(0), framework="pt") as file:
            return set(file.keys())

    def batches(self, key: str) -> Iterator[Tensor]:
        """Yield what was measured of each batch."""
        for number in range(self.count):
            with safe_open(self._file(number), framework="pt") as file:
                if key in file.keys():  # noqa: SIM118
                    yield file.get_tensor(key)

    def read(self, key: str) -> Tensor:
        """Join what was measured of all batches."""
        dim = _images_dim(key)
        sizes = [batch.shape[dim] for batch in self.batches(key)]
        batches = self.batches(key)
        first = next(batches)
        whole = torch.empty([*first.shape[:dim], sum(sizes), *first.shape[dim:][1:]], dtype=first.dtype)
        for piece, batch in zip(whole.split(sizes, dim), chain([first], batches), strict=True):
            piece.copy_(batch)  # one by one, so that nothing is there twice
        return whole

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"
