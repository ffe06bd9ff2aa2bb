"""Data sets by number: sources, targets, or both, found by a reference and read when they are asked for.

A folder means the same in every command: with `source/` and `target/` inside, it holds pairs of equal names; with a
layout, each of its pictures is a pair or a source; else its pictures are sources, or, if they are to be degraded,
targets. Folders inside may be classes.
"""

import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ibmd_cli.data.degradations import is_slow
from ibmd_cli.data.embedded import embedded_pairs, embedded_sources
from ibmd_cli.data.forms import Form, read_normals
from ibmd_cli.data.labels import check_classes, folder_classes, label_of, read_labels
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.files import why
from ibmd_cli.images.decode import decode, read_image, shown
from ibmd_cli.images.find import find_images, passed_over

SOURCE, TARGET = SIDES = ("source", "target")
"""The two pictures of a pair, and the folders that hold them."""
HF_DATA = re.compile(r"hf://datasets/(?P<repo>[^\s/@]+/[^\s/@#]+)(@(?P<revision>[^\s/#]+))?(/(?P<split>[^\s/#]+))?"
                     r"(#(?P<column>.+))?")  # fmt: skip


# ------------------------------------------------------------------------------------------------------- data sets


class DataSet:
    """Items by number, each with a source, a target, or both; it can be sent to other processes.

    Args:
        name: the reference that they were found by.
        forms: for each side that items have, what becomes of its picture.
        labels: the class of each item, if there are any.

    Attributes:
        digest: changes with the pictures that are read, as far as their names and sizes tell.
    """

    digest: str
    passed = ""

    def __init__(self, name: str, forms: Mapping[str, Form], labels: Sequence[int] = ()) -> None:
        self.name, self.forms, self.labels = name, forms, labels

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def base(self) -> str:
        """Return the side from which students are trained: sources, or the targets that sources are made of."""
        return SOURCE if SOURCE in self.forms else TARGET

    def title(self, row: int) -> str:
        """Return the name of an item."""
        return str(row)

    def picture(self, row: int, side: str) -> tuple[Image.Image, str]:
        """Open a picture of an item, and return it with its name for messages.

        Raises:
            IbmdError: it cannot be read.
        """
        raise NotImplementedError

    def read(self, row: int, *sides: str, alike: bool = False) -> Tensor:
        """Return the pixels of an item, uint8 (3 · S, size, size), of S sides; of `base` if none is named.

        Raises:
            IbmdError: a picture cannot be read, is of another size, or (if `alike`) the two are of different shapes.
        """
        sides = sides or (self.base,)
        pictures = [self.picture(row, side) for side in sides]
        if alike and len({name for _, name in pictures}) == 2:
            (one, name), (other, partner) = pictures
            if abs(one.width * other.height - other.width * one.height) > max(one.width, other.width):
                shapes = [f"{picture.width}×{picture.height}" for picture in (one, other)]
                raise IbmdError(f"{name}: {shapes[0]}, but {partner} is {shapes[1]}: expected equal shapes")
        return torch.cat([self.forms[side](*given) for side, given in zip(sides, pictures, strict=True)])

    def describe(self, used: Sequence[str], degradation: str = "") -> str:
        """Say what was taken, e.g. "pairs: 200 sources; 200 targets are not used by this objective"."""
        taken = " and ".join(f"{len(self):,} {side}s" for side in SIDES if side in used)
        if degradation:
            taken += f", made into sources by {degradation}"
        if self.labels:
            taken += f", of {len(set(self.labels)):,} classes"
        unused = [f"{count:,} {side}s" for side, count in self._counts().items() if side not in used]
        return (
            f"{self.name}: {taken}"
            + "".join(f"; {what} are not used by this objective" for what in unused)
            + (f"; {self.passed}" if self.passed else "")
        )

    def _counts(self) -> dict[str, int]:
        return {side: len(self) for side in self.forms}


class Embedded(DataSet):
    """The data of `builtin:NAME`, which are in memory: sources to train with, or the test pairs."""

    def __init__(self, name: str, form: Form, held_out: bool) -> None:
        pairs = embedded_pairs(name) if held_out else None
        self.pixels = {SOURCE: pairs.x_T, TARGET: pairs.x_0} if pairs else {SOURCE: embedded_sources(name)}
        super().__init__(f"builtin:{name}", dict.fromkeys(self.pixels, form))
        self.titles = pairs.names if pairs else ()
        shape = self.pixels[SOURCE].shape
        self.digest = _digest([name, *self.titles] if pairs else [self.name, *map(str, shape)])
        if (side := shape[-1]) != form.size:
            raise IbmdError(f"--data {self.name}: images of {side} pixels, but the teacher is for {form.size}")

    def __len__(self) -> int:
        return len(self.pixels[SOURCE])

    def title(self, row: int) -> str:
        """Return the name of a test pair."""
        return self.titles[row] if self.titles else str(row)

    def read(self, row: int, *sides: str, alike: bool = False) -> Tensor:
        """Return the pixels of an item."""
        return torch.cat([self.pixels[side][row] for side in sides or (SOURCE,)])


class Files(DataSet):
    """Image files.

    Args:
        name: the reference that they were found by.
        forms: for each side, what becomes of its picture.
        files: for each side, all of them, item by item.
        roots: for each side, the folder, or the one file.
        labels: the class of each item, if there are any.
        unused: for a side that is not read, the number of its files.
        passed: says what was passed over in the folder, see `find.passed_over`.
    """

    def __init__(
        self,
        name: str,
        forms: Mapping[str, Form],
        files: Mapping[str, Sequence[Path]],
        roots: Mapping[str, Path],
        labels: Sequence[int],
        unused: Mapping[str, int],
        passed: str = "",
    ) -> None:
        super().__init__(name, forms, labels)
        # As bytes in an array: a million strings would take ten times as much.
        self.paths = {side: np.array([os.fsencode(file) for file in files[side]]) for side in forms}
        self.root, self.unused, self.passed = roots[self.base], unused, passed
        sides = [side for side in forms if side == self.base or roots[side] != self.root]
        self.digest = _digest(f"{within(file, roots[side])} {_size(file)}" for side in sides for file in files[side])

    def __len__(self) -> int:
        return len(self.paths[self.base])

    def title(self, row: int) -> str:
        """Return the path of an item within its folder."""
        return within(self._path(row, self.base), self.root) or self.root.name

    def picture(self, row: int, side: str) -> tuple[Image.Image, str]:
        """Open a file."""
        path = self._path(row, side)
        name = shown(path)
        return (read_normals(path, name, self.forms[side].size) if path.suffix == ".npy" else read_image(path)), name

    def _path(self, row: int, side: str) -> Path:
        return Path(os.fsdecode(bytes(self.paths[side][row])))

    def _counts(self) -> dict[str, int]:
        return super()._counts() | dict(self.unused)


class Rows(DataSet):
    """Rows of a data set of the library `datasets`.

    Args:
        name: the reference.
        table: a `datasets.Dataset`.
        columns: for each side, the column that holds its images.
        forms: for each side, what becomes of its picture.
        labels: the class of each item, if there are any.
    """

    def __init__(
        self, name: str, table: Any, columns: Mapping[str, str], forms: Mapping[str, Form], labels: Sequence[int]
    ) -> None:
        from datasets import Image as Encoded

        super().__init__(name, forms, labels)
        self.columns = columns
        self.table = table.select_columns(sorted(set(columns.values())))
        for column in set(columns.values()):
            self.table = self.table.cast_column(column, Encoded(decode=False))
        self.digest = _digest([name, str(len(table)), str(table.info.dataset_size), str(table.info.download_size)])

    def __len__(self) -> int:
        return len(self.table)

    def picture(self, row: int, side: str) -> tuple[Image.Image, str]:
        """Open an image of a row."""
        column = self.columns[side]
        cell, name = self.table[row][column] or {}, f"{self.name} row {row}"
        if len(set(self.columns.values())) > 1:
            name += f" {column}"
        if cell.get("bytes"):
            return decode(io.BytesIO(cell["bytes"]), name).rgb, name
        if cell.get("path"):
            return read_image(Path(cell["path"])), name
        raise IbmdError(f"{name}: no image in it")


# ------------------------------------------------------------------------------------------------------- references


def open_data_set(
    reference: str, form: Form, classes: int | None, labels: str = "", targets: bool = False, held_out: bool = False
) -> DataSet:
    """Find the images that a reference names, without reading them.

    Args:
        reference: a folder (searched recursively), a file, `builtin:NAME`, or
            `hf://datasets/OWNER/NAME[@REVISION][/SPLIT][#COLUMN]`.
        form: what becomes of a source, or of the targets that sources are made of.
        classes: of the teacher, or None if it takes none. The class of a file is what `labels` says, or the folder
            that holds it (`folder_classes`); that of a row of a data set stands in its column of classes.
        labels: CSV file of classes, see `labels`; "": none.
        targets: whether targets will be read, too.
        held_out: take the test pairs of `builtin:NAME` in place of its training sources.

    Raises:
        UsageError: the classes cannot be told, or the data have no such images.
        NotAvailable: the data are not there, or have no targets.
        IbmdError: they cannot be listed, are of another size, or an item of a pair has no partner.
    """
    if reference.startswith("builtin:"):
        if classes:
            raise UsageError(f"--data {reference}: has no classes, and the teacher needs them: give a folder")
        found: DataSet = Embedded(reference.removeprefix("builtin:"), form, held_out)
    elif reference.startswith("hf://"):
        found = _open_rows(reference, form, classes)
    else:
        return open_files(reference, Path(reference), form, classes, labels, targets)
    if targets and TARGET not in found.forms:
        raise NotAvailable(f"--data {reference}: has sources alone: give a folder with source/ and target/ in it")
    return found


def open_files(
    reference: str, path: Path, form: Form, classes: int | None, labels: str = "", targets: bool = False
) -> Files:
    """Find the images of a folder; arguments and errors are those of `open_data_set`."""
    inside = [side for side in SIDES if (path / side).is_dir()]
    paired = len(inside) == 2
    if paired and form.layout:
        raise UsageError(f"--data {reference}: holds source/ and target/: leave out --layout {form.layout}")
    if inside == [TARGET] and not (form.degradation or form.layout):
        raise NotAvailable(f"--data {reference}: no folder {path / SOURCE}; expected source/ and target/ in it")
    passed = Counter[str]()
    if paired:
        listed = {side: _images(path / side, form.layout, passed) for side in SIDES}
    else:
        listed = dict.fromkeys(SIDES, _images(path, form.layout, passed))
        _refuse_pairs_below(reference, path, listed[SOURCE])
    forms = _forms(form, paired)
    if targets and TARGET not in forms:
        missing = path / (TARGET if inside else SOURCE)
        raise NotAvailable(f"--data {reference}: no folder {missing}; expected source/ and target/ in it")
    unused = {side: len(listed[side]) for side in (SIDES if paired else forms)}
    if not targets and SOURCE in forms:
        forms = {SOURCE: forms[SOURCE]}
    read = {side: TARGET if form.degradation else side for side in forms}
    if paired and len(set(read.values())) == 2:
        listed = _partners(reference, path, listed)
    files = {side: listed[read[side]] for side in forms}
    roots = {side: path / read[side] if paired else path for side in forms}
    base = next(iter(forms))
    if not files[base]:
        kind = "surface normals (*_normal.npy, *_normal.png)" if form.layout == "normals" else "images"
        told = f"; {text}" if (text := passed_over(passed)) else ""
        raise NotAvailable(f"--data {reference}: no {kind} in {'it' if roots[base] == path else roots[base]}{told}")
    unused = {side: count for side, count in unused.items() if side not in read.values()}
    numbers = list[int]()
    if classes and labels:
        table = read_labels(labels, "--labels")
        numbers = [label_of(table, file, within(file, roots[base]), labels) for file in files[base]]
        check_classes(f"--labels {labels}", numbers, classes)
    elif classes:
        numbers = folder_classes(roots[base], files[base], classes)
    return Files(reference, forms, files, roots, numbers, unused, passed_over(passed))


def _forms(form: Form, paired: bool) -> dict[str, Form]:
    """Return the sides that the pictures of a folder have, and what becomes of each."""
    if form.degradation and not is_slow(form.degradation):
        return {TARGET: form}
    if not (paired or form.degradation or form.layout in ("ab", "ba")):
        return {SOURCE: form}
    other = {"ab": "ba", "ba": "ab"}.get(form.layout, "")
    return {SOURCE: form, TARGET: replace(form, layout=other, degradation="", scale=1)}


def _images(folder: Path, layout: str, passed: Counter[str]) -> list[Path]:
    """List the images of a folder; of two normal maps of one name, the numbers rather than the picture."""
    files = find_images(folder, passed=passed)
    if layout != "normals" or not folder.is_dir():
        return files
    del passed[".npy"]
    pictures = [file for file in files if file.stem.endswith("_normal")]
    return sorted({file.with_suffix(""): file for file in (*pictures, *folder.rglob("*_normal.npy"))}.values())


def _refuse_pairs_below(reference: str, path: Path, files: Sequence[Path]) -> None:
    """Raise a UsageError if a folder further down holds pairs: their targets are no sources."""
    for here in sorted({os.path.dirname(file) for file in files}):
        for folder in (Path(here), *Path(here).parents):
            if folder == path or path not in folder.parents:
                break
            if folder.name in SIDES and all((folder.parent / side).is_dir() for side in SIDES):
                raise UsageError(f"--data {reference}: holds pairs in {folder.parent}: give --data {folder.parent}")


def _partners(reference: str, path: Path, listed: Mapping[str, Sequence[Path]]) -> dict[str, list[Path]]:
    """Sort the files of source/ and target/ by their names: equal ones, or such as differ in the ending alone."""
    if empty := [path / side for side in SIDES if not listed[side]]:
        raise NotAvailable(f"--data {reference}: no images in {' and '.join(map(str, empty))}")
    files = {side: {within(file, path / side): file for file in listed[side]} for side in SIDES}
    stems = {side: defaultdict[str, list[str]](list) for side in SIDES}
    for side in SIDES:
        for name in files[side]:
            stems[side][os.path.splitext(name)[0]].append(name)
    partner = {name: name for name in files[SOURCE].keys() & files[TARGET].keys()}
    for stem, names in stems[SOURCE].items():
        if len(names) == len(stems[TARGET].get(stem, ())) == 1:
            partner[names[0]] = stems[TARGET][stem][0]
    left = {SOURCE: files[SOURCE].keys() - partner.keys(), TARGET: files[TARGET].keys() - set(partner.values())}
    lone = [f"{side}/{shown(name)}" for side in SIDES for name in sorted(left[side])]
    if lone:
        more = f" and {len(lone) - 5} more" if len(lone) > 5 else ""
        raise IbmdError(f"--data {reference}: no partner of equal name for {', '.join(lone[:5])}{more}")
    sources = sorted(partner)
    return {SOURCE: [files[SOURCE][n] for n in sources], TARGET: [files[TARGET][partner[n]] for n in sources]}


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
    """Choose the columns of a data set.

    Images are those of `column`, or of "image", or of the only column that holds images; "A,B" names the column of the
    sources and that of the targets. Other arguments and errors are those of `open_data_set`.
    """
    kinds = {name: type(feature).__name__ for name, feature in table.features.items()}
    pictures = [name for name, kind in kinds.items() if kind == "Image"]
    column = column or ("image" if "image" in pictures else pictures[0] if len(pictures) == 1 else "")
    chosen = [column] if column in pictures else column.split(",")
    if not set(chosen) <= set(pictures) or len(chosen) > 2:
        raise UsageError(
            f"--data {reference}: choose its column of images by #COLUMN: it has {', '.join(pictures) or 'none'} "
            "(#SOURCE,TARGET for pairs)"
        )
    labels = list[int]()
    if classes:
        named = [name for name, kind in kinds.items() if kind == "ClassLabel" or name == "label"]
        if len(named) != 1:
            raise UsageError(f"--data {reference}: expected one column of classes, found {', '.join(named) or 'none'}")
        labels = [int(label) for label in table[named[0]]]
        check_classes(f"--data {reference}", labels, classes)
    forms = _forms(form, len(chosen) == 2)
    last = {SOURCE: chosen[0], TARGET: chosen[-1]}
    columns = {side: last[TARGET if form.degradation else side] for side in forms}
    return Rows(reference, table, columns, forms, labels)


def within(file: Path, root: Path) -> str:
    """Return the path of a file within a folder, with `/` (`relative_to` is slow for a million files)."""
    return str(file).removeprefix(str(root)).lstrip(os.sep).replace(os.sep, "/")


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
