"""`ibmd sample`."""

import typer

from ibmd_cli.cli.commands import Common, command
from ibmd_cli.reporting import Reporter
from ibmd_cli.sampling.config import SampleConfig


@command(
    "sample",
    "ibmd sample drawing.png",
    "ibmd sample drawings/ -r -o coloured/ --variants 4 --grid sheet.png",
    "ibmd sample - < drawing.png > coloured.png",
    "find . -name '*.png' -print0 | ibmd sample --files-from - -0 -o coloured/",
    "ibmd sample drawing.png --student hf://OWNER/REPO",
)
def sample(config: SampleConfig, common: Common) -> None:
    """Translate images with a student, in one step. A picture depends on its name and the seed alone.

    One bad file does not stop the others: it is named, counted, and the exit code is 3.
    """
    from ibmd_cli.sampling.pipeline import sample as run

    raise typer.Exit(run(config, Reporter(common.quiet)))
