"""Files that are written whole or not at all."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from ibmd_cli.errors import IbmdError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Codes of the errors after which no other file can be written either: the disk is full, or the user's share of it."""
_MENDS = {
    errno.EACCES: "check its permissions, or choose another place",
    errno.EPERM: "check its permissions, or choose another place",
    errno.ENOENT: "check the path",
    errno.EROFS: "choose another place",
    errno.EISDIR: "it is a folder; give another name",
    errno.ENOTDIR: "a part of the path is a file; give another path",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EFBIG: "the system allows no file so large (ulimit -f); choose a smaller format",
}


def why(error: OSError) -> str:
    """Say what the system says of a file, and what mends it, to be put after "cannot be …"."""
    mend = _MENDS.get(error.errno or 0)
    return f"({error.strerror})" + (f": {mend}" if mend else "")


@contextmanager
def atomic_file(path: Path, replace: bool = True) -> Iterator[Path]:
    """Give the path of a temporary file in the same folder, which becomes `path` if the block ends well.

    Args:
        path: what to write; its folder is made.
        replace: whether it takes the place of a file that is there by then.

    Raises:
        FileExistsError: there is one, and `replace` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(path, f".tmp{path.suffix}")
    handle = os.open(new, os.O_CREAT | os.O_EXCL, 0o666)  # less the umask, which only the system can tell safely
    mode = os.fstat(handle).st_mode
    os.close(handle)
    try:
        yield new
        _sync(new)
        if new.stat().st_mode != mode:  # made anew in the block, as safetensors does
            new.chmod(mode)
        if replace:
            new.replace(path)
        else:
            _name(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_file(path: Path, data: bytes, replace: bool = True) -> None:
    """Write a file, whole or not at all, as `atomic_file` does, with as few calls of the system as will do.

    Args:
        path: its folder is made.
        data: all that it is to hold.
        replace: whether it takes the place of a file that is there by then.

    Raises:
        FileExistsError: there is one, and `replace` is false.
    """
    new, flags = _beside(path, f".tmp{path.suffix}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(new, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(new, flags, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        if replace:
            os.replace(new, path)
        else:
            _name(new, path)
    finally:
        if os.path.lexists(new):
            os.unlink(new)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, which takes its place if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _beside(path, ".tmp")
    new.mkdir()
    old = new.with_suffix(".old")
    try:
        yield new
        for file in new.rglob("*"):
            _sync(file)
        if path.exists():
            path.rename(old)
        new.rename(path)
        _sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".ibmd-{secrets.token_hex(6)}{suffix}")


def _name(new: Path, path: Path) -> None:
    """Give a file a name that no file has; it keeps its own, too, where the file system knows links."""
    try:
        os.link(new, path)
    except FileExistsError:
        raise
    except OSError:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        new.rename(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        IbmdError: the file is absent or is not one.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IbmdError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise IbmdError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def sha256(file: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------- references


def assets() -> Path:
    """Return the folder of the models and data that are embedded in the package."""
    return Path(str(resources.files("ibmd_cli"))) / "assets"
