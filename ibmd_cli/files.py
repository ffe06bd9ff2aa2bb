"""Files that are written whole or not at all."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def is_stream(path: Path | str) -> bool:
    """Tell whether a path is a FIFO or a character device: what is written into it replaces nothing."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def unwritable(path: Path) -> str:
    """Say why no file can be written at a path, to be put after it; nothing if one can, or if a stream is there.

    A link stands for its target. The folder is tried, or the one above it where it is to be made, by a file without a
    name.
    """
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
            return f"is a {'socket' if stat.S_ISSOCK(mode) else 'block device'}: give the name of a file"
        if stat.S_ISREG(mode):
            path = Path(os.path.realpath(path))
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"cannot be written {why(error)}"
    return "" if is_stream(path) else unwritable_folder(path.parent, path.name)


def unwritable_folder(folder: Path, name: str = "") -> str:
    """Say why no file can be written into a folder, or into the one that is to be made; see `unwritable`."""
    above, names = folder, [name]
    while not os.path.lexists(above) and above != above.parent:
        names.append(above.name)
        above = above.parent
    try:
        longest = os.pathconf(above, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
        if any(len(os.fsencode(part)) > longest for part in names):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        return f"cannot be written {why(error)}"
    return ""


def folds_case(folder: Path) -> bool:
    """Tell whether names that differ in upper and lower case alone are one file in a folder, or in the one above it."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".ibmd-case-") as file:
            return os.path.exists(Path(file.name).with_name(Path(file.name).name.upper()))
    except OSError:  # what cannot be written is told elsewhere
        return False


@contextmanager
def atomic_file(path: Path, replace: bool = True) -> Iterator[Path]:
    """Give the path of a temporary file, which becomes `path` if the block ends well.

    A file that is replaced leaves its mode to the new one, and its owner where the system allows that. A link stays,
    and its target is replaced. Into a FIFO or a character device the content is written, at the end.

    Args:
        path: what to write; its folder is made.
        replace: whether it takes the place of a file that is there by then.

    Raises:
        FileExistsError: there is one, and `replace` is false.
        OSError: it cannot be written; `filename` is `path`.
    """
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            new = Path(folder, f"x{path.suffix}")
            new.touch()
            yield new
            with new.open("rb") as content, path.open("wb") as stream:
                shutil.copyfileobj(content, stream)
        return
    target = _target(path) if replace else path
    new = _beside(target, f".tmp{path.suffix}")
    with _errors_name(path, new):
        _make_folder(target.parent)
        handle = os.open(new, os.O_CREAT | os.O_EXCL, 0o666)  # less the umask, which only the system can tell safely
        mode = os.fstat(handle).st_mode
        os.close(handle)
        yield new
        _sync(new)
        if new.stat().st_mode != mode:  # made anew in the block, as safetensors does
            new.chmod(mode)
        _place(new, target, replace)


def write_file(path: Path, data: bytes, replace: bool = True) -> None:
    """Write a file, whole or not at all, as `atomic_file` does, with as few calls of the system as will do.

    Args:
        path: its folder is made.
        data: all that it is to hold.
        replace: whether it takes the place of a file that is there by then.

    Raises:
        FileExistsError: there is one, and `replace` is false.
        OSError: it cannot be written; `filename` is `path`.
    """
    if is_stream(path):
        path.write_bytes(data)
        return
    target = _target(path) if replace else path
    new = _beside(target, f".tmp{path.suffix}")
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
    with _errors_name(path, new, len(data)):
        try:
            handle = os.open(new, flags, 0o666)
        except FileNotFoundError:
            _make_folder(target.parent)
            handle = os.open(new, flags, 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        _place(new, target, replace)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, which takes its place if the block ends well."""
    new = _beside(path, ".tmp")
    old = new.with_suffix(".old")
    with _errors_name(path, new):
        _make_folder(path.parent)
        new.mkdir()
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


@contextmanager
def _errors_name(path: Path, new: Path, needed: int = 0) -> Iterator[None]:
    """Remove a temporary file or folder at the end, and have errors name the one that was wanted.

    Where the disk is full, they tell what is free without the temporary, and what is needed: as much as was written
    of it, and more, if it is not known.
    """
    try:
        yield
    except OSError as error:
        mine = error.filename is None or str(error.filename).startswith(str(new))
        if error.errno is None or not (mine or error.errno in FULL):
            raise
        files = [new] if new.is_file() else new.rglob("*")
        size = needed or sum(file.stat().st_size for file in files if file.is_file())
        _remove(new)
        said = error.strerror or os.strerror(error.errno)
        if error.errno in FULL:
            said += f"; {'' if needed else 'more than '}{_amount(size)} needed"
        if error.errno == errno.ENOSPC:  # with a quota, the system counts otherwise
            said += f", {_amount(_free(new.parent))} free"
        raise OSError(error.errno, said, str(path)) from error
    finally:
        _remove(new)


def _remove(new: Path) -> None:
    if new.is_dir():
        shutil.rmtree(new, ignore_errors=True)
    elif os.path.lexists(new):
        os.unlink(new)


def _free(folder: Path) -> int:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _amount(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def _target(path: Path) -> Path:
    """Return the file that is to be replaced: links are written through."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _place(new: Path, path: Path, replace: bool) -> None:
    """Give a finished file its name, and the mode and owner of the file that had it."""
    if not replace:
        _name(new, path)
        return
    with suppress(FileNotFoundError):
        old, mine = os.stat(path), os.stat(new)
        if (old.st_uid, old.st_gid) != (mine.st_uid, mine.st_gid):
            with suppress(PermissionError):  # only root may give files away
                os.chown(new, old.st_uid, old.st_gid)
        if old.st_mode != mine.st_mode:
            os.chmod(new, stat.S_IMODE(old.st_mode))
    os.replace(new, path)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a file has that name
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


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
