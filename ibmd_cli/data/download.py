"""Data sets of the published teachers (`dataset:NAME`, `datasets.toml`): fetched once, into the cache, when asked.

An archive is taken up where a transfer broke, verified, and unpacked: what is not needed is left in it, and no member
can be written outside of its folder. The data set appears in the cache whole or not at all.
"""

import fcntl
import fnmatch
import gzip
import io
import shutil
import sys
import tarfile
import tomllib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ibmd_cli.data.preprocessing import read_normals
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.files import FULL, atomic_folder, why
from ibmd_cli.hub import MB, cache_folder, fetch_file
from ibmd_cli.reporting import Reporter

TABLE = Path(__file__).parent / "datasets.toml"


def data_sets() -> dict[str, dict[str, Any]]:
    """Return the row of each data set by its name (`datasets.toml`, which says what the keys mean)."""
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def data_folder(name: str) -> Path:
    """Return the folder of a data set in the cache.

    Raises:
        NotAvailable: it is not there.
    """
    row, folder = data_sets()[name], _folder(name)
    if not folder.is_dir():
        raise NotAvailable(_absent(name, row))
    return folder


def to_fetch(references: Sequence[str]) -> list[dict[str, Any]]:
    """Return what is still to be fetched of `dataset:` references: where it is, and about how many bytes."""
    missing = [name for name in _names(references) if not _folder(name).is_dir()]
    rows = [data_sets()[name] for name in missing]
    return [
        {
            "files": [row["url"].rpartition("/")[2]] if row["url"] else [row["title"]],
            "url": row["url"].rpartition("/")[0] or row["page"],
            "bytes": row["bytes"],
            "licence": row["licence"],
            "how": "by ibmd" if row["url"] else "by hand",
        }
        for row in rows
    ]


def fetch(references: Sequence[str], reporter: Reporter, yes: bool) -> None:
    """Fetch the data sets among `references` that are not in the cache.

    Args:
        references: of `--data`; others than `dataset:NAME` are left alone.
        reporter: for notes and progress.
        yes: do not ask.

    Raises:
        NotAvailable: one must be got by hand; or it is not there any more, or there is no network.
        UsageError: the user does not agree, or there is no terminal to ask at.
        IbmdError: it came damaged, or the disk is full.
    """
    for name in _names(references):
        row = data_sets()[name]
        if _folder(name).is_dir():
            continue
        if not row["url"]:
            raise NotAvailable(_absent(name, row))
        _ask(name, row, reporter, yes)
        try:
            with _alone(_folder(name), reporter):
                if not _folder(name).is_dir():  # another process may have fetched it in the meantime
                    _fetch_one(name, row, reporter)
        except OSError as error:
            if error.errno in FULL:
                raise _disk_full(name, str(error)) from error
            raise IbmdError(f"dataset:{name}: cannot be written {why(error)}") from error


def _names(references: Sequence[str]) -> list[str]:
    names = (reference.removeprefix("dataset:") for reference in references if reference.startswith("dataset:"))
    return [name for name in names if name in data_sets()]  # an unknown one `data.check_sources` refuses


def _folder(name: str) -> Path:
    return cache_folder() / "datasets" / name / "images"


def _absent(name: str, row: dict[str, Any]) -> str:
    if row["url"]:
        return f"dataset:{name}: not fetched yet: ibmd distill --data dataset:{name} --yes fetches {_summary(row)}"
    return f"dataset:{name}: {_summary(row)}: it may not be passed on: {row['how']}; see {row['page']}"


def _summary(row: dict[str, Any]) -> str:
    return f"{row['title']}, about {row['bytes'] / 1e9:.1f} GB, licence: {row['licence']}"


def _ask(name: str, row: dict[str, Any], reporter: Reporter, yes: bool) -> None:
    """Say what would be fetched, and go on only if the user agrees."""
    folder = _folder(name).parent
    what = f"dataset:{name}: {_summary(row)}, from {row['url']} into {folder} (IBMD_CACHE names another place)"
    if yes:
        reporter.note(what)
    elif not sys.stdin.isatty():
        raise UsageError(f"{what}: add --yes to fetch it")
    elif reporter.console.input(f"{what}\nFetch it? [y/N] ", markup=False).strip().lower() not in ("y", "yes"):
        raise UsageError(f"dataset:{name}: not fetched; give your own images: --data FOLDER")


@contextmanager
def _alone(folder: Path, reporter: Reporter) -> Iterator[None]:
    """Hold a data set against other processes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name("lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reporter.note(f"another process fetches dataset:{folder.parent.name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.parent.glob(".ibmd-*"):  # of a process that was killed
            shutil.rmtree(left)
        yield


def _fetch_one(name: str, row: dict[str, Any], reporter: Reporter) -> None:
    folder = _folder(name)
    archive = folder.with_name(row["url"].rpartition("/")[2])
    done = sum(file.stat().st_size for file in folder.parent.glob(f"{archive.name}*"))
    need, free = row["bytes"] - done + row["kept"], shutil.disk_usage(folder.parent).free
    if free < need:
        raise _disk_full(name, f"{need / 1e9:.1f} GB are needed in {folder.parent}, {free / 1e9:.1f} GB are free")
    if not archive.exists():  # else it was not unpacked
        fetch_file(row["url"], archive, reporter, row["md5"] and f"md5:{row['md5']}")
    with atomic_folder(folder) as new:
        count = unpack(archive, new, row["members"], row["normals"], reporter)
        if row["images"] not in (0, count):
            archive.unlink()
            raise IbmdError(f"{row['url']}: {count} images in it, expected {row['images']}: deleted; try again")
    archive.unlink()
    reporter.note(f"dataset:{name}: {count} images in {folder}")


def _disk_full(name: str, said: str) -> IbmdError:
    return IbmdError(f"dataset:{name}: the disk is full ({said}): make room, or set IBMD_CACHE to a folder elsewhere")


def unpack(archive: Path, folder: Path, members: str, normals: int, reporter: Reporter) -> int:
    """Unpack the members of an archive that are wanted, and return how many there were.

    Args:
        archive: .tar.gz.
        folder: to write into.
        members: pattern of the names that are wanted.
        normals: size of the pictures that surface normals are made into; 0: files are kept as they are.
        reporter: for progress.

    Raises:
        IbmdError: the archive is damaged, or would write elsewhere.
    """
    count = 0
    try:
        with (
            archive.open("rb") as stream,
            gzip.GzipFile(fileobj=stream) as plain,  # tarfile's own reader never looks at the checksum
            tarfile.open(fileobj=plain, mode="r|") as tar,
        ):
            size = archive.stat().st_size // MB
            with reporter.progress("unpacking", size, "MB") as meter:
                at = 0
                for member in tar:
                    if member.isfile() and fnmatch.fnmatchcase(member.name, members):
                        _unpack_member(tar, tarfile.data_filter(member, str(folder)), folder, normals)
                        count += 1
                    before, at = at, stream.tell() // MB
                    if at > before:
                        meter.advance(at - before)
                while plain.read(1 << 20):  # the checksum stands at the end
                    pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        archive.unlink()
        raise IbmdError(f"{archive.name}: damaged ({error}): deleted; try again") from error
    return count


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, normals: int) -> None:
    content = tar.extractfile(member)
    assert content is not None  # of a regular file
    path = folder / PurePosixPath(member.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if normals:
        read_normals(io.BytesIO(content.read()), member.name, normals).save(path.with_suffix(".png"))
        return
    with path.open("wb") as file:
        shutil.copyfileobj(content, file)
