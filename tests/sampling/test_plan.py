"""The plan of `ibmd sample`: outputs of every kind, names, and folders within folders, before any work."""

import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from ibmd_cli.files import folds_case
from ibmd_cli.sampling import plan


@pytest.fixture
def drawing(drawings, tmp_path) -> Path:
    shutil.copy(drawings / "drawing-0.png", tmp_path / "a.png")
    return Path("a.png")


@pytest.fixture
def special(tmp_path) -> Iterator[Path]:
    """What is no plain file, each with a picture's ending."""
    folder = tmp_path / "special"
    folder.mkdir()
    os.mkfifo(folder / "fifo.png")
    (folder / "folder.png").mkdir()
    (folder / "itself.png").symlink_to("itself.png")
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folder)
        server.bind("socket.png")
        os.chdir(here)
        yield folder


def reading(path: Path) -> tuple[threading.Thread, list[bytes]]:
    content: list[bytes] = []
    thread = threading.Thread(target=lambda: content.append(path.read_bytes()), daemon=True)
    thread.start()
    return thread, content


@pytest.mark.parametrize("on_exists", ["error", "skip", "overwrite"])
def test_a_picture_goes_into_a_fifo(sample, drawing, special, on_exists):
    thread, content = reading(special / "fifo.png")
    result = sample("-i", drawing, "-o", special / "fifo.png", "--on-exists", on_exists)
    thread.join(30)
    assert (result.code, result.paths) == (0, [str(special / "fifo.png")])
    assert sample("-i", drawing, "-o", "-").stdout == content[0]
    assert stat.S_ISFIFO((special / "fifo.png").stat().st_mode)


def test_a_sheet_goes_into_a_fifo(sample, drawing, special):
    thread, content = reading(special / "fifo.png")
    assert sample("-i", drawing, "-o", "out/", "--grid", special / "fifo.png").code == 0
    thread.join(30)
    assert content[0][:4] == b"\x89PNG"
    assert stat.S_ISFIFO((special / "fifo.png").stat().st_mode)


@pytest.mark.parametrize("option", ["-o", "--grid"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("special/folder.png/../itself.png", "Too many levels of symbolic links"),
        ("special/socket.png", "is a socket"),
        ("special/itself.png", "Too many levels of symbolic links"),
        ("plain/x.png", "a part of the path is a file"),
        ("n" * 252 + ".png", "give a shorter name"),
        ("new/" + "n" * 252 + ".png", "give a shorter name"),
        ("/proc/x.png", "cannot be written ("),
        ("/proc/absent/x.png", "cannot be written ("),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_before_the_model_is_loaded(
    sample, drawing, special, option, name, message
):
    Path("plain").touch()
    args = ["-i", drawing, "--student", "absent", "--on-exists", "overwrite", option, name]
    result = sample(*args)
    assert result.code in (1, 2, 3), result.err  # not 4: there is no such student
    assert message in result.err
    assert result.err.count("error: ") == 1
    assert result.stdout == b""
    assert not Path("new").exists()


def test_a_name_that_is_too_long_fails_alone(sample, drawings, tmp_path):
    shutil.copy(drawings / "drawing-0.png", tmp_path / ("n" * 250 + ".png"))
    shutil.copy(drawings / "drawing-1.png", tmp_path / "short.png")
    result = sample("-i", tmp_path / ("n" * 250 + ".png"), "short.png")
    assert (result.code, result.paths) == (3, ["short.ibmd.png"])
    assert "give a shorter name" in result.err


def test_a_fifo_among_many_outputs_is_refused(sample, drawings, tmp_path):
    Path("out").mkdir()
    os.mkfifo("out/drawing-3.png")
    result = sample("-i", drawings, "-o", "out/")
    assert (result.code, len(result.paths)) == (3, 7)
    assert "out/drawing-3.png: is a FIFO or a device, which takes a single picture" in result.err


def test_what_is_overwritten_leaves_its_mode_and_links_stay(sample, drawings, tmp_path):
    Path("out").mkdir()
    Path("far.png").write_bytes(b"old")
    Path("sheet.png").write_bytes(b"old")
    for name, mode in (("out/drawing-0.png", 0o600), ("out/drawing-1.png", 0o664), ("far.png", 0o640)):
        Path(name).touch()
        Path(name).chmod(mode)
    Path("sheet.png").chmod(0o600)
    Path("out/drawing-2.png").symlink_to("../far.png")
    refused = sample("-i", drawings, "-o", "out/", "--grid", "sheet.png")
    assert (refused.code, Path("far.png").read_bytes()) == (1, b"old")
    assert sample("-i", drawings, "-o", "out/", "--grid", "sheet.png", "--on-exists", "overwrite").code == 0
    modes = {name: stat.S_IMODE(os.lstat(name).st_mode) for name in ("out/drawing-0.png", "out/drawing-1.png")}
    assert modes == {"out/drawing-0.png": 0o600, "out/drawing-1.png": 0o664}
    assert stat.S_IMODE(Path("sheet.png").stat().st_mode) == 0o600
    assert Path("out/drawing-2.png").is_symlink()
    assert stat.S_IMODE(Path("far.png").stat().st_mode) == 0o640
    with Image.open("far.png") as image:
        assert image.size == (32, 32)


@pytest.mark.parametrize("pattern", ["**/*.png", "**/drawing-*", "*/*.png"])
def test_outputs_within_the_folder_of_a_glob_are_no_inputs(sample, drawings, tmp_path, pattern):
    (tmp_path / "top").mkdir()
    drawings.rename(tmp_path / "top" / "in")
    made = [sample("-i", f"top/{pattern}", "-o", "top/out", "--on-exists", "overwrite").paths for _ in range(3)]
    assert len(made[0]) == 8
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("inside", ["pairs", "pairs/more"])
def test_of_pairs_sources_are_translated_and_targets_named(sample, drawings, tmp_path, inside):
    """A folder means the same in every command; a folder target/ by itself holds inputs like any other."""
    shutil.copytree(drawings, tmp_path / inside / "target")
    drawings.rename(tmp_path / inside / "source")
    result = sample("-i", "pairs", "--recursive", "-o", "out/")
    assert (result.code, len(result.paths)) == (0, 8)
    assert all("/source/" in path for path in result.paths)
    assert "passed over 8 targets of pairs: sources are what is translated" in " ".join(result.err.split())
    assert len(sample("-i", f"{inside}/target", "-o", "other/").paths) == 8


def test_a_full_disk_says_what_is_needed_and_how_to_go_on(sample, drawings, tmp_path):
    """On a real one, of 16 KiB."""
    out = tmp_path / "small"
    out.mkdir()
    if os.name != "posix" or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "x", out]).returncode:
        pytest.skip("needs root")
    try:
        result = sample("-i", drawings, "-o", "small/", "--format", "bmp")
        there = sorted(os.listdir(out))
    finally:
        subprocess.run(["umount", out], check=True)
    assert result.code == 1
    assert [f"small/{name}" for name in there] == result.paths
    assert not any(name.startswith(".") for name in there)
    line = next(line for line in result.err.splitlines() if line.startswith("error: "))
    assert "disk full while writing small/drawing-" in line
    assert "3.1 KiB needed" in line
    assert " KiB free" in line
    assert "--on-exists skip" in line
    assert result.err.count("error: ") == 1


def test_a_device_that_is_full(sample, drawing):
    Path("full.png").symlink_to("/dev/full")
    result = sample("-i", drawing, "-o", "full.png")
    assert result.code == 1
    assert "disk full while writing full.png" in result.err
    assert result.err.count("error: ") == 1
    assert Path("full.png").is_char_device()


@pytest.mark.parametrize("output", [["-o", "-"], ["-o", "out/"], ["-o", "out/", "--json"]])
def test_a_stdout_that_is_full_is_named(drawing, tmp_path, output):
    """In a process of its own, because its stdout is what is full."""
    args = [sys.executable, "-m", "ibmd_cli", "sample", "-q", "-i", "a.png", *output]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(args, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("error: disk full while writing stdout")


# -------------------------------------------------------------------------------------------------- collisions


def in_all_formats(drawings: Path, folder: Path, *names: str) -> None:
    folder.mkdir()
    with Image.open(drawings / "drawing-0.png") as image:
        for name in names:
            image.save(folder / name)


FOUR = ("photo.avif", "photo.bmp", "photo.jpg", "photo.tif")


@pytest.mark.parametrize("options", [[], ["-o", "out/"], ["--variants", "2"], ["-o", "out/", "--format", "webp"]])
def test_all_collisions_are_named_at_once_and_a_flag_keeps_all(sample, drawings, tmp_path, options):
    in_all_formats(drawings, tmp_path / "in", *FOUR, "two.png", "two.webp", "alone.png")
    refused = sample("-i", "in", "--student", "absent", *options)
    assert (refused.code, refused.stdout) == (2, b"")
    for name in (*FOUR, "two.png", "two.webp"):
        assert f"in/{name}" in refused.err
    assert "alone" not in refused.err
    assert refused.err.count("would all become") == refused.err.count("would both become") == 1 + ("2" in options)
    assert "--keep-suffix keeps them apart (photo." in refused.err
    assert not Path("out").exists()
    result = sample("-i", "in", "--keep-suffix", *options)
    assert (result.code, len(result.paths)) == (0, 14 if "2" in options else 7)
    assert len({Path(path).resolve() for path in result.paths}) == len(result.paths)
    if options == ["-o", "out/"]:
        names = ["alone.png", *(f"{name}.png" for name in FOUR), "two.png", "two.webp.png"]
        assert result.paths == [f"out/{name}" for name in names]


def test_of_very_many_collisions_some_are_named_and_the_rest_counted(sample, drawings, tmp_path):
    in_all_formats(drawings, tmp_path / "in", *(f"{i:02d}.{end}" for i in range(25) for end in ("png", "bmp")))
    result = sample("-i", "in", "-o", "out/")
    assert result.code == 2
    assert result.err.count("would both become") == 10
    assert "; and 15 more: --keep-suffix" in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("folds", [True, False])
def test_names_that_differ_in_case_alone_collide_where_the_file_system_says_so(sample, drawings, monkeypatch, folds):
    """Whether it does is asked of the file system; that of this machine tells case apart."""
    Path("in").mkdir()
    shutil.copy(drawings / "drawing-0.png", "in/a.png")
    shutil.copy(drawings / "drawing-1.png", "in/A.png")
    assert not folds_case(Path("absent/deeper"))
    if folds:
        monkeypatch.setattr(plan, "folds_case", lambda folder: True)
    result = sample("-i", "in", "-o", "out/")
    assert result.code == (2 if folds else 0)
    assert ("in/A.png and in/a.png would both become out/A.png" in result.err) == folds


@pytest.mark.parametrize("option", ["--input", "--output", "--grid"])
def test_an_empty_name_is_no_folder(sample, drawing, option):
    result = sample("-i", drawing, option, "")
    assert (result.code, f"{option}: is empty" in result.err, result.stdout) == (2, True, b"")


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_other_names_of_stdout(sample, drawing, name):
    assert sample("-i", drawing, "-o", name).stdout == sample("-i", drawing, "-o", "-").stdout
    assert sample("-i", drawing, "-o", name, "--json").code == 2


def test_a_device_takes_one_picture(sample, drawing):
    assert sample("-i", drawing, "-o", os.devnull).paths == [os.devnull]
    assert sample("-i", drawing, "-o", os.devnull, "--format", "jpg").code == 0
    refused = sample("-i", drawing, "-o", os.devnull, "--variants", 2)
    assert (refused.code, "takes a single picture" in refused.err) == (2, True)
    assert not Path("/dev/null.1").exists()
