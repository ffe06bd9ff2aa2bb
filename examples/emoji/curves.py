"""Held-out quality against student updates and against seconds, for several settings of `ibmd distill`.

Each setting is run with each seed, and the student of every checkpoint scored on the validation split of
`make_data.py`, on which the settings were chosen. Prints a table, writes `curves.json` and `curves.svg`. Run the same
command again to continue.

    python examples/emoji/curves.py --data build/emoji --work build/curves
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from train_teacher import TASKS, Pairs

from ibmd_cli.errors import UsageError
from ibmd_cli.files import atomic_file, read_json
from ibmd_cli.html import HEIGHT, LEFT, WIDTH, Chart, Line, across, draw, upwards
from ibmd_cli.method.distillation import Sources
from ibmd_cli.method.noise import stream
from ibmd_cli.metrics.scores import energy_score
from ibmd_cli.models.folder import load_model
from ibmd_cli.models.model import StudentModel
from ibmd_cli.models.references import load_teacher
from ibmd_cli.reporting import Reporter
from ibmd_cli.training.config import DistillConfig, changed_settings, load_presets
from ibmd_cli.training.loop import distill

TASK = "outline2emoji"
TEACHER = f"builtin:{TASK}"
CALLS = 20
"""Of the teacher, whose score is the line to reach."""
SAMPLES = 4
"""Draws of z for each source."""
PRESET = load_presets()[TEACHER]
COMMON = {"teacher": TEACHER, "data": (TEACHER,), "batch_size": 16, "recompute": False}
TIMES = {"t_power": 1.0, "t_even": False, "weight_power": 2.0}
"""Independent uniform times with the teacher's own weighting, as in the paper."""
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {"steps": 60, "checkpoint_every": 20},  # what is not named is the paper's
    "uniform-t": {**PRESET, **TIMES, "noise_init": 0.0, "steps": 200, "checkpoint_every": 40},
    "preset": {**PRESET, "checkpoint_every": 20},
}
KINDS = ("a", "b", "c", "d")
"""CSS classes of the settings, in their order, and of the teacher."""
STYLE = """
.a { color: #777 } .b { color: #b34e14 } .c { color: #1f66bd } .d { color: #147a4d }
text { font: 11px sans-serif; fill: #444 } .name { fill: currentColor; font-weight: bold } .grid { stroke: #ddd }
polyline { fill: none; stroke: currentColor; stroke-width: 2 } .raw { opacity: 0.4; stroke-width: 1 }
.dashed { stroke-dasharray: 5 4 } .label { text-anchor: middle }
"""

Curve = list[dict[str, float]]
"""A run: `step`, `seconds` and `energy_score` of each checkpoint."""


def run(out: Path, settings: dict[str, Any], x_0: Tensor, x_T: Tensor) -> Curve:
    """Distil with `settings`, or continue; score all checkpoints, then remove them: they take 120 MB each."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    config = DistillConfig(**values | {"keep": 10_000, "preview_every": 10_000})  # keep all, show none
    done = out / "curve.json"
    if done.exists() and (changed := changed_settings(config, read_json(out / "config.json")["settings"])):
        raise UsageError(f"{out}: a run with other settings ({'; '.join(changed)}); remove it, or give another --work")
    if not done.exists():
        distill(config, {}, out, torch.device("cpu"), "auto", Reporter(quiet=True))
        student = load_model(str(out / "student"), "student")
        assert isinstance(student, StudentModel)
        files = sorted((out / "checkpoints").glob("*/state.pt"))
        curve = [score(file, student, x_0, x_T) for file in files]
        with atomic_file(done) as new:
            new.write_text(json.dumps(curve))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return list(json.loads(done.read_text()))


def score(checkpoint: Path, student: StudentModel, x_0: Tensor, x_T: Tensor) -> dict[str, float]:
    """Put the averaged weights of a checkpoint into `student` and score it."""
    state = torch.load(checkpoint, weights_only=True)
    prefix, average = "module.", state["student"]["average"]
    weights = {name.removeprefix(prefix): v for name, v in average.items() if name.startswith(prefix)}
    student.predictor.load_state_dict(weights)
    value = energy(lambda batch, rng: student.translate(batch, rng), x_0, x_T)
    return {"step": state["step"], "seconds": state["seconds"], "energy_score": value}


def energy(translate: Callable[[Sources, torch.Generator], Tensor], x_0: Tensor, x_T: Tensor) -> float:
    """Mean energy score on pooled pixels; all models get the same random streams."""
    draws = [
        torch.cat([translate(Sources(x), stream(0, "curves", i, j)) for j, x in enumerate(x_T.split(64))])
        for i in range(SAMPLES)
    ]
    return float(energy_score(torch.stack(draws), x_0).mean())


def table(curves: dict[str, list[Curve]]) -> Iterator[str]:
    """Mean and deviation over the seeds at each checkpoint."""
    yield f"{'settings':<14} updates  seconds  energy score"
    for name, runs in curves.items():
        for points in zip(*runs, strict=True):
            scores = [point["energy_score"] for point in points]
            spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
            seconds = mean(point["seconds"] for point in points)
            yield f"{name:<14} {points[0]['step']:7}  {seconds:7.0f}  {mean(scores):.3f}{spread}"


def picture(curves: dict[str, list[Curve]], teacher: float) -> str:
    """Draw the energy score over updates and over seconds, as SVG: runs thin, their means bold, the teacher dashed."""
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {HEIGHT + 50}"><style>{STYLE}</style>',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    kinds = (*KINDS[: len(curves)], KINDS[-1])
    for i, (kind, name) in enumerate(zip(kinds, (*curves, f"teacher, {CALLS} calls"), strict=True)):
        svg.append(f'<text class="{kind} name" x="{LEFT + 145 * i}" y="18">{name}</text>')
    for i, (axis, label) in enumerate((("step", "student updates"), ("seconds", "seconds"))):
        place = f'x="{i * WIDTH}" y="28" width="{WIDTH}" height="{HEIGHT}"'
        svg.append(f"<svg {place}>{panel(curves, teacher, axis)}</svg>")
        svg.append(f'<text class="label" x="{(i + 0.5) * WIDTH}" y="{HEIGHT + 40}">energy score over {label}</text>')
    return "\n".join(svg) + "</svg>\n"


def panel(curves: dict[str, list[Curve]], teacher: float, axis: str) -> str:
    """Draw one chart."""
    points = [point for runs in curves.values() for run in runs for point in run]
    x = across(0, max(point[axis] for point in points))
    y = upwards([teacher, *(point["energy_score"] for point in points)])
    drawn = [Line(f"{KINDS[-1]} dashed", [(0, teacher), (x.high, teacher)])]
    for kind, runs in zip(KINDS, curves.values(), strict=False):
        lines = [[(point[axis], point["energy_score"]) for point in run] for run in runs]
        drawn += [Line(f"{kind} raw", line) for line in lines]
        means = [(mean(a for a, _ in group), mean(b for _, b in group)) for group in zip(*lines, strict=True)]
        drawn.append(Line(kind, means))
    return draw(Chart(f"energy score against {axis}", x, y, drawn))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"), help="of make_data.py")
    parser.add_argument("--work", type=Path, default=Path("build/curves"), help="run folders")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="of curves.json and curves.svg")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="student updates of every run, for a trial; default: see SETTINGS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=SETTINGS, help="one of SETTINGS; default: all")
    parser.add_argument("--change", type=json.loads, default={}, help="""options of every run: '{"reuse": 2}'""")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    x_0, x_T = Pairs(args.data / "val.npz", TASKS[TASK])[:]
    teacher = load_teacher(TEACHER, quiet=True)
    reference = energy(lambda batch, rng: teacher.translate(batch, rng, CALLS), x_0, x_T)
    changes = args.change | ({"steps": args.steps} if args.steps else {})
    chosen = {name: settings | changes for name, settings in SETTINGS.items() if args.only in (None, name)}
    curves: dict[str, list[Curve]] = {name: [] for name in chosen}
    for seed in range(args.seeds):
        for name, settings in chosen.items():
            out = args.work / f"{name}-{seed}"
            curves[name].append(run(out, {**COMMON, **settings, "seed": seed}, x_0, x_T))
    content = {"settings": chosen, "teacher": reference, "curves": curves}
    for name, text in (("curves.json", json.dumps(content, indent=1)), ("curves.svg", picture(curves, reference))):
        with atomic_file(args.out / name) as new:
            new.write_text(text)
    print(f"teacher, {CALLS} calls: {reference:.3f}")
    print("\n".join(table(curves)))


if __name__ == "__main__":
    main()
