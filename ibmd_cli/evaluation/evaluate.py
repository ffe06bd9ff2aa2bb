"""`ibmd eval`: students against their teacher on held-out pairs, with the same code, inputs and noise.

Every model translates the same sources; samples become uint8, as a saved image would be, before anything is measured.
Models take turns call by call, so that a change in the machine's load meets all of them, and the noise of an image
depends on seed, name and sample alone. What was measured of a batch is a file (`measure.Parts`), so that an interrupted
evaluation continues and several processes share the work; `summary` makes the results of all files.
"""

import csv
import errno
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibmd_cli import __version__
from ibmd_cli.data.datasets import tell_notes
from ibmd_cli.data.pairs import Pairs, batches, open_pairs
from ibmd_cli.devices import resolve_device
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.evaluation import pictures
from ibmd_cli.evaluation.config import BUILTIN, EvalConfig
from ibmd_cli.evaluation.fid_reference import read_reference
from ibmd_cli.evaluation.measure import Entry, Measurement, Parts, measure
from ibmd_cli.evaluation.protocols import Protocol, find_protocol
from ibmd_cli.evaluation.report import write_report
from ibmd_cli.evaluation.summary import summarise
from ibmd_cli.files import atomic_file
from ibmd_cli.images.decode import shown
from ibmd_cli.metrics.features import Network, load_network
from ibmd_cli.metrics.scores import DEFAULT, METRICS
from ibmd_cli.metrics.weights import check_given, locate
from ibmd_cli.models.folder import load_student
from ibmd_cli.models.references import TeacherRef, load_teacher
from ibmd_cli.processes import connect, this_process
from ibmd_cli.reporting import Reporter, counted
from ibmd_cli.settings import settings, to_json

FREE = ("preset", "weights", "fetch", "reference", "out")
"""Settings with which an evaluation is continued whatever their value: the plan holds hashes of models and networks."""


def evaluate(config: EvalConfig, reporter: Reporter) -> dict[str, Any]:
    """Measure students and a teacher on pairs.

    Run in several processes (`accelerate launch`, `--processes`), each measures a share; `out` is needed then.

    Args:
        config: what and how.
        reporter: for notes and progress.

    Returns:
        The content of results.json; nothing in any but the first of several processes.

    Raises:
        NotAvailable: no such model, data or weights, or the extra `eval` is not installed.
        UsageError: a setting that does not go with the others.
        IbmdError: pairs that do not match or are too few, images of another size than the models', `out` in use.
    """
    process = this_process()
    if process.count > 1 and config.out is None:
        raise UsageError("--processes: several processes need --out FOLDER, where they put what they measure")
    if config.out is not None and process.rank == 0:
        _check_out(config.out, config)
    protocol = find_protocol(config.protocol)
    check_given(config.weights)
    device = resolve_device(config.device)
    if process.count > 1 and device.type == "cuda":
        device = torch.device("cuda", process.local_rank)
    config = replace(config, samples=config.samples or (4 if protocol is None else 1))
    entries = load_entries(config, device, reporter)
    config = replace(config, data=config.data or _own_data(entries))
    pairs = _open(config, protocol, entries)
    if pairs.data.passed:
        reporter.warn(f"--data {config.data}: {pairs.data.passed}")
    names, networks, left_out = choose_metrics(config, protocol, entries, pairs, device, reporter)
    config, reference = replace(config, metrics=tuple(names)), None
    if config.reference is not None:
        if "fid" not in (*names, *left_out):
            raise UsageError(f"--reference {config.reference}: is of the FID, which is not measured: add --metric fid")
        if "fid" in names and process.rank == 0:
            reference = read_reference(config.reference, networks["inception"], reporter)
    measurement = Measurement(
        metrics=config.metrics,
        seed=config.seed,
        seeds=config.seeds,
        # none for super-resolution, whose sources give the pooled pixels away
        pool=1 if entries[0].model.source_scale > 1 or pairs.degradation.startswith("sr4x") else 4,
        truncate=protocol is not None and protocol.uint8 == "truncate",
        enlarge=protocol.enlarge if protocol else None,
    )
    rows = batches(len(pairs.names), config.batch_size)
    plan = _plan(config, entries, pairs, networks, device)
    with connect() as all_gather, _parts(config.out, plan, len(rows), process.rank) as parts:
        all_gather(None)  # the first process has begun the folder
        reporter.note(f"evaluating on {counted(len(pairs.names), 'pair')} of {config.data}, device {device}")
        share = range(process.rank, len(rows), process.count)
        measure(entries, pairs, rows, networks, measurement, parts, device, reporter, share)
        tell_notes(pairs.data.notes, {}, reporter)
        all_gather(None)  # all parts are there
        if process.rank > 0:
            return {}
        known = to_json(config)
        settings = {name: known[name] for name in ("data", "samples", "seed", "seeds", "protocol", "reference")} | {
            "images": len(pairs.names),
            "size": [entries[0].model.image_size] * 2,
            "degrade": pairs.degradation or None,
            "batch_size": len(rows[0]),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "processes": process.count,
            "torch": torch.__version__,
        }
        context = {"command": shlex.join(["ibmd", *sys.argv[1:]]), "settings": settings, "left_out": left_out}
        results, terms = summarise(entries, pairs.names, measurement, networks, parts, context, protocol, reference)
        results = _printable(results)
        if config.out is not None:
            results |= pictures.write(config.out, terms, entries, pairs, measurement, device)
            _write(config.out, results, pairs.names, terms)
            reporter.note(f"wrote {config.out / 'report.html'}, with results.json and pictures beside it")
        return results


def _plan(
    config: EvalConfig, entries: list[Entry], pairs: Pairs, networks: Mapping[str, Network], device: torch.device
) -> dict[str, Any]:
    """Return all that measured parts depend on: the value of each flag, then what the flags name."""
    teachers = [entry for entry in entries if entry.kind == "teacher"]
    resolved = to_json(config) | {
        "student": [entry.reference for entry in entries if entry.kind == "student"],
        "teacher": teachers[0].reference if teachers else "none",
        "teacher_nfe": [entry.nfe for entry in teachers],
        "degrade": pairs.degradation or None,
        "batch_size": min(config.batch_size, len(pairs.names)),
        "device": device.type,
    }
    return {one.flag: resolved[one.name] for one in settings(EvalConfig) if one.name not in FREE} | {
        "version of ibmd": __version__,
        "files in --data": pairs.digest,
        "weights of the models": [entry.sha256 for entry in entries],
        "weights of the networks": {name: network.about + network.weights for name, network in networks.items()},
    }


def _printable(results: Any) -> Any:
    """Spell all texts of results as names of files are spelled: UTF-8 cannot hold some of their bytes."""
    if isinstance(results, dict):
        return {key: _printable(value) for key, value in results.items()}
    if isinstance(results, list):
        return [_printable(value) for value in results]
    return shown(results) if isinstance(results, str) else results


def _write(out: Path, results: dict[str, Any], names: Sequence[str], terms: Mapping[str, Tensor]) -> None:
    """Write scores.csv (the score of each image: `ROW.METRIC`, mean over draws), results.json, and the report."""
    with atomic_file(out / "scores.csv") as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", *terms])
        columns = [values.tolist() for values in terms.values()]
        writer.writerows([shown(name), *(f"{v:.6g}" for v in row)] for name, *row in zip(names, *columns, strict=True))
    with atomic_file(out / "results.json") as new:
        text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        new.write_text(text, encoding="utf-8", errors="backslashreplace")
    write_report(out, results)


# ---------------------------------------------------------------------------------------------- what is measured


def load_entries(config: EvalConfig, device: torch.device, reporter: Reporter) -> list[Entry]:
    """Load the models and list what is measured: the students, then the teacher at each number of calls."""
    entries, samples = [], config.samples or 1
    reference, preset = config.teacher, config.preset
    named = [name for name in config.student if name != "none"]
    for i, name in enumerate(named):
        student = load_student(name)
        random = student.nfe > 1 or student.setup.noise_shape is not None
        label = "student" if len(named) == 1 else f"student {chr(ord('A') + i)}"
        entries.append(Entry(student, label, name, student.digest(), student.nfe, samples if random else 1))
        if i == 0 and reference is None:
            reference = student.config["teacher"]["reference"]
            preset = preset or student.config["training"].get("preset") or None
    if reference != "none":
        reference = reference or BUILTIN
        try:
            teacher = load_teacher(TeacherRef(reference, preset), quiet=reporter.quiet)
        except NotAvailable as error:
            if config.teacher is not None or not named:
                raise
            raise NotAvailable(f"the student's teacher: {error}; name it with --teacher (or none)") from error
        digest = teacher.digest()
        for entry in entries:
            if entry.model.config["teacher"]["sha256"] not in (None, digest):
                reporter.warn(
                    f"{entry.reference} was distilled from another teacher, or other weights, than {reference}; "
                    "--teacher names one"
                )
        for nfe in sorted({teacher.network_calls(nfe) for nfe in config.teacher_nfe}):
            entries.append(Entry(teacher, "teacher", reference, digest, nfe, samples if nfe > 1 else 1))
    _check_entries(entries)
    for entry in entries:
        entry.model.to(device)
    return entries


def _check_entries(entries: list[Entry]) -> None:
    """Refuse a student that is named twice, and models that do not take the same images."""
    files: dict[Path, str] = {}
    for entry in (entry for entry in entries if entry.kind == "student" and entry.model.weights):
        if before := files.get(file := Path(str(entry.model.weights)).resolve()):
            raise UsageError(
                f"--student {before} --student {entry.reference}: expected different students, both are {file.parent}"
            )
        files[file] = entry.reference
    first = entries[0].model
    for entry in entries:
        if (other := entry.model.image_size) != first.image_size:
            size = first.image_size
            raise IbmdError(f"{entry.reference}: for images of {other}×{other}, {entries[0].label} for {size}×{size}")
        for key in ("classes", "mask"):
            if bool(entry.model.config[key]) != bool(first.config[key]):
                raise IbmdError(f"{entry.reference}: with {key}, or without, unlike {entries[0].reference}")


def _own_data(entries: list[Entry]) -> str:
    """Return the embedded data that belong to the models."""
    for entry in entries:
        reference = entry.reference if entry.kind == "teacher" else entry.model.config["teacher"]["reference"]
        if reference.startswith("builtin:"):
            return reference
    raise UsageError("--data: no test pairs belong to these models: give a folder with source/ and target/")


def _open(config: EvalConfig, protocol: Protocol | None, entries: list[Entry]) -> Pairs:
    model, data = entries[0].model.config, config.data or BUILTIN
    degrade = config.degrade if config.degrade is not None else protocol.degrade if protocol else ""
    if degrade == "teacher":
        degrade = model.get("degradation") or ""
        if not degrade:
            raise UsageError(f"--protocol {config.protocol}: {model['name']} names no degradation: give --degrade NAME")
    side_by_side = not data.startswith("builtin:") and not (Path(data) / "source").is_dir()
    return open_pairs(
        data,
        model,
        degrade="" if degrade == "none" else degrade,
        masks=config.masks,
        labels=config.labels,
        layout=protocol.layout if protocol and side_by_side and config.degrade is None else "",
        fit=config.fit,
        seed=config.seed,
    )


class Unmeasurable(IbmdError):
    """A score that cannot be measured on these data."""


def choose_metrics(
    config: EvalConfig,
    protocol: Protocol | None,
    entries: list[Entry],
    pairs: Pairs,
    device: torch.device,
    reporter: Reporter,
) -> tuple[list[str], dict[str, Network], dict[str, str]]:
    """Choose what is measured, and load the networks for it.

    Returns:
        Names of metrics, in the order of `METRICS`; networks by name; and the metrics that are left out, with the
        reason in one line.

    Raises:
        NotAvailable: weights that a metric needs are not here, or nothing is left to measure.
        Unmeasurable: a metric that was asked for by its name; those chosen by default are left out with a note.
    """
    asked = config.metrics or (protocol.metrics if protocol else DEFAULT)
    size, mode = entries[0].model.image_size, protocol.inception if protocol else "tensorflow"
    enlarge = protocol.enlarge if protocol else None

    def find(file: str) -> Path:
        return locate(file, config.weights, config.fetch, reporter.quiet)

    def load(network: str) -> None:
        if network not in networks:
            networks[network] = load_network(network, device, mode, enlarge, find)
        if size < (smallest := networks[network].smallest):
            raise Unmeasurable(f"needs images of at least {smallest} pixels, the model's have {size}")

    names, networks, left_out = [], dict[str, Network](), dict[str, str]()
    for name in (name for name in METRICS if name in asked):
        try:
            _check_metric(name, pairs, size, config.samples or 1)
            if METRICS[name].network:
                load(METRICS[name].network)
        except (Unmeasurable, NotAvailable) as error:
            if name in config.metrics:
                raise type(error)(f"--metric {name}: {error}; or leave {name} out") from error
            left_out[name] = str(error)
        else:
            names.append(name)
    for reason in dict.fromkeys(left_out.values()):
        reporter.note(f"left out: {', '.join(name for name, why in left_out.items() if why == reason)}: {reason}")
    if not names:
        raise NotAvailable(f"nothing is left to measure: {'; '.join(f'{n}: {why}' for n, why in left_out.items())}")
    used = {METRICS[name].network for name in names}
    return names, {name: network for name, network in networks.items() if name in used}, left_out


def _check_metric(name: str, pairs: Pairs, size: int, samples: int) -> None:
    """Raise `Unmeasurable` if a score cannot be measured on these data."""
    if (images := len(pairs.names)) < (needs := METRICS[name].needs):
        few = f"{counted(images, 'pair')} {'is' if images == 1 else 'are'} too few: {needs} are needed"
        raise Unmeasurable(f"{few}, give --data with more")
    if METRICS[name].compares == "draws" and samples < 2:
        raise Unmeasurable("needs several samples of each source: give --samples 2 or more")
    if size < (least := METRICS[name].smallest):
        raise Unmeasurable(f"needs images of at least {least} pixels, the model's have {size}")
    if name == "resnet50_accuracy" and not pairs.classes:
        raise Unmeasurable("the true classes are not known: give --labels FILE, or images in a folder for each class")


# ------------------------------------------------------------------------------------------------- parts, processes


def _check_out(out: Path, config: EvalConfig) -> None:
    """Refuse a folder with something else than a part of an evaluation, among images, or that cannot be written."""
    data = Path(config.data or BUILTIN)
    images = [data / "source", data / "target"] if (data / "source").is_dir() else [data]
    images += [config.reference] if config.reference else []
    folders = (out, *out.absolute().parents)
    if broken := [folder for folder in folders if os.path.islink(folder) and not os.path.exists(folder)]:
        raise IbmdError(f"--out {out}: {broken[0]} is a link to nothing; give another --out")
    there = next(folder for folder in folders if os.path.exists(folder))  # unlike Path.exists, for any name
    try:
        with tempfile.TemporaryDirectory(dir=there) as trial:
            (Path(trial) / out.absolute().relative_to(there.absolute())).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "" if error.errno == errno.ENOENT else f" ({error.strerror})"  # what a virtual file system says
        raise IbmdError(f"--out {out}: nothing can be written in {there}{reason}; give another --out") from error
    if (out / "results.json").is_file() and not (out / "parts").is_dir():
        raise IbmdError(f"--out {out}: holds a finished evaluation (results.json); give another --out, or remove it")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "parts").is_dir())):
        raise IbmdError(f"--out {out}: exists and is not an empty folder; give another --out")
    for folder in images:
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise IbmdError(f"--out {out}: lies in {folder}, whose images are read; give another --out")


@contextmanager
def _parts(out: Path | None, plan: dict[str, Any], count: int, rank: int) -> Iterator[Parts]:
    """Give the folder of what is measured: `out`/parts, which is removed at the end, or a temporary one."""
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Parts(Path(folder), plan, count)
        return
    parts = Parts(out / "parts", plan, count)
    if rank == 0:
        parts.begin()
    yield parts
    if rank == 0:
        parts.remove()
