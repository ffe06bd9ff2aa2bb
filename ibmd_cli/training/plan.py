"""What a distillation would take, told without starting it."""

from pathlib import Path
from typing import Any

import torch

from ibmd_cli.data.download import to_fetch
from ibmd_cli.data.sources import check_sources, look_up_data, usual_fit
from ibmd_cli.models.model import student_times
from ibmd_cli.models.teachers import TeacherRef, look_up_teacher
from ibmd_cli.networks.predictor import make_predictor
from ibmd_cli.reporting import Reporter
from ibmd_cli.training.config import AUTO, DistillConfig
from ibmd_cli.training.memory import estimate


def plan(config: DistillConfig, out: Path, processes: int = 1) -> dict[str, Any]:
    """Return what a run would take, for `--dry-run`; nothing is fetched, converted or written.

    The memory is an estimate (`memory.estimate`), within a quarter of what was measured on a CPU.

    Raises:
        NotAvailable, UsageError, IbmdError: see `teachers.load_teacher`.
    """
    teacher, files = look_up_teacher(
        TeacherRef(config.teacher, config.preset, config.head_channels, config.attention_order)
    )
    degradation, data = "" if config.degrade == "none" else config.degrade, list[str]()
    if config.data:
        check_sources(config.data, teacher, degradation, Reporter(quiet=True), config.layout, config.labels)
        data = look_up_data(config.data, teacher, degradation, config.layout, config.labels)
        files = [*files, *to_fetch(config.data)]
    channels = config.noise_channels if config.noise else 0
    student = {**teacher, "noise_channels": channels}
    student["network"] = {**teacher["network"], "in_channels": teacher["network"]["in_channels"] + channels}
    with torch.device("meta"):
        predictor, generator = make_predictor(teacher), make_predictor(student)
    n, n_student = (sum(p.numel() for p in network.parameters()) for network in (predictor, generator))
    bridge = predictor.bridge
    times = student_times(bridge, config.nfe, config.timesteps)
    memory = estimate(
        predictor,
        generator,
        teacher["image_size"] if "image_size" in teacher else teacher["image"]["size"],
        calls=config.nfe if bridge.kind == "i2sb" else 1,  # of which gradients flow through all, see `rollout`
        recompute=config.recompute,
        checkpointing=config.checkpointing,
        mixed=config.precision != "fp32",
        alone=processes == 1 or config.fsdp,
    )
    fixed = memory.fixed // (processes if config.fsdp else 1)
    share = config.batch_size // processes
    micro_batch = 1 if config.micro_batch == AUTO else int(config.micro_batch) or share
    return {
        "run folder": str(out),
        "data": data,
        "images that are not square": config.fit or usual_fit(config.layout, degradation),
        "parameters of the teacher": n,
        "parameters of the bridge model": n,
        "parameters of the student": n_student,
        "images per update": config.batch_size,
        "processes": processes,
        "micro-batch": "auto; memory for 1" if config.micro_batch == AUTO else micro_batch,
        "memory of each process without activations, bytes": fixed,
        "activations, bytes per image of a micro-batch": memory.per_image,
        "memory of each process, bytes": fixed + micro_batch * memory.per_image,
        "updates of the bridge model": config.bridge_warmup + config.steps * config.bridge_steps,
        "timesteps of the student": times,
        "files to download": files,
    }
