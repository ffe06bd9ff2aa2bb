"""Teachers by reference: embedded, in a model folder, as their authors published them, or on the Hub.

A published checkpoint is converted once to a model folder in the cache; from then on it is one like any other.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ibmd_cli import hub
from ibmd_cli.devices import resolve_device
from ibmd_cli.errors import IbmdError, UsageError, nearest
from ibmd_cli.files import read_json
from ibmd_cli.models import FORMAT_VERSION, published_teachers
from ibmd_cli.models.convert import Checkpoint, convert, describe_checkpoint, read_checkpoint
from ibmd_cli.models.folder import (
    check_folder,
    find_model,
    is_model,
    is_run,
    list_builtin,
    load_folder,
    other_kind,
    read_config,
    read_file_config,
)
from ibmd_cli.models.model import TeacherModel
from ibmd_cli.models.published_teachers import missing_files, published


@dataclass(frozen=True)
class TeacherRef:
    """A teacher by name, and what the file of its authors does not say; "", 0 or None: not given.

    Attributes:
        reference: `builtin:NAME`, `hub:ALIAS` (a published teacher), `hf://OWNER/REPO[@REV][/FILE]`, a model folder, or
            a checkpoint as published (a file, or I2SB's folder).
        preset: alias of the published teacher that a checkpoint is like, where its contents cannot tell.
        head_channels: width of an attention head, where a checkpoint differs from its family.
        attention_order: "new" or "legacy", where a checkpoint differs from its family.
    """

    reference: str
    preset: str | None = None
    head_channels: int | None = None
    attention_order: str | None = None


def load_teacher(
    reference: str | TeacherRef, *, device: torch.device | str = "cpu", quiet: bool = False, **facts: Any
) -> TeacherModel:
    """Load a teacher.

    Args:
        reference: see `TeacherRef`.
        device: where to put it.
        quiet: show no progress of downloads.
        facts: `preset`, `head_channels` and `attention_order` of a `TeacherRef`.

    Returns:
        The teacher: `predict_x0`, `bridge`, `translate`; in eval mode, float32.

    Raises:
        NotAvailable: there is no such model here, or it cannot be fetched.
        UsageError: no such preset.
        IbmdError: the file is not a teacher, is damaged, or is another than the preset's.
    """
    ref = TeacherRef(reference, **facts) if isinstance(reference, str) else reference
    teacher = load_folder(find_teacher(ref, quiet), ref.reference, TeacherModel)
    teacher.to(resolve_device(str(device)))
    return teacher


def find_teacher(ref: TeacherRef, quiet: bool = False) -> Path:
    """Return the model folder of a teacher, fetched and converted first where that is needed; see `load_teacher`."""
    path, ref = _locate(ref, quiet)
    return path if _own_config(path, ref) else _converted(path, ref)


def look_up_teacher(ref: TeacherRef) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what `config.json` says, or will say, of a teacher, and what is to be fetched; nothing is fetched yet.

    Errors are those of `load_teacher`. Of a published teacher that is not here, the table tells.
    """
    alias = ref.reference.removeprefix("hub:")
    if ref.reference.startswith("hub:") and alias in published() and (missing := missing_files(alias)):
        row = published()[alias]
        network = {"in_channels": 6 if row["conditional"] else 3, "num_classes": row["classes"], **row["network"]}
        network |= {key: row[key] for key in ("attention_order", "head_channels")}
        return {**row, "network": network, "noise_channels": 0}, missing
    path, ref = _locate(ref, quiet=True)
    if _own_config(path, ref):
        return check_folder(path, ref.reference, "teacher")[0], []
    checkpoint = read_checkpoint(path)
    return describe_checkpoint(checkpoint, _row(checkpoint, ref), ref.head_channels, ref.attention_order), []


def recognise_file(reference: str) -> str | None:
    """Return the alias of the published teacher in a file or folder; None if `reference` is none, or is not known."""
    path = Path(reference)
    if ":" in reference or not path.exists() or _own_config(path, TeacherRef(reference)):
        return None
    return recognise(read_checkpoint(path))


def _locate(ref: TeacherRef, quiet: bool) -> tuple[Path, TeacherRef]:
    """Return the folder or file that is meant, fetched if need be, and the reference with the preset it implies."""
    reference, preset = ref.reference, ref.preset
    if not reference.strip():
        raise UsageError("--teacher: nothing is named: expected a reference or the path of a folder or file")
    if preset and preset not in published():
        raise UsageError(f"--preset {preset}: no such published teacher: {nearest(preset, published())}")
    if reference.startswith("hub:"):
        alias = reference.removeprefix("hub:")
        if preset not in (None, "", alias):
            raise UsageError(f"--preset {preset}: {reference} has its own; leave --preset out")
        return published_teachers.find_published(alias, quiet=quiet), replace(ref, preset=alias)
    return Path(reference) if Path(reference).exists() else find_model(reference, "teacher", quiet), ref


def _own_config(path: Path, ref: TeacherRef) -> dict[str, Any] | None:
    """Return the configuration of a teacher of ibmd; None for what may be a published checkpoint.

    Raises:
        IbmdError: a student, in whatever form.
        UsageError: `ref` says what such a teacher says itself.
    """
    if is_run(path):
        own = read_json(path / "config.json").get("settings", {}).get("teacher", "named in its config.json")
        raise IbmdError(f"{ref.reference}: a run folder, where a teacher is needed. The run's own teacher is {own}")
    if path.suffix in (".onnx", ".pt2"):
        raise other_kind(ref.reference, {}, "teacher")
    if not is_model(path) and not (path.suffix == ".safetensors" and read_file_config(path)):
        return None
    config = read_config(path)
    if config["format"] != "ibmd-teacher":
        raise other_kind(ref.reference, config, "teacher")
    if ref.head_channels or ref.attention_order:  # a preset is no contradiction: `distill` takes its settings
        raise UsageError(
            f"--head-channels and --attention-order are for published checkpoints: {ref.reference} is a model of ibmd "
            "and says all this itself; leave them out"
        )
    return config


def _converted(path: Path, ref: TeacherRef) -> Path:
    """Return the model folder that a published checkpoint becomes: in the cache, made now unless it is there."""
    checkpoint = read_checkpoint(path)
    row = _row(checkpoint, ref)
    read = [f for f in (checkpoint.file, checkpoint.file.with_name("options.pkl")) if f.is_file()]
    parts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in read]
    alias = row["alias"] if row else None
    key = repr((parts, alias, ref.head_channels or None, ref.attention_order or None, FORMAT_VERSION))
    name = alias or (path if path.is_dir() else path.with_suffix("")).name
    folder = hub.cache_folder() / "teachers" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not is_model(folder):
        convert(
            checkpoint,
            folder,
            name=name,
            preset=row,
            head_channels=ref.head_channels,
            attention_order=ref.attention_order,
            source=ref.reference,
        )
    return folder


def _row(checkpoint: Checkpoint, ref: TeacherRef) -> dict[str, Any] | None:
    """Return the row of the published teacher that a checkpoint is: by name, or by its contents."""
    alias = ref.preset or recognise(checkpoint)
    return {"alias": alias, **published()[alias]} if alias else None


def recognise(checkpoint: Checkpoint) -> str | None:
    """Return the alias of the published teacher whose contents a checkpoint has: network, classes and I2SB's options.

    None for any other; it has what its family shares, and a licence of its own.
    """
    parameters = sum(v.numel() for v in checkpoint.tensors.values())
    for alias, row in published().items():
        corrupt = checkpoint.options["corrupt"] if checkpoint.options else None
        is_task = row["family"] != "i2sb" or row["degradation"] == corrupt
        if row["family"] == checkpoint.family and row["parameters"] == parameters and is_task:
            return alias
    return None


def list_teachers() -> list[dict[str, Any]]:
    """Return a row for each known teacher, embedded and published."""
    rows = list_builtin()
    for alias, row in published().items():
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
