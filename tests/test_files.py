"""Files that are written whole or not at all: what stood there, links, streams, and messages."""

import errno
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ibmd_cli.files import atomic_file, atomic_folder, is_stream, unwritable, why, write_file


def by_block(path: Path, data: bytes, replace: bool = True) -> None:
    with atomic_file(path, replace) as new:
        new.write_bytes(data)


def by_block_anew(path: Path, data: bytes, replace: bool = True) -> None:
    """As safetensors does: in a file of its own making, of another mode."""
    with atomic_file(path, replace) as new:
        new.unlink()
        os.close(os.open(new, os.O_CREAT, 0o600))
        new.write_bytes(data)


Write = Callable[..., None]
writers = pytest.mark.parametrize("write", [write_file, by_block, by_block_anew])


@writers
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o444, 0o755, 0o666])
def test_a_replaced_file_leaves_its_mode(tmp_path, write: Write, mode):
    file = tmp_path / "a.png"
    file.write_bytes(b"old")
    file.chmod(mode)
    write(file, b"new")
    assert file.read_bytes() == b"new"
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert os.listdir(tmp_path) == ["a.png"]


@writers
def test_a_replaced_file_leaves_its_extended_attributes(tmp_path, write: Write):
    file = tmp_path / "a.png"
    file.write_bytes(b"old")
    try:
        os.setxattr(file, "user.note", b"kept")
    except (AttributeError, OSError):
        pytest.skip("no extended attributes here")
    write(file, b"new")
    assert (file.read_bytes(), os.getxattr(file, "user.note")) == (b"new", b"kept")


@writers
def test_another_name_of_a_replaced_file_keeps_the_old_content(tmp_path, write: Write):
    (tmp_path / "a.png").write_bytes(b"old")
    os.link(tmp_path / "a.png", tmp_path / "other.png")
    write(tmp_path / "a.png", b"new")
    assert (tmp_path / "other.png").read_bytes() == b"old"


@pytest.mark.skipif(os.name != "posix", reason="folders have no such mode")
@writers
def test_the_group_of_a_folder_is_that_of_new_files_and_folders(tmp_path, write: Write):
    tmp_path.chmod(0o2775)
    write(tmp_path / "deep" / "a.png", b"new")
    assert (tmp_path / "deep").stat().st_mode & stat.S_ISGID
    assert (tmp_path / "deep" / "a.png").stat().st_gid == tmp_path.stat().st_gid


@writers
def test_a_new_file_has_the_mode_of_the_umask(tmp_path, write: Write):
    (tmp_path / "like").touch()
    write(tmp_path / "folder" / "a.png", b"new")
    assert (tmp_path / "folder" / "a.png").stat().st_mode == (tmp_path / "like").stat().st_mode


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may give files away")
@writers
def test_a_replaced_file_leaves_its_owner(tmp_path, write: Write):
    file = tmp_path / "a.png"
    file.write_bytes(b"old")
    os.chown(file, 65534, 65533)
    write(file, b"new")
    assert (file.stat().st_uid, file.stat().st_gid) == (65534, 65533)


@writers
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_replaced(tmp_path, write: Write, there):
    target, link, again = tmp_path / "far" / "target.png", tmp_path / "link.png", tmp_path / "again.png"
    target.parent.mkdir()
    if there:
        target.write_bytes(b"old")
        target.chmod(0o600)
    link.symlink_to("far/target.png")
    again.symlink_to("link.png")
    write(again, b"new")
    assert link.is_symlink()
    assert again.is_symlink()
    assert target.read_bytes() == b"new"
    if there:
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write(link, b"newer", False)
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["target.png"]


def test_into_streams_the_content_is_written(tmp_path):
    fifo, read = tmp_path / "fifo.png", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()), daemon=True)
    reader.start()
    by_block(fifo, b"content" * 50_000)
    reader.join(30)
    assert read == [b"content" * 50_000]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    by_block(Path(os.devnull), b"x")
    assert is_stream(os.devnull)
    assert os.listdir(tmp_path) == ["fifo.png"]


@pytest.fixture
def places(tmp_path) -> Iterator[Path]:
    """A folder with something of every kind; root may write anywhere, so nothing here depends on permissions."""
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("plain")
    (tmp_path / "to-folder").symlink_to("folder")
    (tmp_path / "to-nothing").symlink_to("absent/file")
    (tmp_path / "itself").symlink_to("itself")
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # names of sockets are short
        server.bind("socket")
        os.chdir(here)
        yield tmp_path


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("plain", ""),
        ("absent", ""),
        ("absent/deep/er", ""),
        ("fifo", ""),
        ("link", ""),
        (os.devnull, ""),
        ("folder", "is a folder"),
        ("to-folder", "is a folder"),
        ("socket", "is a socket"),
        ("itself", "Too many levels of symbolic links"),
        ("plain/x", "a part of the path is a file"),
        ("plain/x/y/z", "a part of the path is a file"),
        ("n" * 256, "give a shorter name"),
        ("é" * 128, "give a shorter name"),
        ("absent/" + "n" * 256 + "/x", "give a shorter name"),
        ("/proc/x.png", "cannot be written ("),
        ("/proc/absent/x.png", "cannot be written ("),
    ],
)
def test_where_nothing_can_be_written_is_known_before(places, path, reason):
    said = unwritable(places / path)
    assert (reason in said.replace("it is a folder", "is a folder")) if reason else said == ""
    assert "\n" not in said


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, to step down from it")
def test_a_folder_that_is_read_only(tmp_path_factory):
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        os.chmod(place, 0o755)
        os.seteuid(65534)
        try:
            said = unwritable(Path(place, "x.png"))
        finally:
            os.seteuid(0)
    assert said == "cannot be written (Permission denied): check its permissions, or choose another place"


def by_folder(path: Path, data: bytes, replace: bool = True) -> None:
    with atomic_folder(path) as new:
        (new / "deep").mkdir()
        (new / "deep" / "file").write_bytes(data)


@pytest.mark.parametrize("write", [write_file, by_block, by_folder])
def test_a_full_disk_names_the_file_that_was_wanted_and_what_is_free(tmp_path, write: Write):
    """On a real one of 256 KiB, where a file of 200 fits once: its own half is not counted as taken."""
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "x", tmp_path]).returncode:
        pytest.skip("needs root")
    try:
        (tmp_path / "other").write_bytes(bytes(100 << 10))
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(OSError, match="No space left") as error:
            write(tmp_path / "wanted", bytes(200 << 10))
        assert sorted(os.listdir(tmp_path)) == before
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path / "wanted")
    said = why(error.value)
    free = float(said.split(", ")[1].split(" KiB free")[0])
    assert 140 <= free <= 156
    assert "200.0 KiB needed" in said or "more than " in said


def test_a_disk_that_takes_no_more_files_is_not_called_full_of_bytes(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=3", "x", tmp_path]
    if os.name != "posix" or subprocess.run(mount).returncode:
        pytest.skip("needs root")
    try:
        for name in ("a", "b"):
            (tmp_path / name).touch()
        with pytest.raises(OSError, match="it takes no more files") as error:
            write_file(tmp_path / "wanted", bytes(1000))
        assert error.value.filename == str(tmp_path / "wanted")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_limit_of_the_system_leaves_nothing(tmp_path):
    """RLIMIT_FSIZE stands for file systems and users with limits; in a process of its own."""
    code = (
        "import resource, sys; from pathlib import Path; from ibmd_cli.files import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "Path('old').write_bytes(b'old')\n"
        "for name in ('old', 'new'):\n"
        "    try: write_file(Path(name), bytes(20_000))\n"
        "    except OSError as error: print(error.filename, why(error))\n"
        "    try:\n"
        "        with atomic_file(Path(name)) as new: new.write_bytes(bytes(20_000))\n"
        "    except OSError as error: print(error.filename, why(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    mend = "(File too large): the system allows no file so large (ulimit -f); choose a smaller format"
    assert done.stdout.splitlines() == [f"{name} {mend}" for name in ("old", "old", "new", "new")]
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


@pytest.mark.parametrize("write", [write_file, by_block])
def test_other_errors_name_the_file_that_was_wanted(tmp_path, write: Write):
    (tmp_path / "plain").touch()
    for path in (tmp_path / "plain" / "x", tmp_path / ("n" * 300)):
        with pytest.raises(OSError, match="plain/x|nnn") as error:
            write(path, b"x")
        assert ".tmp" not in str(error.value)


def test_an_error_of_the_block_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as error, atomic_file(tmp_path / "x"):
        (tmp_path / "absent").read_bytes()
    assert error.value.filename == str(tmp_path / "absent")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "x"):
        1 / 0  # noqa: B018
    assert os.listdir(tmp_path) == []
