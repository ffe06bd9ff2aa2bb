"""`ibmd distill`: a run of Algorithm 1 on Accelerate, with its folder, previews, checkpoints and resume.

A run folder holds `config.json`, `metrics.jsonl`, `run.html`, `previews/`, `checkpoints/step-NNNNNN/` (all that
training needs) and `student/` (all that the other commands need). Every random number belongs to an update of the run
(`stream`), so a checkpoint holds weights, optimisers and counts, and a resumed run equals an uninterrupted one.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ibmd_cli.data.augment import Augmentation
from ibmd_cli.data.references import usual_fit
from ibmd_cli.data.sources import SourceImages, count_workers
from ibmd_cli.devices import peak_memory
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import read_json
from ibmd_cli.method.distillation import Iterations, Sources, Step, generate, ibmd
from ibmd_cli.method.log_times import LogTimes
from ibmd_cli.method.noise import BatchStreams, Streams
from ibmd_cli.models.folder import refuse_models
from ibmd_cli.models.model import StudentModel, TeacherModel, make_setup
from ibmd_cli.models.references import TeacherRef, load_teacher
from ibmd_cli.networks.predictor import Predictor
from ibmd_cli.processes import this_process
from ibmd_cli.reporting import Reporter
from ibmd_cli.settings import to_json
from ibmd_cli.training.accelerator import check_processes, make_accelerator
from ibmd_cli.training.config import AUTO, DistillConfig
from ibmd_cli.training.fsdp import split
from ibmd_cli.training.heldout import HeldOut, calls_of_student, choose_held_out, score_student, spacing, verdict
from ibmd_cli.training.log import Watch, read_log
from ibmd_cli.training.memory import fitting_micro_batch
from ibmd_cli.training.new_student import new_student
from ibmd_cli.training.optimise import Player, Schedule
from ibmd_cli.training.preview import Preview
from ibmd_cli.training.run_folder import RESUME, STUDENT, TEACHER, Position, Run, check_run, open_run, writing
from ibmd_cli.training.run_page import run_page, write_page
from ibmd_cli.training.shared_images import SharedImages
from ibmd_cli.training.signals import interrupts
from ibmd_cli.training.teacher import Teaching, describe_teacher, new_teacher


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
        IbmdError: losses or gradients that stay not finite, a checkpoint that cannot be written, unreadable data, or no
            update of the student that was made.
        KeyboardInterrupt: after SIGINT, SIGTERM or SIGHUP, when the update is finished and a checkpoint is written.
    """
    process = this_process()
    if process.count > 1 and not process.connected:
        raise UsageError(
            f"WORLD_SIZE={process.count} without MASTER_ADDR: start them with --processes {process.count}, torchrun or "
            "accelerate launch; or unset RANK and WORLD_SIZE"
        )
    if process.rank == 0:
        refuse_models(config.data)
        check_run(out, config, resume)
    accelerator = make_accelerator(config, out, device)
    check_processes(config, accelerator.num_processes)
    reporter = reporter if accelerator.is_main_process else Reporter(quiet=True)
    if config.trains_teacher:
        teacher, described, digest = None, describe_teacher(config, out.name), {}
    else:
        ref = TeacherRef(config.teacher, config.preset, config.head_channels, config.attention_order)
        teacher = load_teacher(ref, quiet=reporter.quiet)
        described, digest = teacher.config, {config.teacher: f"sha256 {teacher.digest()}"}
        student = new_student(config, teacher)  # refuses what does not go together, before the work
    sources = SourceImages(
        config.data,
        described,
        reporter,
        "" if config.degrade == "none" else config.degrade,
        config.masks,
        layout=config.layout,
        labels=config.labels,
        workers=count_workers(config.workers, process.local_count),
        fit=_fit(config, out),
        targets=config.reads_targets,
    )
    for line in sources.describe():
        reporter.note(line)
    held_out = choose_held_out(config, described, sources, reporter, accelerator.device)
    hold = open_run(out, config, origins, accelerator.num_processes, {**digest, **sources.inputs})
    of_teacher = Path(resume).name.startswith(TEACHER.prefix)
    with hold if accelerator.is_main_process else nullcontext(), closing(sources):
        accelerator.wait_for_everyone()
        if teacher is None:
            teacher = new_teacher(config, described, sources, reporter)
            teaching = Teaching(config, out, teacher, sources, held_out, accelerator, reporter)
            teacher = teaching.run(resume if of_teacher or resume in RESUME else "auto")
            if config.stop_after == "teacher":
                return out / TEACHER.best
            student = new_student(config, teacher, str(out / TEACHER.best))
        training = Training(config, out, teacher, student, sources, held_out, accelerator, reporter)
        training.run("auto" if of_teacher else resume)
    return out / STUDENT.best


def _fit(config: DistillConfig, out: Path) -> str:
    """Return what becomes of images that are not square; runs from before that was a setting keep what they had."""
    file = out / "config.json"
    if not config.fit and file.is_file() and "fit" not in read_json(file).get("settings", {}):
        return "published"
    return config.fit or usual_fit(config.layout, config.degrade)


class Training:
    """A run at work: its players, its folder, and what is done after each update.

    Args:
        config: the settings.
        out: the run folder, which is held.
        teacher: x̂*_0.
        student: at its start.
        sources: images to train on.
        held_out: pairs to score it on; None: it is not scored, and the last student is kept.
        accelerator: device, precision, processes.
        reporter: for notes and progress.

    Attributes:
        at: how far the run is.
    """

    def __init__(
        self,
        config: DistillConfig,
        out: Path,
        teacher: TeacherModel,
        student: StudentModel,
        sources: SourceImages,
        held_out: HeldOut | None,
        accelerator: Accelerator,
        reporter: Reporter,
    ) -> None:
        self.config, self.out, self.sources, self.reporter = config, out, sources, reporter
        self.held_out = held_out
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self._say_where()
        torch.manual_seed(config.seed)
        self.teacher, self.student = teacher, student
        teacher.to(accelerator.device).predictor.requires_grad_(False)
        bridge_model = copy.deepcopy(teacher.predictor).requires_grad_(True)
        student.predictor.to(accelerator.device).requires_grad_(True)
        networks = (teacher.predictor, bridge_model, student.predictor)
        for predictor in networks:
            predictor.backbone.gradient_checkpointing = config.checkpointing
        # Dropout stays off (eval mode): student and bridge model must agree with the teacher at the start.
        self.setup = make_setup(
            student.predictor, student.config["sampling"], config.t_power, config.t_even, config.weight_power
        )
        if times := teacher.config.get("times"):
            self.setup = replace(self.setup, log_times=LogTimes(**times))
        self.augment = Augmentation(config.flip, config.shift, config.colour)
        self.score_every = config.score_every or spacing(
            calls_of_student(config, held_out), config.batch_size, config.steps
        )
        self.micro_batch = self._choose_micro_batch(networks)
        self.phi, self.theta = self._players(bridge_model, student.predictor)
        if config.compile:  # after their copies were made, and in place: names of parameters stay
            for predictor in networks:
                predictor.backbone.compile()
        players = {"student": self.theta, "bridge_model": self.phi}
        self.folder = Run(
            out, players, student, config.keep, accelerator.scaler, writes=self.main, scored=held_out is not None
        )
        self.at = Position()
        self.interrupted: list[int] = []

    def run(self, resume: str) -> None:
        """Train from where the run folder stands to the end."""
        config, folder = self.config, self.folder
        self.at = folder.restore(resume, self.reporter, config.steps)
        self.iterations = Iterations(config.steps, config.bridge_steps, config.bridge_warmup)
        first, last = (self.iterations.first(k) for k in (self.at.step, self.at.step + 1))
        bridge = self.at.bridge if first <= self.at.bridge <= last else first  # a run with other settings counts anew
        self.iterations = replace(self.iterations, start=self.at.step, bridge_start=bridge)
        self.lines = folder.trim_log(self.at.step) if self.main else []
        self.watch = Watch(config.steps, self.lines)
        if self.at.step and bridge == first:
            folder.mend(self.at.step, self.reporter)
        self.accelerator.wait_for_everyone()
        if self.at.step >= config.steps:
            self._refuse_untrained()
            if self.main:
                write_page(self.out, "finished")
            self.reporter.note(
                f"{self.out}: complete ({self.at.step} student updates); to train anew, give another --out"
            )
            return
        self.preview = Preview(self.sources, self.teacher, config.seed, self.accelerator.device) if self.main else None
        if self.at.step == 0 and not self._preview_file(0).exists():
            self._show(0)
        self.began = time.monotonic() - self.at.seconds
        with (
            run_page(self.out) if self.main else nullcontext(),
            self._tracking(),
            interrupts(self.reporter.quiet) as self.interrupted,
            folder.naming_checkpoint(),
            self.reporter.progress("distilling", config.steps, "step", self.at.step) as self.meter,
        ):
            for step in self._algorithm():
                self._after_student_update(step)
            self._refuse_untrained()
        for text in verdict(self.lines):
            self.reporter.warn(f"student: {text}")
        self.accelerator.end_training()

    # --------------------------------------------------------------------------------------------- before the first

    def _say_where(self) -> None:
        device, count = self.accelerator.device, self.accelerator.num_processes
        where = f"{device} × {count}" if count > 1 else f"{device}"
        name = "the new teacher" if self.config.trains_teacher else self.config.teacher
        self.reporter.note(f"distilling {name} into {self.out} on {where}")
        if count == 1 and torch.cuda.device_count() > 1 and device.type == "cuda":
            self.reporter.note(
                f"{torch.cuda.device_count()} GPUs are here and one is used; --processes all uses them all"
            )

    def _choose_micro_batch(self, networks: tuple[Predictor, Predictor, Predictor]) -> int:
        share = self.config.batch_size // self.accelerator.num_processes
        if self.config.micro_batch != AUTO:
            return int(self.config.micro_batch) or share
        last = int([0, *(line.get("micro_batch", 0) for line in read_log(self.out))][-1])
        self.accelerator.wait_for_everyone()
        if last and share % last == 0:
            return last  # sums in another order would differ in their last bits
        return fitting_micro_batch(self.config, networks, self.setup, self.sources, self.accelerator, self.reporter)

    def _players(self, bridge_model: Predictor, student: Predictor) -> tuple[Player, Player]:
        """Return φ and θ."""
        config = self.config
        player = partial(
            Player,
            accelerator=self.accelerator,
            seed=config.seed,
            betas=config.betas,
            micro_batches=config.batch_size // self.accelerator.num_processes // self.micro_batch,
            micro_batch=self.micro_batch,
            split=config.fsdp,
            halved=self._say_halved if config.reuse == 1 else None,
        )
        phi = player(
            "bridge_model",
            bridge_model,
            schedule=Schedule(config.bridge_lr, 0, config.lr_decay),
            steps=config.bridge_warmup + config.steps * config.bridge_steps,
        )
        theta = player(
            "student",
            student,
            schedule=Schedule(config.lr, config.lr_warmup, config.lr_decay),
            steps=config.steps,
            clip=config.clip or None,
            ema=config.ema,
        )
        return phi, theta

    def _say_halved(self, micro_batch: int) -> None:
        self.reporter.warn(f"out of memory: {micro_batch} images at a time from here on (--micro-batch {micro_batch})")

    def _algorithm(self) -> Iterator[Step]:
        """Algorithm 1 on these players; it moves as its steps are asked for."""
        if self.config.fsdp:
            if self.preview:
                self.preview.of_teacher  # noqa: B018 (made while this process has the whole teacher)
            split(self.teacher.predictor)
        x0_star = self.accelerator.prepare_model(self.teacher.predictor, evaluation_mode=True)
        self.sources.expect(self.micro_batch, self._coming_streams())

        def sources(rng: Streams) -> Sources:
            images = len(rng) if isinstance(rng, BatchStreams) else self.micro_batch
            return self.sources.batch(images, rng, self.augment, self.accelerator.device)

        make = partial(generate, self.theta.model, self.setup, sources)
        self.images = SharedImages(make, self.phi, self.iterations, self.config.reuse)
        return ibmd(
            x0_star,
            self.phi.model,
            self.theta.model,
            self.setup,
            sources,
            self._update_bridge,
            self.theta.update,
            self.iterations,
            images=self.images if self.config.reuse > 1 else None,
            recompute=self.config.recompute,
        )

    def _coming_streams(self) -> Iterator[Streams]:
        """Yield copies of the random streams of all coming batches, in the order in which they are drawn."""
        for k in self.iterations.of_student():
            makers = (self.iterations.maker(l, k, self.config.reuse) for l in self.iterations.of_bridge_model(k))  # noqa: E741
            for maker in dict.fromkeys(makers):
                yield from (self.phi.streams(maker, micro) for micro in range(self.phi.micro_batches))
            yield from (self.theta.streams(k, micro) for micro in range(self.theta.micro_batches))

    @contextmanager
    def _tracking(self) -> Iterator[None]:
        """Send the log to the tracker of `--track`, too; a run that continues replaces the steps from there on."""
        settings = {k: v if isinstance(v, int | float | str) else str(v) for k, v in to_json(self.config).items()}
        purge = {"purge_step": self.at.step + 1}
        options = {"tensorboard": purge, "wandb": {"name": self.out.name, "dir": str(self.out)}}
        self.accelerator.init_trackers("ibmd", settings, options)
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()

    # -------------------------------------------------------------------------------------------- after each update

    def _update_bridge(self, l: int, compute: Callable[..., Tensor]) -> float:  # noqa: E741 (the paper's letter)
        """Make update l of φ; save where a kill would lose too much, and where the run is to stop."""
        k = self.at.step
        self.images.begin(l, k)
        loss = self.phi.update(l, compute)
        self.at = Position(k, l + 1, loss, time.monotonic() - self.began)
        if l < self.config.bridge_warmup:
            self.meter.prepare(f"warm-up {l + 1}/{self.config.bridge_warmup}")
        stop, due = self._agreed(self.folder.is_due())
        if stop or due:
            self.folder.save(self.at, between=True, model=stop and k > 0)
            self.accelerator.wait_for_everyone()
        if stop:
            self._stop(f"after update {l + 1} of the bridge model")
        return loss

    def _after_student_update(self, step: Step) -> None:
        """Log, show and save what is due."""
        config, k = self.config, step.k + 1
        self.at = self.at._replace(step=k, seconds=time.monotonic() - self.began)
        line = self._line(step)
        stop, _ = self._agreed()
        show = k % config.preview_every == 0 or k == config.steps
        save = stop or k % config.checkpoint_every == 0 or k == config.steps
        if show:
            line |= self._show(k)
        if self.held_out and (k % self.score_every == 0 or k == config.steps):
            line |= score_student(self.folder, self.held_out, k, self.lines)
        if self.main:
            line |= self.watch.look(line)
            self.lines.append(line)
            for warning in line.get("warnings", []):
                self.reporter.warn(warning)
            self.folder.log(line)
            self.accelerator.log({name: v for name, v in line.items() if isinstance(v, int | float)}, step=k)
        if save:
            self.folder.save(self.at)
            self.accelerator.wait_for_everyone()
        if self.main and (show or save):
            write_page(self.out, "running")
        if stop and k < config.steps:
            self._stop(f"after step {k}")

    def _line(self, step: Step) -> dict[str, Any]:
        """Return what the log says of a student update, and show it."""
        config, k = self.config, step.k + 1
        losses = {"bridge_loss": self.at.bridge_loss, "student_loss": step.student_loss}
        images = (config.bridge_warmup + k * (config.bridge_steps + 1)) * config.batch_size
        rate = images / self.at.seconds
        self.meter.advance(1, **{name: f"{v:.4f}" for name, v in losses.items()}, images_per_second=f"{rate:.0f}")
        return {
            "step": k,
            **{name: v if math.isfinite(v) else None for name, v in losses.items()},
            "lr": self.theta.schedule(step.k, config.steps),
            "images": images,
            "seconds": self.at.seconds,
            "images_per_second": rate,
            "micro_batch": self.theta.micro_batch,
            "peak_memory_bytes": peak_memory(self.accelerator.device),
            "skipped": self.phi.skipped + self.theta.skipped,
            "broken_images": len(self.sources.broken),
        }

    def _preview_file(self, k: int) -> Path:
        return self.out / "previews" / f"step-{k:06d}.png"

    def _show(self, k: int) -> dict[str, float]:
        """Write the preview after student update k; return what it adds to the log. All processes call this."""
        average, file = self.theta.averaged(), self._preview_file(k)
        if not self.preview:
            return {}
        with writing(file, holds=self.folder.holds()):
            return self.preview.save(file, self.student, average)

    def _agreed(self, due: bool = False) -> tuple[bool, bool]:
        """Tell whether any process was interrupted, and whether the first one's answer is yes; the same in all."""
        stop = bool(self.interrupted)
        if self.accelerator.num_processes == 1:
            return stop, due
        said = torch.tensor([float(stop), float(due and self.main)], device=self.accelerator.device)
        stops, dues = self.accelerator.reduce(said).tolist()
        return stops > 0, dues > 0

    def _stop(self, where: str) -> None:
        self.reporter.note(f"interrupted {where}; the same command continues from here")
        raise KeyboardInterrupt

    def _refuse_untrained(self) -> None:
        """Fail, in the first process, if no update of the student was made."""
        training = read_json(self.out / STUDENT.best / "config.json")["training"] if self.main else {}
        if training.get("untrained"):
            raise IbmdError(
                f"{self.out}: nothing was learnt: all {self.config.steps} updates of the student were skipped, their "
                "losses or gradients were not finite; lower --lr and --bridge-lr, or use --precision fp32, with "
                "another --out"
            )
