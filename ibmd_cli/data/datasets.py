"""Data sets: items by number, each with a source, a target, or both, read when they are asked for."""

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ibmd_cli.data.embedded import embedded_pairs, embedded_sources
from ibmd_cli.data.preprocessing import Preprocessing, read_normals
from ibmd_cli.errors import IbmdError
from ibmd_cli.files import why
from ibmd_cli.images.decode import Picture, decode, read_picture, shown
from ibmd_cli.reporting import Reporter, counted

SOURCE, TARGET = SIDES = ("source", "target")
"""The two pictures of a pair, and the folders that hold them."""
Notes = dict[int, set[tuple[str, str]]]
"""Item → what is to be said of how it was read: kind, and name of the picture."""


class DataSet:
    """Items by number, each with a source, a target, or both; it can be sent to other processes.

    Args:
        name: the reference that they were found by.
        preprocess: for each side that items have, what becomes of its picture.
        labels: the class of each item, if there are any.

    Attributes:
        digest: changes with the pictures that are read, as far as their names and sizes tell.
        notes: of the items that were read.
    """

    digest: str
    passed = ""

    def __init__(self, name: str, preprocess: Mapping[str, Preprocessing], labels: Sequence[int] = ()) -> None:
        self.name, self.preprocess, self.labels, self.notes = name, preprocess, labels, Notes()

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def base(self) -> str:
        """Return the side from which students are trained: sources, or the targets that sources are made of."""
        return SOURCE if SOURCE in self.preprocess else TARGET

    def title(self, row: int) -> str:
        """Return the name of an item."""
        return str(row)

    def picture(self, row: int, side: str) -> tuple[Image.Image, str]:
        """Open a picture of an item, and return it with its name for messages.

        Raises:
            IbmdError: it cannot be read.
        """
        raise NotImplementedError

    def noted(self, row: int, picture: Picture, name: str) -> Image.Image:
        """Keep what is to be said of a picture, and return its colours."""
        for note in picture.notes:
            self.notes.setdefault(row, set()).add((note, name))
        return picture.rgb

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
        return torch.cat([self.preprocess[side](*given) for side, given in zip(sides, pictures, strict=True)])

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
        return {side: len(self) for side in self.preprocess}


class Embedded(DataSet):
    """The data of `builtin:NAME`, which are in memory: sources to train with, or the test pairs."""

    def __init__(self, name: str, how: Preprocessing, held_out: bool) -> None:
        pairs = embedded_pairs(name) if held_out else None
        self.pixels = {SOURCE: pairs.x_T, TARGET: pairs.x_0} if pairs else {SOURCE: embedded_sources(name)}
        super().__init__(f"builtin:{name}", dict.fromkeys(self.pixels, how))
        self.titles = pairs.names if pairs else ()
        shape = self.pixels[SOURCE].shape
        self.digest = _digest([name, *self.titles] if pairs else [self.name, *map(str, shape)])
        if (side := shape[-1]) != how.size:
            raise IbmdError(f"--data {self.name}: images of {side} pixels, but the teacher is for {how.size}")

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
        preprocess: for each side, what becomes of its picture.
        files: for each side, all of them, item by item.
        roots: for each side, the folder, or the one file.
        labels: the class of each item, if there are any.
        unused: for a side that is not read, the number of its files.
        passed: says what was passed over in the folder, see `find.passed_over`.
    """

    def __init__(
        self,
        name: str,
        preprocess: Mapping[str, Preprocessing],
        files: Mapping[str, Sequence[Path]],
        roots: Mapping[str, Path],
        labels: Sequence[int],
        unused: Mapping[str, int],
        passed: str = "",
    ) -> None:
        super().__init__(name, preprocess, labels)
        # As bytes in an array: a million strings would take ten times as much.
        self.paths = {side: np.array([os.fsencode(file) for file in files[side]]) for side in preprocess}
        self.root, self.unused, self.passed = roots[self.base], unused, passed
        sides = [side for side in preprocess if side == self.base or roots[side] != self.root]
        self.digest = _digest(
            f"{within(file, roots[side])} {_bytes_of(file)}" for side in sides for file in files[side]
        )

    def __len__(self) -> int:
        return len(self.paths[self.base])

    def title(self, row: int) -> str:
        """Return the path of an item within its folder."""
        return within(self._path(row, self.base), self.root) or self.root.name

    def picture(self, row: int, side: str) -> tuple[Image.Image, str]:
        """Open a file."""
        path = self._path(row, side)
        if path.suffix == ".npy":
            return read_normals(path, shown(path), self.preprocess[side].size), shown(path)
        return self.noted(row, read_picture(path), shown(path)), shown(path)

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
        preprocess: for each side, what becomes of its picture.
        labels: the class of each item, if there are any.
    """

    def __init__(
        self,
        name: str,
        table: Any,
        columns: Mapping[str, str],
        preprocess: Mapping[str, Preprocessing],
        labels: Sequence[int],
    ) -> None:
        from datasets import Image as Encoded

        super().__init__(name, preprocess, labels)
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
            return self.noted(row, decode(io.BytesIO(cell["bytes"]), name), name), name
        if cell.get("path"):
            return self.noted(row, read_picture(Path(cell["path"])), name), name
        raise IbmdError(f"{name}: no image in it")


def tell_notes(notes: Notes, told: Mapping[str, int], reporter: Reporter) -> dict[str, int]:
    """Say of how many pictures each kind of note is, unless `told` has the same number; return the numbers."""
    names = defaultdict[str, list[str]](list)
    for kind, name in (note for row in sorted(notes) for note in sorted(notes[row])):
        names[kind].append(name)
    for kind, of in names.items():
        if told.get(kind) != len(of):
            more = f" and {counted(len(of) - 1, 'other')}" if len(of) > 1 else ""
            reporter.note(f"--data: {of[0]}{more}: {kind}")
    return {kind: len(of) for kind, of in names.items()}


def within(file: Path, root: Path) -> str:
    """Return the path of a file within a folder, with `/` (`relative_to` is slow for a million files)."""
    return str(file).removeprefix(str(root)).lstrip(os.sep).replace(os.sep, "/")


def _bytes_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise IbmdError(f"{shown(file)}: cannot be opened {why(error)}") from error


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
