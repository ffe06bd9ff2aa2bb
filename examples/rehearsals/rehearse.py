"""Rehearse the ten rows of Table 7 (arXiv:2502.01362v2) on photos of 32 pixels.

For each published teacher a narrow network of its kind (bridge, preconditioning, conditioning, classes, fill of holes)
is trained on squares of real photos, distilled by `ibmd distill --preset`, and measured on photos held out:

    python examples/rehearsals/rehearse.py                          all rows
    python examples/rehearsals/rehearse.py i2sb-jpeg-5-1step        one of them

Run the same command again to continue. Of the presets only what a short run needs is changed: batch, updates, learning
rates; for DDBM's rows also how times are drawn and weighted. The last step writes results.json, results.md and
results.png from the rows that are there.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from teaching import train

from ibmd_cli import __version__
from ibmd_cli.data.degradations import degrade, draw_masks, fill_hole
from ibmd_cli.images.decode import read_image
from ibmd_cli.images.find import find_images
from ibmd_cli.images.fit import to_uint8
from ibmd_cli.images.grids import labelled_grid
from ibmd_cli.method.distillation import Setup, Sources, bridge_loss
from ibmd_cli.method.noise import stream
from ibmd_cli.metrics import intervals, scores
from ibmd_cli.metrics.distances import kid_terms
from ibmd_cli.metrics.features import EffLite0
from ibmd_cli.models.folder import FORMAT_VERSION, load_model, save_model
from ibmd_cli.models.model import StudentModel, TeacherModel
from ibmd_cli.models.published_teachers import published
from ibmd_cli.networks.predictor import Predictor, make_predictor

SIZE = 32
"""Pixels."""
BATCH = 16
"""Squares per update of a teacher."""
NETWORK = {
    "model_channels": 24,
    "channel_mult": [1, 2, 3],
    "num_res_blocks": 1,
    "attention": [2, 4],
    "head_channels": 24,
    "norm_groups": 8,
    "patch_size": 2,
}
"""1.2 million parameters; the published ones have 295 to 554."""


@dataclass(frozen=True)
class Plan:
    """How a teacher is trained in small.

    Attributes:
        steps: updates.
        start: the teacher whose weights it starts from, as the published ones start from ADM's; "": from nothing.
        sources: kind of images that its sources are; "": photos, degraded.
    """

    steps: int
    start: str = ""
    sources: str = ""


TEACHERS = {
    "i2sb-jpeg-5": Plan(1500),
    "i2sb-jpeg-10": Plan(300, "i2sb-jpeg-5"),
    "i2sb-sr4x-bicubic": Plan(500, "i2sb-jpeg-5"),
    "i2sb-sr4x-pool": Plan(300, "i2sb-sr4x-bicubic"),
    "i2sb-inpaint-center": Plan(600, "i2sb-jpeg-5"),
    "ddbm-diode": Plan(5000, "i2sb-jpeg-5", sources="normals"),
    "ddbm-edges2handbags": Plan(3000, "ddbm-diode", sources="edges"),
    "dbim-imagenet-inpaint-center": Plan(600, "i2sb-inpaint-center"),
}


@dataclass(frozen=True)
class Row:
    """A row of Table 7, and what a short run needs of its own.

    Attributes:
        teacher: alias of the published teacher.
        nfe: network calls of the student.
        steps: student updates.
        settings: names of `DistillConfig`, and what they are in place of the preset's.
        start: the row whose student it starts from (`--init`); "": from the teacher. From there, a bridge model that is
            fitted to blurred first steps and sharp second ones leads a student of two steps astray for long.
    """

    teacher: str
    nfe: int
    steps: int
    settings: dict[str, Any]
    start: str = ""


RATES = {"batch_size": 8, "lr": 3e-4, "bridge_lr": 3e-4}
SLOWER = RATES | {"lr": 1e-4}
"""At 3e-4 the bridge model fell behind, as the log warned."""
SMALL_BATCH = {
    "batch_size": 16,
    "lr": 3e-4,
    "bridge_lr": 5e-4,
    "bridge_warmup": 40,
    "lr_warmup": 30,
    "lr_decay": "linear",
    "betas": [0.5, 0.99],
    "clip": 1.0,
    "t_even": True,
    "t_power": 1.5,
    "weight_power": 1,
    "noise_init": 0.01,
}
"""With which the embedded teacher is distilled in a hundred updates, see `presets.toml`."""
SECOND_STEP = {k: v for k, v in SMALL_BATCH.items() if k not in ("t_power", "weight_power")} | {"lr": 1e-4}
"""From a student of one step. Times near T are for one step: with them and 3e-4, a student of two steps diverged."""
ROWS = {
    f"{row.teacher}-{row.nfe}step": row
    for row in (
        Row("i2sb-jpeg-5", 1, 100, RATES),
        Row("i2sb-inpaint-center", 4, 50, RATES),
        Row("ddbm-edges2handbags", 2, 30, SECOND_STEP, "ddbm-edges2handbags-1step"),
        Row("dbim-imagenet-inpaint-center", 4, 200, SLOWER),
        Row("i2sb-sr4x-bicubic", 1, 100, RATES),
        Row("ddbm-diode", 2, 30, SECOND_STEP, "ddbm-diode-1step"),
        Row("ddbm-edges2handbags", 1, 100, SMALL_BATCH),
        Row("ddbm-diode", 1, 100, SMALL_BATCH),
        Row("i2sb-jpeg-10", 1, 100, RATES),
        Row("i2sb-sr4x-pool", 1, 100, RATES),
    )
}


class Photos:
    """The squares of one split, in memory as bytes, and their sources for a teacher."""

    def __init__(self, data: Path, split: str, alias: str) -> None:
        root = data / "photos" / split
        files = find_images(root)
        self.facts, self.names = published()[alias], [file.relative_to(root) for file in files]
        self.classes = sorted({name.parts[0] for name in self.names})
        self.labels = torch.tensor([self.classes.index(name.parts[0]) for name in self.names])
        self.targets = torch.stack([to_uint8(read_image(file)) for file in files])
        kind = TEACHERS[alias].sources
        self.sources = (
            torch.stack([to_uint8(read_image(data / kind / split / name)) for name in self.names]) if kind else None
        )

    def pairs(self, rows: Tensor, rng: torch.Generator, mirror: bool = False) -> tuple[Tensor, Sources]:
        """Return targets and sources by their numbers, half of them mirrored if `mirror`."""
        flip = torch.rand(len(rows), 1, 1, 1, generator=rng) < (0.5 if mirror else 0.0)

        def images(pixels: Tensor) -> Tensor:
            x = pixels[rows].float() / 127.5 - 1
            return torch.where(flip, x.flip(3), x)

        x_0, name = images(self.targets), self.facts["degradation"]
        label = self.labels[rows] if self.facts["classes"] else None
        if self.sources is not None:
            return x_0, Sources(images(self.sources), label)
        if self.facts["mask"] is None:
            return x_0, Sources(degrade(x_0, name), label)
        mask = draw_masks(name, len(x_0), SIZE, rng)
        return x_0, Sources(fill_hole(x_0, mask, self.facts["mask"]["fill"], rng), label, mask)

    def chosen(self, per_photo: int) -> tuple[Tensor, list[str]]:
        """Return the same number of squares of each photo that has so many, evenly spaced, and these photos."""
        of_photo: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            of_photo.setdefault(str(name).rsplit("-", 2)[0], []).append(i)
        enough = {photo: rows for photo, rows in of_photo.items() if len(rows) >= per_photo}
        picks = [[rows[k * len(rows) // per_photo] for k in range(per_photo)] for rows in enough.values()]
        return torch.tensor(picks).flatten(), list(enough)


def train_teacher(alias: str, args: argparse.Namespace) -> None:
    """Train the narrow relative of a published teacher and write its model folder, unless it is there."""
    folder, plan = args.out / alias, TEACHERS[alias]
    if (folder / "teacher").exists():
        return
    if plan.start:
        train_teacher(plan.start, args)
    print(f"{alias}: training the teacher", flush=True)
    photos, held_out = Photos(args.data, "train", alias), Photos(args.data, "test", alias)
    config = describe(alias, len(photos.classes))
    torch.manual_seed(0)
    predictor = make_predictor(config)
    if plan.start:
        start_from(predictor, args.out / plan.start / "teacher")
    setup = Setup(predictor.bridge, predictor.weight, timesteps=(predictor.bridge.T,))
    steps = max(1, round(args.scale * plan.steps))

    def draw(rng: torch.Generator) -> tuple[Tensor, Sources]:
        return photos.pairs(torch.randint(len(photos.names), (BATCH,), generator=rng), rng, mirror=True)

    def validate(average: Predictor) -> dict[str, float]:
        with torch.no_grad():
            x_0, batch = held_out.pairs(torch.arange(0, len(held_out.names), 8), stream(0, "validation"))
            return {"held_out_loss": float(bridge_loss(average, setup, x_0, batch, stream(0, "times")))}

    average = train(
        predictor, setup, draw, validate, folder / "training", steps=steps, lr=7e-4, seed=0, every=100, about={}
    )
    config["training"] = {"steps": steps, "batch_size": BATCH, "lr": 7e-4, "start": plan.start}
    save_model(TeacherModel(average, config), folder / "teacher")


def describe(alias: str, classes: int) -> dict[str, Any]:
    """Return the config.json of the narrow relative of a published teacher."""
    facts = published()[alias]
    network = {
        "in_channels": 6 if facts["conditional"] else 3,
        "out_channels": 3,
        **NETWORK,
        "attention_order": facts["attention_order"],
        "num_classes": classes if facts["classes"] else None,
    }
    return {
        "format": "ibmd-teacher",
        "format_version": FORMAT_VERSION,
        "ibmd_version": __version__,
        "name": f"{alias}-rehearsal",
        "task": facts["task"],
        "network": network,
        **{key: facts[key] for key in ("bridge", "preconditioning", "conditional", "mask", "degradation", "sampling")},
        "noise_channels": 0,
        "image": {"size": SIZE, "channels": 3, "range": [-1, 1], "source_scale": facts["source_scale"]},
        "classes": network["num_classes"],
        "licence": "trained on photos, public domain and CC BY-SA: see ATTRIBUTION.md of the data",
    }


def start_from(predictor: Predictor, folder: Path) -> None:
    """Take over the weights of another teacher; those for x_T that it has not are zero, those for classes stay."""
    state = predictor.state_dict()
    for name, value in load_model(str(folder), "teacher").predictor.state_dict().items():
        wider = state[name].zero_() if state[name].shape != value.shape else state[name]
        wider[tuple(slice(n) for n in value.shape)] = value


def distil(name: str, args: argparse.Namespace) -> None:
    """Run `ibmd distill` with the row's preset."""
    row = ROWS[name]
    if row.start:
        distil(row.start, args)
    folder = args.out / row.teacher
    kind = TEACHERS[row.teacher].sources or "photos"
    options = {
        "teacher": folder / "teacher",
        "preset": row.teacher,
        "data": args.data / kind / "train",
        "nfe": row.nfe,
        "steps": max(1, round(args.scale * row.steps)),
        "config": args.out / f"{name}.json",
        "checkpoint-every": 20,
        "preview-every": 100,
        "out": args.out / name,
    }
    if row.start:
        options["init"] = args.out / row.start
    options["config"].write_text(json.dumps(row.settings, indent=1) + "\n")
    command = ["ibmd", "distill", *(str(word) for key, value in options.items() for word in (f"--{key}", value))]
    print(" ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", "ibmd_cli", *command[1:], "--quiet"], check=True)


# ------------------------------------------------------------------------------------------------- measurement

SAMPLES = 2
PER_PHOTO = 12
TEACHER_CALLS = 10
SHOWN = 3
# KID, as the FID of the paper, compares sets: it punishes blur, which PSNR rewards, and noise, which the energy score
# of thousands of pixels forgives. It was chosen before any row was run.
MEASURES = {"kid_efflite0": "kid_efflite0 ×1000 ↓", "energy_score": "energy score ↓", "psnr": "PSNR ↑"}


def evaluate(name: str, args: argparse.Namespace) -> None:
    """Measure a student, and its teacher at 1 and 10 calls, on squares of the photos held out."""
    row, file = ROWS[name], args.out / name / "rehearsal.json"
    if file.exists():
        return
    photos = Photos(args.data, "test", row.teacher)
    rows, names = photos.chosen(args.per_photo)
    student, teacher = load_model(str(args.out / name), "student"), load_model(str(args.out / row.teacher / "teacher"))
    assert isinstance(student, StudentModel)
    assert isinstance(teacher, TeacherModel)
    # DDBM's own sampler makes calls in groups of three.
    sampler = "dbim" if photos.facts["family"] == "ddbm" else None
    models: dict[str, Callable[[Sources, torch.Generator], Tensor]] = {
        "teacher1": lambda batch, rng: teacher.translate(batch, rng, 1, sampler),
        "student": student.translate,
        "teacher10": lambda batch, rng: teacher.translate(batch, rng, TEACHER_CALLS, sampler),
    }
    source = photos.pairs(rows, stream(0, "sources", 0))[1]
    truth = photos.targets[rows]
    samples = {
        model: torch.stack([translate_all(f, photos, rows, model, draw) for draw in range(SAMPLES)])
        for model, f in models.items()
    }

    def estimate(terms: Tensor) -> dict[str, Any]:
        """Estimate a mean over photos: the squares of one photo are not independent."""
        each = intervals.pseudo_values(terms) if terms.ndim == 2 else terms
        return intervals.estimate(each.unflatten(0, (-1, args.per_photo)).mean(1))._asdict()

    terms = {model: score(x, truth, hole=source.mask is not None) for model, x in samples.items()}
    result: dict[str, Any] = {"row": name, "nfe": row.nfe, "photos": len(names), "squares": len(rows)}
    for measure in terms["student"]:
        result[measure] = {m: estimate(terms[m][measure]) for m in models}
        for model in ("teacher1", "teacher10"):
            difference = terms["student"][measure] - terms[model][measure]
            result[measure][f"student − {model}"] = estimate(difference)
    log = [json.loads(line) for line in (args.out / name / "metrics.jsonl").read_text().splitlines()]
    result["steps"] = log[-1]["step"]
    picks = torch.linspace(0, len(rows) - 1, SHOWN + 2)[1:-1].round().long()
    shown = [to_uint8(source.x_T), *(samples[model][0] for model in models), truth]
    torch.save(torch.stack([x[picks] for x in shown], dim=1).flatten(0, 1), args.out / name / "shown.pt")
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def translate_all(
    translate: Callable[[Sources, torch.Generator], Tensor], photos: Photos, rows: Tensor, model: str, draw: int
) -> Tensor:
    """Translate squares, rounded to uint8 as a saved image would be."""
    results = []
    for i, part in enumerate(rows.split(64)):
        batch = photos.pairs(part, stream(0, "sources", draw))[1]
        results.append(to_uint8(translate(batch, stream(0, model, draw, i))))
    return torch.cat(results)


def features(images: Tensor) -> Tensor:
    """Return the features (N, D) of images, uint8 (N, 3, H, W)."""
    return torch.cat([network()(part).pooled for part in images.split(64)])


@cache
def network() -> EffLite0:
    return EffLite0()


def score(images: Tensor, true_images: Tensor, hole: bool) -> dict[str, Tensor]:
    """Return the terms of the measures; all but the KID of the hole alone, where there is one."""
    samples, truth = (x.float() / 127.5 - 1 for x in (images, true_images))
    if hole:
        half = slice(SIZE // 4, 3 * SIZE // 4)
        samples, truth = samples[..., half, half], truth[..., half, half]
    return {
        "kid_efflite0": 1000 * kid_terms(torch.stack([features(x) for x in images]), features(true_images)),
        "energy_score": scores.energy_score(samples, truth, pool=1),
        "psnr": scores.psnr(samples, truth),
        "diversity": scores.diversity(samples),
    }


def report(out: Path) -> str:
    """Write results.json, results.md and results.png of the rows that are there; return the table."""
    results = [json.loads(f.read_text()) for name in ROWS if (f := out / name / "rehearsal.json").exists()]
    heads = [f"{title}: teacher at 1 / student / teacher at {TEACHER_CALLS}" for title in MEASURES.values()]
    lines = [
        f"| row | updates | {heads[0]} | student − teacher at 1 | {heads[1]} | student − teacher at 1 | {heads[2]} |",
        "|---" * 7 + "|",
    ]
    for r in results:
        cells = [r["row"], r["steps"]]
        for measure, digits in zip(MEASURES, (0, 2, 1), strict=True):
            scores = r[measure]
            cells.append(" / ".join(f"{scores[m]['value']:.{digits}f}" for m in ("teacher1", "student", "teacher10")))
            if measure != "psnr":
                d = scores["student − teacher1"]
                ends = "" if d["low"] is None else f" [{d['low']:+.{digits}f}, {d['high']:+.{digits}f}]"
                cells.append(f"{d['value']:+.{digits}f}{ends}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    table = "\n".join(lines) + "\n"
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (out / "results.md").write_text(table)
    labelled_grid({r["row"]: torch.load(out / r["row"] / "shown.pt") for r in results}, side=64).save(
        out / "results.png"
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all; {', '.join(ROWS)}")
    parser.add_argument("--out", type=Path, default=Path("build/rehearsals"))
    parser.add_argument("--data", type=Path, help="of make_photos.py, which is run if need be; default OUT/data")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all numbers of updates")
    parser.add_argument("--per-photo", type=int, default=PER_PHOTO, help="squares of each photo that are measured")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"no row {unknown[0]!r}: expected one of {', '.join(ROWS)}")
    args.data = args.data or args.out / "data"
    if not args.data.exists():
        make = [sys.executable, Path(__file__).with_name("make_photos.py"), "--threads", str(args.threads)]
        subprocess.run([*make, "--out", args.data], check=True)
    for name in args.rows or ROWS:
        train_teacher(ROWS[name].teacher, args)
        distil(name, args)
        evaluate(name, args)
        print(f"{name}: done; {sum(os.times()[:4]) / 60:.1f} minutes of CPU so far", flush=True)
    print(report(args.out))


if __name__ == "__main__":
    main()
