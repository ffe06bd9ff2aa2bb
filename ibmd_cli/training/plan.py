"""The plan of a distillation: images, sizes, memory, downloads and time, without starting it."""

import copy
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ibmd_cli.data.datasets import DataSet
from ibmd_cli.data.download import to_fetch
from ibmd_cli.data.references import check_sources, look_up_data, open_data, usual_fit
from ibmd_cli.devices import free_memory
from ibmd_cli.errors import IbmdError
from ibmd_cli.method.distillation import Sources, bridge_loss, rollout, student_gradient
from ibmd_cli.method.noise import BatchStreams
from ibmd_cli.models.folder import refuse_models
from ibmd_cli.models.model import make_setup, student_times
from ibmd_cli.models.references import TeacherRef, look_up_teacher
from ibmd_cli.networks.predictor import make_predictor
from ibmd_cli.reporting import Reporter
from ibmd_cli.training.config import AUTO, DistillConfig, duration
from ibmd_cli.training.memory import estimate_memory
from ibmd_cli.training.preview import preview_calls
from ibmd_cli.training.teacher import describe_teacher, updates_of_teacher

PROBE = 4
"""Images of the updates that are timed, at most."""
TOO_LARGE = 100_000_000
"""Parameters of a teacher from which on a CPU would take minutes for these updates."""


def plan(config: DistillConfig, out: Path, processes: int, device: torch.device) -> dict[str, Any]:
    """Return what a run would take, for `--dry-run`; nothing is fetched, converted or written.

    The memory is an estimate (`estimate_memory`), within a quarter of what was measured on a CPU; the time follows
    from a few updates of networks with random weights.

    Raises:
        NotAvailable, UsageError, IbmdError: no such teacher or data, or settings that do not go together.
    """
    teacher, files, steps = _teacher(config, out)
    size = teacher["image_size"] if "image_size" in teacher else teacher["image"]["size"]
    degradation, data, sizes = "" if config.degrade == "none" else config.degrade, list[str](), list[str]()
    if config.data:
        refuse_models(config.data)
        check_sources(config.data, teacher, degradation, Reporter(quiet=True), config.layout, config.labels)
        targets = config.reads_targets
        data = look_up_data(config.data, teacher, degradation, config.layout, config.labels, targets)
        local = [one for one in config.data if not one.startswith(("dataset:", "hf:"))]
        if "image" in teacher and local:
            parts = open_data(local, teacher, degradation, config.layout, config.labels, targets=targets)
            sizes = _sizes(parts, size)
            steps = steps or updates_of_teacher(config, sum(map(len, parts)))
        files = [*files, *to_fetch(config.data)]
    channels = config.noise_channels if config.noise else 0
    student = {**teacher, "noise_channels": channels}
    student["network"] = {**teacher["network"], "in_channels": teacher["network"]["in_channels"] + channels}
    with torch.device("meta"):
        predictor, generator = make_predictor(teacher), make_predictor(student)
    n, n_student = (sum(p.numel() for p in network.parameters()) for network in (predictor, generator))
    bridge = predictor.bridge
    times = student_times(bridge, config.nfe, config.timesteps)
    memory = estimate_memory(
        predictor,
        generator,
        size,
        calls=config.nfe if bridge.kind == "i2sb" else 1,  # of which gradients flow through all, see `rollout`
        recompute=config.recompute,
        checkpointing=config.checkpointing,
        mixed=config.precision != "fp32",
        alone=processes == 1 or config.fsdp,
    )
    fixed = memory.fixed // (processes if config.fsdp else 1)
    share = config.batch_size // processes
    micro_batch = 1 if config.micro_batch == AUTO else int(config.micro_batch) or share
    small = device.type != "cpu" or n < TOO_LARGE
    fits = fixed + memory.per_image * min(PROBE, micro_batch) < free_memory(device)
    seconds, per_image = (
        _seconds(config, teacher, student, size, times, share, micro_batch, device) if small and fits else (None, 0.0)
    )
    of_teacher = share * per_image * steps
    if seconds and config.teacher_time:
        of_teacher = min(of_teacher, duration(config.teacher_time))
    return {
        "run folder": str(out),
        "device": str(device),
        "image size": size,
        "data": data,
        "sizes": sizes,
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
        "seconds": seconds,
        **({"updates of the teacher": steps, "seconds of the teacher": of_teacher} if config.trains_teacher else {}),
    }


def _teacher(config: DistillConfig, out: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Return a teacher's configuration, what is to be fetched, and the updates that it is trained by, as asked for."""
    if config.trains_teacher:
        return describe_teacher(config, out.name), [], config.teacher_steps
    ref = TeacherRef(config.teacher, config.preset, config.head_channels, config.attention_order)
    return *look_up_teacher(ref), 1


def _sizes(parts: list[DataSet], size: int) -> list[str]:
    """Say of each data set what becomes of its first image, if that has another size than the teacher's."""
    said = []
    for part in parts:
        try:
            width, height = part.picture(0, part.base)[0].size
        except (IbmdError, NotImplementedError):  # embedded data are of the teacher's size
            continue
        if (width, height) != (size, size):
            said.append(f"the first image has {width}×{height} pixels and becomes {size}×{size}")
    return said


def _seconds(
    config: DistillConfig,
    teacher: Mapping[str, Any],
    student: Mapping[str, Any],
    size: int,
    times: list[float],
    share: int,
    micro_batch: int,
    device: torch.device,
) -> tuple[float, float]:
    """Time an update of each kind; return the seconds of all updates and previews, and of an image of one network."""
    frozen = make_predictor(dict(teacher)).to(device).requires_grad_(False)
    bridge_model, generator = copy.deepcopy(frozen).requires_grad_(True), make_predictor(dict(student)).to(device)
    chained = frozen.bridge.kind == "i2sb"
    sampling = {
        "timesteps": times,
        "noise": {"channels": student["noise_channels"], "grid": config.noise_grid or size},
        "rollout": "chain" if chained else "random-step",
        "transition": "posterior" if chained else "marginal",
    }
    setup = make_setup(generator, sampling, config.t_power, config.t_even, config.weight_power)
    images = min(micro_batch, PROBE if device.type == "cpu" else 4 * PROBE)
    rng = BatchStreams(range(images), config.seed, "probe")
    batch = Sources(
        torch.rand(images, 3, size, size, device=device) * 2 - 1,
        torch.zeros(images, dtype=torch.long, device=device) if teacher.get("classes") else None,
        torch.ones(images, 1, size, size, device=device) if teacher.get("mask") else None,
    )
    spent: dict[str, float] = {}
    for _ in range(2):  # the first call of a network takes longer
        for kind in ("sample", "bridge", "student"):
            began = time.perf_counter()
            if kind == "sample":
                with torch.no_grad():
                    x_0 = rollout(generator, setup, batch, rng)
            elif kind == "bridge":
                bridge_loss(bridge_model, setup, x_0, batch, rng).backward()
            else:
                student_gradient(frozen, bridge_model, generator, setup, batch, rng, recompute=config.recompute)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent[kind] = (time.perf_counter() - began) / images
    warmup, each, reuse = config.bridge_warmup, config.bridge_steps, config.reuse
    made = math.ceil((warmup + each) / reuse) + (config.steps - 1) * math.ceil(each / reuse)
    updates = warmup + config.steps * each
    trained = share * (made * spent["sample"] + updates * spent["bridge"] + config.steps * spent["student"])
    shown = preview_calls(teacher["sampling"]["nfe"], len(times), 1 + math.ceil(config.steps / config.preview_every))
    return trained + shown * spent["sample"] / len(times), spent["bridge"]
