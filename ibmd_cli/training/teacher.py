"""A teacher of one's own: bridge matching on pairs, the first half of `ibmd distill --teacher new`.

The loss is the one that trains the bridge model in the second half, on the coupling of the data (`bridge_loss`). The
network, its times and its preconditioning are options of the `Predictor` that published teachers are, too.
"""

import math
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ibmd_cli import __version__
from ibmd_cli.data.augment import Augmentation
from ibmd_cli.data.sources import SourceImages
from ibmd_cli.devices import peak_memory
from ibmd_cli.errors import UsageError, nearest
from ibmd_cli.files import atomic_file
from ibmd_cli.images.fit import to_uint8
from ibmd_cli.images.grids import labelled_grid
from ibmd_cli.method.bridges import Bridge, I2SBBridge, VEBridge, VPBridge
from ibmd_cli.method.distillation import Setup, bridge_loss
from ibmd_cli.method.log_times import LogTimes
from ibmd_cli.method.noise import BatchStreams, Streams, stream
from ibmd_cli.models.folder import load_folder
from ibmd_cli.models.model import TeacherModel
from ibmd_cli.models.references import load_teacher
from ibmd_cli.networks.predictor import make_predictor
from ibmd_cli.networks.unet import UNetConfig
from ibmd_cli.reporting import Meter, Reporter
from ibmd_cli.settings import to_json
from ibmd_cli.training.config import DistillConfig, duration
from ibmd_cli.training.heldout import SAMPLES, HeldOut, best, spacing, verdict
from ibmd_cli.training.log import read_log
from ibmd_cli.training.optimise import Player, Schedule
from ibmd_cli.training.run_folder import TEACHER, Position, Run, writing
from ibmd_cli.training.run_page import run_page, write_page
from ibmd_cli.training.signals import interrupts

NFE = 20
"""Network calls at which it is scored, and sampled if nothing else is asked for."""
EPOCHS, FEWEST, MOST = 20, 40_000, 400_000
"""How often it sees each pair, within these numbers of images in all."""
MOMENTS = 256
"""Pairs from which second moments are measured."""
BOUND = {"x0": 50.0, "residual": 3.0}
"""Bound of λ(t) by prediction, where the network's output is not scaled by c_out."""
SHOWN = 8
"""Held-out pairs of a preview."""
PROBES = 3
"""Updates by which the time of one is told."""


# ------------------------------------------------------------------------------------------------- what it is made of


def read_network(name: str) -> dict[str, Any]:
    """Return the settings of a network by its name in `networks.toml`, or from a TOML file of the same keys.

    Raises:
        UsageError: there is no such network, or it has other keys.
    """
    table = tomllib.loads((Path(__file__).parent / "networks.toml").read_text(encoding="utf-8"))
    if name in table:
        return dict(table[name])
    if not name.endswith(".toml"):
        raise UsageError(f"--network {name}: {nearest(name, table)}; or give a TOML file of one's own")
    try:
        settings = tomllib.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--network {name}: cannot be read ({error})") from error
    known = {field.name for field in fields(UNetConfig)} - {"in_channels", "out_channels", "num_classes"} | {"grid"}
    if wrong := settings.keys() - known:
        raise UsageError(f"--network {name}: no setting {min(wrong)!r}: {nearest(min(wrong), known)}")
    return settings


def describe_teacher(config: DistillConfig, name: str) -> dict[str, Any]:
    """Return the `config.json` of the teacher that settings ask for; second moments of the data are measured later.

    Raises:
        UsageError: settings that do not go together.
    """
    settings, size = read_network(config.network), config.size
    grid = settings.pop("grid", size)
    patch = settings.setdefault("patch_size", max(p for p in (1, 2, 4, 8) if p * grid <= max(size, grid)))
    multiple = patch * 2 ** (len(settings["channel_mult"]) - 1)
    if size % multiple:
        near = sorted({max(multiple, size // multiple * multiple), -(-size // multiple) * multiple})
        raise UsageError(
            f"--size {size}: the network {config.network} takes multiples of {multiple}: expected "
            f"{' or '.join(map(str, near))}"
        )
    bridge = _bridge(config)
    conditional = not isinstance(bridge, I2SBBridge)
    prediction = config.prediction or ("x0" if patch >= 4 else "ddbm" if conditional else "i2sb")
    log = (config.times or ("log" if conditional else "own")) == "log"
    low, high = config.sigma
    grid_of_times = {"log_grid": True, "sigma_min": low, "sigma_max": high} if log else {}
    sampler = {"sampler": "dbim", "eta": 1.0} if conditional else {"sampler": "i2sb"}
    return {
        "format": "ibmd-teacher",
        "format_version": 1,
        "ibmd_version": __version__,
        "name": name,
        "task": config.degrade or "source → target, as in its pairs",
        "network": {
            "in_channels": 6 if conditional else 3, **settings, "num_classes": config.classes or None,
        },
        "bridge": bridge.to_dict(),
        "preconditioning": {
            "kind": prediction, "time": "log" if log else "own", "max_weight": BOUND.get(prediction, 0.0),
        },
        "conditional": conditional,
        "noise_channels": 0,
        "image": {"size": size, "channels": 3, "range": [-1, 1], "source_scale": 1},
        "classes": config.classes or None,
        "mask": {"fill": "noise"} if config.degrade.startswith("inpaint-") else None,
        "degradation": config.degrade,
        "times": {"sigma_min": low, "sigma_max": high, "at_T": config.at_T} if log else None,
        "sampling": {**sampler, "nfe": NFE, **grid_of_times},
        "licence": "that of its pairs",
    }  # fmt: skip


def _bridge(config: DistillConfig) -> Bridge:
    scale = config.noise_scale
    if config.bridge == "vp":
        return VPBridge(beta_d=scale) if scale else VPBridge(beta_d=8.0)
    if config.bridge == "ve":
        return VEBridge(T=scale) if scale else VEBridge()
    return I2SBBridge(beta_max=scale) if scale else I2SBBridge()


def new_teacher(config: DistillConfig, draft: dict[str, Any], data: SourceImages, reporter: Reporter) -> TeacherModel:
    """Make the teacher that `describe_teacher` drafted, with fresh weights, or with those of the teacher `--init`."""
    settings = {**draft, "training": to_json(config)}
    torch.manual_seed(config.seed)
    if config.init:
        first = load_teacher(config.init, quiet=reporter.quiet)
        same = ("network", "bridge", "preconditioning", "conditional", "classes", "mask", "times", "sampling")
        settings |= {key: first.config.get(key) for key in same}
        if first.image_size != config.size:
            raise UsageError(f"--init {config.init}: is for {first.image_size} pixels: --size {first.image_size}")
        return TeacherModel(first.predictor.train(), settings)
    if settings["preconditioning"]["kind"] != "i2sb":
        batch, x_0 = data.take_pairs(data.rows[:MOMENTS].tolist(), stream(config.seed, "moments"))
        x_T = batch.x_T
        moments = {"m0": x_0.square().mean(), "mT": x_T.square().mean(), "m0T": (x_0 * x_T).mean()}
        settings["preconditioning"] = settings["preconditioning"] | {k: round(float(v), 6) for k, v in moments.items()}
    predictor = make_predictor(settings)
    shared = ("network", "bridge", "preconditioning", "conditional", "noise_channels")
    settings |= {key: predictor.to_dict()[key] for key in shared}
    return TeacherModel(predictor.train(), settings)


# ------------------------------------------------------------------------------------------------------------ training


def updates_of_teacher(config: DistillConfig, pairs: int) -> int:
    """Return the updates that a teacher is trained by: as asked for, or by the number of pairs."""
    images = min(max(EPOCHS * pairs, FEWEST), MOST)
    return config.teacher_steps or -(-images // config.batch_size)


class Teaching:
    """The first half of a run: from pairs to `teacher/` in the run folder.

    Args:
        config: the settings.
        out: the run folder.
        teacher: to be trained, in place.
        data: pairs.
        held_out: pairs that are kept from training; None: it is not scored, and its last state is kept.
        accelerator: device, precision, processes.
        reporter: for notes and progress.
    """

    def __init__(
        self,
        config: DistillConfig,
        out: Path,
        teacher: TeacherModel,
        data: SourceImages,
        held_out: HeldOut | None,
        accelerator: Accelerator,
        reporter: Reporter,
    ) -> None:
        self.config, self.out, self.teacher, self.data = config, out, teacher, data
        self.held_out, self.accelerator, self.reporter = held_out, accelerator, reporter
        predictor, times = teacher.to(accelerator.device).predictor, teacher.config["times"]
        self.setup = Setup(
            predictor.bridge, predictor.weight, (predictor.bridge.T,), log_times=LogTimes(**times) if times else None
        )
        self.lines: list[dict[str, Any]] = []
        self.augment = Augmentation(config.flip, config.shift, config.colour)
        share = config.batch_size // accelerator.num_processes
        micro = share if isinstance(config.micro_batch, str) else config.micro_batch or share
        self.player = Player(
            "teacher", predictor, accelerator, Schedule(self._rate(), 100, "cosine", 0.01), steps=1, seed=config.seed,
            clip=1.0, ema=config.ema, weight_decay=0.01, micro_batch=micro, micro_batches=share // micro,
            halved=self._say_halved,
        )  # fmt: skip
        self.folder = Run(
            out, {"teacher": self.player}, teacher, config.keep, accelerator.scaler,
            writes=accelerator.is_main_process, half=TEACHER, scored=held_out is not None,
        )  # fmt: skip

    def run(self, resume: str) -> TeacherModel:
        """Train from where the run folder stands to the end, and return the teacher that is kept.

        Raises:
            KeyboardInterrupt: it was stopped by a signal; a checkpoint is written.
        """
        folder, main = self.folder, self.folder.writes
        lines = read_log(self.out, TEACHER.log)
        at = folder.restore(resume, self.reporter, lines[-1]["steps"] if lines else None)
        self.lines = folder.trim_log(at.step) if main else lines[: at.step]
        steps = self.player.steps = self.lines[-1]["steps"] if self.lines else self._steps()
        if at.step:
            folder.mend(at.step, self.reporter)
        self.data.expect(self.player.micro_batch or 1, self._streams(at.step, steps))
        self.every = self.spacing(steps)
        self.began = time.monotonic() - at.seconds
        with (
            run_page(self.out) if main and at.step < steps else nullcontext(),
            interrupts(self.reporter.quiet) as interrupted,
            folder.naming_checkpoint(),
            self.reporter.progress("teacher (1 of 2)", steps, "step", at.step) as meter,
        ):
            for k in range(at.step, steps):
                self._update(k, steps, meter)
                if self._save(k + 1, steps, bool(interrupted)):
                    self.reporter.note(f"interrupted after step {k + 1} of the teacher; the same command goes on")
                    raise KeyboardInterrupt
        if self.held_out and at.step < steps:
            for text in verdict(self.lines, self.held_out.copying()):
                self.reporter.warn(f"teacher: {text}")
        self.accelerator.wait_for_everyone()
        return load_folder(self.out / TEACHER.best, str(self.out / TEACHER.best), TeacherModel)

    def _update(self, k: int, steps: int, meter: Meter) -> None:
        """Make update k, score the teacher where that is due, and log all this."""
        loss = self.player.update(k, self.compute)
        seconds, images = time.monotonic() - self.began, (k + 1) * self.config.batch_size
        line = {
            "step": k + 1,
            "steps": steps,
            "loss": loss if math.isfinite(loss) else None,
            "lr": self.player.schedule(k, steps),
            "images": images,
            "seconds": seconds,
            "images_per_second": images / seconds,
            "micro_batch": self.player.micro_batch,
            "peak_memory_bytes": peak_memory(self.accelerator.device),
            "skipped": self.player.skipped,
            "broken_images": len(self.data.broken),
        }
        if self.held_out and ((k + 1) % self.every == 0 or k + 1 == steps):
            line |= self.score(k + 1)
        self.lines.append(line)
        if self.folder.writes:
            self.folder.log(line)
        meter.advance(1, loss=f"{loss:.4f}", images_per_second=f"{images / seconds:.0f}")

    def _save(self, step: int, steps: int, interrupted: bool) -> bool:
        """Write a checkpoint where one is due; tell whether any process was interrupted. All processes call this."""
        whole = step % self.config.checkpoint_every == 0 or step == steps
        said = torch.tensor([float(interrupted), float(self.folder.is_due())], device=self.accelerator.device)
        stop, due = (v > 0 for v in self.accelerator.reduce(said).tolist())
        if whole or stop or due:
            at = Position(step, seconds=time.monotonic() - self.began)
            self.folder.save(at, between=not (whole or stop), model=whole or stop)
            self.accelerator.wait_for_everyone()
            if self.folder.writes:
                write_page(self.out, "running")
        return stop and step < steps

    def _say_halved(self, micro_batch: int) -> None:
        self.reporter.warn(f"out of memory: {micro_batch} images at a time from here on (--micro-batch {micro_batch})")

    def compute(self, rng: Streams, backward: Callable[[Tensor], None]) -> Tensor:
        """Draw pairs, and add the gradient of their loss; return the loss, see `Player.update`."""
        assert isinstance(rng, BatchStreams)
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng.shared)))  # of dropout
        batch, x_0 = self.data.pairs(len(rng), rng, self.augment, self.accelerator.device)
        loss = bridge_loss(self.player.model, self.setup, x_0, batch, rng)
        backward(loss)
        return loss.detach()

    def score(self, step: int) -> dict[str, Any]:
        """Score the averages on the held-out pairs, and keep the best if none before was better; return log entries.

        Each average is scored at one call, and the best of them at `NFE` calls.
        """
        assert self.held_out is not None
        candidates = [(decay, self.folder.averaged(step, decay)) for decay in self.player.averages]
        if not self.folder.writes:
            return {}
        scored = []
        for decay, teacher in candidates:
            teacher.predictor.eval()
            assert isinstance(teacher, TeacherModel)
            draws = self.held_out.draw(partial(teacher.translate, nfe=1), 1)
            scored.append((self.held_out.judge(draws), decay, teacher, draws[0]))
        one, decay, teacher, mean = min(scored, key=lambda row: row[0]["mse"])
        draws = self.held_out.draw(partial(teacher.translate, nfe=NFE))
        line = {**self.held_out.judge(draws), "energy_score_1": one["energy_score"], "mse_1": one["mse"], "ema": decay}
        least = best(self.lines)
        if least is None or line["energy_score"] < least["energy_score"]:
            self.folder.write(teacher, TEACHER.best)
        rows = {"source": self.held_out.sources.x_T, "one call": mean, f"{NFE} calls": draws[0]}
        rows |= {"target": self.held_out.x_0}
        images = {name: to_uint8(x[:SHOWN].clamp(-1, 1).cpu()) for name, x in rows.items()}
        file = self.out / "previews" / f"{TEACHER.prefix}-{step:06d}.png"
        with writing(file, holds=self.folder.holds()), atomic_file(file) as new:
            labelled_grid(images).save(new, format="png")
        return line

    def spacing(self, steps: int) -> int:
        """Return how many of `steps` updates lie between two scorings."""
        calls = (SAMPLES * NFE + len(self.player.averages)) * (len(self.held_out) if self.held_out else 0)
        return self.config.score_every or spacing(calls, self.config.batch_size, steps)

    def _rate(self) -> float:
        return self.config.teacher_lr or (1e-4 if self.config.init else 7e-4)

    def _steps(self) -> int:
        """Return the updates of the whole half: as asked for, or by the number of pairs; no more than there is time."""
        config = self.config
        steps = updates_of_teacher(config, len(self.data.rows))
        if config.teacher_time:
            seconds = self._seconds_of_an_update()
            affordable = max(1, int(duration(config.teacher_time) / seconds))
            self.reporter.note(
                f"teacher: an update takes {seconds:.2g} s; --teacher-time {config.teacher_time} is enough for "
                f"{affordable} of {steps} steps" + ("" if affordable < steps else ", all of them")
            )
            steps = min(steps, affordable)
        return steps

    def _seconds_of_an_update(self) -> float:
        """Measure forward and backward passes, which leave no gradient behind; the same number in all processes."""
        player = self.player
        rng = player.streams(0, 0)
        self.compute(rng, Tensor.backward)
        began = time.monotonic()
        for _ in range(PROBES):
            self.compute(player.streams(0, 0), Tensor.backward)
        seconds = (time.monotonic() - began) / PROBES * player.micro_batches
        player.optimizer.zero_grad(set_to_none=True)
        device = self.accelerator.device
        return float(self.accelerator.gather(torch.tensor([seconds], device=device)).max())

    def _streams(self, start: int, steps: int) -> Iterator[Streams]:
        """Yield copies of the random streams of all coming batches."""
        for k in range(start, steps):
            yield from (self.player.streams(k, micro) for micro in range(self.player.micro_batches))
