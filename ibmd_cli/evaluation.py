"""`ibmd eval`: the student against its teacher on held-out pairs, with the same code, inputs and noise.

Every model translates the same sources; samples are rounded to uint8, as a saved image would be, before anything is
measured. Models take turns batch by batch, so that a change in the machine's load meets all of them, and the noise
of an image depends on seed, name and sample alone. Scores, intervals and differences: `metrics`.
"""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibmd_cli import __version__, metrics
from ibmd_cli.devices import resolve_device
from ibmd_cli.distillation import Sources
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.files import atomic_file
from ibmd_cli.images import find_images, read_image, shown, to_uint8
from ibmd_cli.metrics import EffLite0, estimate
from ibmd_cli.models import Model, Student, Teacher, load_model, sha256
from ibmd_cli.mosaics import Pairs, embedded_pairs, labelled_grid
from ibmd_cli.noise import stream
from ibmd_cli.reporting import Reporter
from ibmd_cli.teachers import load_teacher

MIN_IMAGES = 10
GRID_COLUMNS = 12
BUILTIN = "builtin:outline2emoji"


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, and how.

    Attributes:
        student: reference of the student, or "none".
        teacher: reference of the teacher, "none", or None for the one that the student was distilled from.
        teacher_nfe: numbers of network calls at which the teacher is sampled.
        preset: alias of the published teacher that a checkpoint is like, where its contents cannot tell.
        data: `builtin:NAME`, or a folder with the subfolders source/ and target/ of equal file names; None for the test
            pairs of the embedded teacher that is measured, or that the student was distilled from.
        samples: m, draws for each source (one for a model without randomness).
        batch_size: most images at a time.
        seed: of all randomness.
        device: name of the device.
        out: folder for results.json and grid.png, or None.
    """

    student: str = BUILTIN
    teacher: str | None = None
    teacher_nfe: tuple[int, ...] = (1, 5, 20, 100)
    preset: str | None = None
    data: str | None = None
    samples: int = 4
    batch_size: int = 64
    seed: int = 0
    device: str = "auto"
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.student == self.teacher == "none":
            raise UsageError("--student none --teacher none: nothing to evaluate: name one of them")
        if min(self.teacher_nfe, default=0) < 1:
            raise UsageError(f"--teacher-nfe {min(self.teacher_nfe, default=0)}: expected at least 1")
        if self.samples < 2:
            raise UsageError(f"--samples {self.samples}: the energy score and the diversity need at least 2")
        if self.batch_size < 1:
            raise UsageError(f"--batch-size {self.batch_size}: expected at least 1")


@dataclass
class Entry:
    """A model at a number of network calls, and what was measured of it.

    Attributes:
        model: teacher or student.
        reference: what it was loaded by.
        sha256: of its weights.
        nfe: network calls per image.
        samples: draws for each source.
        terms: score → its terms, batch by batch; see `metrics`.
        features: pooled features (m, B, D), batch by batch.
        seconds: per image, batch by batch.
        images: the first sample of each source, uint8 (B, 3, H, W), batch by batch.
    """

    model: Teacher | Student
    reference: str
    sha256: str
    nfe: int
    samples: int
    terms: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    features: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Return "teacher" or "student"."""
        return "teacher" if isinstance(self.model, Teacher) else "student"

    def translate(self, batch: Sources, rng: list[torch.Generator]) -> Tensor:
        """Translate sources; returns uint8 (B, 3, H, W) on the CPU."""
        if isinstance(self.model, Teacher):
            x_0 = self.model.translate(batch, rng, self.nfe).cpu()
        else:
            x_0 = self.model.translate(batch, rng).cpu()
        if not x_0.isfinite().all():
            raise IbmdError(f"{self.kind} {self.reference}: its output is not finite: the weights are damaged")
        return to_uint8(x_0)


def evaluate(config: EvalConfig, reporter: Reporter) -> dict[str, Any]:
    """Measure a student and its teacher on pairs.

    Args:
        config: what and how.
        reporter: for notes and progress.

    Returns:
        The content of results.json.

    Raises:
        NotAvailable: no such model or data, or the extra `eval` is not installed.
        IbmdError: pairs that do not match or are too few, images of another size than the models', `out` in use.
    """
    if config.out is not None and config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise IbmdError(f"{config.out}: exists and is not an empty folder; give another --out")
    device = resolve_device(config.device)
    network = EffLite0(device)
    entries = load_entries(config, device, reporter)
    data = config.data or _own_data(entries)
    pairs = load_pairs(data, entries[0].model.image_size)
    reporter.note(f"evaluating on {len(pairs.names)} pairs of {data}, device {device}")
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
    truth = measure(entries, pairs, network, config, device, reporter)
    results = {
        "schema": 1,
        "ibmd_version": __version__,
        "settings": {
            "data": data,
            "images": len(pairs.names),
            "size": list(pairs.x_0.shape[2:]),
            "samples": config.samples,
            "seed": config.seed,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "batch_size": len(entries[0].images[0]),
        },
        "protocol": metrics.protocols(data, pairs.x_0.shape, config.samples, _pool(entries)),
        **summarise(entries, truth, config.seed),
    }
    if config.out is not None:
        with atomic_file(config.out / "results.json") as new:
            new.write_text(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        with atomic_file(config.out / "grid.png") as new:
            labelled_grid(grid_rows(entries, pairs)).save(new, format="png")
        reporter.note(f"wrote {config.out / 'results.json'} and {config.out / 'grid.png'}")
    return results


def load_entries(config: EvalConfig, device: torch.device, reporter: Reporter) -> list[Entry]:
    """Load the models and list what is measured: the student, then the teacher at each number of calls."""
    entries = []
    reference, preset, recorded = config.teacher, config.preset, None
    if config.student != "none":
        student = load_model(config.student, "student")
        assert isinstance(student, Student)
        random = student.nfe > 1 or student.setup.noise_shape is not None
        samples = config.samples if random else 1
        entries.append(Entry(student, config.student, _digest(student), student.nfe, samples))
        if reference is None:
            reference, recorded = student.config["teacher"]["reference"], student.config["teacher"]["sha256"]
            preset = preset or student.config["training"].get("preset") or None
    if reference != "none":
        reference = reference or BUILTIN
        try:
            teacher = load_teacher(reference, preset=preset, quiet=reporter.quiet)
        except NotAvailable as error:
            if recorded is None:
                raise
            raise NotAvailable(f"the student's teacher: {error}; name it with --teacher (or none)") from error
        digest = _digest(teacher)
        if recorded not in (None, digest):
            reporter.warn(f"{config.student} was distilled from other weights of {reference} than are there now")
        for nfe in sorted({teacher.network_calls(nfe) for nfe in config.teacher_nfe}):
            entries.append(Entry(teacher, reference, digest, nfe, config.samples if nfe > 1 else 1))
    size = entries[0].model.image_size
    for entry in entries:
        if entry.model.config["classes"] or entry.model.config["mask"]:
            raise IbmdError(f"{entry.reference}: needs classes or masks, which pairs of images do not have")
        if (other := entry.model.image_size) != size:
            raise IbmdError(f"{entry.reference}: for images of {other}×{other}, the student for {size}×{size}")
        entry.model.to(device)
    return entries


def _digest(model: Model) -> str:
    assert model.weights is not None
    return sha256(model.weights)


def _pool(entries: list[Entry]) -> int:
    """Return the pooling of the energy score: none for super-resolution, whose sources give the pooled pixels away."""
    return 4 if entries[0].model.source_scale == 1 else 1


def _own_data(entries: list[Entry]) -> str:
    """Return the embedded data that belong to the models."""
    for entry in entries:
        reference = entry.reference if entry.kind == "teacher" else entry.model.config["teacher"]["reference"]
        if reference.startswith("builtin:"):
            return reference
    raise UsageError("--data: no test pairs belong to these models: give a folder with source/ and target/")


def load_pairs(data: str, size: int) -> Pairs:
    """Read pairs of `size` × `size` pixels: embedded ones, or a folder with source/ and target/.

    Raises:
        NotAvailable: there is nothing of that name.
        IbmdError: names that do not match, images of another size, too few pairs.
    """
    pairs = embedded_pairs(data.removeprefix("builtin:")) if data.startswith("builtin:") else read_pairs(Path(data))
    if len(pairs.names) < MIN_IMAGES:
        raise IbmdError(
            f"--data {data}: {len(pairs.names)} pairs are too few for kid_efflite0: {MIN_IMAGES} are needed"
        )
    height, width = pairs.x_0.shape[2:]
    if (height, width) != (size, size):
        raise IbmdError(f"--data {data}: images of {width}×{height}, but the model is for {size}×{size}")
    return pairs


def read_pairs(folder: Path) -> Pairs:
    """Read a folder of pairs: the images in source/ and target/, with equal names, all of one size."""
    sides = ("source", "target")
    files: dict[str, dict[str, Path]] = {}
    for side in sides:
        if not (root := folder / side).is_dir():
            raise NotAvailable(f"--data {folder}: no folder {root}; expected source/ and target/ in it")
        files[side] = {file.relative_to(root).as_posix(): file for file in find_images(root)}
    both = files["source"].keys() & files["target"].keys()
    lone = [f"{side}/{shown(name)}" for side in sides for name in sorted(files[side].keys() - both)]
    if lone:
        more = f" and {len(lone) - 5} more" if len(lone) > 5 else ""
        raise IbmdError(f"--data {folder}: no partner of equal name for {', '.join(lone[:5])}{more}")
    names = sorted(both)
    images: dict[str, list[Tensor]] = {side: [] for side in sides}
    for side in sides:
        for name in names:
            images[side].append(to_uint8(read_image(files[side][name])))
            if (shape := images[side][-1].shape) != (first := images["source"][0].shape):
                sizes = f"{shape[2]}×{shape[1]}, others of {first[2]}×{first[1]}"
                raise IbmdError(f"--data {folder}: {side}/{shown(name)} is of {sizes}: expected one size")
    return Pairs(names, *(torch.stack(images[side]) if names else torch.empty(0, 3, 0, 0) for side in sides))


def measure(
    entries: list[Entry], pairs: Pairs, network: EffLite0, config: EvalConfig, device: torch.device, reporter: Reporter
) -> Tensor:
    """Translate all sources with all entries, filling in what is measured; return the truth's features (N, D)."""
    features = []
    with reporter.progress("evaluating", sum(e.samples * e.nfe for e in entries) * len(pairs.names), "call") as meter:
        for i, (names, x_T, truth) in enumerate(_batches(pairs, config.batch_size)):
            batch = Sources(x_T.to(device))
            pooled, maps = network(truth)
            features.append(pooled)
            if i == 0:  # the first call of a network is slower: not timed
                for entry in {id(e.model): e for e in reversed(entries)}.values():
                    entry.translate(batch, [stream(0)] * len(names))
            for entry in entries:
                draws, found, distances = [], [], []
                for draw in range(entry.samples):
                    rng = [stream(config.seed, "eval", name, draw) for name in names]
                    began = time.perf_counter()
                    draws.append(entry.translate(batch, rng))
                    entry.seconds.append((time.perf_counter() - began) / len(names))
                    drawn, drawn_maps = network(_floats(draws[-1]))
                    found.append(drawn)
                    distances.append(metrics.map_distance(drawn_maps, maps).cpu())
                    meter.advance(len(names) * entry.nfe)
                samples = _floats(torch.stack(draws))
                entry.terms["energy_score"].append(metrics.energy_score(samples, truth, _pool(entries)))
                entry.terms["efflite0_distance"].append(torch.stack(distances).mean(0))
                entry.terms["psnr"].append(metrics.psnr(samples, truth))
                entry.terms["diversity"].append(metrics.diversity(samples))
                entry.features.append(torch.stack(found))
                entry.images.append(draws[0])
    return torch.cat(features)


def summarise(entries: list[Entry], truth: Tensor, seed: int) -> dict[str, Any]:
    """Turn the terms into scores with intervals, and into differences student − teacher.

    Args:
        entries: measured.
        truth: features of the true images (N, D).
        seed: of the bootstrap.
    """
    weights = metrics.resamples(len(truth), metrics.RESAMPLES, stream(seed, "bootstrap"))
    terms: list[dict[str, Tensor]] = []
    rows: list[dict[str, Any]] = []
    for entry in entries:
        scores = {name: torch.cat(parts) for name, parts in entry.terms.items()}
        scores["kid_efflite0"] = metrics.kid_terms(torch.cat(entry.features, dim=1), truth)
        terms.append(scores)
        rows.append(
            {
                "model": entry.kind,
                "reference": entry.reference,
                "sha256": entry.sha256,
                "nfe": entry.nfe,
                "samples": entry.samples,
                **{name: estimate(values, weights)._asdict() for name, values in scores.items()},
                "ms_per_image": 1000 * statistics.median(entry.seconds),
            }
        )
    differences = []
    for i, row in enumerate(rows):
        if rows[0]["model"] == "student" and row["model"] == "teacher":
            spread = row["diversity"]["value"]
            differences.append(
                {
                    "teacher_nfe": row["nfe"],
                    **{n: estimate(v - terms[i][n], weights)._asdict() for n, v in terms[0].items()},
                    "diversity_ratio": rows[0]["diversity"]["value"] / spread if spread > 0 else None,
                    "speed_up": row["ms_per_image"] / rows[0]["ms_per_image"],
                }
            )
    floor = metrics.kid_floor(truth, metrics.RESAMPLES, stream(seed, "floor"))
    floors = {"kid_efflite0": {**floor._asdict(), "images": len(truth) // 2}}
    return {"rows": rows, "differences": differences, "floor": floors}


def grid_rows(entries: list[Entry], pairs: Pairs) -> dict[str, Tensor]:
    """Choose what the grid shows, for evenly spaced names: source, teacher at fewest and most calls, student, truth."""
    n = len(pairs.names)
    chosen = torch.linspace(0, n - 1, min(n, GRID_COLUMNS)).round().long()
    teachers = [entry for entry in entries if entry.kind == "teacher"]
    shown = [*teachers[:1], *teachers[1:][-1:], *(entry for entry in entries if entry.kind == "student")]
    middle = {f"{entry.kind}, {entry.nfe} NFE": torch.cat(entry.images)[chosen] for entry in shown}
    return {"source": pairs.x_T[chosen], **middle, "truth": pairs.x_0[chosen]}


def _batches(pairs: Pairs, batch_size: int) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Yield names, sources and targets in batches of nearly equal size, images as floats in [-1, 1]."""
    count = -(-len(pairs.names) // batch_size)
    for rows in torch.arange(len(pairs.names)).chunk(count):
        yield [pairs.names[i] for i in rows], _floats(pairs.x_T[rows]), _floats(pairs.x_0[rows])


def _floats(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1
