"""Tables that commands print on stdout."""

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import typer

from ibmd_cli.reporting import is_plain


def show_teachers(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print the teachers that are known."""
    if as_json:
        typer.echo(json.dumps({"schema": 1, "teachers": rows}, ensure_ascii=False))
        return
    sites = {"hf": "Hub", "https": "Google Drive", "embedded": "embedded"}
    short = [
        {
            "teacher": row["teacher"],
            "task": row["task"],
            "pixels": row["pixels"],
            "kind": row["kind"],
            "size": f"{row['bytes'] / 1e9:.1f} GB" if row["bytes"] > 1e8 else f"{row['bytes'] / 1e6:.0f} MB",
            "from": sites[row["source"].partition(":")[0]],
            "licence": row["licence"],
            "Table 7": "yes" if row["paper_row"] else "",
        }
        for row in rows
    ]
    if sys.stdout.isatty() and os.get_terminal_size().columns < 120:
        short = [{key: row[key] for key in ("teacher", "task", "size", "from")} for row in short]
    table("Teachers (Table 7: distilled in the paper; --json tells files, parameters and data, too)", short)


def show_plan(plan: dict[str, Any], settings: dict[str, Any], origins: Mapping[str, str], as_json: bool) -> None:
    """Print what a distillation would take, and where its settings come from."""
    if as_json:
        typer.echo(json.dumps({"schema": 1, "settings": settings, "origins": origins, "plan": plan}))
        return
    table("Settings", [{"setting": k, "value": settings[k], "origin": o} for k, o in origins.items()])
    files = [
        f"{' and '.join(f['files'])} of {f['url']}, about {f['bytes'] / 1e9:.1f} GB, {f['how']}"
        for f in plan["files to download"]
    ]
    rows = {key.replace(", bytes", ""): f"{v / 1e9:.3g} GB" if "bytes" in key else v for key, v in plan.items()}
    rows["files to download"] = "; ".join(files) or "none"
    table("Plan", [{"what": k, "value": v} for k, v in rows.items()])


def show_exports(reports: list[dict[str, Any]]) -> None:
    """Print how exported files compare with their student."""
    table("Exports", [_export_row(report) for report in reports])


def _export_row(report: dict[str, Any]) -> dict[str, Any]:
    times = report["ms_per_image"]
    return {
        "file": report["output"],
        "MB": f"{report['bytes'] / 1e6:.2f}",
        "max difference": f"{report['max_difference']:.2g}",
        "mean": f"{report['mean_difference']:.2g}",
        "PSNR dB": "equal" if report["psnr"] is None else f"{report['psnr']:.1f}",
        "ms/image": f"{times['exported']:.2f}",
        "student": f"{times['student']:.2f}",
    }


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows on stdout; the first column names them and is never broken."""
    from rich.table import Table

    table = Table(title=title, box=None, title_justify="left", header_style="bold")
    for i, name in enumerate(rows[0]):
        table.add_column(name, no_wrap=i == 0)
    for row in rows:
        table.add_row(*(str(v) for v in row.values()))
    show(table, None if sys.stdout.isatty() else 200)


def show(what: Any, width: int | None = None) -> None:
    """Print something of rich on stdout."""
    from rich.console import Console

    Console(force_terminal=False if is_plain(sys.stdout) else None, width=width).print(what)
