"""`ibmd eval`."""

from dataclasses import dataclass

from ibmd_cli.cli.commands import Common, command, start_processes
from ibmd_cli.cli.printing import print_json, show
from ibmd_cli.evaluation.config import EvalConfig
from ibmd_cli.processes import this_process
from ibmd_cli.reporting import Reporter
from ibmd_cli.settings import Record, setting


@dataclass(frozen=True)
class EvalRun(Record):
    """Where an evaluation runs."""

    processes: str = setting(
        "1", "Processes to share the work: a number, or all (one a GPU)", "Run", metavar="N|all", also=("gpus", "nproc")
    )


@command(
    "eval",
    "ibmd eval                         # the embedded student and teacher",
    "ibmd eval --student runs/mine --data pairs/ --out report",
    "ibmd eval --student runs/a --student runs/b --seeds 3",
    "ibmd eval --teacher none --metric psnr,ssim --json",
)
def evaluate(config: EvalConfig, run: EvalRun, common: Common) -> None:
    """Measure students against their teacher on held-out pairs: quality, diversity, speed and memory.

    With --out, the same command again continues an interrupted evaluation.
    """
    start_processes(run.processes, config.device)
    from ibmd_cli.evaluation.evaluate import evaluate
    from ibmd_cli.evaluation.tables import layout

    reporter = Reporter(common.quiet or this_process().rank > 0)
    results = evaluate(config, reporter)
    if results and common.as_json:
        print_json(results)
    elif results:
        show(layout(results))
    if config.out is None:
        reporter.note("next: the same with --out report, for a page with pictures; nothing was written")
    else:
        reporter.note(f"next: open {config.out / 'report.html'} in a browser")
