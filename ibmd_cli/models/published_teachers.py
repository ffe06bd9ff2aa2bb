"""The table of published teachers: where each is, what it is, and its checkpoint as its authors wrote it."""

import tomllib
from pathlib import Path
from typing import Any

from ibmd_cli.errors import NotAvailable, nearest
from ibmd_cli.hub import download


def published() -> dict[str, dict[str, Any]]:
    """Return the row of each published teacher by its alias (`teachers.toml`, which says what the keys mean)."""
    table = tomllib.loads((Path(__file__).parent / "teachers.toml").read_text(encoding="utf-8"))
    absent = {"classes": None, "mask": None}  # TOML has no null
    return {alias: {**absent, **table["defaults"][row["family"]], **row} for alias, row in table["teachers"].items()}


def find_published(alias: str, *, quiet: bool = False) -> Path:
    """Return the checkpoint of a published teacher, as its authors wrote it.

    Args:
        alias: a key of `published`.
        quiet: show no progress.

    Raises:
        NotAvailable: no such alias; or its authors keep the file where it must be fetched by hand (the message tells
            where, and what to do then); or see `download`.
        IbmdError: see `download`.
    """
    rows = published()
    if alias not in rows:
        raise NotAvailable(f"no teacher hub:{alias}: {nearest(alias, rows)} (ibmd distill --list-teachers)")
    row = rows[alias]
    if row["where"] == "hub":
        return download(row["repo"], row["file"], quiet=quiet)
    place = "into one folder, and name it: --teacher FOLDER" if len(row["files"]) > 1 else "and name it: --teacher FILE"
    raise NotAvailable(
        f"hub:{alias}: its authors keep it on Google Drive: download {' and '.join(row['files'])} from {row['url']} "
        f"(if Drive asks, request access) {place} --preset {alias}"
    )


def missing_files(alias: str) -> list[dict[str, Any]]:
    """Return what is still to be fetched of a published teacher: where it is, and about how many bytes."""
    from huggingface_hub import try_to_load_from_cache

    row = published()[alias]
    if row["where"] == "drive":
        return [{"files": row["files"], "url": row["url"], "bytes": row["bytes"], "how": "by hand"}]
    if isinstance(try_to_load_from_cache(row["repo"], row["file"]), str):
        return []
    return [{"files": [row["file"]], "url": f"hf://{row['repo']}", "bytes": row["bytes"], "how": "by ibmd"}]
