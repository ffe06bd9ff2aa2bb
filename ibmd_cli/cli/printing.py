"""Tables that commands print on stdout."""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import typer

from ibmd_cli.reporting import counted, is_plain, is_unicode
from ibmd_cli.settings import settings, to_json

SITES = {"hf": "the Hub", "https": "Google Drive", "embedded": "this package"}


def print_json(value: Any, indent: int | None = None) -> None:
    """Print JSON; characters are escaped where stdout does not take all."""
    typer.echo(json.dumps(value, ensure_ascii=not is_unicode(sys.stdout), indent=indent))


def show(what: Any) -> None:
    """Print something of rich on stdout."""
    from rich.console import Console

    Console(force_terminal=False if is_plain(sys.stdout) else None, highlight=False).print(what)


def _show_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and texts in two columns, as wide as the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", max_width=36)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(Text(f"  {row[0]}", style="cyan"), Text(row[1]))
    show(Text(title, style="bold"))
    show(table)


def show_teachers(known: list[dict[str, Any]], as_json: bool) -> None:
    """Print the teachers that are known."""
    if as_json:
        return print_json({"schema": 1, "teachers": known})
    _show_rows(
        "Teachers that --teacher takes (--json tells files, parameters and data, too)",
        (
            (
                row["teacher"],
                f"{row['task']}, {row['pixels']} px, {row['kind']}, "
                f"{_size(row['bytes'])} from {SITES[row['source'].partition(':')[0]]}, {row['licence']}"
                f"{', in the paper' * bool(row['paper_row'])}",
            )
            for row in known
        ),
    )


def show_exports(reports: list[dict[str, Any]]) -> None:
    """Print how exported files compare with their student."""
    _show_rows(
        "Files, and how they differ from the student",
        (
            (
                report["output"],
                f"{_size(report['bytes'])}, largest difference {report['max_difference']:.2g}, "
                f"PSNR {'equal' if report['psnr'] is None else format(report['psnr'], '.1f') + ' dB'}, "
                f"{report['ms_per_image']['exported']:.2f} ms/image (student: {report['ms_per_image']['student']:.2f})",
            )
            for report in reports
        ),
    )


def show_plan(plan: dict[str, Any], config: Any, origins: Mapping[str, str], as_json: bool) -> None:
    """Print what a distillation would take, and which settings are not the default."""
    if as_json:
        return print_json({"schema": 1, "settings": to_json(config), "origins": origins, "plan": plan})
    _show_rows("Plan", _planned(plan, config))
    every = [(one, getattr(config, one.name)) for one in settings(config.__class__)]
    changed = [(one.key, f"{_value(value)} ({origins[one.name]})") for one, value in every if value != one.default]
    if changed:
        _show_rows("\nSettings that are not the default", changed)


def _planned(plan: dict[str, Any], config: Any) -> list[tuple[str, str]]:
    """Return what a distillation would take, in words."""
    several, number = plan["processes"] > 1, plan["parameters of the teacher"]
    memory = f"about {_size(plan['memory of each process, bytes'])} on {plan['device']}"
    memory += " for one image at a time" * ("auto" in str(plan["micro-batch"])) + " in each process" * several
    return [
        ("teacher", f"{config.teacher}, {f'{number / 1e6:.3g} million' if number >= 1e6 else number} parameters"),
        *(("", line) for line in _first_half(plan, config)),
        *(("data", line) for line in plan["data"] or [", ".join(config.data) or "none: give --data FOLDER"]),
        *(("sizes", line) for line in plan["sizes"]),
        (
            "student",
            f"{counted(config.nfe, 'network call')} an image, {plan['image size']}×{plan['image size']} pixels",
        ),
        ("updates", f"{config.steps:,} of the student, {plan['updates of the bridge model']:,} of the bridge model"),
        ("images", f"{plan['images per update']:,} per update" + f", in {plan['processes']} processes" * several),
        ("memory", memory),
        *(
            ("download", f"{' and '.join(f['files'])} of {f['url']}, about {_size(f['bytes'])}, {f['how']}")
            for f in plan["files to download"]
        ),
        ("time", _times(plan)),
        ("run folder", plan["run folder"]),
    ]


def _first_half(plan: dict[str, Any], config: Any) -> list[str]:
    """Say how a new teacher is trained, if one is."""
    if "updates of the teacher" not in plan:
        return []
    return [f"{plan['updates of the teacher']:,} updates; pairs held out: {config.validation or '5%'}"]


def _times(plan: dict[str, Any]) -> str:
    if not plan["seconds"]:
        return "not tried on this machine"
    first = plan.get("seconds of the teacher")
    halves = f"about {_time(first)} for the teacher and " if first else ""
    return f"{halves}about {_time(plan['seconds'])} {'for the student ' if first else ''}on this machine"


def _size(size: float) -> str:
    return f"{size / 1e9:.2g} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"


def _time(seconds: float) -> str:
    """Spell a time roughly."""
    for size, unit, limit in ((1, "second", 90), (60, "minute", 90), (3600, "hour", 48)):
        if seconds / size < limit:
            return counted(max(1, round(seconds / size)), unit)
    return counted(round(seconds / 86400), "day")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
