"""Classes of images, from a CSV file with lines PATH,CLASS."""

import csv
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
        with open(file, newline="", encoding="utf-8", errors="surrogateescape") as lines:
            return {path: int(number) for path, number in csv.reader(lines)}
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
