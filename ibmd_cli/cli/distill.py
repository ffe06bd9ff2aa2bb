"""`ibmd distill`."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import typer

from ibmd_cli.cli.commands import Common, command, start_processes
from ibmd_cli.cli.printing import print_json, show_plan, show_teachers
from ibmd_cli.processes import this_process
from ibmd_cli.reporting import Reporter
from ibmd_cli.settings import Record, setting
from ibmd_cli.training.config import CONTENTS, DistillConfig


@dataclass(frozen=True)
class DistillRun(Record):
    """Where a distillation runs and what becomes of it; what is learnt does not depend on it."""

    # fmt: off
    out: Path | None = setting(None, "Run folder: checkpoints, log, run.html and the student", "Run folder",
        metavar="FOLDER", shown="runs/TEACHER", also=("output", "output-dir", "out-dir", "o", "run", "logdir"))
    resume: str = setting("auto", "auto, never, or a checkpoint", "Run folder", metavar="HOW",
        also=("continue", "restart"))
    processes: str = setting("1", "Processes to train with: a number, or all (one a GPU)", "Run", metavar="N|all",
        also=("gpus", "nproc"))
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", "Run", also=("gpu", "cuda", "cpu"))
    yes: bool = setting(False, "Fetch data without asking", "Data", flags=("--yes", "-y"))
    list_teachers: bool = setting(False, "List the known teachers and exit", "Teacher", flags=("--list-teachers",))
    dry_run: bool = setting(False, "Show the plan and exit", "Run", flags=("--dry-run",), also=("plan", "check"))
    # fmt: on


@command(
    "distill",
    "ibmd distill                      # the embedded teacher, offline",
    "ibmd distill --data drawings/ --out runs/mine --steps 1000",
    "ibmd distill --processes all      # one process a GPU",
    "ibmd distill --teacher new --data pairs/ --out runs/mine",
)
def distill(config: DistillConfig, run: DistillRun, common: Common, origins: dict[str, str]) -> None:
    """Distil a diffusion-bridge teacher into a student of one or a few steps, from source images alone.

    The same command again continues an interrupted run. Defaults are the paper's; a known teacher has a preset that
    replaces some of them, which --dry-run shows.
    """
    reporter = Reporter(common.quiet)
    if run.list_teachers:
        from ibmd_cli.models.references import list_teachers

        return show_teachers(list_teachers(), common.as_json)
    if origins["preset"] == CONTENTS:
        reporter.note(f"{config.teacher} is {config.preset}: its preset is used (--preset ALIAS names another)")
    out = run.out or Path("runs") / Path(config.teacher.rpartition(":")[2]).name.removesuffix(".pt")
    if run.dry_run:
        return _print_plan(config, origins, out, run, common)
    if any(reference.startswith("dataset:") for reference in config.data):
        from ibmd_cli.data.download import fetch

        fetch(config.data, reporter, run.yes)
    device = start_processes(run.processes, run.device)
    from ibmd_cli.training.loop import distill

    made = distill(config, origins, out, device, run.resume, reporter)
    if this_process().rank > 0:
        return
    kind = config.stop_after or "student"
    print_json({"schema": 1, kind: str(made)}) if common.as_json else typer.echo(str(made))
    reporter.note(f"made {made}; {out / 'run.html'} shows how it went")
    reporter.note(f"next: ibmd sample drawing.png --{kind} {quote(str(made if config.stop_after else out))}")


def _print_plan(config: DistillConfig, origins: dict[str, str], out: Path, run: DistillRun, common: Common) -> None:
    from ibmd_cli.devices import resolve_device
    from ibmd_cli.processes import count_processes
    from ibmd_cli.training.plan import plan

    device = resolve_device(run.device)
    found = plan(config, out, count_processes(run.processes, device), device)
    show_plan(found, config, origins, common.as_json)
