"""What a distillation would take, told without starting it."""

from pathlib import Path
from typing import Any

import torch

from ibmd_cli.config import DistillConfig
from ibmd_cli.data import check_sources
from ibmd_cli.models import student_times
from ibmd_cli.networks import make_predictor
from ibmd_cli.reporting import Reporter
from ibmd_cli.teachers import look_up_teacher


def plan(config: DistillConfig, out: Path) -> dict[str, Any]:
    """Return what a run would take, for `--dry-run`; nothing is fetched, converted or written.

    The memory is an estimate: weights, gradients, Adam's moments and averages in float32, without activations.

    Raises:
        NotAvailable, UsageError, IbmdError: see `teachers.load_teacher`.
    """
    teacher, files = look_up_teacher(
        config.teacher, config.preset or None, config.head_channels or None, config.attention_order or None
    )
    if config.data:
        check_sources(config.data, teacher, "" if config.degrade == "none" else config.degrade, Reporter(quiet=True))
    channels = config.noise_channels if config.noise else 0
    student = {**teacher, "noise_channels": channels}
    student["network"] = {**teacher["network"], "in_channels": teacher["network"]["in_channels"] + channels}
    with torch.device("meta"):
        predictors = [make_predictor(settings) for settings in (teacher, student)]
    n, n_student = (sum(p.numel() for p in predictor.parameters()) for predictor in predictors)
    return {
        "run folder": str(out),
        "parameters of the teacher": n,
        "parameters of the bridge model": n,
        "parameters of the student": n_student,
        # teacher: weights; bridge model: weights, gradient, two moments; student: these and the average
        "memory without activations, bytes": 4 * (n + 4 * n + 5 * n_student),
        "images per update": config.batch_size,
        "updates of the bridge model": config.bridge_warmup + config.steps * config.bridge_steps,
        "timesteps of the student": student_times(predictors[0].bridge, config.nfe),
        "files to download": files,
    }
