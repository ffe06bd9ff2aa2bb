"""`ibmd distill`: a run of Algorithm 1 on Accelerate, with its folder, previews, checkpoints and resume.

A run folder holds `config.json`, `metrics.jsonl`, `run.html`, `previews/`, `checkpoints/step-NNNNNN/` (all that
training needs) and `student/` (all that the other commands need). Every random number belongs to a place in the run
(`stream`), so a checkpoint holds weights, optimisers and counts, and a resumed run equals an uninterrupted one.
"""

import copy
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from ibmd_cli import __version__
from ibmd_cli.data.sources import SourceImages, count_workers, usual_fit
from ibmd_cli.devices import forget_peak, free_memory, peak_memory, tune
from ibmd_cli.errors import UsageError
from ibmd_cli.files import atomic_file, read_json
from ibmd_cli.images.fit import to_uint8
from ibmd_cli.images.grids import labelled_grid
from ibmd_cli.method.distillation import Setup, Sources, bridge_iterations, bridge_loss, ibmd, rollout, student_step
from ibmd_cli.method.noise import BatchStreams, Streams, stream
from ibmd_cli.metrics.scores import diversity
from ibmd_cli.models.folder import load_student
from ibmd_cli.models.model import Model, Student, Teacher, make_setup, student_times
from ibmd_cli.models.teachers import TeacherRef, load_teacher
from ibmd_cli.networks.predictor import Predictor
from ibmd_cli.processes import keep_freed_memory, this_process
from ibmd_cli.reporting import Reporter
from ibmd_cli.training.config import AUTO, DistillConfig, to_json
from ibmd_cli.training.fsdp import split
from ibmd_cli.training.log import Watch, read_log
from ibmd_cli.training.memory import GIB, SHARE_OF_FREE, largest_micro_batch
from ibmd_cli.training.optimise import Player, Schedule
from ibmd_cli.training.page import run_page, write_page
from ibmd_cli.training.run_folder import Run, open_run

PREVIEWS = 8
"""Sources of a preview."""
VARIANTS = 4
"""Draws of z for each of them, from which diversity is computed."""
TEACHER_CALLS = 10
MOST_CALLS = 100
"""Of the teacher, for the preview: the published ones are sampled in up to 999."""


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
        UsageError: settings that do not go together, or a folder that holds another run.
        IbmdError: losses or gradients that stay not finite, a checkpoint that cannot be written, unreadable data.
        KeyboardInterrupt: after SIGINT or SIGTERM, when the step is finished and a checkpoint is written.
    """
    process = this_process()
    if process.count > 1 and not process.connected:
        raise UsageError(
            f"WORLD_SIZE={process.count} without MASTER_ADDR: start them with --processes {process.count}, torchrun or "
            "accelerate launch; or unset RANK and WORLD_SIZE"
        )
    accelerator = _accelerator(config, out, device)
    reporter = reporter if accelerator.is_main_process else Reporter(quiet=True)
    share, rest = divmod(config.batch_size, accelerator.num_processes)
    micro_batch = 1 if config.micro_batch == AUTO else int(config.micro_batch) or share
    if rest or share % micro_batch:
        raise UsageError(
            f"--batch-size {config.batch_size} is not a multiple of {accelerator.num_processes} process(es) × "
            f"--micro-batch {micro_batch}: choose a multiple"
        )
    if config.fsdp and accelerator.num_processes == 1:
        raise UsageError("--fsdp splits the networks over several processes, and there is one: add --processes N")
    ref = TeacherRef(config.teacher, config.preset, config.head_channels, config.attention_order)
    teacher = load_teacher(ref, quiet=reporter.quiet)
    degradation = "" if config.degrade == "none" else config.degrade
    workers = count_workers(config.workers, this_process().local_count)
    sources = SourceImages(
        config.data, teacher.config, reporter, degradation, config.masks,
        layout=config.layout, labels=config.labels, workers=workers, fit=_fit(config, out),
    )  # fmt: skip
    for line in sources.describe():
        reporter.note(line)
    student = _new_student(config, teacher)
    inputs = {config.teacher: f"sha256 {student.config['teacher']['sha256']}", **sources.inputs}
    hold = open_run(out, config, origins, resume, accelerator.num_processes, inputs)
    with hold if accelerator.is_main_process else nullcontext(), closing(sources):
        accelerator.wait_for_everyone()
        _train(config, out, resume, teacher, student, sources, accelerator, reporter)
    return out / "student"


def _fit(config: DistillConfig, out: Path) -> str:
    """Return what becomes of images that are not square; runs from before that was a setting keep what they had."""
    file = out / "config.json"
    if not config.fit and file.is_file() and "fit" not in read_json(file).get("settings", {}):
        return "published"
    return config.fit or usual_fit(config.layout, config.degrade)


def _accelerator(config: DistillConfig, out: Path, device: torch.device) -> Accelerator:
    if config.precision == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU: on a CPU use fp32 or bf16")
    if config.track and find_spec(config.track) is None:
        raise UsageError(f"--track {config.track}: it is not installed: pip install {config.track}")
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UsageError(
                f"ACCELERATE_USE_{name}: turn it off in `accelerate config`: --fsdp splits the networks over processes"
            )
    if device.type == "cuda" and device.index is not None and not this_process().launched:
        torch.cuda.set_device(device)  # the one that Accelerate takes
    tune(device)
    if device.type == "cpu":
        keep_freed_memory()
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with=config.track or None,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        project_config=ProjectConfiguration(str(out), logging_dir=str(out / "tensorboard")),
    )


def _train(
    config: DistillConfig,
    out: Path,
    resume: str,
    teacher: Teacher,
    student: Student,
    sources: SourceImages,
    accelerator: Accelerator,
    reporter: Reporter,
) -> None:
    """Train from where the run folder `out` stands to the end."""
    main = accelerator.is_main_process
    where = f"{accelerator.device}" + (f" × {accelerator.num_processes}" if accelerator.num_processes > 1 else "")
    reporter.note(f"distilling {config.teacher} into {out} on {where}")
    if accelerator.num_processes == 1 and torch.cuda.device_count() > 1 and accelerator.device.type == "cuda":
        reporter.note(f"{torch.cuda.device_count()} GPUs are here and one is used; --processes all uses them all")
    torch.manual_seed(config.seed)
    teacher.to(accelerator.device).predictor.requires_grad_(False)
    bridge_model = copy.deepcopy(teacher.predictor).requires_grad_(True)
    student.predictor.to(accelerator.device).requires_grad_(True)
    for predictor in (teacher.predictor, bridge_model, student.predictor):
        predictor.backbone.gradient_checkpointing = config.checkpointing
    # Dropout stays off (eval mode): student and bridge model must agree with the teacher at the start.
    setup = make_setup(
        student.predictor, student.config["sampling"], config.t_power, config.t_even, config.weight_power
    )
    share = config.batch_size // accelerator.num_processes
    if config.micro_batch == AUTO:
        networks = (teacher.predictor, bridge_model, student.predictor)
        last = [line.get("micro_batch", 0) for line in read_log(out)][-1:]
        accelerator.wait_for_everyone()
        if last and last[0] and share % last[0] == 0:
            micro_batch = last[0]  # sums in another order would differ in their last bits
        else:
            micro_batch = _fitting_micro_batch(config, share, networks, setup, sources, accelerator, reporter)
    else:
        micro_batch = int(config.micro_batch) or share
    player = partial(
        Player,
        accelerator=accelerator,
        seed=config.seed,
        betas=config.betas,
        micro_batches=share // micro_batch,
        micro_batch=micro_batch,
        split=config.fsdp,
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
    if config.compile:  # after their copies were made, and in place: names of parameters stay
        for predictor in (teacher.predictor, bridge_model, student.predictor):
            predictor.backbone.compile()
    run = Run(out, {"student": theta, "bridge_model": phi}, student, config.keep, accelerator.scaler, writes=main)
    start, spent = run.restore(resume, reporter)
    watch = Watch(config.steps, run.trim_log(start) if main else ())
    if start:
        run.mend_student(start, reporter)
    accelerator.wait_for_everyone()
    if start >= config.steps:
        if main:
            write_page(out, "finished")
        reporter.note(f"{out}: complete ({start} student updates); to train anew, give another --out")
        return

    sources.expect(micro_batch, _coming_streams(config, start, phi, theta))

    def draw(rng: Streams) -> Sources:
        return sources.batch(micro_batch, rng, config.flip, accelerator.device)

    preview = Preview(sources, teacher, config.seed, accelerator.device) if main else None
    if start == 0:
        average = theta.averaged()
        if preview:
            preview.save(out / "previews" / "step-000000.png", student, average)
        del average
    if config.fsdp:
        split(teacher.predictor)
    x0_star = accelerator.prepare_model(teacher.predictor, evaluation_mode=True)
    steps = ibmd(
        x0_star, phi.model, theta.model, setup, draw, phi.update, theta.update,
        steps=config.steps, bridge_steps=config.bridge_steps, bridge_warmup=config.bridge_warmup,
        start=start, recompute=config.recompute, reuse=config.reuse,
    )  # fmt: skip
    warmup, images = config.bridge_warmup * config.batch_size, config.batch_size * (config.bridge_steps + 1)
    began = time.monotonic()
    with (
        run_page(out) if main else nullcontext(),
        _tracking(accelerator, config, out, start),
        interrupts() as interrupted,
        run.naming_checkpoint(),
        reporter.progress("distilling", config.steps, "step", start) as meter,
    ):
        for step in steps:
            k, seconds = step.k + 1, spent + time.monotonic() - began
            losses = {"bridge_loss": step.bridge_loss, "student_loss": step.student_loss}
            done = {"images": warmup + k * images, "seconds": seconds}
            rate = done["images"] / seconds
            meter.advance(1, **{name: f"{v:.4f}" for name, v in losses.items()}, images_per_second=f"{rate:.0f}")
            stop = _agreed(accelerator, interrupted)
            line: dict[str, Any] = {"step": k, **{name: v if math.isfinite(v) else None for name, v in losses.items()}}
            line |= {"lr": theta.schedule(step.k, config.steps), **done, "images_per_second": rate}
            line |= {"micro_batch": micro_batch, "peak_memory_bytes": peak_memory(accelerator.device)}
            line |= {"skipped": phi.skipped + theta.skipped, "broken_images": len(sources.broken)}
            show = k % config.preview_every == 0 or k == config.steps
            save = stop or k % config.checkpoint_every == 0 or k == config.steps
            if show:
                average = theta.averaged()
                if preview:
                    line |= preview.save(out / "previews" / f"step-{k:06d}.png", student, average)
                del average
            if main:
                line |= watch.look(line)
                for warning in line.get("warnings", []):
                    reporter.warn(warning)
                run.log(line)
                accelerator.log({name: v for name, v in line.items() if isinstance(v, int | float)}, step=k)
            if save:
                run.save(k, seconds)
                accelerator.wait_for_everyone()
            if main and (show or save):
                write_page(out, "running")
            if stop and k < config.steps:
                reporter.note(f"interrupted after step {k}; the same command continues from here")
                raise KeyboardInterrupt
    accelerator.end_training()


def _coming_streams(config: DistillConfig, start: int, phi: Player, theta: Player) -> Iterator[Streams]:
    """Yield copies of the random streams of all coming batches, in the order in which `ibmd` draws them."""
    for k in range(start, config.steps):
        for l, fresh in bridge_iterations(k, config.bridge_steps, config.bridge_warmup, config.reuse):  # noqa: E741
            if fresh:
                yield from (phi.streams(l, micro) for micro in range(phi.micro_batches))
        yield from (theta.streams(k, micro) for micro in range(theta.micro_batches))


@contextmanager
def _tracking(accelerator: Accelerator, config: DistillConfig, out: Path, start: int) -> Iterator[None]:
    """Send the log to the tracker of `--track`, if any, too; one that continues replaces the steps after `start`."""
    settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in to_json(config).items()}
    options = {"tensorboard": {"purge_step": start + 1}, "wandb": {"name": out.name, "dir": str(out)}}
    accelerator.init_trackers("ibmd", settings, options)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def _fitting_micro_batch(
    config: DistillConfig,
    share: int,
    networks: tuple[Predictor, Predictor, Predictor],
    setup: Setup,
    sources: SourceImages,
    accelerator: Accelerator,
    reporter: Reporter,
) -> int:
    """Find the micro-batch of `--micro-batch auto`, the same in all processes; weights stay as they are."""
    teacher, bridge_model, student = networks
    device = accelerator.device
    sharers = 1 if device.type == "cuda" else this_process().local_count
    limit = config.memory * GIB or SHARE_OF_FREE * free_memory(device) / sharers
    learning = [*bridge_model.parameters(), *student.parameters()]
    gradients = sum(p.nbytes for p in learning)
    later = 2 * gradients + sum(p.nbytes for p in student.parameters())  # Adam's moments, the average
    forget_peak(device)
    start = peak_memory(device)

    def attempt(images: int) -> int:
        rng = BatchStreams(range(images), config.seed, "micro-batch")
        batch = sources.batch(images, rng, config.flip, device)
        with accelerator.autocast():
            with torch.no_grad():
                x_0 = rollout(student, setup, batch, rng)
            bridge_loss(bridge_model, setup, x_0, batch, rng).backward()
            student_step(teacher, bridge_model, student, setup, batch, rng, recompute=config.recompute)
        return peak_memory(device) - start + later

    found = largest_micro_batch(share, limit, gradients + later, attempt)
    for p in learning:
        p.grad = None
    torch.cuda.empty_cache()  # of an attempt that did not fit
    found = int(accelerator.gather(torch.tensor([found], device=device)).min())
    reporter.note(f"--micro-batch auto: {found} of {share} images at a time, in {limit / GIB:.3g} GiB")
    return found


def _new_student(config: DistillConfig, teacher: Model) -> Student:
    """Make a student of the teacher's weights; those for z are zero or small (arXiv:2502.01362v2, App. B).

    Differs from the paper: with `init`, of the weights of a student, e.g. one of fewer steps.
    """
    bridge = teacher.predictor.bridge
    channels = config.noise_channels if config.noise else 0
    rng = stream(config.seed, "noise weights")
    predictor = copy.deepcopy(teacher.predictor)
    if channels:
        predictor = predictor.widen(channels, config.noise_init, rng)
    noise = {"channels": channels, "grid": config.noise_grid or teacher.image_size}
    if config.init:
        first = load_student(config.init)
        have, want = (
            {**model.to_dict(), "noise": settings}
            for model, settings in ((first.predictor, first.config["sampling"]["noise"]), (predictor, noise))
        )
        if wrong := [f"{key}: {have[key]} there, {want[key]} here" for key in want if have[key] != want[key]]:
            raise UsageError(f"--init {config.init}: another kind of student ({'; '.join(wrong)})")
        predictor = first.predictor
    chained = bridge.to_dict()["kind"] == "i2sb"
    shared = ("network", "bridge", "preconditioning", "conditional", "noise_channels")
    inherited = ("task", "image", "classes", "mask", "degradation", "licence")
    settings = {
        "format": "ibmd-student",
        "format_version": 1,
        "ibmd_version": __version__,
        "name": f"{teacher.name}-{config.nfe}step",
        **{key: predictor.to_dict()[key] for key in shared},
        **{key: teacher.config.get(key) for key in inherited},
        "sampling": {
            "timesteps": student_times(bridge, config.nfe, config.timesteps),
            "noise": noise,
            "rollout": "chain" if chained else "random-step",
            "transition": "posterior" if chained else "marginal",
        },
        "teacher": {"reference": config.teacher, "sha256": teacher.digest()},
        "training": to_json(config),
    }
    return Student(predictor, settings)


class Preview:
    """The student on the same sources with the same noise each time: a picture, and how much the noise changes.

    The rows of the picture are source, teacher, student. Diversity is compared with that of the teacher at
    `TEACHER_CALLS` calls, or fewer: nearly all of it is there by then.
    """

    def __init__(self, sources: SourceImages, teacher: Teacher, seed: int, device: torch.device) -> None:
        n = min(PREVIEWS, len(sources))
        rows = torch.linspace(0, len(sources) - 1, n).long().tolist()
        self.batch = sources.take(rows, stream(seed, "preview sources"), device)
        self.seed = seed
        nfe = min(teacher.config["sampling"]["nfe"], MOST_CALLS)
        self.rows = [self.batch.x_T, teacher.translate(self.batch, self._streams(), nfe)]
        calls = min(nfe, TEACHER_CALLS)
        variants = [teacher.translate(self.batch, self._streams(v), calls) for v in range(VARIANTS)]
        self.teacher_diversity = float(diversity(torch.stack(variants)).mean())

    def save(self, file: Path, student: Student, predictor: Any) -> dict[str, float]:
        """Write the picture with the student's present (averaged) weights; return what it adds to the log.

        A student without noise adds nothing.
        """
        student = Student(predictor, student.config)
        variants = [student.translate(self.batch, self._streams(v)) for v in range(VARIANTS)]
        images = [to_uint8(x.cpu()) for x in (*self.rows, variants[0])]
        with atomic_file(file) as new:
            labelled_grid(dict(zip(("source", "teacher", "student"), images, strict=True))).save(new, format="png")
        if not student.config["sampling"]["noise"]["channels"]:
            return {}
        spread = float(diversity(torch.stack(variants)).mean())
        return {"diversity": spread, "teacher_diversity": self.teacher_diversity}

    def _streams(self, variant: int = 0) -> list[torch.Generator]:
        more = (variant,) if variant else ()
        return [stream(self.seed, "preview", i, *more) for i in range(len(self.batch.x_T))]


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


def _agreed(accelerator: Accelerator, interrupted: list[int]) -> bool:
    """Tell whether any process was interrupted, the same in all of them."""
    if accelerator.num_processes == 1:
        return bool(interrupted)
    return bool(accelerator.reduce(torch.tensor(float(bool(interrupted)), device=accelerator.device)) > 0)
