"""Students of one and more steps on an embedded teacher, each with all numbers of network calls that it can make.

python examples/multistep.py outline2emoji                           distils students of 1, 2 and 4 steps first
python examples/multistep.py outline2emoji --val build/emoji/val.npz     of make_data.py: the pairs to choose by
python examples/multistep.py outline2emoji --student runs/a --student runs/b
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "emoji"))
from train_teacher import TASKS, Pairs

from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.method.distillation import Sources
from ibmd_cli.method.noise import stream
from ibmd_cli.metrics.intervals import estimate
from ibmd_cli.metrics.scores import diversity, energy_score
from ibmd_cli.models.folder import load_model
from ibmd_cli.models.model import StudentModel, TeacherModel

SAMPLES = 4
"""Draws for each source."""


def distil(teacher: str, nfe: int, steps: int) -> str:
    """Distil a student of `nfe` steps, or take the one that is there; return its folder.

    Each starts from the embedded student of one step: from the teacher, a bridge model that is fitted to the mixture of
    blurred first and sharp later steps leads several steps astray.
    """
    out = Path("runs") / f"{teacher}-{nfe}step"
    command = ["distill", "--teacher", f"builtin:{teacher}", "--init", f"builtin:{teacher}", "--nfe", str(nfe)]
    command += ["--steps", str(steps), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "ibmd_cli", *command], check=True, stdout=subprocess.DEVNULL)
    return str(out)


def measure(model: StudentModel | TeacherModel, nfe: int, x_T: Tensor, x_0: Tensor, names: list[str], pool: int) -> str:
    """Return a row of the table: energy score with its 95 % interval, diversity, time."""
    draws, began = [], time.perf_counter()
    for draw in range(SAMPLES):
        parts = []
        for rows in torch.arange(len(names)).split(64):
            rng = [stream(0, "eval", names[i], draw) for i in rows]
            parts.append(model.translate(Sources(x_T[rows]), rng, nfe))
        draws.append(torch.cat(parts))
    seconds = (time.perf_counter() - began) / (SAMPLES * len(names))
    samples = (torch.stack(draws) * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1  # as saved images
    score = estimate(energy_score(samples, x_0, pool))
    spread = float(diversity(samples).mean())
    interval = "" if score.low is None else f"[{score.low:.2f},{score.high:.2f}]"  # none of a few images
    return f"{score.value:6.2f} {interval:13}  {spread:9.3f}  {1000 * seconds:8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="name of an embedded teacher")
    parser.add_argument("--student", action="append", default=[], help="reference (repeatable)")
    parser.add_argument("--steps", type=int, default=100, help="updates of each student")
    parser.add_argument("--teacher-nfe", type=int, nargs="*", default=[1, 2, 4, 20])
    parser.add_argument("--val", type=Path, help="measure on these pairs, not on the test split")
    parser.add_argument("--images", type=int, help="the first so many only")
    args = parser.parse_args()
    references = args.student or [distil(args.teacher, nfe, args.steps) for nfe in (1, 2, 4)]
    teacher = load_model(f"builtin:{args.teacher}", "teacher")
    if args.val:
        x_0, x_T = Pairs(args.val, TASKS[args.teacher])[:]
        names = [str(i) for i in range(len(x_0))]
    else:
        names, *images = embedded_pairs(args.teacher)
        x_T, x_0 = (x.float() / 127.5 - 1 for x in images)
    names, x_T, x_0 = names[: args.images], x_T[: args.images], x_0[: args.images]
    pool = 4 if teacher.source_scale == 1 else 1  # sources of super-resolution give the pooled pixels away
    print(f"{'model':40}  NFE  energy score          diversity  ms/image")
    for reference in references:
        student = load_model(reference, "student")
        for nfe in [2**k for k in range(student.nfe.bit_length())]:
            print(f"{reference:40}  {nfe:3}  {measure(student, nfe, x_T, x_0, names, pool)}", flush=True)
    for nfe in args.teacher_nfe:
        print(f"{'teacher':40}  {nfe:3}  {measure(teacher, nfe, x_T, x_0, names, pool)}", flush=True)


if __name__ == "__main__":
    main()
