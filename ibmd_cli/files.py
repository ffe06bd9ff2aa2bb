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

FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk is full, or the user's share of it: no other file can be written either
NAME_MAX = 255  # bytes of the longest names that file systems have
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
        mode = _mode(path)
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _mode(path: Path | str) -> int:
    """Return the type and mode of a file, through links; 0 if there is none."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return 0


def unwritable(path: Path) -> str:
    """Say why no file can be written at a path, to be put after it; nothing if one can, or if a stream is there.

    A link stands for its target. The folder is tried, or the one above it where it is to be made, by a file without a
    name.
    """
    try:
        mode = _mode(path)
        if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
            return f"is a {'socket' if stat.S_ISSOCK(mode) else 'block device'}: give the name of a file"
        if stat.S_ISDIR(mode):
            raise _error(errno.EISDIR)
        if not is_stream(path):
            path = Path(os.path.realpath(path))
            above = _standing(path.parent)
            longest = os.pathconf(above, "PC_NAME_MAX") if hasattr(os, "pathconf") else NAME_MAX
            if any(len(os.fsencode(part)) > longest for part in path.relative_to(above).parts):
                raise _error(errno.ENAMETOOLONG)
            tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        return f"cannot be written {why(error)}"
    return ""


def folds_case(folder: Path) -> bool:
    """Tell whether names that differ in upper and lower case alone are one file in a folder, or in the one above it."""
    try:
        with tempfile.NamedTemporaryFile(dir=_standing(folder), prefix=".ibmd-case-") as file:
            return os.path.exists(Path(file.name).with_name(Path(file.name).name.upper()))
    except OSError:  # what cannot be written is told elsewhere
        return False


def _standing(path: Path) -> Path:
    """Return a path if it is there, or the nearest above it that is."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@contextmanager
def atomic_file(path: Path, replace: bool = True, size: int = 0) -> Iterator[Path]:
    """Give the path of a temporary file, which becomes `path` if the block ends well.

    A file that is replaced leaves its mode to the new one, and its owner and extended attributes (ACL) where the system
    allows that. A link stays, and its target is replaced. Into a FIFO or a character device the content is written, at
    the end.

    Args:
        path: what to write; its folder is made.
        replace: whether it takes the place of a file that is there by then.
        size: of what will be written, in bytes, for the message that the disk is full; 0 if not known.

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
    target = Path(os.path.realpath(path)) if replace and path.is_symlink() else path
    new = _temporary(target, f".tmp{path.suffix}")
    with _errors_name(path, new, size):
        try:
            handle = _create(new)
        except FileNotFoundError:
            _make_folder(target.parent)
            handle = _create(new)
        mode = os.fstat(handle).st_mode
        os.close(handle)
        yield new
        _sync(new)
        if new.stat().st_mode != mode:  # made anew in the block, as safetensors does
            new.chmod(mode)
        if replace:
            _inherit(new, target)
            os.replace(new, target)
        else:
            _link(new, target)


def write_file(path: Path, data: bytes, replace: bool = True) -> None:
    """Write a file, whole or not at all; arguments and errors as `atomic_file`."""
    if is_stream(path):
        path.write_bytes(data)
        return
    with atomic_file(path, replace, len(data)) as new:
        new.write_bytes(data)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, which takes its place if the block ends well."""
    new = _temporary(path, ".tmp")
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
            free = shutil.disk_usage(_standing(new.parent)).free
            said += f", {_amount(free)} free" + (": it takes no more files, of any size" if free > 2 * size > 0 else "")
        raise OSError(error.errno, said, str(path)) from error
    finally:
        _remove(new)


def _remove(new: Path) -> None:
    if new.is_dir():
        shutil.rmtree(new, ignore_errors=True)
    elif os.path.lexists(new):
        os.unlink(new)


def _amount(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def _create(new: Path) -> int:
    return os.open(new, os.O_CREAT | os.O_EXCL, 0o666)  # less the umask, which only the system can tell safely


def _inherit(new: Path, old: Path) -> None:
    """Give a file what another has beside its content, as far as the system allows."""
    try:
        was, mine = os.stat(old), os.stat(new)
    except FileNotFoundError:
        return
    with suppress(PermissionError):  # only root may give files away
        if (was.st_uid, was.st_gid) != (mine.st_uid, mine.st_gid):
            os.chown(new, was.st_uid, was.st_gid)
    os.chmod(new, stat.S_IMODE(was.st_mode))
    with suppress(OSError, AttributeError):  # file systems, and systems, without
        for name in os.listxattr(old):
            if name.startswith(("user.", "system.posix_acl_access")):
                os.setxattr(new, name, os.getxattr(old, name))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a file has that name
        raise _error(errno.ENOTDIR) from None


def _temporary(path: Path, suffix: str) -> Path:
    return path.with_name(f".ibmd-{secrets.token_hex(6)}{suffix}")


def _link(new: Path, path: Path) -> None:
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


def assets() -> Path:
    """Return the folder of the models and data that are embedded in the package."""
    return Path(str(resources.files("ibmd_cli"))) / "assets"
