"""Memory and time of the student's gradient: one graph against the lean form, each in a process of its own.

    python examples/benchmarks/student_step.py --batch-size 64 --threads 2

Memory is the operating system's peak (VmHWM) above what the process held before its first step, when weights,
gradients and inputs were there. The rounds of the forms alternate, so that a busy machine is unfair to none of them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

FORMS = ("naive", "lean", "lean, recomputed")


def status(field: str) -> int:
    """Read a memory figure of this process from the kernel, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(form: str, batch_size: int, steps: int, threads: int) -> dict[str, object]:
    """Take `steps` student gradients of the embedded teacher's distillation in one form."""
    import copy

    import torch

    from ibmd_cli.distillation import Setup, Sources, student_loss, student_step
    from ibmd_cli.models import load_model
    from ibmd_cli.mosaics import embedded_sources
    from ibmd_cli.noise import stream

    torch.set_num_threads(threads)
    teacher = load_model("builtin:outline2emoji", "teacher").predictor.requires_grad_(False)
    bridge_model = copy.deepcopy(teacher).requires_grad_(True)
    with torch.no_grad():  # move it away from the teacher: at the start their terms cancel
        for p in bridge_model.parameters():
            p.mul_(1 + 0.02 * torch.randn(p.shape, generator=stream(0, "noise")))
    student = teacher.widen(3).requires_grad_(True)
    setup = Setup(teacher.bridge, teacher.weight, (teacher.bridge.T,), noise_shape=(3, 4, 4))
    x_T = embedded_sources()[:batch_size].float() / 127.5 - 1
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    base, times, gradient = status("VmRSS"), [], []
    for step in range(steps):
        for p in student.parameters():
            p.grad.zero_()
        began = time.perf_counter()
        rng = stream(0, step)
        if form == "naive":
            student_loss(teacher, bridge_model, student, setup, Sources(x_T), rng).backward()
            bridge_model.zero_grad(set_to_none=True)
        else:
            recompute = form != "lean"
            student_step(teacher, bridge_model, student, setup, Sources(x_T), rng, recompute=recompute)
        times.append(time.perf_counter() - began)
        if step == 0:
            gradient = torch.cat([p.grad.flatten() for p in student.parameters()])[::97].tolist()
    return {"bytes": status("VmHWM") - base, "seconds": times[1:], "gradient": gradient}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.form:
        print(json.dumps(measure(args.form, args.batch_size, args.steps, args.threads)))
        return
    results: dict[str, list[dict]] = {form: [] for form in FORMS}
    for _ in range(args.rounds):
        for form in FORMS:
            child = subprocess.run(
                [sys.executable, *sys.argv, "--form", form], check=True, capture_output=True, text=True
            )
            results[form].append(json.loads(child.stdout))
    reference = results["naive"][0]["gradient"]
    scale = max(abs(g) for g in reference)
    memory = {form: statistics.median(r["bytes"] for r in rounds) for form, rounds in results.items()}
    seconds = {form: min(min(r["seconds"]) for r in rounds) for form, rounds in results.items()}
    print(f"batch {args.batch_size}, {args.threads} thread(s), best of {args.rounds} x {args.steps - 1} steps")
    print(f"{'form':18} {'peak memory':>13} {'ratio':>6} {'s/step':>8} {'ratio':>6} {'gradient differs by':>20}")
    for form in FORMS:
        difference = max(abs(a - b) for a, b in zip(reference, results[form][0]["gradient"], strict=True)) / scale
        print(
            f"{form:18} {memory[form] / 2**20:9.0f} MiB {memory[form] / memory['naive']:6.2f} "
            f"{seconds[form]:8.3f} {seconds[form] / seconds['naive']:6.2f} {difference:20.1e}"
        )


if __name__ == "__main__":
    main()
