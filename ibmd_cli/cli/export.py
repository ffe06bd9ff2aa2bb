"""`ibmd export`."""

import typer

from ibmd_cli.cli.commands import Common, command
from ibmd_cli.cli.printing import print_json, show_exports
from ibmd_cli.export.config import ExportConfig
from ibmd_cli.reporting import Reporter


@command(
    "export",
    "ibmd export --dtype fp16 --output student.safetensors",
    "ibmd export --student runs/mine --output student.onnx",
    "ibmd export --student runs/mine --output page.html      # a page to draw on",
    "ibmd export --all --output exported/      # every format, compared",
)
def export(config: ExportConfig, common: Common) -> None:
    """Write a student as one file, run it back on real images, and keep it if it agrees with the student.

    With --push-to, the student goes to the Hub, from where hf://OWNER/REPO names it anywhere.
    """
    if config.push_to is not None:
        return _publish(config, config.push_to, common)
    files, reporter, reports = config.files(), Reporter(common.quiet), []
    from ibmd_cli.export.exporter import Exporter

    exporter = Exporter(config.student, reporter.note)
    for file in files:
        reports.append(report := exporter.export(file))
        times = report["ms_per_image"]
        reporter.note(
            f"{file.output}: {report['bytes'] / 1e6:.2f} MB, largest difference {report['max_difference']:.2g}, "
            f"{times['exported']:.2f} ms/image (student: {times['student']:.2f})"
        )
    if common.as_json:
        print_json({"schema": 1, "exports": reports} if config.everything else reports[0])
    elif config.everything:
        show_exports(reports)
    else:
        typer.echo(str(files[0].output))
    reporter.note(f"next: {reports[-1]['next']}")


def _publish(config: ExportConfig, repository: str, common: Common) -> None:
    from ibmd_cli.models.card import publish

    report = publish(
        config.student,
        repository,
        results=config.results,
        public=config.public,
        dry_run=config.dry_run,
        quiet=common.quiet,
    )
    if common.as_json:
        print_json({"schema": 1, **report})
    elif config.dry_run:
        typer.echo("\n".join(f"{file['bytes']:>12,} {file['path']}" for file in report["files"]))
        typer.echo(report["card"])
    else:
        typer.echo(report["url"])
        Reporter(common.quiet).note(f"next: ibmd sample drawing.png --student hf://{repository}")
