"""`ibmd distill`: a run of Algorithm 1 on Accelerate, with its folder, previews, checkpoints and resume.

A run folder holds `config.json`, `metrics.jsonl`, `previews/`, `checkpoints/step-NNNNNN/` (all that training needs)
and `student/` (all that the other commands need). Every random number belongs to a place in the run (`stream`), so a
checkpoint holds weights, optimisers and one step count, and a resumed run equals an uninterrupted one.
"""

import copy
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ibmd_cli import __version__
from ibmd_cli.cards import student_card
from ibmd_cli.config import DistillConfig, differences, to_json
from ibmd_cli.data import SourceImages
from ibmd_cli.distillation import Sources, ibmd
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import atomic_file, atomic_folder
from ibmd_cli.images import to_uint8
from ibmd_cli.models import Model, Student, Teacher, load_model, make_setup, read_json, save_model, sha256
from ibmd_cli.mosaics import labelled_grid
from ibmd_cli.noise import stream
from ibmd_cli.optimisation import Player, Schedule
from ibmd_cli.reporting import Reporter
from ibmd_cli.teachers import load_teacher

PREVIEWS = 8


def plan(config: DistillConfig, out: Path) -> dict[str, Any]:
    """Return what a run would take, for `--dry-run`.

    The memory is an estimate: weights, gradients, Adam's moments and averages in float32, without activations.
    """
    teacher = _load(config, Reporter(quiet=True))
    n = sum(p.numel() for p in teacher.predictor.parameters())
    student = _new_student(config, teacher)
    n_student = sum(p.numel() for p in student.predictor.parameters())
    return {
        "run folder": str(out),
        "parameters of the teacher": n,
        "parameters of the bridge model": n,
        "parameters of the student": n_student,
        # teacher: weights; bridge model: weights, gradient, two moments; student: these and the average
        "memory without activations, bytes": 4 * (n + 4 * n + 5 * n_student),
        "images per update": config.batch_size,
        "updates of the bridge model": config.bridge_warmup + config.steps * config.bridge_steps,
        "timesteps of the student": student.config["sampling"]["timesteps"],
        "files to download": [],
    }


def distill(
    config: DistillConfig, origins: dict[str, str], out: Path, device: torch.device, resume: str, reporter: Reporter
) -> Path:
    """Distil a teacher into a student; continue if `out` holds an interrupted run of the same settings.

    Args:
        config: the settings.
        origins: where each came from; written to `config.json`.
        out: run folder.
        device: to train on; further processes take the devices that Accelerate gives them.
        resume: "auto" (the newest sound checkpoint of `out`, if any), "never" (refuse a folder that holds a run), or
            the path of a checkpoint.
        reporter: for notes and progress.

    Returns:
        The student's folder.

    Raises:
        IbmdError: a loss or gradient that is not finite, a run of other settings, unreadable data.
        KeyboardInterrupt: after SIGINT or SIGTERM, when the step is finished and a checkpoint is written.
    """
    if config.precision == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU: on a CPU use fp32 or bf16")
    if device.type == "cuda" and device.index is not None and "RANK" not in os.environ:
        torch.cuda.set_device(device)  # the one that Accelerate takes
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="no" if config.precision == "fp32" else config.precision
    )
    main = accelerator.is_main_process
    reporter = reporter if main else Reporter(quiet=True)
    share, rest = divmod(config.batch_size, accelerator.num_processes)
    micro_batch = config.micro_batch or share
    if rest or share % micro_batch:
        raise UsageError(
            f"--batch-size {config.batch_size} is not a multiple of {accelerator.num_processes} process(es) × "
            f"--micro-batch {micro_batch}: choose a multiple"
        )
    teacher = _load(config, reporter)
    degradation = "" if config.degrade == "none" else config.degrade
    sources = SourceImages(config.data, teacher.config, reporter, degradation, config.masks)
    if main:
        open_run(out, config, origins, resume, accelerator.num_processes)
    accelerator.wait_for_everyone()

    where = f"{accelerator.device}" + (f" × {accelerator.num_processes}" if accelerator.num_processes > 1 else "")
    reporter.note(f"distilling {config.teacher} into {out} on {where}")
    if accelerator.num_processes == 1 and torch.cuda.device_count() > 1 and device.type == "cuda":
        reporter.note(f"{torch.cuda.device_count()} GPUs are here and one is used; --processes all uses them all")
    torch.manual_seed(config.seed)
    teacher.to(accelerator.device).predictor.requires_grad_(False)
    bridge_model = copy.deepcopy(teacher.predictor).requires_grad_(True)
    student = _new_student(config, teacher)
    student.predictor.to(accelerator.device).requires_grad_(True)
    for predictor in (teacher.predictor, bridge_model, student.predictor):
        predictor.backbone.gradient_checkpointing = config.checkpointing
    # Dropout stays off (eval mode): student and bridge model must agree with the teacher at the start.
    player = partial(
        Player, accelerator=accelerator, seed=config.seed, betas=config.betas, micro_batches=share // micro_batch
    )
    phi = player(
        "bridge_model",
        bridge_model,
        schedule=Schedule(config.bridge_lr, 0, config.lr_decay),
        steps=config.bridge_warmup + config.steps * config.bridge_steps,
    )
    theta = player(
        "student",
        student.predictor,
        schedule=Schedule(config.lr, config.lr_warmup, config.lr_decay),
        steps=config.steps,
        clip=config.clip or None,
        ema=config.ema,
    )
    x0_star = accelerator.prepare_model(teacher.predictor, evaluation_mode=True)
    players = {"student": theta, "bridge_model": phi}
    run = Run(out, players, student, config.keep, accelerator.scaler)
    start, spent = run.restore(resume, reporter)
    if start >= config.steps:
        if main and run.student_step() != start:  # it was stopped between the last checkpoint and the student
            run.save_student(start)
        accelerator.wait_for_everyone()
        reporter.note(f"{out}: complete ({start} student updates); to train anew, give another --out")
        return out / "student"

    def draw(rng: torch.Generator) -> Sources:
        return sources.batch(micro_batch, rng, config.flip, accelerator.device)

    setup = make_setup(student.predictor, student.config["sampling"], config.t_power, config.weight_power)
    preview = Preview(sources, teacher, config.seed, accelerator.device) if main else None
    if preview and start == 0:
        preview.save(out / "previews" / "step-000000.png", student, theta.averaged())
    steps = ibmd(
        x0_star, phi.model, theta.model, setup, draw, phi.update, theta.update,
        steps=config.steps, bridge_steps=config.bridge_steps, bridge_warmup=config.bridge_warmup,
        start=start, recompute=config.recompute,
    )  # fmt: skip
    warmup, images = config.bridge_warmup * config.batch_size, config.batch_size * (config.bridge_steps + 1)
    began = time.monotonic()
    with interrupts() as interrupted, reporter.progress("distilling", config.steps, "step", start) as meter:
        for step in steps:
            k, seconds = step.k + 1, spent + time.monotonic() - began
            losses = {"bridge_loss": step.bridge_loss, "student_loss": step.student_loss}
            done = {"images": warmup + k * images, "seconds": seconds}
            rate = done["images"] / seconds
            meter.advance(1, **{name: f"{v:.4f}" for name, v in losses.items()}, images_per_second=f"{rate:.0f}")
            stop = _agreed(accelerator, interrupted)
            if main:
                run.log(
                    {"step": k, **losses, "lr": theta.schedule(step.k, config.steps), **done}
                    | {"images_per_second": rate, "peak_memory_bytes": peak_memory(accelerator.device)}
                )
            if preview and (k % config.preview_every == 0 or k == config.steps):
                preview.save(out / "previews" / f"step-{k:06d}.png", student, theta.averaged())
            if stop or k % config.checkpoint_every == 0 or k == config.steps:
                if main:
                    run.save(k, seconds)
                accelerator.wait_for_everyone()
            if stop and k < config.steps:
                reporter.note(f"interrupted after step {k}; the same command continues from here")
                raise KeyboardInterrupt
    accelerator.end_training()
    return out / "student"


def _load(config: DistillConfig, reporter: Reporter) -> Teacher:
    return load_teacher(
        config.teacher,
        preset=config.preset or None,
        head_channels=config.head_channels or None,
        attention_order=config.attention_order or None,
        quiet=reporter.quiet,
    )


def _new_student(config: DistillConfig, teacher: Model) -> Student:
    """Make a student of the teacher's weights; those for z are zero or small (arXiv:2502.01362v2, App. B)."""
    bridge = teacher.predictor.bridge
    channels = config.noise_channels if config.noise else 0
    rng = stream(config.seed, "noise weights")
    predictor = copy.deepcopy(teacher.predictor)
    if channels:
        predictor = predictor.widen(channels, config.noise_init, rng)
    fractions = torch.arange(config.nfe, dtype=torch.float64) / config.nfe
    chained = bridge.to_dict()["kind"] == "i2sb"
    shared = ("network", "bridge", "preconditioning", "conditional", "noise_channels")
    inherited = ("task", "image", "classes", "mask", "degradation", "licence")
    assert teacher.weights is not None
    settings = {
        "format": "ibmd-student",
        "format_version": 1,
        "ibmd_version": __version__,
        "name": f"{teacher.name}-{config.nfe}step",
        **{key: predictor.to_dict()[key] for key in shared},
        **{key: teacher.config.get(key) for key in inherited},
        "sampling": {
            "timesteps": bridge.time(fractions).tolist(),
            "noise": {"channels": channels, "grid": config.noise_grid or teacher.image_size},
            "rollout": "chain" if chained else "random-step",
            "transition": "posterior" if chained else "marginal",
        },
        "teacher": {"reference": config.teacher, "sha256": sha256(teacher.weights)},
        "training": to_json(config),
    }
    return Student(predictor, settings)


def open_run(out: Path, config: DistillConfig, origins: dict[str, str], resume: str, processes: int) -> None:
    """Make the run folder, or check that the one that is there may be continued with these settings."""
    file = out / "config.json"
    if file.exists():
        saved = read_json(file)
        if resume == "never":
            raise UsageError(f"{out}: holds a run already; give another --out, or --resume auto to continue it")
        changed = differences(config, saved["settings"])
        if saved["processes"] != processes:
            changed.append(f"processes: {saved['processes']} there, {processes} here")
        if changed:
            raise UsageError(f"{out}: a run with other settings ({'; '.join(changed)}); give another --out")
        return
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out}: not empty and not a run folder; give another --out")
    content = {
        "ibmd_version": __version__,
        "processes": processes,
        "settings": to_json(config),
        "origins": origins,
    }
    with atomic_file(file) as new:
        new.write_text(json.dumps(content, indent=2) + "\n")


class Run:
    """The checkpoints of a run folder and the student in it.

    Args:
        out: the run folder.
        players: what a checkpoint holds.
        student: written to `student/` with its averaged weights.
        keep: checkpoints to keep.
        scaler: of the gradients with fp16, shared by the players.
    """

    def __init__(
        self, out: Path, players: dict[str, Player], student: Student, keep: int, scaler: torch.amp.GradScaler | None
    ) -> None:
        self.out, self.players, self.student, self.keep, self.scaler = out, players, student, keep, scaler

    def save(self, step: int, seconds: float) -> None:
        """Write `checkpoints/step-NNNNNN` and `student/`, each whole or not at all, and drop the oldest ones."""
        folder = self.out / "checkpoints" / f"step-{step:06d}"
        with atomic_folder(folder) as new:
            try:
                state = {name: player.state_dict() for name, player in self.players.items()}
                torch.save(state | {"scaler": self.scaler.state_dict() if self.scaler else None}, new / "state.pt")
            except RuntimeError as error:  # what torch makes of an OSError
                free = shutil.disk_usage(self.out).free / 2**20
                raise IbmdError(
                    f"{folder}: cannot be written, {free:.0f} MiB are free there: free some space and run the same "
                    "command again; the checkpoint before it is intact"
                ) from error
            progress = {"step": step, "seconds": seconds, "sha256": sha256(new / "state.pt")}
            (new / "progress.json").write_text(json.dumps(progress, indent=2) + "\n")
        self.save_student(step)
        for old in self.checkpoints()[self.keep :]:
            shutil.rmtree(old)

    def save_student(self, step: int) -> None:
        """Write `student/` with the averaged weights."""
        config = {**self.student.config, "training": {**self.student.config["training"], "step": step}}
        averaged = Student(self.players["student"].averaged(), config)  # type: ignore[arg-type]
        save_model(averaged, self.out / "student", card=student_card(averaged))

    def student_step(self) -> int | None:
        """Return the step at which `student/` was written, None if there is no sound one."""
        try:
            return int(load_model(str(self.out / "student"), "student").config["training"]["step"])
        except IbmdError:
            return None

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def checkpoints(self) -> list[Path]:
        """Return the folders of the checkpoints, newest first."""
        return sorted((self.out / "checkpoints").glob("step-*"), reverse=True)

    def restore(self, resume: str, reporter: Reporter) -> tuple[int, float]:
        """Load the newest sound checkpoint, or the one named; return its step and the seconds spent so far."""
        folders = self.checkpoints() if resume in ("auto", "never") else [Path(resume)]
        for folder in folders:
            try:
                progress = read_json(folder / "progress.json")
                if sha256(folder / "state.pt") != progress["sha256"]:
                    raise IbmdError(f"{folder}/state.pt: its checksum is wrong")
            except (IbmdError, OSError, KeyError) as error:
                if resume not in ("auto", "never"):
                    raise IbmdError(f"--resume {resume}: not a sound checkpoint ({error})") from error
                reporter.warn(f"{folder}: damaged ({error}); trying the one before it")
                continue
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            for name, player in self.players.items():
                player.load_state_dict(state[name])
            if self.scaler:
                self.scaler.load_state_dict(state["scaler"])
            step = int(progress["step"])
            self._trim_log(step)
            reporter.note(f"resuming from {folder}")
            return step, float(progress["seconds"])
        if folders:
            reporter.warn(f"{self.out}: no sound checkpoint; starting from step 0")
        self._trim_log(0)
        return 0, 0.0

    def _trim_log(self, step: int) -> None:
        """Drop the lines of steps that will be made again."""
        file = self.out / "metrics.jsonl"
        if file.exists():
            lines = file.read_text().splitlines()[:step]
            with atomic_file(file) as new:
                new.write_text("".join(f"{line}\n" for line in lines))


class Preview:
    """The preview grid: the same sources and noise each time; rows source, teacher, student."""

    def __init__(self, sources: SourceImages, teacher: Teacher, seed: int, device: torch.device) -> None:
        n = min(PREVIEWS, len(sources))
        rows = torch.linspace(0, len(sources) - 1, n).long().tolist()
        self.batch = sources.take(rows, stream(seed, "preview sources"), device)
        self.seed = seed
        nfe = teacher.config["sampling"]["nfe"]
        self.rows = [self.batch.x_T, teacher.translate(self.batch, self._streams(), nfe)]

    def save(self, file: Path, student: Student, predictor: Any) -> None:
        """Write the grid with the student's present (averaged) weights."""
        images = Student(predictor, student.config).translate(self.batch, self._streams())
        with atomic_file(file) as new:
            rows = dict(
                zip(("source", "teacher", "student"), (to_uint8(x.cpu()) for x in (*self.rows, images)), strict=True)
            )
            labelled_grid(rows).save(new, format="png")

    def _streams(self) -> list[torch.Generator]:
        return [stream(self.seed, "preview", i) for i in range(len(self.batch.x_T))]


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list in place of stopping at once; the second one stops at once."""
    received: list[int] = []

    def remember(number: int, _: Any) -> None:
        if received:
            os._exit(130)
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: on the GPU it trains on, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _agreed(accelerator: Accelerator, interrupted: list[int]) -> bool:
    """Tell whether any process was interrupted, the same in all of them."""
    if accelerator.num_processes == 1:
        return bool(interrupted)
    return bool(accelerator.reduce(torch.tensor(float(bool(interrupted)), device=accelerator.device)) > 0)
