"""Images in folders and globs: which files are images, and in what order."""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from ibmd_cli.errors import IbmdError
from ibmd_cli.files import why
from ibmd_cli.images.decode import shown

if TYPE_CHECKING:
    pass


SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif")
WRITTEN = re.compile(r"\.ibmd(\.\d+)?\.(png|jpe?g|webp|tiff?|bmp|avif)$")


# ---------------------------------------------------------------------------------------------------- files


def find_images(
    path: Path,
    recursive: bool = True,
    without: Path | None = None,
    on_error: Callable[[OSError], None] | None = None,
) -> list[Path]:
    """List the images of a folder, sorted; a path that is no folder stands for itself.

    They are known by the endings of their names. Hidden files and folders, links to folders or to nothing, what is no
    regular file, and what `ibmd sample` wrote beside its inputs (`*.ibmd.png`) are passed over.

    Args:
        path: folder.
        recursive: search folders in it, too.
        without: a folder that is not searched.
        on_error: told of folders and files that cannot be looked at, in place of an exception.

    Raises:
        IbmdError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise IbmdError(f"{shown(error.filename)}: cannot be listed {why(error)}")

    on_error = on_error or refuse
    if not os.path.isdir(path):
        return [path]
    found = []
    for here, folders, files in os.walk(path, onerror=on_error):
        folders[:] = sorted(f for f in folders if recursive and not f.startswith("."))
        if without is not None:
            folders[:] = [f for f in folders if os.path.realpath(Path(here, f)) != os.path.realpath(without)]
        images = (f for f in sorted(files) if not f.startswith(".") and not WRITTEN.search(f))
        found += [file for f in images if _is_image(file := Path(here, f), on_error)]
    return found


def find_matches(pattern: str, on_error: Callable[[OSError], None]) -> tuple[Path, list[Path]]:
    """Find files and folders by a pattern with `*`, `?`, `[…]`, and `**` for any number of folders.

    Hidden ones, unless their part of the pattern begins with a dot, links to folders, and what `ibmd sample` wrote
    beside its inputs are passed over, as in `find_images`; so links that go round in a circle do no harm.

    Args:
        pattern: path.
        on_error: told of folders that cannot be looked at.

    Returns:
        The folder that the pattern begins with, and what matches, sorted.
    """
    parts = PurePath(pattern).parts
    wild = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    folder = Path(*parts[:wild])
    return folder, sorted(set(_matches(folder, parts[wild:], on_error))) if wild < len(parts) else []


def _matches(folder: Path, parts: Sequence[str], on_error: Callable[[OSError], None]) -> Iterator[Path]:
    part, rest = parts[0], parts[1:]
    deep = part == "**"
    if deep:
        yield from _matches(folder, rest or ("*",), on_error)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        on_error(error)
        return
    for name in names:
        path, hidden = folder / name, name.startswith(".") and not part.startswith(".")
        is_folder = os.path.isdir(path)
        if hidden or not fnmatchcase(name, part) or WRITTEN.search(name) or (is_folder and path.is_symlink()):
            continue
        if deep and is_folder:
            yield from _matches(path, parts, on_error)
        elif not deep and not rest:
            yield path
        elif not deep and is_folder:
            yield from _matches(path, rest, on_error)


def _is_image(file: Path, on_error: Callable[[OSError], None]) -> bool:
    """Tell whether a file that was found in a folder is to be read as an image."""
    if file.suffix.lower() not in SUFFIXES:
        return False
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):  # links to nothing, and to themselves
            on_error(error)
        return False
