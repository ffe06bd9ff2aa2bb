"""Images in folders and globs: which files are images, in what order, and what is passed over."""

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from urllib.parse import unquote_to_bytes

from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import why
from ibmd_cli.images import table
from ibmd_cli.images.decode import shown
from ibmd_cli.images.other_files import EXPECTED
from ibmd_cli.reporting import counted

SUFFIXES = frozenset(table("endings")["images"])
WRITTEN = re.compile(r"\.ibmd(\.\d+)?\.(png|jpe?g|webp|tiff?|bmp|avif)$")
NO_ENDING, FOLDER, LINK = "without an ending", "folder", "linked folder"
_FETCH = {"http": "curl -LO", "https": "curl -LO", "s3": "aws s3 cp", "gs": "gcloud storage cp"}
PAIRED = "target"
MENDS = {
    FOLDER: ": --recursive searches them",
    LINK: ": give them by themselves",
    PAIRED: " of pairs: sources are what is translated",
}


def find_images(
    path: Path,
    recursive: bool = True,
    without: Path | None = None,
    on_error: Callable[[OSError], None] | None = None,
    passed: Counter[str] | None = None,
) -> list[Path]:
    """List the images of a folder, sorted; a path that is no folder stands for itself.

    They are known by the endings of their names. Hidden files and folders, links to folders or to nothing, what is no
    regular file, and what `ibmd sample` wrote beside its inputs (`*.ibmd.png`) are passed over.

    Args:
        path: folder.
        recursive: search folders in it, too.
        without: a folder that is not searched.
        on_error: told of folders and files that cannot be looked at, in place of an IbmdError.
        passed: counts what is passed over, except hidden ones, by kind, for `passed_over`.
    """

    def refuse(error: OSError) -> None:
        raise IbmdError(f"{shown(error.filename)}: cannot be listed {why(error)}")

    on_error = on_error or refuse
    if not os.path.isdir(path):
        return [path]
    found, passed = [], Counter() if passed is None else passed
    for here, folders, files in os.walk(path, onerror=on_error):
        deeper = [f for f in sorted(folders) if not f.startswith(".")]
        if without is not None:
            deeper = [f for f in deeper if os.path.realpath(Path(here, f)) != os.path.realpath(without)]
        linked = [f for f in deeper if os.path.islink(os.path.join(here, f))]
        folders[:] = [f for f in deeper if f not in linked] if recursive else []
        passed.update({LINK: len(linked)} if recursive else {FOLDER: len(deeper)})
        for name in sorted(f for f in files if not f.startswith(".")):
            if (kind := _passed(file := Path(here, name), on_error)) is None:
                found.append(file)
            elif kind:
                passed[kind] += 1
    return found


def passed_over(passed: Counter[str]) -> str:
    """Say what `find_images` passed over: "passed over 2 files (.heic): expected PNG …"; "" if there was nothing."""
    files = {kind: count for kind, count in passed.most_common() if kind.startswith(".") or kind == NO_ENDING}
    texts = []
    if files:
        kinds = [kind if len(files) == 1 else f"{count:,} {kind}" for kind, count in files.items()]
        if more := sum(list(files.values())[6:]):
            kinds[6:] = [counted(more, "other")]
        texts.append(f"passed over {counted(sum(files.values()), 'file')} ({', '.join(kinds)}): {EXPECTED}")
    others = [(kind, count) for kind, count in passed.items() if count and kind not in files]
    return "; ".join([*texts, *(f"passed over {counted(count, kind)}{MENDS.get(kind, '')}" for kind, count in others)])


def named_path(text: str) -> str:
    """Return the path that a user's text names: without spaces or quotes around it, `~` and `file:` resolved.

    Addresses of what is no file here raise an IbmdError.
    """
    if os.path.lexists(text):
        return text
    named = text.strip()
    if len(named) > 2 and named[0] == named[-1] and named[0] in "\"'":
        named = named[1:-1]
    scheme, _, rest = named.partition(":")
    short = shown(named[:200])
    if scheme.lower() == "file":
        host, slash, path = rest[2:].partition("/") if rest.startswith("//") else ("", "", rest)
        if host.lower() not in ("", "localhost"):
            raise IbmdError(f"{short}: a file of another machine: expected file:///PATH")
        named = os.fsdecode(unquote_to_bytes(os.fsencode(slash + path)))
    elif scheme.lower() == "data" or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", named):
        get = _FETCH.get(scheme.lower())
        raise IbmdError(
            f"{short}: addresses ({scheme}:{'//' * rest.startswith('//')}) are not read: fetch it first"
            f"{f', e.g. with {get},' if get else ''} and give the file"
        )
    if "\0" in named:
        raise IbmdError(f"{short}: no path: it holds a NUL")
    return os.path.expanduser(named)


def named_data(reference: str) -> str:
    """Return what `--data` names: a path as `named_path`, and references of other kinds as they are."""
    try:
        return reference if reference.startswith("hf://") else named_path(reference)
    except IbmdError as error:
        raise UsageError(f"--data {error}") from error


def find_matches(pattern: str, on_error: Callable[[OSError], None]) -> tuple[Path, list[Path]]:
    """Return the folder that a pattern (`*`, `?`, `[…]`, `**`) begins with, and the files and folders that match.

    Hidden ones, unless their part of the pattern begins with a dot, links to folders, and what `ibmd sample` wrote
    beside its inputs are passed over, as in `find_images`; so links that go round in a circle do no harm.
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


def _passed(file: Path, on_error: Callable[[OSError], None]) -> str | None:
    """Name the kind of a file that is not read as an image: "" if that was told; None if it is read."""
    if WRITTEN.search(file.name):
        return "earlier result"
    if file.suffix.lower() not in SUFFIXES:
        return file.suffix.lower() if file.suffix.isprintable() and file.suffix else NO_ENDING
    try:
        return None if stat.S_ISREG(file.stat().st_mode) else "special file"
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return "broken link"
        on_error(error)
        return ""
