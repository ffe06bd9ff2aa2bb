r"""The plan of `ibmd sample`: which pictures are made from which inputs, and where they go.

Inputs, by rule: folders are searched for names that end as images do, hidden ones, links to folders, and what is no
regular file passed over; so do globs pass over hidden names and links to folders. A path that is given by itself, or in
a list, or that a glob matches, is taken whatever its ending. Names are bytes, and need not be UTF-8: on stdout they are
what they were, and in JSON a byte that is not UTF-8 is `\udcXX`.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import NAME_MAX, folds_case, is_stream, unwritable, why
from ibmd_cli.images.decode import shown
from ibmd_cli.images.encode import WRITABLE
from ibmd_cli.images.find import PAIRED, find_images, find_matches, named_path, passed_over
from ibmd_cli.images.fit import Geometry
from ibmd_cli.images.metadata import Metadata
from ibmd_cli.images.tiles import Tiles
from ibmd_cli.sampling.config import SampleConfig, is_folder

LATER: Any = None
"""Stands for what a later step fills in."""


@dataclass(eq=False)
class Job:
    """A picture to make: planned, then read, translated and written by the steps that `pipeline` names.

    Attributes:
        name: names its noise, with the seed and the variant.
        source: file of its input; None: stdin.
        place: path of the input below the folder or glob that found it.
        variant: from 1; 0 if the input was not found, so that no picture of it was planned.
        output: None: its bytes go to stdout.
        skipped: whether another process is making it or has made it.
        error: why it is not made.
        size: (width, height) of the input, as soon as it is read.
        notes: what is to be said of the input.
        unlike: what the input is if the model was not made for it, see `read.unlike`.
        dpi: see `decode.Picture`.
        metadata: what the output is to say of its input.
        before: the input, small, for the contact sheet.
        x: canvas, (3, H, W), uint8 or float32 in [-1, 1]: a square of the model's size, or larger, in tiles.
        tiles: of the canvas.
        geometry: how the input lies there; None if the canvas is all there is.
        alpha: transparency that the result is to have, mode L.
        original: the input, mode RGB, and its hole, mode 1, if known pixels come back in the input's own size.
        hole: (1, H, W), on the canvas, 1 or True is to be filled; None without.
        label: class, for models that have classes.
        x_0: translation, float32 (3, scale · H, scale · W) in [-1, 1].
        made: (width, height) of the picture that was written.
        seconds: spent on it so far.
    """

    name: str
    source: Path | None = None
    place: str = ""
    variant: int = 1
    output: Path | None = None
    skipped: bool = False
    error: IbmdError | None = None
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    unlike: str = ""
    dpi: tuple[float, float] | None = None
    metadata: Metadata = Metadata()
    before: Image.Image | None = None
    x: np.ndarray = LATER
    tiles: Tiles = LATER
    geometry: Geometry = LATER
    alpha: Image.Image | None = None
    original: tuple[Image.Image, Image.Image] | None = None
    hole: np.ndarray | None = None
    label: int | None = None
    x_0: np.ndarray = LATER
    made: tuple[int, int] | None = None
    seconds: float = 0.0

    @property
    def path(self) -> str:
        """Path of the input as it was given, `-` for stdin."""
        return "-" if self.source is None else str(self.source)

    def drop_pixels(self) -> None:
        """Forget all arrays: while a picture waits for the disk, its bytes suffice."""
        self.x = self.x_0 = LATER
        self.hole = self.alpha = self.original = None


@dataclass
class Plan:
    """The pictures to make, and those that are not made.

    Attributes:
        jobs: to make, the variants of an input one after the other.
        skipped: whose outputs exist already.
        failed: for each input, or folder of outputs, that cannot be used, its pictures with the reason in `error`.
        passed: counts what was passed over in folders that hold images.
    """

    jobs: list[Job] = field(default_factory=list)
    skipped: list[Job] = field(default_factory=list)
    failed: list[list[Job]] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)

    def fail(self, path: str, message: str) -> None:
        """Note an input of which no picture can be planned."""
        self.failed.append([Job(path, Path(path), path, 0, error=IbmdError(message))])


def make_plan(config: SampleConfig, process: int = 0, processes: int = 1) -> Plan:
    """Find the inputs, map them to outputs, and refuse conflicts.

    Args:
        config: what is asked for.
        process: number of this process, from 0, which takes its share of the inputs.
        processes: how many there are.

    Raises:
        UsageError: two outputs are one, an output is an input, or `--output` does not go with the inputs.
        IbmdError: an output exists, with `on_exists="error"`; or the contact sheet cannot be written.
    """
    plan = Plan()
    found = list(_find(config, plan))
    _check_output(found, config)
    folder = config.output is not None and is_folder(config.output)
    variants = range(1, config.variants + 1)
    plan.jobs = [replace(job, variant=v, output=_output_of(job, v, config, folder)) for job in found for v in variants]
    if config.to_stdout:
        return plan
    plan.jobs = _unique(plan.jobs)
    grid = _check_grid(plan.jobs, config)
    plan.jobs = [job for i, group in enumerate(by_input(plan.jobs)) if i % processes == process for job in group]
    there = [job for job in plan.jobs if stands(job.output)]
    if config.on_exists == "error" and (outputs := [str(job.output) for job in there] + grid):
        more = f" (and {len(outputs) - 1} more)" if len(outputs) > 1 else ""
        raise IbmdError(f"{shown(outputs[0])}{more}: exists already; choose --on-exists skip or overwrite")
    if config.on_exists == "skip":
        plan.skipped, done = there, set(there)
        plan.jobs = [job for job in plan.jobs if job not in done]
    if process > 0:
        plan.failed, plan.passed = [], Counter()  # the first tells them
    _check_writable(plan)
    if config.grid is not None and (reason := unwritable(Path(config.grid))):
        raise IbmdError(f"--grid {shown(config.grid)}: {reason}")
    return plan


def by_input(jobs: Iterable[Job]) -> list[list[Job]]:
    """Group jobs that follow each other by their inputs, each of which is read once."""
    return [list(group) for _, group in groupby(jobs, key=lambda job: (job.source, job.place))]


def _check_writable(plan: Plan) -> None:
    """Move the jobs whose outputs cannot be written to `plan.failed`, before time is spent on them."""
    groups: dict[Path, list[Job]] = {}  # by what tells whether they can: mostly the folder
    for job in plan.jobs:
        output = Path(str(job.output))
        alone = os.path.lexists(output) or len(os.fsencode(output.name)) > NAME_MAX
        groups.setdefault(output if alone else output.parent, []).append(job)
    for path, jobs in groups.items():
        reason = unwritable(Path(str(jobs[0].output)))
        if is_stream(path) and len(plan.jobs) > 1:
            reason = "is a FIFO or a device, which takes a single picture: give another --output"
        if reason:
            for job in jobs:
                job.error = IbmdError(f"{shown(path)}: {reason}")
            plan.failed.append(jobs)
    plan.jobs = [job for job in plan.jobs if job.error is None]


def _find(config: SampleConfig, plan: Plan) -> Iterator[Job]:
    """Yield a job for each input in turn, still without output, and note paths that stand for none."""
    for text in config.inputs:
        if text == "-":
            yield Job("stdin", place="stdin")
            continue
        for path, base in _paths_of(text, config, plan):
            yield from _images_of(path, base or (path if os.path.isdir(path) else path.parent), config, plan)
    for text in _listed(config):
        if (named := _path_of(text, plan)) is not None:
            whole = not named.is_absolute() and ".." not in named.parts  # then its place in the tree is kept
            root = Path() if whole else named if os.path.isdir(named) else named.parent
            yield from _images_of(named, root, config, plan)


def _path_of(text: str, plan: Plan) -> Path | None:
    """Return the path that a user's text names; note one that names none."""
    try:
        return Path(named_path(text))
    except IbmdError as error:
        plan.fail(text, str(error))
        return None


def _paths_of(text: str, config: SampleConfig, plan: Plan) -> list[tuple[Path, Path | None]]:
    """Return the files and folders that an input stands for, each with the folder that its glob begins with."""
    if (path := _path_of(text, plan)) is None:
        return []
    if os.path.lexists(path):
        return [(path, None)]
    before = len(plan.failed)
    base, matches = find_matches(str(path), _unlisted(plan))
    matches = [path for path in matches if not _made_here(path, base, config)]
    if not matches and len(plan.failed) == before:
        plan.fail(text, f"{shown(text)}: no such file or folder, and nothing matches it")
    return [(match, base) for match in matches]


def _made_here(path: Path, base: Path, config: SampleConfig) -> bool:
    """Tell whether a glob found what lies in the folder of the outputs, below the one where the glob begins."""
    if config.output is None or not os.path.isdir(config.output):
        return False
    output, inside = (Path(os.path.realpath(p)) for p in (config.output, path))
    return output != Path(os.path.realpath(base)) and output in inside.parents and output not in base.resolve().parents


def _images_of(path: Path, root: Path, config: SampleConfig, plan: Plan) -> Iterator[Job]:
    """Yield the images that a path stands for, and note if there are none."""
    before = len(plan.failed)
    output = Path(config.output) if config.output else None
    passed = Counter[str]()
    found = find_images(path, config.recursive, output, _unlisted(plan), passed)
    if targets := {file for file in found if _is_target(file, path)}:
        found, passed[PAIRED] = [file for file in found if file not in targets], len(targets)
    if found:
        plan.passed += passed
    elif len(plan.failed) == before:
        told = f"; {text}" if (text := passed_over(passed)) else ""
        plan.fail(str(path), f"{shown(path)}: no images in this folder{told}")
    yield from (Job(file.name, file, file.relative_to(root).as_posix()) for file in found)


def _is_target(file: Path, folder: Path) -> bool:
    """Tell whether a file that was found in a folder is a target of pairs: below a target/ beside a source/."""
    if "target" not in file.parts:
        return False
    inside = [parent for parent in file.parents if folder in parent.parents]
    return any(parent.name == "target" and (parent.parent / "source").is_dir() for parent in inside)


def stands(output: Path | str | None) -> bool:
    """Tell whether something is there that an output would replace: what goes into a FIFO or a device does not."""
    return os.path.lexists(str(output)) and not is_stream(str(output))


def _unlisted(plan: Plan) -> Callable[[OSError], None]:
    """Return what notes a folder that cannot be searched, or a file that cannot be looked at."""
    return lambda error: plan.fail(error.filename, f"{shown(error.filename)}: cannot be listed {why(error)}")


def _listed(config: SampleConfig) -> Iterator[str]:
    """Yield the paths that `--files-from` lists; empty ones are none."""
    if config.files_from is None:
        return
    try:
        name = config.files_from
        content = sys.stdin.buffer.read() if name == "-" else Path(named_path(name)).read_bytes()
    except OSError as error:
        raise UsageError(f"--files-from {shown(config.files_from)}: cannot be read {why(error)}") from error
    except IbmdError as error:
        raise UsageError(f"--files-from {error}") from error
    content = content.removeprefix(b"\xef\xbb\xbf")  # as programs of Windows begin a text
    wide = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}.get(content[:2])
    if wide is None and not config.null and b"\0" in content[:2]:  # the same without its mark
        wide = "utf-16-le" if content[1:2] == b"\0" else "utf-16-be"
    if wide is not None:
        content = content.decode(wide, "replace").encode("utf-8", "surrogateescape")
    if not config.null and b"\0" in content:
        raise UsageError(f"--files-from {shown(config.files_from)}: paths end in NUL: add --null")
    lines = content.split(b"\0") if config.null else [line.removesuffix(b"\r") for line in content.split(b"\n")]
    yield from (os.fsdecode(line) for line in lines if line.strip())


def _check_output(found: Sequence[Job], config: SampleConfig) -> None:
    """Refuse an `--output` that does not go with the inputs."""
    *most, last = WRITABLE
    endings = f"{', '.join(most)} or {last}"
    if config.to_stdout:
        if len(found) > 1 or config.variants > 1:
            images, variants = (
                f"{n} {what}{'s' * (n != 1)}" for n, what in ((len(found), "image"), (config.variants, "variant"))
            )
            raise UsageError(f"{images}, {variants}: stdout takes one picture; give --output FOLDER/")
    elif config.output is not None:
        output, name = Path(config.output), shown(config.output)
        if is_stream(output):
            if len(found) > 1 or config.variants > 1:
                raise UsageError(f"--output {name}: a FIFO or a device takes a single picture; give a folder")
        elif is_folder(config.output):
            if os.path.lexists(output) and not os.path.isdir(output):
                raise UsageError(f"--output {name}: is a file; expected a folder, or a name with {endings}")
        elif output.suffix.lower() not in WRITABLE:
            raise UsageError(f"--output {name}: expected a name with {endings}, or a folder with / at its end")
        elif len({(job.source, job.place) for job in found}) > 1:
            raise UsageError(f"--output {name}: one file for {len(found)} images; give a folder with / at its end")


def _output_of(job: Job, variant: int, config: SampleConfig, folder: bool) -> Path | None:
    mark = f".{variant}" if config.variants > 1 else ""
    place = PurePath(job.place)
    stem = place.name if config.keep_suffix and place.suffix.lower() != config.suffix else place.stem
    if config.to_stdout:
        return None
    if config.output is None:
        return Path(job.path).with_name(f"{stem}.ibmd{mark}{config.suffix}")
    output = Path(config.output)
    if folder:
        return output / place.with_name(f"{stem}{mark}{config.suffix}")
    return output.with_name(f"{output.stem}{mark}{output.suffix}")


def _unique(jobs: Sequence[Job]) -> list[Job]:
    """Drop repeated jobs, and refuse outputs that would overwrite inputs or one another, also through links."""
    inputs = {os.path.realpath(job.path) for job in jobs}
    makers: dict[str, dict[tuple[str, int], Job]] = {}  # output → its jobs, by input and variant
    for job in jobs:
        makers.setdefault(os.path.realpath(str(job.output)), {})[os.path.realpath(job.path), job.variant] = job
    if over := [job for real, group in makers.items() if real in inputs for job in group.values()]:
        more = f" (and {len(over) - 1} more)" if len(over) > 1 else ""
        output = shown(str(over[0].output))
        raise UsageError(f"{shown(over[0].path)}: its output {output} is an input, too{more}; give another --output")
    alike: dict[str, list[Job]] = {}  # outputs that differ in upper and lower case alone
    for real, group in makers.items():
        alike.setdefault(real.casefold(), []).extend(group.values())
    groups = [list(group.values()) for group in makers.values() if len(group) > 1]
    if not groups:
        folding = (group for group in alike.values() if len(group) > 1)
        groups = [group for group in folding if folds_case(Path(str(group[0].output)).parent)]
    if groups:
        raise UsageError(_collisions(groups))
    return [next(iter(group.values())) for group in makers.values()]


def _collisions(groups: list[list[Job]]) -> str:
    """Name outputs that several inputs would become, and what keeps them apart."""
    most = 10
    lines = []
    for group in groups[:most]:
        *paths, last = (shown(job.path) for job in group)
        both = "both" if len(group) == 2 else "all"
        lines.append(f"{', '.join(paths)} and {last} would {both} become {shown(str(group[0].output))}")
    text = "; ".join(lines) + (f"; and {len(groups) - most} more" if len(groups) > most else "")
    pairs = [(Path(one.path), Path(other.path)) for group in groups for one, other in pairwise(group)]
    if all(one.parent == other.parent and one.suffix.lower() != other.suffix.lower() for one, other in pairs):
        ending = Path(str(groups[0][0].output)).suffix
        other = next(path for path in pairs[0] if path.suffix.lower() != ending)
        return f"{text}: --keep-suffix keeps them apart ({shown(other.name + ending)})"
    return f"{text}: translate them in several runs with different --output, or give the folder above them, --recursive"


def _check_grid(jobs: Sequence[Job], config: SampleConfig) -> list[str]:
    """Refuse a contact sheet that is an input or an output; return its name if it exists."""
    if config.grid is None:
        return []
    grid, real = shown(config.grid), os.path.realpath(config.grid)
    if PurePath(config.grid).suffix.lower() not in WRITABLE:
        raise UsageError(f"--grid {grid}: expected the name of a picture, e.g. sheet.png")
    for path in (path for job in jobs for path in (job.path, str(job.output))):
        if os.path.realpath(path) == real:
            raise UsageError(f"--grid {grid}: is {shown(path)}, an input or output; give another name")
    return [config.grid] if stands(config.grid) else []
