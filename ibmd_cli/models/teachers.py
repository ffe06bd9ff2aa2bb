"""Teachers by reference: embedded, in a model folder, as their authors published them, or on the Hub.

A published checkpoint is converted once to a model folder in the cache; from then on it is one like any other.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch

from ibmd_cli import hub
from ibmd_cli.devices import resolve_device
from ibmd_cli.errors import UsageError, nearest
from ibmd_cli.files import read_json
from ibmd_cli.models import catalogue
from ibmd_cli.models.folder import FORMAT_VERSION, is_model, list_builtin, load_model, read_metadata, resolve
from ibmd_cli.models.model import Teacher
from ibmd_cli.models.published import Checkpoint, convert, describe, read_checkpoint


def load_teacher(
    reference: str,
    *,
    preset: str | None = None,
    device: torch.device | str = "cpu",
    head_channels: int | None = None,
    attention_order: str | None = None,
    quiet: bool = False,
) -> Teacher:
    """Load a teacher.

    Args:
        reference: `builtin:NAME`, `hub:ALIAS` (a published teacher), `hf://OWNER/REPO[@REV][/FILE]`, a model folder, or
            a checkpoint as published (a file, or I2SB's folder).
        preset: alias of the published teacher that a checkpoint is like, where its contents cannot tell.
        device: where to put it.
        head_channels: width of an attention head, where a checkpoint differs from its family.
        attention_order: "new" or "legacy", likewise.
        quiet: show no progress of downloads.

    Returns:
        The teacher: `predict_x0`, `bridge`, `translate`; in eval mode, float32.

    Raises:
        NotAvailable: there is no such model here, or it cannot be fetched.
        UsageError: no such preset.
        IbmdError: the file is not a teacher, is damaged, or is another than the preset's.
    """
    folder = find_teacher(reference, preset, head_channels, attention_order, quiet)
    teacher = load_model(str(folder), "teacher")
    assert isinstance(teacher, Teacher)
    teacher.to(resolve_device(str(device)))
    return teacher


def find_teacher(
    reference: str,
    preset: str | None = None,
    head_channels: int | None = None,
    attention_order: str | None = None,
    quiet: bool = False,
) -> Path:
    """Return the model folder of a teacher, fetched and converted first where that is needed; see `load_teacher`."""
    table = catalogue.published()
    if preset is not None and preset not in table:
        raise UsageError(f"--preset {preset}: no such published teacher: {nearest(preset, table)}")
    if reference.startswith("hub:"):
        alias = reference.removeprefix("hub:")
        if preset not in (None, alias):
            raise UsageError(f"--preset {preset}: {reference} has its own; leave --preset out")
        path, preset = catalogue.locate(alias, quiet=quiet), alias
    elif reference.startswith("hf://"):
        repo, revision, file = hub.parse_hf(reference)
        path = (
            hub.download(repo, file, revision=revision, quiet=quiet)
            if file
            else hub.snapshot(repo, revision, quiet=quiet)
        )
    elif Path(reference).exists():
        path = Path(reference)
    else:
        path = resolve(reference, "teacher")
    if _is_ours(path):
        if head_channels or attention_order:  # a preset is no contradiction: `distill` takes its settings
            raise UsageError(
                f"--head-channels and --attention-order are for published checkpoints: {reference} is a model of ibmd "
                "and says all this itself; leave them out"
            )
        return path
    return _converted(path, reference, preset, head_channels, attention_order)


def look_up_teacher(
    reference: str,
    preset: str | None = None,
    head_channels: int | None = None,
    attention_order: str | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what `config.json` says, or will say, of a teacher, and what is to be fetched; nothing is fetched yet.

    Arguments and errors are those of `load_teacher`. Of a published teacher that is not here, the table tells.
    """
    alias = reference.removeprefix("hub:")
    if reference.startswith("hub:") and alias in catalogue.published() and (missing := catalogue.to_fetch(alias)):
        row = catalogue.published()[alias]
        network = {"in_channels": 6 if row["conditional"] else 3, "num_classes": row["classes"], **row["network"]}
        network |= {key: row[key] for key in ("attention_order", "head_channels")}
        return {**row, "network": network, "noise_channels": 0}, missing
    path = Path(reference)
    if path.exists() and not _is_ours(path):
        checkpoint = read_checkpoint(path)
        name = preset or recognise(checkpoint)
        of_preset = catalogue.published()[name] if name else None
        return describe(checkpoint, of_preset, head_channels, attention_order), []
    return read_json(find_teacher(reference, preset, head_channels, attention_order) / "config.json"), []


def recognise_file(reference: str) -> str | None:
    """Return the alias of the published teacher in a file or folder; None if `reference` is none, or is not known."""
    path = Path(reference)
    if ":" in reference or not path.exists() or _is_ours(path):
        return None
    return recognise(read_checkpoint(path))


def _is_ours(path: Path) -> bool:
    """Tell whether a path is a model folder, a run folder or an exported file of ibmd."""
    return is_model(path) or is_model(path / "student") or (path.suffix == ".safetensors" and bool(read_metadata(path)))


def _converted(
    path: Path, reference: str, preset: str | None, head_channels: int | None, attention_order: str | None
) -> Path:
    """Return the model folder that a published checkpoint becomes: in the cache, made now unless it is there."""
    checkpoint = read_checkpoint(path)
    alias = preset or recognise(checkpoint)
    read = [f for f in (checkpoint.file, checkpoint.file.with_name("options.pkl")) if f.is_file()]
    parts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in read]
    key = repr((parts, alias, head_channels, attention_order, FORMAT_VERSION))
    name = alias or (path if path.is_dir() else path.with_suffix("")).name
    folder = hub.cache_folder() / "teachers" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not is_model(folder):
        convert(
            path,
            folder,
            name=name,
            preset=catalogue.published()[alias] if alias else None,
            head_channels=head_channels,
            attention_order=attention_order,
            source=reference,
        )
    return folder


def recognise(checkpoint: Checkpoint) -> str | None:
    """Return the alias of the published teacher whose contents a checkpoint has: network, classes and I2SB's options.

    None for any other; it has what its family shares, and a licence of its own.
    """
    parameters = sum(v.numel() for v in checkpoint.tensors.values())
    for alias, row in catalogue.published().items():
        corrupt = checkpoint.options["corrupt"] if checkpoint.options else None
        is_task = row["family"] != "i2sb" or row["degradation"] == corrupt
        if row["family"] == checkpoint.family and row["parameters"] == parameters and is_task:
            return alias
    return None


def list_teachers() -> list[dict[str, Any]]:
    """Return a row for each known teacher, embedded and published."""
    rows = list_builtin()
    for alias, row in catalogue.published().items():
        bridge = row["bridge"]
        kind = f"{'conditional' if row['conditional'] else 'unconditional'} {bridge['kind']}"
        rows.append(
            {
                "teacher": f"hub:{alias}",
                "task": row["task"],
                "pixels": row["image_size"],
                "kind": kind + (", noise-free" if bridge.get("noise_free") else ""),
                "parameters": row["parameters"],
                "bytes": row["bytes"],
                "source": f"hf://{row['repo']}/{row['file']}" if row["where"] == "hub" else row["url"],
                "licence": row["licence"],
                "network": {**row["network"], **{k: row[k] for k in ("attention_order", "head_channels")}},
                "bridge": bridge,
                "files": [row["file"]] if row["where"] == "hub" else row["files"],
                "paper_row": row["paper_row"],
                "dataset": row["dataset"],
            }
        )
    return rows
