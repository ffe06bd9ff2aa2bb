"""Classes of images: from a CSV file with lines PATH,CLASS, or from the folders that hold them. Imports no PyTorch."""

import codecs
import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import why
from ibmd_cli.images.decode import shown


def read_labels(file: str, flag: str) -> dict[str, int]:
    """Read a file of classes.

    Args:
        file: CSV, UTF-8, lines PATH,CLASS without a header.
        flag: that names it, for messages.

    Raises:
        UsageError: it cannot be read, or has another line.
    """
    try:
        text = os.fsdecode(Path(file).read_bytes().removeprefix(codecs.BOM_UTF8))  # paths are bytes in every locale
        return {path: int(number) for path, number in csv.reader(io.StringIO(text, newline=""))}
    except OSError as error:
        raise UsageError(f"{flag} {shown(file)}: cannot be read {why(error)}") from error
    except ValueError as error:
        raise UsageError(f"{flag} {shown(file)}: expected lines PATH,CLASS ({error})") from error


def label_of(labels: dict[str, int], path: str | Path, name: str, file: str) -> int:
    """Return the class of an image, by its path or by its name.

    Args:
        labels: from `read_labels`.
        path: as the user gave it.
        name: the path within the folder that was searched.
        file: that holds the labels, for messages.

    Raises:
        IbmdError: there is none.
    """
    for key in (str(path), name):
        if key in labels:
            return labels[key]
    raise IbmdError(f"{shown(name)}: no class for it in {shown(file)}")


def folder_classes(path: Path, files: Sequence[Path], classes: int) -> list[int]:
    """Return the class of each image: the number that its folder in `path` is called by, or has in the alphabet.

    Raises:
        UsageError: an image is in no such folder, or the folders are neither numbers below `classes` nor that many.
    """
    loose = next((file for file in files if file.parent == path), None)
    names = [] if loose else [file.relative_to(path).parts[0] for file in files]
    folders = sorted(set(names))
    if not loose and all(name.isdecimal() and int(name) < classes for name in folders):
        return [int(name) for name in names]
    if len(folders) == classes:
        number = {name: i for i, name in enumerate(folders)}
        return [number[name] for name in names]
    found = f"{loose} lies outside of them" if loose else f"{len(folders)} folders, {folders[0]} … {folders[-1]}"
    raise UsageError(
        f"--data {path}: the teacher has {classes} classes: expected a folder for each, or folders that are called by "
        f"their numbers (0 … {classes - 1}), or --labels FILE; found {found}"
    )


def check_classes(given: str, labels: Sequence[int], classes: int) -> None:
    """Raise a UsageError that begins with `given` unless all classes are 0 … `classes` − 1."""
    if not 0 <= min(labels) <= max(labels) < classes:
        raise UsageError(f"{given}: classes {min(labels)} … {max(labels)}: the teacher has 0 … {classes - 1}")
