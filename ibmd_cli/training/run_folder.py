"""The folder of a run: what it was started with, its log, its checkpoints, its student; and how to continue from them.

A checkpoint is a folder that appears whole or not at all: `state.pt` holds all that the next step depends on, and
`state.pt.sha256` its checksum, in the format of `sha256sum`. A process may be killed at any moment: what it leaves
half-written is swept away, and what is damaged later is found by the checksum and gives way to the one before it.
"""

import fcntl
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from ibmd_cli import __version__
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import atomic_file, atomic_folder, read_json, sha256
from ibmd_cli.models.card import student_card, teacher_card
from ibmd_cli.models.folder import load_folder, misfits, save_model
from ibmd_cli.models.model import Model, StudentModel
from ibmd_cli.reporting import Reporter
from ibmd_cli.training.config import DistillConfig, changed_settings, to_json
from ibmd_cli.training.log import read_log
from ibmd_cli.training.optimise import Diverged, Player

RESUME = ("auto", "never")
SECONDS = 10.0
"""After which there is a checkpoint between those of `--checkpoint-every`, so that a kill loses little …"""
SHARE = 0.05
"""… unless writing them would take more than this part of the time."""


def check_run(out: Path, config: DistillConfig, resume: str) -> None:
    """Refuse a run folder that cannot be used, before anything is read.

    Args:
        out: the run folder.
        config: the settings.
        resume: of `ibmd distill`; "never" refuses a folder that holds a run.

    Raises:
        UsageError: it is something else, may not be written, or holds a run that was started otherwise; or `resume`
            names no checkpoint.
    """
    there = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UsageError(f"--out {out}: {there} is no folder; give another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--out {out}: {there} may not be written to; check its permissions, or give another --out")
    others = any((out / "checkpoints").glob("*-*")) and Path(resume).resolve().parent.parent != out.resolve()
    if resume not in RESUME and not others and not (Path(resume) / "state.pt").is_file():
        raise UsageError(f"--resume {resume}: no checkpoint: expected a folder RUN/checkpoints/step-… with state.pt")
    if (out / "config.json").exists():
        saved = read_json(out / "config.json").get("settings")
        if not isinstance(saved, dict) or not isinstance(read_json(out / "config.json").get("inputs", {}), dict):
            raise UsageError(f"--out {out}: its config.json is not that of a run; give another --out")
        if resume == "never":
            raise UsageError(f"{out}: holds a run already; give another --out, or --resume auto to continue it")
        if changed := changed_settings(config, saved):
            raise UsageError(f"{out}: a run with other settings ({'; '.join(changed)}); give another --out")
    elif out.exists() and any(path.name[:6] != ".ibmd-" for path in out.iterdir()):
        raise UsageError(f"{out}: not empty and not a run folder; give another --out")


@contextmanager
def open_run(
    out: Path, config: DistillConfig, origins: Mapping[str, str], processes: int, inputs: Mapping[str, str]
) -> Iterator[None]:
    """Make the run folder, or check that what the run there was made of is the same still; then hold it.

    Args:
        out: the run folder, after `check_run`.
        config: the settings.
        origins: where each came from.
        processes: that train; a run may be continued by more or fewer.
        inputs: teacher and data → what was found of them; a run that is continued must find the same.

    Raises:
        UsageError: teacher or data changed, or another process trains in the folder.
    """
    file = out / "config.json"
    if file.exists():
        before = read_json(file).get("inputs", inputs)
        if changed := [f"{k}: {before.get(k)} there, {now} here" for k, now in inputs.items() if before.get(k) != now]:
            raise UsageError(
                f"{out}: teacher or data changed ({'; '.join(changed)}); put them back, or give another --out"
            )
    else:
        content = {
            "ibmd_version": __version__,
            "processes": processes,
            "settings": to_json(config),
            "origins": dict(origins),
            "inputs": dict(inputs),
        }
        with writing(file), atomic_file(file) as new:
            new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with file.open("rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed, or the process dies
        except BlockingIOError as error:
            raise UsageError(f"{out}: another process trains in it; wait for it, or give another --out") from error
        _sweep(out)
        yield


@contextmanager
def writing(file: Path, needed: int = 0, holds: str = "") -> Iterator[None]:
    """Say, of what cannot be written, which file that was, what is free and needed, what holds, and how to go on.

    Args:
        file: to be written inside.
        needed: its bytes, where they are known.
        holds: what there is still of the run.
    """
    try:
        yield
    except (OSError, RuntimeError, IbmdError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__ or error
        number = re.search(r"\(os error (\d+)\)", str(cause))  # as safetensors says it
        reason = os.strerror(int(number[1])) if number else getattr(cause, "strerror", None) or str(cause)
        there = next(path for path in file.absolute().parents if path.exists())
        space = f"{shutil.disk_usage(there).free / 2**20:.1f} MiB are free"
        space += f", {needed / 2**20:.1f} MiB are needed" if needed else ""
        raise IbmdError(
            f"{file}: cannot be written ({reason}; {space}){holds and '; '}{holds}; make room for it, or make its "
            "folder writable, and run the same command again"
        ) from error


def _sweep(out: Path) -> None:
    """Remove what a killed process left half-written."""
    for folder in (out, out / "checkpoints", out / "previews"):
        for path in folder.glob(".ibmd-*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


class Position(NamedTuple):
    """How far a run is.

    Attributes:
        step: student updates that are made.
        bridge: bridge-model updates that are made.
        bridge_loss: of the last of them.
        seconds: spent on all this.
    """

    step: int = 0
    bridge: int = 0
    bridge_loss: float = math.nan
    seconds: float = 0.0


@dataclass(frozen=True)
class Half:
    """What the files of one half of a run are called.

    Attributes:
        player: that becomes a model.
        log: the file of its log.
        prefix: of its checkpoints and previews, before the number of the step.
        best: folder of the model that is best by its held-out score.
        last: folder of the model of the last checkpoint; "": none. Without held-out scores it is `best`.
        rates: the settings of its learning rates.
    """

    player: str
    log: str
    prefix: str
    best: str
    last: str
    rates: str


STUDENT = Half("student", "metrics.jsonl", "step", "student", "student-last", "--lr and --bridge-lr")
TEACHER = Half("teacher", "teacher.jsonl", "teacher", "teacher", "", "teacher_lr (in a --config file)")


class Run:
    """The log, the checkpoints and the models of a half of a run.

    Args:
        out: the run folder.
        players: what a checkpoint holds; one of them becomes a model.
        model: its settings.
        keep: checkpoints to keep.
        scaler: of the gradients with fp16, shared by the players.
        writes: whether this process writes; all of them must call `save` and `mend`, which gather networks that are
            split.
        half: of the run.
        scored: whether models are scored on held-out pairs, and the best is written by `write`.
    """

    def __init__(
        self,
        out: Path,
        players: dict[str, Player],
        model: Model,
        keep: int,
        scaler: torch.amp.GradScaler | None,
        writes: bool = True,
        half: Half = STUDENT,
        scored: bool = False,
    ) -> None:
        self.out, self.players, self.model, self.keep, self.scaler = out, players, model, keep, scaler
        self.writes, self.half, self.last = writes, half, half.last if scored else half.best
        self.saved, self.cost = time.monotonic(), 0.0
        self.left_alone = False

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to the log."""
        file = self.out / self.half.log
        with writing(file, holds=self.holds()), file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def trim_log(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines of steps after `step`, which will be made again, and return the others."""
        file = self.out / self.half.log
        lines = [line for line in read_log(self.out, self.half.log) if line["step"] <= step]
        if file.exists():
            with writing(file, holds=self.holds()), atomic_file(file) as new:
                new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return lines

    def checkpoints(self) -> list[Path]:
        """Return the folders of the checkpoints, newest first."""
        return sorted((self.out / "checkpoints").glob(f"{self.half.prefix}-*"), key=_order, reverse=True)

    def is_due(self) -> bool:
        """Tell whether so much time went by that a kill would lose too much."""
        return time.monotonic() - self.saved >= max(SECONDS, self.cost / SHARE)

    def save(self, at: Position, *, between: bool = False, model: bool = True) -> None:
        """Write a checkpoint and the last model, each whole or not at all, and drop the checkpoints that are not kept.

        Args:
            at: how far the run is.
            between: whether this is until the next checkpoint alone, e.g. after an update of the bridge model.
            model: whether to write the folder of the last model, too.

        Raises:
            IbmdError: they cannot be written; the checkpoint before is intact.
        """
        began = time.monotonic()
        name = f"{self.half.prefix}-{at.step:06d}" + (f"-bridge-{at.bridge:06d}" if between else "")
        folder = self.out / "checkpoints" / name
        state: dict[str, Any] = {name: player.state_dict() for name, player in self.players.items()}
        averaged = self.averaged(at.step)
        if self.writes:
            state |= {"scaler": self.scaler.state_dict() if self.scaler else None, **at._asdict()}
            needed = sum(x.nbytes for x in tree_leaves(state) if isinstance(x, torch.Tensor))
            with writing(folder, needed, self.holds(folder)), atomic_folder(folder) as new:
                with (new / "state.pt").open("wb") as file:  # not by its name: torch would hide what the system says
                    torch.save(state, file)
                (new / "state.pt.sha256").write_text(f"{sha256(new / 'state.pt')}  state.pt\n", encoding="utf-8")
            if model:
                absent = "" if (self.out / self.half.best).exists() else self.half.best  # before the first scores
                for name in dict.fromkeys(filter(None, (self.last, absent))):
                    self.write(averaged, name)
            # Later ones are left from before a damaged one, or from before --resume: they do not count.
            before = [path for path in self.checkpoints() if _order(path) < _order(folder)]
            whole = [path for path in before if "-bridge-" not in path.name][: self.keep - (not between)]
            for old in set(before) - set(whole):
                shutil.rmtree(old)
        self.saved = time.monotonic()
        self.cost = self.saved - began

    def restore(self, resume: str, reporter: Reporter, steps: int | None = None) -> Position:
        """Load the newest sound checkpoint; of a finished run whose student is whole, none need be sound.

        Args:
            resume: "auto" or "never", or the path of a checkpoint: one of this run is loaded whatever else there is,
                one of another run if this one has none yet.
            reporter: told which one, and of those that are damaged.
            steps: student updates of a finished run.

        Returns:
            Where the run stands; at the start if there is no sound checkpoint.

        Raises:
            IbmdError: the checkpoint that `resume` names is damaged or absent; or the run is finished, and neither its
                student nor a checkpoint is sound.
        """
        named = None if resume in RESUME else Path(resume)
        folders = self.checkpoints()
        if named:
            own = named.resolve().parent == (self.out / "checkpoints").resolve()
            folders = [named] if own else [*folders, named]
        log = read_log(self.out, self.half.log)
        finished = steps is not None and any(line["step"] >= steps for line in log)
        whole = finished and self._is_whole(steps)
        for folder in folders:
            try:
                state = self._read(folder)
            except (IbmdError, OSError) as error:
                if folder == named:
                    raise IbmdError(f"--resume {resume}: not a sound checkpoint ({error})") from error
                if not whole:
                    reporter.warn(f"{folder}: damaged ({error}); trying the one before it")
                continue
            if whole and folder != named and state["step"] != steps:
                continue
            for name, player in self.players.items():
                player.load_state_dict(state[name])
            if self.scaler:
                self.scaler.load_state_dict(state["scaler"])
            reporter.note(f"resuming from {folder}")
            return Position(**{key: state[key] for key in Position._fields if key in state})
        if whole:
            reporter.warn(f"{self.out}: its checkpoints are damaged or gone; its student is whole, and left alone")
            self.left_alone = True
            return Position(step=steps or 0)
        if finished:
            raise IbmdError(
                f"{self.out}: a finished run, of which neither the student nor a checkpoint is sound; to train anew, "
                "give another --out"
            )
        if folders:
            reporter.warn(f"{self.out}: no sound checkpoint; starting from step 0")
        return Position()

    def _read(self, folder: Path) -> dict[str, Any]:
        """Return the content of a checkpoint, if its checksum is right and it is one of these networks."""
        file = folder / "state.pt"
        sums = (folder / "state.pt.sha256").read_text(encoding="utf-8", errors="replace").split()
        if sums != [sha256(file), "state.pt"]:
            raise IbmdError(f"{file}: its checksum is wrong")
        try:
            state = dict(torch.load(file, map_location="cpu", weights_only=True))
            have, want = (
                {f"{name} {key}": tuple(v.shape) for name in self.players for key, v in weights(name).items()}
                for weights in (lambda name: state[name]["model"], lambda name: self.players[name].network.state_dict())
            )
        except Exception as error:  # whatever another file makes torch raise
            raise IbmdError(f"{file}: not a checkpoint of such a run ({type(error).__name__})") from error
        if wrong := misfits(have, want):
            raise IbmdError(f"{file}: of other networks: {wrong}")
        return state

    def _is_whole(self, step: int | None) -> bool:
        """Tell whether the models are there, the last one that of `step`."""
        try:
            steps = [self._load(folder).config["training"]["step"] for folder in (self.half.best, self.last) if folder]
        except (IbmdError, KeyError, TypeError):
            return False
        return not self.last or bool(steps[-1] == step)

    def _load(self, folder: str) -> Model:
        return load_folder(self.out / folder, str(self.out / folder), type(self.model))  # type: ignore[type-var]

    def holds(self, folder: Path | None = None) -> str:
        """Say which checkpoint there is, before the one in `folder`."""
        before = next((path.name for path in self.checkpoints() if path != folder), None)
        return f"the checkpoint before it is intact ({before})" if before else "there is no checkpoint before it"

    @contextmanager
    def naming_checkpoint(self) -> Iterator[None]:
        """Tell, when training diverges, from which checkpoint it can be continued and how."""
        try:
            yield
        except Diverged as error:
            mend = f"lower {self.half.rates}, or use --precision fp32, with another --out"
            if newest := self.checkpoints()[:1]:
                mend += f"; --resume {newest[0]} starts it from the last good checkpoint"
            raise IbmdError(f"{error}; {mend}") from error

    def write(self, model: Model, name: str) -> None:
        """Write a model to a folder of the run, whole or not at all."""
        needed = sum(v.nbytes for v in model.predictor.state_dict().values())
        card = student_card(model) if isinstance(model, StudentModel) else teacher_card(model)
        with writing(self.out / name, needed, self.holds()):
            save_model(model, self.out / name, card=card)

    def mend(self, step: int, reporter: Reporter) -> None:
        """Write a model's folder again, and say so, if it is damaged, or the last model is not that of `step`."""
        want = self.averaged(step)
        if not self.writes or self.left_alone:
            return
        for name in dict.fromkeys(filter(None, (self.last, self.half.best))):
            try:
                have = self._load(name)
                sound = name != self.last or (_content(have) == _content(want) and _equal(have, want))
            except (IbmdError, KeyError, TypeError):
                sound = False
            if not sound:
                reporter.warn(
                    f"{self.out / name}: absent, damaged, or not of step {step}; written again from the checkpoint"
                )
                self.write(want, name)

    def averaged(self, step: int, decay: float | None = None) -> Model:
        """Return the model with weights averaged by a decay, or by the first."""
        player = self.players[self.half.player]
        training = {**self.model.config["training"], "step": step}
        if 0 < step <= player.skipped:
            training["untrained"] = True  # all updates were skipped
        return type(self.model)(player.averaged(decay), {**self.model.config, "training": training})  # type: ignore[arg-type]


def _order(checkpoint: Path) -> tuple[int, ...]:
    """Return the numbers in a checkpoint's name: `step-NNNNNN`, or `step-NNNNNN-bridge-NNNNNN`."""
    return tuple(int(word) for word in checkpoint.name.split("-") if word.isdecimal())


def _content(model: Model) -> dict[str, Any]:
    """Return the configuration as in its file, but without the settings that a resumed run may have otherwise."""
    return dict(json.loads(json.dumps({**model.config, "training": model.config["training"]["step"]})))


def _equal(one: Model, other: Model) -> bool:
    a, b = one.predictor.state_dict(), other.predictor.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[key].cpu()) for key, v in a.items())
