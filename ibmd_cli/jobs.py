"""What `ibmd sample` is to do: which pictures are made from which inputs, and where they go."""

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import NamedTuple

from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.images import MAX_PIXELS, WRITABLE, WRITTEN, find_images, shown


@dataclass(frozen=True)
class SampleConfig:
    """What `ibmd sample` is asked for.

    Attributes:
        inputs: files, folders, globs, or "-" (image bytes on stdin).
        output: a file (if it ends as an image does), a folder, "-" (image bytes on stdout), or None: beside the input.
        student: reference; None for the embedded one. Not together with `teacher`.
        teacher: reference of a teacher to translate with instead.
        nfe: network calls per image; None for what the model says.
        recursive: search folders in folders.
        on_exists: "error", "skip" or "overwrite".
        fit: "pad", "stretch" or "crop", see `images.fit`.
        restore_size: give results the size of their inputs; otherwise they have the model's.
        variants: pictures per input, each from noise of its own.
        seed: of all noise.
        batch_size: images in the network at once. On a CPU, the model's image size decides alone.
        max_pixels: larger inputs are refused.
        device: see `devices.resolve_device`.
        fail_fast: stop at the first image that fails.
        as_json: on stdout, a JSON object for each picture instead of its path.
    """

    inputs: tuple[str, ...]
    output: str | None = None
    student: str | None = None
    teacher: str | None = None
    nfe: int | None = None
    recursive: bool = False
    on_exists: str = "error"
    fit: str = "pad"
    restore_size: bool = False
    variants: int = 1
    seed: int = 0
    batch_size: int = 16
    max_pixels: int = MAX_PIXELS
    device: str = "auto"
    fail_fast: bool = False
    as_json: bool = False

    def __post_init__(self) -> None:
        """Refuse settings that cannot be meant together."""
        if not self.inputs:
            raise UsageError("no input: give files, folders or globs, or - for an image on stdin: --input drawing.png")
        if "-" in self.inputs and sys.stdin.isatty():
            raise UsageError("--input -: stdin is a terminal; pipe an image in: ibmd sample --input - < drawing.png")
        if self.student is not None and self.teacher is not None:
            raise UsageError("--student and --teacher: only one of them translates; run the command once for each")
        if self.to_stdout and self.as_json:
            raise UsageError("--json: image bytes already go to stdout; give --output FILE")
        if self.to_stdout and sys.stdout.isatty():
            raise UsageError("stdout is a terminal: expected a file for the image bytes; give --output FILE")

    @property
    def to_stdout(self) -> bool:
        """Whether image bytes go to stdout: asked for, or nothing was and the image comes from stdin."""
        return self.output == "-" or (self.output is None and "-" in self.inputs)


class Source(NamedTuple):
    """An image to read: its file (None: stdin), and its path below the folder or glob that found it."""

    path: Path | None
    name: str

    def __str__(self) -> str:
        """Spell the path, `-` for stdin."""
        return "-" if self.path is None else str(self.path)


class Job(NamedTuple):
    """A picture to make. Variants count from 1; without an output, its bytes go to stdout."""

    source: Source
    variant: int
    output: Path | None


@dataclass
class Plan:
    """The pictures to make, those that exist already, and the inputs that are not there with the reasons."""

    jobs: list[Job] = field(default_factory=list)
    skipped: list[Job] = field(default_factory=list)
    problems: list[tuple[str, IbmdError]] = field(default_factory=list)


def make_plan(config: SampleConfig) -> Plan:
    """Find the inputs, map them to outputs, and refuse conflicts.

    Returns:
        The plan, the variants of a source one after the other.

    Raises:
        UsageError: two outputs are one, an output is an input, or `--output` does not go with the inputs.
        IbmdError: an output exists, with `on_exists="error"`.
    """
    plan = Plan()
    sources = list(_find(config, plan.problems))
    _check_output(sources, config)
    jobs = [Job(source, v, _output(source, v, config)) for source in sources for v in range(1, config.variants + 1)]
    if config.to_stdout:
        plan.jobs = jobs
        return plan
    jobs = _unique(jobs)
    there = {job for job in jobs if os.path.lexists(str(job.output))}
    if there and config.on_exists == "error":
        first = next(job for job in jobs if job in there)
        more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
        raise IbmdError(f"{shown(str(first.output))}{more}: exists already; choose --on-exists skip or overwrite")
    if config.on_exists == "skip":
        plan.skipped = [job for job in jobs if job in there]
        jobs = [job for job in jobs if job not in there]
    plan.jobs = jobs
    return plan


def _find(config: SampleConfig, problems: list[tuple[str, IbmdError]]) -> Iterator[Source]:
    """Yield the sources of each input in turn, and note inputs that have none."""

    def unreadable(error: OSError) -> None:
        problems.append((error.filename, IbmdError(f"{shown(error.filename)}: cannot be listed ({error.strerror})")))

    without = Path(config.output) if config.output else None
    for text in config.inputs:
        if text == "-":
            yield Source(None, "stdin")
            continue
        base, matches = None, [text]
        if not os.path.lexists(text):
            matches = sorted(m for m in glob.glob(text, recursive=True) if not WRITTEN.search(m))
            base = _fixed_part(text)
        if not matches:
            problems.append((text, IbmdError(f"{shown(text)}: no such file or folder, and nothing matches it")))
        for path in map(Path, matches):
            before = len(problems)
            found = find_images(path, config.recursive, without, unreadable)
            if not found and len(problems) == before:
                deeper = "" if config.recursive else "; --recursive searches the folders in it"
                problems.append((str(path), IbmdError(f"{shown(path)}: no images in this folder{deeper}")))
            root = base or (path if path.is_dir() else path.parent)
            yield from (Source(file, file.relative_to(root).as_posix()) for file in found)


def _fixed_part(pattern: str) -> Path:
    parts = PurePath(pattern).parts
    wild = (i for i, part in enumerate(parts) if set(part) & set("*?["))
    return Path(*parts[: next(wild, len(parts))])


def _check_output(sources: Sequence[Source], config: SampleConfig) -> None:
    """Refuse an `--output` that does not go with the inputs."""
    *most, last = WRITABLE
    endings = f"{', '.join(most)} or {last}"
    if config.to_stdout:
        if len(sources) > 1 or config.variants > 1:
            raise UsageError(
                f"{len(sources)} images, {config.variants} variants: stdout takes one picture; give --output FOLDER/"
            )
    elif config.output is not None:
        output, name = Path(config.output), shown(config.output)
        if _is_folder(config.output):
            if output.exists() and not output.is_dir():
                raise UsageError(f"--output {name}: is a file; expected a folder, or a name with {endings}")
        elif output.suffix.lower() not in WRITABLE:
            raise UsageError(f"--output {name}: expected a name with {endings}, or a folder with / at its end")
        elif len(set(sources)) > 1:
            raise UsageError(f"--output {name}: one file for {len(sources)} images; give a folder with / at its end")


def _is_folder(output: str) -> bool:
    return output.endswith(("/", os.sep)) or os.path.isdir(output) or not PurePath(output).suffix


def _output(source: Source, variant: int, config: SampleConfig) -> Path | None:
    mark = f".{variant}" if config.variants > 1 else ""
    name = PurePath(source.name)
    if config.to_stdout:
        return None
    if config.output is None:
        return Path(str(source)).with_name(f"{name.stem}.ibmd{mark}.png")
    output = Path(config.output)
    if _is_folder(config.output):
        return output / name.with_name(f"{name.stem}{mark}.png")
    return output.with_name(f"{output.stem}{mark}{output.suffix}")


def _unique(jobs: Sequence[Job]) -> list[Job]:
    """Drop repeated jobs, and refuse outputs that would overwrite inputs or one another, also through links."""
    inputs = {os.path.realpath(str(job.source)) for job in jobs}
    makers: dict[str, Job] = {}
    for job in jobs:
        place = os.path.realpath(str(job.output))
        other = makers.setdefault(place, job)
        first, source, output = (shown(str(path)) for path in (other.source, job.source, job.output))
        if place in inputs:
            raise UsageError(f"{source}: its output {output} is an input, too; give another --output")
        if other.variant != job.variant or not _same(other.source, job.source):
            raise UsageError(
                f"{first} and {source} would both become {output}; "
                f"translate them in two runs with different --output, or give the folder above them as --input"
            )
    return list(makers.values())


def _same(one: Source, other: Source) -> bool:
    return one == other or os.path.realpath(str(one)) == os.path.realpath(str(other))
