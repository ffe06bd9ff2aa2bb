"""The folder of a run: what it was started with, its log, its checkpoints, its student; and how to continue from them.

A checkpoint is a folder that appears whole or not at all: `state.pt` holds all that the next step depends on, and
`state.pt.sha256` its checksum, in the format of `sha256sum`. A process may be killed at any moment: what it leaves
half-written is swept away, and what is damaged later is found by the checksum and gives way to the one before it.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ibmd_cli import __version__
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import atomic_file, atomic_folder, read_json, sha256
from ibmd_cli.models.card import student_card
from ibmd_cli.models.folder import load_student, save_model
from ibmd_cli.models.model import Model, Student
from ibmd_cli.reporting import Reporter
from ibmd_cli.training.config import DistillConfig, differences, to_json
from ibmd_cli.training.log import read_log
from ibmd_cli.training.optimise import Diverged, Player

RESUME = ("auto", "never")


@contextmanager
def open_run(
    out: Path,
    config: DistillConfig,
    origins: Mapping[str, str],
    resume: str,
    processes: int,
    inputs: Mapping[str, str],
) -> Iterator[None]:
    """Make the run folder, or check that the one that is there may be continued with these settings; then hold it.

    Args:
        out: the run folder.
        config: the settings.
        origins: where each came from.
        resume: of `ibmd distill`; "never" refuses a folder that holds a run.
        processes: that train; a run may be continued by more or fewer.
        inputs: teacher and data → what was found of them; a run that is continued must find the same.

    Raises:
        UsageError: the folder holds something else, a run that was started otherwise, or one that is still running.
    """
    file = out / "config.json"
    if file.exists():
        _check(out, config, resume, inputs)
    else:
        _start(out, config, origins, processes, inputs)
    with file.open(encoding="utf-8") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed, or the process dies
        except BlockingIOError as error:
            raise UsageError(f"{out}: another process trains in it; wait for it, or give another --out") from error
        _sweep(out)
        yield


def _start(
    out: Path, config: DistillConfig, origins: Mapping[str, str], processes: int, inputs: Mapping[str, str]
) -> None:
    if out.exists() and any(path.name[:6] != ".ibmd-" for path in out.iterdir()):
        raise UsageError(f"{out}: not empty and not a run folder; give another --out")
    content = {
        "ibmd_version": __version__,
        "processes": processes,
        "settings": to_json(config),
        "origins": dict(origins),
        "inputs": dict(inputs),
    }
    with atomic_file(out / "config.json") as new:
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check(out: Path, config: DistillConfig, resume: str, inputs: Mapping[str, str]) -> None:
    """Refuse to continue a run that was started otherwise."""
    if resume == "never":
        raise UsageError(f"{out}: holds a run already; give another --out, or --resume auto to continue it")
    saved = read_json(out / "config.json")
    if changed := differences(config, saved["settings"]):
        raise UsageError(f"{out}: a run with other settings ({'; '.join(changed)}); give another --out")
    before = saved.get("inputs", inputs)
    if changed := [f"{k}: {before.get(k)} there, {now} here" for k, now in inputs.items() if before.get(k) != now]:
        raise UsageError(f"{out}: teacher or data changed ({'; '.join(changed)}); put them back, or give another --out")


def _sweep(out: Path) -> None:
    """Remove what a killed process left half-written."""
    for folder in (out, out / "checkpoints", out / "previews"):
        for path in folder.glob(".ibmd-*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


class Run:
    """The log, the checkpoints and the student of a run folder.

    Args:
        out: the run folder.
        players: what a checkpoint holds; the one named "student" becomes `student/`.
        student: its settings.
        keep: checkpoints to keep.
        scaler: of the gradients with fp16, shared by the players.
        writes: whether this process writes; all of them must call `save` and `mend_student`, which gather networks
            that are split.
    """

    def __init__(
        self,
        out: Path,
        players: dict[str, Player],
        student: Student,
        keep: int,
        scaler: torch.amp.GradScaler | None,
        writes: bool = True,
    ) -> None:
        self.out, self.players, self.student, self.keep, self.scaler = out, players, student, keep, scaler
        self.writes = writes

    def log(self, line: Mapping[str, Any]) -> None:
        """Append a line to `metrics.jsonl`."""
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def trim_log(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines of steps after `step`, which will be made again, and return the others."""
        file = self.out / "metrics.jsonl"
        lines = [line for line in read_log(self.out) if line["step"] <= step]
        if file.exists():
            with atomic_file(file) as new:
                new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return lines

    def checkpoints(self) -> list[Path]:
        """Return the folders of the checkpoints, newest first."""
        return sorted((self.out / "checkpoints").glob("step-*"), key=_step, reverse=True)

    def save(self, step: int, seconds: float) -> None:
        """Write `checkpoints/step-NNNNNN` and `student/`, each whole or not at all, and drop the oldest checkpoints.

        Raises:
            IbmdError: they cannot be written; the checkpoint before is intact.
        """
        folder = self.out / "checkpoints" / f"step-{step:06d}"
        state: dict[str, Any] = {name: player.state_dict() for name, player in self.players.items()}
        student = self._averaged(step)
        if not self.writes:
            return
        state |= {"scaler": self.scaler.state_dict() if self.scaler else None, "step": step, "seconds": seconds}
        with atomic_folder(folder) as new:
            try:
                torch.save(state, new / "state.pt")
            except RuntimeError as error:  # what torch makes of an OSError
                free = shutil.disk_usage(self.out).free / 2**20
                raise IbmdError(
                    f"{folder}: cannot be written, {free:.0f} MiB are free there: free some space and run the same "
                    "command again; the checkpoint before it is intact"
                ) from error
            (new / "state.pt.sha256").write_text(f"{sha256(new / 'state.pt')}  state.pt\n", encoding="utf-8")
        self._save_student(student)
        # Later ones are left from before a damaged one, or from before --resume: they do not count.
        for old in [path for path in self.checkpoints() if _step(path) <= step][self.keep :]:
            shutil.rmtree(old)

    def restore(self, resume: str, reporter: Reporter) -> tuple[int, float]:
        """Load the newest sound checkpoint.

        Args:
            resume: "auto" or "never", or the path of a checkpoint: one of this run is loaded whatever else there is,
                one of another run if this one has none yet.
            reporter: told which one, and of those that are damaged.

        Returns:
            The step, and the seconds spent on it; (0, 0.0) if there is no sound checkpoint.

        Raises:
            IbmdError: the checkpoint that `resume` names is damaged or absent.
        """
        named = None if resume in RESUME else Path(resume)
        folders = self.checkpoints()
        if named:
            own = named.resolve().parent == (self.out / "checkpoints").resolve()
            folders = [named] if own else [*folders, named]
        for folder in folders:
            try:
                state = _read(folder)
            except (IbmdError, OSError) as error:
                if folder == named:
                    raise IbmdError(f"--resume {resume}: not a sound checkpoint ({error})") from error
                reporter.warn(f"{folder}: damaged ({error}); trying the one before it")
                continue
            for name, player in self.players.items():
                player.load_state_dict(state[name])
            if self.scaler:
                self.scaler.load_state_dict(state["scaler"])
            reporter.note(f"resuming from {folder}")
            return int(state["step"]), float(state["seconds"])
        if folders:
            reporter.warn(f"{self.out}: no sound checkpoint; starting from step 0")
        return 0, 0.0

    @contextmanager
    def naming_checkpoint(self) -> Iterator[None]:
        """Tell, when training diverges, from which checkpoint it can be continued and how."""
        try:
            yield
        except Diverged as error:
            mend = "lower --lr and --bridge-lr, or use --precision fp32, with another --out"
            if newest := self.checkpoints()[:1]:
                mend += f"; --resume {newest[0]} starts it from the last good checkpoint"
            raise IbmdError(f"{error}; {mend}") from error

    def _save_student(self, student: Student) -> None:
        save_model(student, self.out / "student", card=student_card(student))

    def mend_student(self, step: int, reporter: Reporter) -> None:
        """Write `student/` again, and say so, unless it holds the averaged weights of `step`."""
        want, folder = self._averaged(step), self.out / "student"
        if not self.writes:
            return
        try:
            have = load_student(str(folder))
            sound = _content(have) == _content(want) and _equal(have, want)
        except (IbmdError, KeyError, TypeError):
            sound = False
        if not sound:
            reporter.warn(f"{folder}: absent, damaged, or not of step {step}; written again from the checkpoint")
            self._save_student(want)

    def _averaged(self, step: int) -> Student:
        """Return the student with the averaged weights."""
        config = {**self.student.config, "training": {**self.student.config["training"], "step": step}}
        return Student(self.players["student"].averaged(), config)  # type: ignore[arg-type]


def _read(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, if its checksum is right."""
    file = folder / "state.pt"
    if (folder / "state.pt.sha256").read_text(encoding="utf-8", errors="replace").split() != [sha256(file), "state.pt"]:
        raise IbmdError(f"{file}: its checksum is wrong")
    return dict(torch.load(file, map_location="cpu", weights_only=True))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _content(student: Model) -> dict[str, Any]:
    """Return the configuration as in its file, but without the settings that a resumed run may have otherwise."""
    return dict(json.loads(json.dumps({**student.config, "training": student.config["training"]["step"]})))


def _equal(one: Model, other: Model) -> bool:
    a, b = one.predictor.state_dict(), other.predictor.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[key].cpu()) for key, v in a.items())
