"""What `--data` names: images by number, which are read when they are asked for.

Each kind of reference is a class of the form `Records`, which can be sent to other processes.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from ibmd_cli.data.degradations import degrade
from ibmd_cli.data.embedded import embedded_sources, enlarge
from ibmd_cli.data.labels import label_of, read_labels
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.files import why
from ibmd_cli.images.decode import decode, read_image, shown
from ibmd_cli.images.find import find_images
from ibmd_cli.images.fit import fit, to_uint8

LAYOUTS = {
    "": "an image is a source",
    "ab": "source and target side by side, the source on the left, as in edges2handbags",
    "ba": "source and target side by side, the source on the right",
    "normals": "surface normals: *_normal.npy as in DIODE, or *_normal.png as DDBM prepares them",
}
"""Name → what the files hold, in one line."""

HF_DATA = re.compile(r"hf://datasets/(?P<repo>[^\s/@]+/[^\s/@#]+)(@(?P<revision>[^\s/#]+))?(/(?P<split>[^\s/#]+))?"
                     r"(#(?P<column>.+))?")  # fmt: skip


class Records(Protocol):
    """Images by number.

    Attributes:
        name: the reference.
        digest: changes with the images, as far as their names and sizes tell.
        labels: the class of each, if there are any.
    """

    name: str
    digest: str
    labels: Sequence[int]

    def __len__(self) -> int: ...

    def read(self, row: int) -> Tensor:
        """Return the pixels of an image, uint8 (3, H, W).

        Raises:
            IbmdError: it cannot be read.
        """


# --------------------------------------------------------------------------------------------------- one picture


@dataclass(frozen=True)
class Form:
    """How a picture becomes the pixels of a source, or of the clean image that a source is made of.

    Pictures are scaled as the teachers' authors did: halves of pairs by a bicubic filter, ImageNet's photos (what is
    degraded) by a bilinear one to the shorter side, and normal maps to the nearest pixel. Others: `images.fit`.

    Attributes:
        size: height and width.
        layout: key of `LAYOUTS`.
        degradation: that will follow; "edges" are found here.
        scale: sources are read smaller by this, and enlarged by repetition of pixels.
    """

    size: int
    layout: str = ""
    degradation: str = ""
    scale: int = 1

    def __call__(self, picture: Image.Image, name: str) -> Tensor:
        """Return uint8 (3, size, size).

        Raises:
            IbmdError: the picture, called `name`, cannot be a pair.
        """
        side = self.size // self.scale
        if self.layout in ("ab", "ba"):
            width, height = picture.size
            if width < height:
                raise IbmdError(f"{name}: {width}×{height} pixels: expected two pictures side by side")
            half = (0, 0, width // 2, height) if self.layout == "ab" else (width // 2, 0, width, height)
            x = to_uint8(picture.crop(half).resize((side, side), Image.Resampling.BICUBIC))
        elif self.layout == "normals":
            x = to_uint8(picture.resize((side, side), Image.Resampling.NEAREST))
        elif self.degradation not in ("", "edges"):
            x = to_uint8(_shorter_side(picture, side))
        else:
            fitted = fit(picture, side, "crop")[0][None]
            x = to_uint8(degrade(fitted, "edges") if self.degradation == "edges" else fitted)[0]
        return enlarge(x[None], self.scale)[0]


def _shorter_side(picture: Image.Image, side: int) -> Image.Image:
    """Scale the shorter side by a bilinear filter, and take the centre: torchvision's Resize and CenterCrop."""
    short = min(picture.size)
    width, height = (int(side * length / short) for length in picture.size)
    left, upper = round((width - side) / 2), round((height - side) / 2)
    return picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, upper, left + side, upper + side))


def read_normals(content: Path | BinaryIO, name: str, size: int) -> Image.Image:
    """Read surface normals and colour them as DDBM does.

    They are reduced to the nearest pixel (as OpenCV does: the upper left one of each block); places without a normal
    become black; the smallest number of the picture becomes 0, and what lies 2 above it 255.

    Args:
        content: a file of NumPy, (H, W, 3) floats in [-1, 1], 0 where there is no normal.
        name: for messages.
        size: height and width of the result.

    Raises:
        IbmdError: it holds something else, or cannot be read.

    Source: github.com/alexzhou907/DDBM, datasets/preprocess_depth.py.
    """
    try:
        normals = np.load(content, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError, EOFError) as error:
        raise IbmdError(f"{name}: no file of NumPy, or a damaged one: copy it again") from error
    if normals.ndim != 3 or normals.shape[2] != 3 or normals.size == 0 or not np.isfinite(normals).all():
        raise IbmdError(f"{name}: shape {normals.shape}: expected finite surface normals (H, W, 3)")
    rows, columns = (np.arange(size) * length // size for length in normals.shape[:2])
    normals = normals[rows][:, columns]
    absent = normals.sum(2, keepdims=True) == 0
    normals = normals + absent * normals.min()
    return Image.fromarray((np.clip((normals - normals.min()) / 2, 0, 1) * 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------------- kinds of records


class Embedded:
    """The sources of `builtin:NAME`, which are in memory."""

    def __init__(self, name: str) -> None:
        self.name = f"builtin:{name}"
        self.labels: Sequence[int] = ()
        self.pixels = embedded_sources(name)
        self.digest = _digest([self.name, *map(str, self.pixels.shape)])

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, row: int) -> Tensor:
        """Return the pixels of a source."""
        return self.pixels[row]


class Files:
    """Image files.

    Args:
        name: the reference that they were found by.
        root: the folder, or the one file.
        files: all of them.
        form: what becomes of each.
        labels: the class of each, if there are any.
    """

    def __init__(self, name: str, root: Path, files: Sequence[Path], form: Form, labels: Sequence[int]) -> None:
        self.name, self.form, self.labels = name, form, labels
        self.paths = np.array([os.fsencode(file) for file in files])  # a million strings would take ten times as much
        self.digest = _digest(f"{_within(file, root)} {_size(file)}" for file in files)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> Tensor:
        """Return the pixels of a file."""
        path = Path(os.fsdecode(bytes(self.paths[row])))
        name = shown(path)
        picture = read_normals(path, name, self.form.size) if path.suffix == ".npy" else read_image(path)
        return self.form(picture, name)


class Rows:
    """Rows of a data set of the library `datasets`.

    Args:
        name: the reference.
        table: a `datasets.Dataset`.
        column: that holds the images.
        form: what becomes of each.
        labels: the class of each, if there are any.
    """

    def __init__(self, name: str, table: Any, column: str, form: Form, labels: Sequence[int]) -> None:
        from datasets import Image as Encoded

        self.name, self.column, self.form, self.labels = name, column, form, labels
        self.table = table.select_columns([column]).cast_column(column, Encoded(decode=False))
        self.digest = _digest([name, str(len(table)), str(table.info.dataset_size), str(table.info.download_size)])

    def __len__(self) -> int:
        return len(self.table)

    def read(self, row: int) -> Tensor:
        """Return the pixels of a row."""
        cell, name = self.table[row][self.column] or {}, f"{self.name} row {row}"
        if cell.get("bytes"):
            return self.form(decode(io.BytesIO(cell["bytes"]), name).rgb, name)
        if cell.get("path"):
            return self.form(read_image(Path(cell["path"])), name)
        raise IbmdError(f"{name}: no image in it")


# ------------------------------------------------------------------------------------------------------- references


def open_records(reference: str, form: Form, classes: int | None, labels: str = "") -> Records:
    """Find the images that a reference names, without reading them.

    Args:
        reference: a folder (searched recursively), a file, `builtin:NAME`, or
            `hf://datasets/OWNER/NAME[@REVISION][/SPLIT][#COLUMN]`.
        form: what becomes of each image.
        classes: of the teacher, or None if it takes none. The class of a file is what `labels` says, or the folder
            that holds it (`_folder_classes`); that of a row of a data set stands in its column of classes.
        labels: CSV file of classes, see `labels`; "": none.

    Raises:
        UsageError: the classes cannot be told, or the data have no such images.
        NotAvailable: the data are not there.
        IbmdError: they cannot be read, or are of another size.
    """
    if reference.startswith("builtin:"):
        if classes:
            raise UsageError(f"--data {reference}: has no classes, and the teacher needs them: give a folder")
        records = Embedded(reference.removeprefix("builtin:"))
        if records.pixels.shape[-1] != form.size:
            raise IbmdError(
                f"--data {reference}: images of {records.pixels.shape[-1]} pixels, but the teacher is for {form.size}"
            )
        return records
    if reference.startswith("hf://"):
        return _open_rows(reference, form, classes)
    return open_files(reference, Path(reference), form, classes, labels)


def open_files(reference: str, path: Path, form: Form, classes: int | None, labels: str = "") -> Files:
    """Find the images of a folder; arguments and errors are those of `open_records`."""
    files = _find_normals(path) if form.layout == "normals" else find_images(path)
    if not files:
        kind = "surface normals (*_normal.npy, *_normal.png)" if form.layout == "normals" else "images"
        raise NotAvailable(f"--data {reference}: no {kind} in it")
    numbers = list[int]()
    if classes and labels:
        table = read_labels(labels, "--labels")
        numbers = [label_of(table, file, _within(file, path), labels) for file in files]
        _check_classes(f"--labels {labels}", numbers, classes)
    elif classes:
        numbers = _folder_classes(path, files, classes)
    return Files(reference, path, files, form, numbers)


def _find_normals(path: Path) -> list[Path]:
    """List the normal maps of a folder; of two of one name, the numbers rather than the picture."""
    if path.is_file():
        return [path]
    pictures = [file for file in find_images(path) if file.stem.endswith("_normal")]
    arrays = path.rglob("*_normal.npy")
    return sorted({file.with_suffix(""): file for file in (*pictures, *arrays)}.values())


def _folder_classes(path: Path, files: Sequence[Path], classes: int) -> list[int]:
    """Return the class of each image: the folder in `path` that holds it, by its number or its place in the alphabet.

    Raises:
        UsageError: an image is in no such folder, or the folders are neither numbers below `classes` nor that many.
    """
    loose = next((file for file in files if file.parent == path), None)
    names = [] if loose else [file.relative_to(path).parts[0] for file in files]
    folders = sorted(set(names))
    if not loose and all(name.isdecimal() and int(name) < classes for name in folders):
        return [int(name) for name in names]
    if len(folders) == classes:
        place = {name: i for i, name in enumerate(folders)}
        return [place[name] for name in names]
    found = f"{loose} lies outside of them" if loose else f"{len(folders)} folders, {folders[0]} … {folders[-1]}"
    raise UsageError(
        f"--data {path}: the teacher has {classes} classes: expected a folder for each, or folders that are called by "
        f"their numbers (0 … {classes - 1}), or --labels FILE; found {found}"
    )


def parse_hf_data(reference: str) -> dict[str, str | None]:
    """Split `hf://datasets/OWNER/NAME[@REVISION][/SPLIT][#COLUMN]` into repo, revision, split and column.

    Raises:
        UsageError: it is not of this form.
        NotAvailable: the library `datasets` is not installed.
    """
    match = HF_DATA.fullmatch(reference)
    if match is None:
        raise UsageError(f"--data {reference}: expected hf://datasets/OWNER/NAME[@REVISION][/SPLIT][#COLUMN]")
    if find_spec("datasets") is None:
        raise NotAvailable(f"--data {reference}: needs the library datasets: pip install 'ibmd-cli[datasets]'")
    return match.groupdict()


def _open_rows(reference: str, form: Form, classes: int | None) -> Rows:
    """Load a data set of the Hugging Face Hub into the cache of the library `datasets`, or find it there."""
    parts = parse_hf_data(reference)
    import datasets

    if Path(str(parts["repo"])).exists():
        raise UsageError(
            f"--data {reference}: the folder {parts['repo']} is here, and would be read instead: start in another one"
        )
    try:
        table = datasets.load_dataset(parts["repo"], revision=parts["revision"], split=parts["split"] or "train")
    except Exception as error:  # of many libraries: of the network, of files, of Parquet
        said = next(iter(str(error).strip().splitlines()), "")
        raise NotAvailable(f"--data {reference}: cannot be loaded ({type(error).__name__}: {said})") from error
    return rows_of(reference, table, parts["column"], form, classes)


def rows_of(reference: str, table: Any, column: str | None, form: Form, classes: int | None) -> Rows:
    """Choose the columns of a data set: images from `column`, or "image", or the only one that holds images.

    Arguments and errors are those of `open_records`.
    """
    kinds = {name: type(feature).__name__ for name, feature in table.features.items()}
    pictures = [name for name, kind in kinds.items() if kind == "Image"]
    column = column or ("image" if "image" in pictures else pictures[0] if len(pictures) == 1 else "")
    if column not in pictures:
        raise UsageError(
            f"--data {reference}: choose its column of images by #COLUMN: it has {', '.join(pictures) or 'none'}"
        )
    labels = list[int]()
    if classes:
        named = [name for name, kind in kinds.items() if kind == "ClassLabel" or name == "label"]
        if len(named) != 1:
            raise UsageError(f"--data {reference}: expected one column of classes, found {', '.join(named) or 'none'}")
        labels = [int(label) for label in table[named[0]]]
        _check_classes(f"--data {reference}", labels, classes)
    return Rows(reference, table, column, form, labels)


def _check_classes(given: str, labels: Sequence[int], classes: int) -> None:
    if not 0 <= min(labels) <= max(labels) < classes:
        raise UsageError(f"{given}: classes {min(labels)} … {max(labels)}: the teacher has 0 … {classes - 1}")


def _within(file: Path, root: Path) -> str:
    """Return the path of a file within a folder (`relative_to` is slow for a million files)."""
    return str(file).removeprefix(str(root)).lstrip(os.sep)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise IbmdError(f"{shown(file)}: cannot be opened {why(error)}") from error


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
