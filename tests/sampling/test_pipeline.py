"""`ibmd sample`: what it writes and where, what it refuses, and that a picture depends on name and seed alone."""

import errno
import fcntl
import io
import os
import pty
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import write_corpus
from PIL import Image

from ibmd_cli import __version__
from ibmd_cli.devices import resolve_device
from ibmd_cli.errors import UsageError
from ibmd_cli.files import atomic_file, sha256
from ibmd_cli.images.decode import read_picture
from ibmd_cli.images.find import find_images
from ibmd_cli.locks import Claims, _claim_file
from ibmd_cli.method.noise import randn, stream
from ibmd_cli.models.folder import find_model, load_student, save_model
from ibmd_cli.models.model import TeacherModel
from ibmd_cli.networks.predictor import make_predictor
from ibmd_cli.reporting import Reporter
from ibmd_cli.sampling import engine, pipeline, results
from ibmd_cli.sampling.config import SampleConfig
from ibmd_cli.sampling.plan import Job
from ibmd_cli.sampling.translator import Translator


def tree(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def opened(source: object) -> Image.Image:
    with Image.open(source) as image:
        image.load()
        return image


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        assert image.mode == "RGB"
        return image.size


# ----------------------------------------------------------------------------------------------------- outputs


def test_one_image(sample, drawings):
    source = drawings / "drawing-0.png"
    before = source.read_bytes()
    result = sample("--input", source)
    assert result.code == 0
    assert result.paths == [str(drawings / "drawing-0.ibmd.png")]
    assert "builtin:outline2emoji on cpu" in result.err
    assert "1 done, 0 skipped, 0 failed" in result.err
    assert size_of(drawings / "drawing-0.ibmd.png") == (32, 32)
    assert source.read_bytes() == before


def test_quiet(sample, drawings):
    assert sample("-q", "-i", drawings).err == ""


def test_several_inputs_as_the_shell_gives_them(sample, drawings):
    files = sorted(drawings.glob("*.png"))[:3]
    result = sample("--input", *files, "--output", "out/")
    assert result.paths == [f"out/{file.name}" for file in files]


@pytest.mark.parametrize(
    "name", ["two words.png", "ünï 🎨.png", "new\nline.png", "-dash.png", "[br]*.png", "no-ending"]
)
def test_names(sample, drawings, name):
    shutil.copy(drawings / "drawing-0.png", name)
    result = sample("--input", name)
    assert result.code == 0
    output = f"{Path(name).stem}.ibmd.png"
    assert (
        result.stdout.decode() == ("./" if output[0] == "-" else "") + output + "\n"
    )  # no program takes it for a flag
    assert Path(f"{Path(name).stem}.ibmd.png").is_file()


def test_names_of_any_bytes(sample, drawings, tmp_path):
    os.rename(drawings / "drawing-0.png", os.fsencode(drawings) + b"/latin\xe9.png")
    result = sample("--input", drawings, "--output", "out/")
    assert b"out/latin\xe9.png\n" in result.stdout
    assert sample("--input", drawings, "--output", "out2/", "--json").lines[-1]["output"] == "out2/latin\udce9.png"


def test_mirrored_tree(sample, drawings, tmp_path):
    (drawings / "a" / "b").mkdir(parents=True)
    (drawings / "drawing-1.png").rename(drawings / "a" / "b" / "x.webp")
    (drawings / "a" / "notes.txt").write_text("no image")
    flat = sample("--input", drawings, "--output", "flat")
    deep = sample("--input", drawings, "--output", "deep", "--recursive")
    assert (flat.code, deep.code) == (0, 0)
    assert len(flat.paths) == 7
    assert tree(tmp_path / "deep") == sorted([*tree(tmp_path / "flat"), "a/b/x.png"])
    (drawings / "a" / "loop").symlink_to(drawings)
    assert sample("--input", f"{drawings}/**/*.webp", "--output", "glob").paths == ["glob/a/b/x.png"]


def test_outputs_are_no_inputs(sample, drawings):
    assert len(sample("-i", drawings).paths) == 8
    assert len(sample("-i", drawings, "--on-exists", "overwrite").paths) == 8
    assert len(sample("-i", f"{drawings}/*", "--on-exists", "overwrite").paths) == 8
    inside = drawings / "out"
    assert len(sample("-i", drawings, "-r", "-o", inside).paths) == 8
    assert len(sample("-i", drawings, "-r", "-o", inside, "--on-exists", "overwrite").paths) == 8


def test_on_exists(sample, drawings):
    out = drawings / "drawing-2.ibmd.png"
    out.write_bytes(b"precious")
    refused = sample("-i", drawings)
    assert refused.code == 1
    assert "drawing-2.ibmd.png: exists already; choose --on-exists skip or overwrite" in refused.err
    assert refused.stdout == b""
    assert tree(drawings) == sorted([*(f"drawing-{i}.png" for i in range(8)), out.name])
    skipped = sample("-i", drawings, "--on-exists", "skip", "--json")
    assert skipped.code == 0
    assert [line["status"] for line in skipped.lines].count("skipped") == 1
    assert "7 done, 1 skipped, 0 failed" in skipped.err
    assert out.read_bytes() == b"precious"
    assert "0 done, 8 skipped" in sample("-i", drawings, "--on-exists", "skip").err
    assert "8 done" in sample("-i", drawings, "--on-exists", "overwrite").err
    assert size_of(out) == (32, 32)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff", "bmp"])
def test_format_by_name(sample, drawings, ending):
    sample("-i", drawings / "drawing-0.png", "-o", f"out.{ending}")
    with Image.open(f"out.{ending}") as image:
        assert image.format == {"jpg": "JPEG"}.get(ending, ending.upper())


@pytest.mark.parametrize("fit", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (4001, 37), (60, 40)])
def test_sizes(sample, size, fit):
    Image.new("RGB", size, "white").save("in.png")
    sample("-i", "in.png", "-o", "small.png", "--fit", fit)
    sample("-i", "in.png", "-o", "own.png", "--fit", fit, "--restore-size")
    assert size_of(Path("small.png")) == (32, 32)
    assert size_of(Path("own.png")) == size


def test_json(sample, drawings):
    (drawings / "bad.png").write_text("no image")
    result = sample("-i", drawings, "-o", "out/", "--json", "--seed", 7)
    assert result.code == 3
    failed, done = result.lines[0], result.lines[1]
    assert failed["status"] == "failed"
    assert "not an image" in failed["error"]
    assert done["seconds"] > 0
    assert done | {"seconds": 0} == {
        "schema": 1,
        "status": "done",
        "input": str(drawings / "drawing-0.png"),
        "output": "out/drawing-0.png",
        "input_width": 32,
        "input_height": 32,
        "width": 32,
        "height": 32,
        "seconds": 0,
        "seed": 7,
        "variant": 1,
        "name": "drawing-0.png",
        "model": "builtin:outline2emoji",
        "model_sha256": sha256(find_model("builtin:outline2emoji", "student") / "model.safetensors"),
        "version": __version__,
        "unlike": None,
        "error": None,
    }


def test_bytes_in_and_out(sample, drawings):
    content = (drawings / "drawing-0.png").read_bytes()
    piped = sample("-i", "-", stdin=content)
    assert piped.code == 0
    assert Image.open(io.BytesIO(piped.stdout)).size == (32, 32)
    assert sample("-i", "-", "-o", "-", stdin=content).stdout == piped.stdout
    assert sample("-i", drawings / "drawing-0.png", "-o", "-").stdout[:4] == b"\x89PNG"
    assert sample("-i", "-", "-o", "out.png", stdin=content).paths == ["out.png"]
    assert Path("out.png").read_bytes() == piped.stdout
    assert sample("-i", "-", "-o", "out/", stdin=content).paths == ["out/stdin.png"]
    bad = sample("-i", "-", stdin=b"no image")
    assert (bad.code, bad.stdout) == (3, b"")
    assert "stdin: not an image" in bad.err


# -------------------------------------------------------------------------------------------------- reproduced


def test_a_picture_depends_on_name_and_seed_alone(sample, drawings, student, tmp_path):
    def run(*args: object) -> None:
        assert sample("--student", student, *args).code == 0

    files = sorted(drawings.iterdir())
    run("-i", drawings, "-o", "all/", "--batch-size", 3)
    run("-i", *reversed(files), "-o", "reversed/", "--batch-size", 7)
    for file in files:
        run("-i", file, "-o", "alone/")
    shutil.copytree(drawings, tmp_path / "moved" / "elsewhere")
    run("-i", "moved/elsewhere", "-o", "moved/out/")
    run("-i", drawings, "-o", "other-seed/", "--seed", 1)
    shutil.copytree(drawings, tmp_path / "renamed")
    for file in (tmp_path / "renamed").iterdir():
        file.rename(file.with_stem(f"x{file.stem}"))
    run("-i", "renamed", "-o", "other-name/")
    for name in (file.name for file in files):
        want = (tmp_path / "all" / name).read_bytes()
        for folder in ("reversed", "alone", "moved/out"):
            assert (tmp_path / folder / name).read_bytes() == want, (folder, name)
        assert (tmp_path / "other-seed" / name).read_bytes() != want
        assert (tmp_path / "other-name" / f"x{name}").read_bytes() != want


def test_company_changes_no_bit(drawings):
    """With the embedded student, whose kernels round differently in batches of different sizes."""
    model = load_student("builtin:outline2emoji")
    translator = Translator(engine.TorchEngine(model))
    pieces = [translator.prepare(read_picture(file), Job(file.name)) for file in sorted(drawings.iterdir())]

    def run(some: list[Job]) -> list[np.ndarray]:
        return [piece.x_0 for piece in translator.run(replace(piece) for piece in some)]

    together = run(pieces)
    for i in range(8):
        assert np.array_equal(run(pieces[i : i + 1])[0], together[i])
    for one, other in zip(run(pieces[5:1:-1]), together[5:1:-1], strict=True):
        assert np.array_equal(one, other)


def test_batches_at_once_change_no_bit(drawings):
    """One thread for each of two batches, or two for one; and two networks are in fact at work together."""
    model = load_student("builtin:outline2emoji")
    translator = Translator(engine.TorchEngine(model))
    pieces = [translator.prepare(read_picture(file), Job(file.name)) for file in sorted(drawings.iterdir())] * 6
    both, calls = threading.Barrier(2, timeout=600), []

    def meet(*_) -> None:
        calls.append(_)
        if len(calls) <= 2:
            both.wait()

    torch.set_num_threads(2)
    apart = [piece.x_0 for piece in translator.run(map(replace, pieces))]
    with translator.spread(len(pieces)):
        assert (translator.workers, torch.get_num_threads()) == (2, 1)
        model.predictor.register_forward_pre_hook(meet)
        together = [piece.x_0 for piece in translator.run(map(replace, pieces))]
    assert (translator.workers, torch.get_num_threads()) == (1, 2)
    assert len(calls) > 2
    for one, other in zip(apart, together, strict=True):
        assert np.array_equal(one, other)
    with translator.spread(translator.size):
        assert translator.workers == 1  # all threads for a single batch


def test_variants(sample, drawings, student):
    source = drawings / "drawing-0.png"
    one = sample("-i", source, "--student", student).paths[0]
    result = sample("-i", source, "--student", student, "--variants", 3)
    assert result.paths == [str(drawings / f"drawing-0.ibmd.{i}.png") for i in (1, 2, 3)]
    contents = [Path(p).read_bytes() for p in result.paths]
    assert len(set(contents)) == 3
    assert contents[0] == Path(one).read_bytes()
    Path(result.paths[1]).unlink()
    again = sample("-i", source, "--student", student, "--variants", 3, "--on-exists", "skip")
    assert again.paths == result.paths[1:2]
    assert [Path(p).read_bytes() for p in result.paths] == contents
    assert sample("-i", source, "-o", "x.jpg", "--variants", 2).paths == ["x.1.jpg", "x.2.jpg"]


def test_teacher(sample, drawings, tiny_teacher):
    def run(out: str, *args: object) -> dict[str, bytes]:
        result = sample("-i", drawings, "--teacher", tiny_teacher, "-o", out, *args)
        assert result.code == 0, result.err
        return {Path(p).name: Path(p).read_bytes() for p in result.paths}

    four = run("four/")
    assert size_of(Path("four/drawing-0.png")) == (16, 16)
    assert run("four-again/", "--nfe", 4) == four
    assert run("two/", "--nfe", 2) != four
    sample("-i", drawings / "drawing-5.png", "--teacher", tiny_teacher, "-o", "alone.png")
    assert Path("alone.png").read_bytes() == four["drawing-5.png"]


# ----------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no input"),
        (["-i", "a.png", "--student", "s", "--teacher", "t"], "only one of them translates"),
        (["-i", "a.png", "--nfe", "4"], "was distilled for 1"),
        (["-i", "a.png", "--nfe", "0"], "--nfe"),
        (["-i", "a.png", "--fit", "square"], "--fit"),
        (["-i", "a.png", "--device", "gpu"], "expected auto, cpu, cuda, cuda:N or mps"),
        (["-i", "a.png", "-i", "b.png", "-o", "c.png"], "one file for 2 images"),
        (["-i", "a.png", "-i", "b.png", "-o", "-"], "2 images, 1 variant: stdout takes one picture"),
        (["-i", "a.png", "--variants", "2", "-o", "-"], "1 image, 2 variants: stdout takes one picture"),
        (["-i", "a.png", "-o", "-", "--json"], "image bytes already go to stdout"),
        (["-i", "a.png", "--json", "--print0"], "leave one of them out"),
        (["-i", "-", "-i", "a.png"], "stdout takes one picture"),
        (["-i", "a.png", "-o", "c.gif"], "expected a name with .png"),
        (["-i", "a.png", "-o", "plain"], "is a file"),
        (["-i", "a.png", "-o", "a.png"], "is an input, too"),
        (["-i", "a.png", "-o", "./"], "is an input, too"),
        (["-i", "a.png", "-o", "link.png"], "is an input, too"),
        (["-i", "a.png", "-i", "a.jpg"], "a.png and a.jpg would both become a.ibmd.png"),
        (["-i", "many"], "would both become many/a.ibmd.png: --keep-suffix keeps them apart (a.jpg.png)"),
        (["-i", "a.png", "-i", "sub/a.png", "-o", "out/"], "would both become out/a.png"),
        (["-i", "many", "--variants", "2", "-o", "out/"], "would both become out/a.1.png"),
    ],
)
def test_usage(sample, drawings, tmp_path, args, message):
    for name in ("a.png", "b.png", "a.jpg", "sub/a.png", "many/a.png", "many/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(drawings / "drawing-0.png", name)
    Path("plain").write_text("a file")
    Path("link.png").symlink_to("a.png")
    before = {name: Path(name).read_bytes() for name in tree(tmp_path)}
    result = sample(*args)
    assert result.code == 2
    assert message in result.err
    assert result.stdout == b""
    assert {name: Path(name).read_bytes() for name in tree(tmp_path)} == before


def test_the_same_input_twice_is_done_once(sample, drawings):
    file = drawings / "drawing-0.png"
    result = sample("-i", drawings, "-i", file, "-i", os.path.relpath(file))
    assert result.code == 0
    assert len(result.paths) == 8


@pytest.mark.parametrize(("option", "kind"), [("--student", "student"), ("--teacher", "teacher")])
def test_unknown_model(sample, drawings, option, kind):
    result = sample("-i", drawings, option, "builtin:outline2emojy")
    assert result.code == 4
    assert f"no {kind} 'builtin:outline2emojy': nearest: builtin:outline2emoji" in result.err


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("", "CPU", "cpu:0", "cuda:", "cuda:x", "cuda:99", "mps:1"):
        with pytest.raises(UsageError, match="--device"):
            resolve_device(name)


# ------------------------------------------------------------------------------------------------------ failed


def test_bad_files_do_not_stop_the_others(sample, drawings):
    content = (drawings / "drawing-0.png").read_bytes()
    (drawings / "cut.png").write_bytes(content[:-40])
    (drawings / "text.png").write_text("no image")
    (drawings / "empty.jpg").touch()
    os.mkfifo("pipe.png")
    Path("empty").mkdir()
    bad = ["pipe.png", "absent.png", "nothing-*.png", "empty"]
    result = sample("-i", drawings, *bad, "-o", "out/")
    assert result.code == 3
    assert len(result.paths) == 8
    assert "8 done, 0 skipped, 7 failed" in result.err
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 7
    for name in ["cut.png", "text.png", "empty.jpg", *bad]:
        assert sum(name in line for line in errors) == (2 if name == "empty" else 1), name
    assert len(tree(Path("out"))) == 8


@pytest.mark.parametrize("bad", ["text", "folder"])
def test_an_input_that_fails_in_all_its_variants_counts_once(sample, drawings, bad):
    if bad == "text":
        (drawings / "bad.png").write_text("no image")
        result = sample("-i", drawings / "bad.png", drawings / "drawing-0.png", "-o", "out/", "--variants", 4, "--json")
        assert "4 done, 0 skipped, 1 failed" in result.err
    else:
        Path("file").touch()
        result = sample("-i", drawings / "drawing-0.png", "-o", "file/out/", "--variants", 4, "--json")
        assert "0 done, 0 skipped, 1 failed" in result.err
    assert [line["variant"] for line in result.lines if line["status"] == "failed"] == [1, 2, 3, 4]
    assert result.err.count("error: ") == 1


def test_fail_fast(sample, drawings):
    (drawings / "drawing-00.png").write_text("no image")
    result = sample("-i", drawings, "-o", "out/", "--fail-fast")
    assert result.code == 1
    assert result.err.count("drawing-00.png: not an image") == 1
    assert result.err.endswith("stopped: 0 done, 0 skipped, 1 failed\n")
    assert result.stdout == b""


def test_pixel_limit(sample, drawings):
    assert sample("-i", drawings, "-o", "a/", "--max-pixels", 1024).code == 0
    result = sample("-i", drawings, "-o", "b/", "--max-pixels", 1023)
    assert result.code == 3
    assert "32×32 pixels, more than 1,023" in result.err
    assert "raise the limit (--max-pixels; in Python, max_pixels)" in result.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), 3, "0 done, 0 skipped, 8 failed"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "disk full while writing"),
        (KeyboardInterrupt(), 130, "the same command with --on-exists skip does the rest"),
    ],
)
def test_a_broken_write_leaves_nothing(sample, drawings, tmp_path, monkeypatch, error, code, message):
    def broken(handle: int) -> None:
        os.truncate(os.readlink(f"/proc/self/fd/{handle}"), os.fstat(handle).st_size // 2)
        raise error

    monkeypatch.setattr(os, "fsync", broken)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "drawing-0.png").touch()
    result = sample("-i", drawings, "-o", "out/", "--on-exists", "overwrite")
    assert result.code == code
    assert message in result.err
    assert tree(tmp_path / "out") == ["drawing-0.png"]
    assert (tmp_path / "out" / "drawing-0.png").read_bytes() == b""


def test_a_full_disk_ends_the_run_and_what_is_done_is_told(sample, drawings, tmp_path, monkeypatch):
    def full(handle: int) -> None:
        if len(tree(tmp_path / "out")) > 3:  # with the temporary file of this one
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(pipeline, "MOST_WRITERS", 1)
    result = sample("-i", drawings, "-o", "out/", "--json")
    assert result.code == 1
    done = [line["output"] for line in result.lines if line["status"] == "done"]
    assert done == [f"out/{name}" for name in tree(tmp_path / "out")] == [f"out/drawing-{i}.png" for i in range(3)]
    assert result.lines[3]["status"] == "failed"
    assert "disk full while writing out/drawing-3.png (Disk quota exceeded; " in result.lines[3]["error"]
    assert "the same command with --on-exists skip then does the rest" in result.err
    assert "stopped: 3 done, 0 skipped" in result.err


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EFBIG, "the system allows no file so large (ulimit -f); choose a smaller format"),
        (errno.ENAMETOOLONG, "give a shorter name"),
        (errno.EISDIR, "it is a folder; give another name"),
    ],
)
def test_what_mends_a_write(sample, drawings, monkeypatch, number, message):
    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    assert f"({os.strerror(number)}): {message}\n" in sample("-i", drawings / "drawing-0.png").err


def test_folders_are_tried_before_the_model_is_loaded(sample, drawings):
    Path("file").touch()
    result = sample("-i", drawings, "-o", "file/out/", "--student", "absent")
    assert result.code == 3
    assert "file/out: cannot be written (Not a directory): a part of the path is a file" in result.err
    assert "0 done, 0 skipped, 8 failed" in result.err
    result = sample("-i", drawings, "-o", "out/", "--student", "absent", "--grid", "file/sheet.png")
    assert result.code == 1
    assert "--grid file/sheet.png: cannot be written (Not a directory): a part of the path is a file" in result.err
    assert sample("-i", drawings, "-o", "out/", "--student", "absent").code == 4
    assert not Path("out").exists()


@pytest.mark.parametrize("links", [True, False])
def test_what_appears_meanwhile_stays(sample, drawings, monkeypatch, links):
    """Also on file systems that know no links."""
    load = pipeline._load_model

    def slow(*args: object) -> object:
        Path("out").mkdir()
        Path("out/drawing-3.png").write_bytes(b"precious")
        return load(*args)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(pipeline, "_load_model", slow)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    result = sample("-i", drawings, "-o", "out/")
    assert (result.code, len(result.paths)) == (3, 7)
    assert "out/drawing-3.png: appeared meanwhile and stays as it is" in result.err
    assert Path("out/drawing-3.png").read_bytes() == b"precious"
    assert len(os.listdir("out")) == 8


def test_modes_are_those_of_the_umask(sample, drawings, monkeypatch):
    """Which is the process's, not the thread's: no thread may change it to learn it."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("umask"))
    sample("-i", drawings, "-o", "out/")
    Path("like").touch()
    assert {file.stat().st_mode for file in Path("out").iterdir()} == {Path("like").stat().st_mode}
    with atomic_file(Path("anew")) as new:
        new.unlink()
        os.close(os.open(new, os.O_CREAT, 0o600))
    assert Path("anew").stat().st_mode == Path("like").stat().st_mode


def test_closed_streams(drawings, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", None)
    for given in ({"inputs": ("-",)}, {"files_from": "-"}):
        with pytest.raises(UsageError, match="stdin is closed"):
            SampleConfig(**given)
    file = str(drawings / "drawing-0.png")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(UsageError, match="stdout is closed"):
        SampleConfig(inputs=(file,), output="-")
    assert pipeline.sample(SampleConfig(inputs=(file,), output=str(tmp_path / "out.png")), Reporter()) == 0
    assert (tmp_path / "out.png").is_file()


def test_what_is_written_is_told_before_a_slow_network_goes_on(sample, drawings, embedded, monkeypatch):
    monkeypatch.setattr(pipeline, "SLOW", 0.0)
    events: list[str] = []
    monkeypatch.setattr(results.Results, "_print", lambda *_: events.append("told"))
    network = embedded.predictor
    hook = network.register_forward_pre_hook(lambda *_: events.append("network"))
    for i in range(24):
        shutil.copy(drawings / f"drawing-{i % 8}.png", drawings / f"more-{i}.png")
    sample("-i", drawings, "-o", "out/")
    hook.remove()
    assert events == ["network", *["told"] * 16] * 2


# ------------------------------------------------------------------------------------------------------- lists


def test_lists_of_files(sample, drawings, tmp_path):
    (drawings / "sub").mkdir()
    (drawings / "drawing-7.png").rename(drawings / "sub" / "new\nline.png")
    relative = os.path.relpath(drawings, tmp_path)
    names = [f"{relative}/drawing-0.png", f"./{relative}/drawing-1.png", "", str(drawings / "drawing-2.png")]
    listed = sample("--files-from", "-", "-o", "out/", stdin="\r\n".join([*names, ""]).encode())
    assert listed.paths == ["out/drawings/drawing-0.png", "out/drawings/drawing-1.png", "out/drawing-2.png"]
    weird = os.fsencode(drawings) + b"/sub/new\nline.png\0" + os.fsencode(relative) + b"/sub/new\nline.png\0"
    Path("list").write_bytes(weird)
    result = sample("--files-from", "list", "-0", "--print0", "-o", "out2/")
    assert result.stdout == b"out2/new\nline.png\0out2/drawings/sub/new\nline.png\0"
    folder = sample("--files-from", "-", "-o", "out3/", "-r", stdin=os.fsencode(relative))
    assert folder.code == 0
    assert tree(tmp_path / "out3" / "drawings") == tree(drawings)
    assert sample("--files-from", "-", "-o", "out4/", stdin=b"").err.endswith("0 done, 0 skipped, 0 failed\n")
    missing = sample("--files-from", "-", "-o", "out5/", stdin=b"absent.png\n*.png\n-\n")
    assert missing.code == 3
    assert missing.err.count("cannot be opened") == 3  # neither a glob nor stdin in a list
    shutil.copy(drawings / "drawing-0.png", "a\rb.png")
    assert tree(Path(sample("--files-from", "-", "-o", "out7", stdin=b"a\rb.png\n").paths[0]).parent) == ["a\rb.png"]
    nul = sample("--files-from", "-", "-o", "out6/", stdin=b"a.png\0b.png\0")
    assert (nul.code, "add --null" in nul.err) == (2, True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_as_other_programs_write_them(sample, drawings, tmp_path, monkeypatch, encoding, end):
    """With a byte order mark, CRLF, quotes, ~ and file://; an address in it is refused, the rest is done."""
    monkeypatch.setenv("HOME", str(drawings.parent))
    (drawings / "drawing-1.png").rename(drawings / "ü b.png")
    first, address = drawings / "drawing-0.png", "https://example.org/a.png"
    uri = (drawings / "drawing-3.png").as_uri()
    lines = [first, f' "{drawings}/ü b.png" ', "  ", f"~/{drawings.name}/drawing-2.png", uri]
    Path("list.txt").write_bytes(end.join(map(str, [*lines, address])).encode(encoding))
    result = sample("--files-from", "list.txt", "-o", "out/")
    assert [Path(path).name for path in result.paths] == [
        "drawing-0.png", "ü b.png", "drawing-2.png", "drawing-3.png"
    ]  # fmt: skip
    assert (result.code, result.err.count("error: ")) == (3, 1)
    assert "https://example.org/a.png: addresses (https://) are not read" in result.err


def test_inputs_as_addresses(sample, drawings, monkeypatch):
    monkeypatch.setenv("HOME", str(drawings.parent))
    uri, home = (drawings / "drawing-0.png").as_uri(), f"~/{drawings.name}/drawing-[12].png"
    result = sample("-i", uri, "-i", home, "-i", "s3://bucket/a.png", "-o", "out/")
    assert [Path(path).name for path in result.paths] == ["drawing-0.png", "drawing-1.png", "drawing-2.png"]
    assert result.code == 3
    assert "s3://bucket/a.png: addresses (s3://) are not read" in result.err
    assert "--files-from http://x.org/list: addresses" not in result.err
    refused = sample("--files-from", "http://x.org/list", "-o", "out/")
    assert refused.code == 2
    assert "--files-from http://x.org/list: addresses (http://) are not read" in refused.err


def test_of_profiles_that_are_ignored_and_further_frames_one_of_each_kind_is_said(sample, drawings):
    for i in range(4):
        with Image.open(drawings / f"drawing-{i}.png") as image:
            image.load()
        more = {"save_all": True, "append_images": [image.rotate(90)]} if i > 1 else {"icc_profile": b"no profile"}
        image.save(drawings / f"drawing-{i}.png", **more)
    result = sample("-i", drawings, "-o", "out/")
    assert result.code == 0
    assert result.err.count("its colour profile is ignored (") == 1
    assert result.err.count("several frames or pages: of such files the first one counts") == 1


def test_what_is_passed_over_in_folders_is_said(sample, drawings):
    for name in ("a.heic", "b.HEIC", "c.txt"):
        (drawings / name).write_bytes(b"x")
    (drawings / "deep").mkdir()
    shutil.copy(drawings / "drawing-0.png", drawings / "deep" / "d.png")
    result = sample("-i", drawings, "-o", "out/")
    assert result.code == 0
    assert result.err.count("passed over 3 files (2 .heic, 1 .txt): expected PNG, JPEG") == 1
    assert "passed over 1 folder: --recursive searches them" in result.err
    Path("only").mkdir()
    Path("only/a.heic").write_bytes(b"x")
    refused = sample("-i", "only", "-o", "out2/")
    assert refused.code == 3
    assert "only: no images in this folder; passed over 1 file (.heic): expected PNG, JPEG" in refused.err
    assert "--recursive" not in refused.err


def test_json_names_any_bytes(sample, drawings):
    os.rename(drawings / "drawing-0.png", os.fsencode(drawings) + b"/latin\xe9\n.png")
    line = sample("-i", drawings, "-o", "out/", "--json").lines[-1]
    assert os.fsencode(line["input"]) == os.fsencode(drawings) + b"/latin\xe9\n.png"
    assert os.path.exists(os.fsencode(line["output"]))


# ----------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("form", ["png", "jpg", "webp", "tiff", "bmp", "avif"])
def test_format_by_option(sample, drawings, form):
    name = {"jpg": "JPEG"}.get(form, form.upper())
    beside = sample("-i", drawings / "drawing-0.png", "--format", form).paths
    assert beside == [str(drawings / f"drawing-0.ibmd.{form}")]
    assert opened(beside[0]).format == name
    piped = sample("-i", "-", "--format", form, stdin=(drawings / "drawing-0.png").read_bytes())
    assert opened(io.BytesIO(piped.stdout)).format == name
    assert len(sample("-i", drawings, "-o", "out/", "--format", form).paths) == 8  # and not what was written beside


def test_quality(sample, drawings):
    def size(*args: object) -> int:
        return len(sample("-i", drawings / "drawing-0.png", "-o", "-", *args).stdout)

    for form in ("jpg", "webp", "avif"):
        assert size("--format", form, "--quality", 20) < size("--format", form, "--quality", 90)


def test_what_is_kept_beside_the_pixels(sample, drawings):
    exif = Image.Exif()
    exif[0x8298], exif[0x010F] = "© Ann\n".encode(), "Camera"
    with Image.open(drawings / "drawing-0.png") as image:
        image.save("in.jpg", exif=exif, dpi=(144, 144))
    for form in ("png", "jpg", "tiff", "webp", "avif"):
        sample("-i", "in.jpg", "-o", f"out.{form}", "--seed", 5)
        with Image.open(f"out.{form}") as image:
            tags = image.getexif()
            assert tags[0x0131].startswith("ibmd ")
            assert "builtin:outline2emoji sha256=" in tags[0x0131]
            assert tags[0x0131].endswith(" nfe=1 seed=5 variant=1 name=in.jpg")
            assert tags[0x8298].encode("latin-1").decode() == "© Ann"
            assert tags[0x010F] == "Camera"
            if form in ("png", "jpg", "tiff"):
                assert round(float(image.info["dpi"][0])) == 144
    opened("in.jpg").resize((64, 64)).save("large.jpg", dpi=(144, 144))
    sample("-i", "large.jpg", "-o", "small.png")
    assert "dpi" not in opened("small.png").info  # other pixels, other resolution


def test_alpha(sample, drawings):
    rgba = opened(drawings / "drawing-0.png").convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize((32, 32)))
    rgba.save("in.png")
    result = sample("-i", "in.png", "-o", "keep.png", "--alpha", "keep")
    assert result.code == 0
    kept = opened("keep.png")
    assert kept.mode == "RGBA"
    assert kept.getchannel("A").tobytes() == rgba.getchannel("A").tobytes()
    sample("-i", "in.png", "-o", "white.png")
    assert opened("white.png").tobytes() == kept.convert("RGB").tobytes()
    sample("-i", "in.png", "-o", "drop.png", "--alpha", "drop")
    Path("opaque").mkdir()
    opened("in.png").convert("RGB").save("opaque/in.png")
    sample("-i", "opaque/in.png", "-o", "opaque.png")
    assert Path("drop.png").read_bytes() == Path("opaque.png").read_bytes()


def test_first_frame_is_said_once(sample, drawings):
    frames = [opened(drawings / f"drawing-{i}.png") for i in range(3)]
    for i in range(3):
        frames[i].save(f"anim{i}.gif", save_all=True, append_images=frames)
    result = sample("-i", "anim*.gif", "-o", "out/")
    assert result.code == 0
    assert result.err.count("several frames") == 1
    sample("-i", drawings / "drawing-1.png", "-o", "one.png")
    assert size_of(Path("out/anim1.png")) == (32, 32)


# ------------------------------------------------------------------------------------------- teachers' options


def test_options_of_a_teacher(sample, drawings, tiny_teacher):
    def run(*args: object) -> bytes:
        result = sample("-i", drawings / "drawing-0.png", "--teacher", tiny_teacher, "-o", "-", *args)
        assert result.code == 0, result.err
        return result.stdout

    own = run()
    assert run("--sampler", "dbim", "--sampler-option", "eta=1.0") == own
    assert run("--sampler-option", "eta=0") != own
    assert run("--sampler", "ddbm", "--nfe", 5, "--sampler-option", "churn=0") != own
    assert run("--degrade", "sr4x-pool") != own


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sampler", "dbim"], "--sampler: is for a teacher"),
        (["--sampler-option", "eta=0"], "--sampler-option: is for a teacher"),
        (["--preset", "ddbm-edges2handbags"], "--preset: is for a teacher"),
        (["--head-channels", "32"], "--head-channels: is for a teacher"),
        (["--teacher", "TINY", "--attention-order", "new"], "says all this itself; leave them out"),
        (["--teacher", "TINY", "--sampler", "euler"], "euler"),
        (["--teacher", "TINY", "--sampler", "i2sb"], "not defined for a teacher of kind vp"),
        (["--teacher", "TINY", "--sampler-option", "eta"], "expected KEY=VALUE"),
        (["--teacher", "TINY", "--sampler-option", "rho=7"], "has no option 'rho'"),
        (["--teacher", "TINY", "--label", "3"], "takes no --label"),
        (["--mask", "center"], "takes no --mask"),
        (["--degrade", "jpeg-55"], "no degradation 'jpeg-55'"),
        (["--format", "gif"], "expected one of png"),
        (["--format", "jpg", "-o", "x.png"], "ends in .png, but --format is jpg"),
        (["--quality", "50"], "PNG has none"),
        (["--alpha", "keep", "--format", "jpg"], "JPEG holds no transparency"),
        (["--null"], "--null: says how the list"),
        (["-i", "-", "--files-from", "-"], "stdin is an image or a list"),
        (["--files-from", "absent"], "--files-from absent: cannot be read"),
        (["--grid", "sheet.txt"], "expected the name of a picture"),
        (["--grid", "a.png"], "a.png, an input or output"),
        (["--grid", "a.ibmd.png"], "a.ibmd.png, an input or output"),
    ],
)
def test_usage_of_options(sample, drawings, tiny_teacher, tmp_path, args, message):
    shutil.copy(drawings / "drawing-0.png", "a.png")
    before = tree(tmp_path)
    result = sample("-i", "a.png", *(tiny_teacher if arg == "TINY" else arg for arg in args))
    assert message in result.err
    assert (result.code, result.stdout) == (2, b"")
    assert tree(tmp_path) == before


def teacher_with(tmp_path: Path, tiny_config: dict, **changes: object) -> Path:
    predictor = make_predictor(tiny_config | changes).eval()
    for name, p in predictor.named_parameters():
        p.data = 0.2 * randn(p.shape, stream(0, name))
    save_model(TeacherModel(predictor, tiny_config | changes), tmp_path / "teacher")
    return tmp_path / "teacher"


def test_another_degradation_than_the_models_own_is_said(sample, drawings, tmp_path, tiny_config):
    teacher = teacher_with(tmp_path, tiny_config, degradation="jpeg-10")
    result = sample("-i", drawings, "--teacher", teacher, "--degrade", "jpeg-5", "-o", "5/")
    assert result.code == 0
    assert result.err.count("warning: --degrade jpeg-5: ") == 1
    assert "was trained with jpeg-10" in result.err
    assert "warning" not in sample("-i", drawings, "--teacher", teacher, "--degrade", "jpeg-10", "-o", "10/").err


def test_masks(sample, drawings, tmp_path, tiny_config):
    teacher = teacher_with(tmp_path, tiny_config, mask={"fill": "noise"})
    with Image.open(drawings / "drawing-0.png") as image:
        small = image.resize((16, 16))
    small.save("a.png")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 4, 12, 12))
    Path("masks").mkdir()
    mask.save("masks/a.png")

    def run(where: str, *args: object) -> bytes:
        result = sample("-i", "a.png", "--teacher", teacher, "-o", "-", "--mask", where, *args)
        assert result.code == 0, result.err
        return result.stdout

    result = run("center")
    pixels = np.asarray(opened(io.BytesIO(result)))
    known = np.asarray(mask) == 0
    assert (pixels == np.asarray(small))[known].all()
    assert run("masks") == run("masks/a.png") == result
    degraded = sample("-i", "a.png", "--teacher", teacher, "-o", "-", "--degrade", "inpaint-center")
    assert np.asarray(opened(io.BytesIO(degraded.stdout))).shape == pixels.shape
    assert sample("-i", "a.png", "--teacher", teacher).code == 2
    assert "no such file or folder" in sample("-i", "a.png", "--teacher", teacher, "--mask", "absent").err
    small.save("b.png")
    two = sample("-i", "a.png", "b.png", "--teacher", teacher, "--mask", "masks", "-o", "out/")
    assert (two.code, two.paths) == (3, ["out/a.png"])
    assert "b.png: no mask of that name in masks" in two.err


def test_labels(sample, drawings, tmp_path, tiny_config):
    network = tiny_config["network"] | {"num_classes": 3}
    teacher = teacher_with(tmp_path, tiny_config, classes=3, network=network)
    files = sorted(drawings.iterdir())[:3]

    def run(label: str, out: str) -> dict[str, bytes]:
        result = sample("-i", *files, "--teacher", teacher, "--label", label, "-o", out)
        assert result.code == 0, result.err
        return {Path(p).name: Path(p).read_bytes() for p in result.paths}

    same = [run(str(i), f"{i}/") for i in range(3)]
    Path("classes.csv").write_text(f"drawing-0.png,2\n{files[1]},0\ndrawing-2.png,1\n")
    mixed = run("classes.csv", "mixed/")
    for name, label in zip(sorted(mixed), (2, 0, 1), strict=True):
        assert mixed[name] == same[label][name]
        assert mixed[name] != same[(label + 1) % 3][name]
    assert sample("-i", *files, "--teacher", teacher).code == 2
    far = sample("-i", *files, "--teacher", teacher, "--label", "3", "-o", "far/")
    assert far.code == 3
    assert "needs a class from 0 to 2" in far.err
    Path("bad.csv").write_text("drawing-0.png;2\n")
    assert "expected lines PATH,CLASS" in sample("-i", *files, "--teacher", teacher, "--label", "bad.csv").err


# ------------------------------------------------------------------------------------------------ contact sheet


def test_grid(sample, drawings):
    result = sample("-i", drawings, "-o", "out/", "--variants", 2, "--grid", "sheet.png")
    assert len(result.paths) == 16
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 3 * 128
        first = np.asarray(sheet.crop((6, 6, 134, 134)))
        second = np.asarray(sheet.crop((140, 6, 268, 134)))
    with Image.open(drawings / "drawing-0.png") as source, Image.open("out/drawing-0.1.png") as made:
        assert (first == np.asarray(source.convert("RGB").resize((128, 128), Image.Resampling.NEAREST))).all()
        assert (second == np.asarray(made.resize((128, 128), Image.Resampling.NEAREST))).all()
    refused = sample("-i", drawings, "-o", "other/", "--grid", "sheet.png")
    assert (refused.code, "sheet.png: exists already" in refused.err) == (1, True)
    before = Path("sheet.png").read_bytes()
    assert "stays as it is" in sample("-i", drawings, "-o", "other/", "--grid", "sheet.png", "--on-exists", "skip").err
    assert Path("sheet.png").read_bytes() == before
    assert sample("-i", drawings, "-o", "out/", "--grid", "sheet.png", "--on-exists", "overwrite").code == 0
    assert Path("sheet.png").read_bytes() != before


# --------------------------------------------------------------------------------------------- hostile and many


@pytest.mark.parametrize("options", [["--restore-size"], ["--fit", "tile", "--alpha", "keep"]])
def test_hostile_files(sample, tmp_path, options, student):
    """With a student of 16 pixels and two calls, which is fast."""
    expected = write_corpus(tmp_path / "corpus")
    result = sample("-i", "corpus", "-r", "-o", "out", "--json", "--student", student, *options)
    assert result.code == 3
    lines = {os.path.relpath(line["input"], "corpus"): line for line in result.lines}
    assert set(lines) == set(expected)
    for name, size in expected.items():
        line = lines[name]
        assert line["status"] == ("failed" if size is None else "done"), (name, line["error"])
        if size is not None:
            assert (line["input_width"], line["input_height"]) == size, name
            with Image.open(line["output"]) as image:
                image.load()
                assert image.size == (line["width"], line["height"]) == size, name
    assert len([f for f in (tmp_path / "out").rglob("*") if f.is_file()]) == len([s for s in expected.values() if s])
    assert "\x1b" not in result.err


def test_unreadable_places(drawings):
    """Folders and files that the user may not read are named; root may read all, so it steps down for a moment."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        folder = Path(place, "in")
        shutil.copytree(drawings, folder / "locked")
        shutil.copytree(drawings, folder / "listed")
        for file in (place, folder):
            os.chmod(file, 0o755)
        os.chmod(folder / "locked", 0)
        os.chmod(folder / "listed", 0o444)  # its names can be read, its files not
        found: list[OSError] = []
        was = os.geteuid()
        os.seteuid(65534 if was == 0 else was)
        try:
            assert find_images(folder, on_error=found.append) == []
        finally:
            os.seteuid(was)
            os.chmod(folder / "locked", 0o755)
    names = sorted(str(Path(error.filename).relative_to(folder)) for error in found)
    assert names == sorted(["locked", *(f"listed/drawing-{i}.png" for i in range(8))])


def test_pipeline_of_shell_tools(drawings, tmp_path):
    """The example, on names that need care; the second time there is nothing left to do."""
    (drawings / "deep").mkdir()
    os.rename(drawings / "drawing-3.png", drawings / "deep" / "two words.png")
    os.rename(drawings / "drawing-4.png", os.fsencode(drawings) + b"/new\nline\xe9.png")
    script = Path(__file__).parents[2] / "examples" / "pipelines" / "changed.sh"
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run() -> dict[bytes, int]:
        done = subprocess.run([script, "drawings", "out"], cwd=tmp_path, env=environ, capture_output=True)
        assert done.returncode == 0, done.stderr
        lines = (line.split(b"\t") for line in done.stdout.split(b"\0") if line)
        return {name: int(size) for size, name in lines}

    made = run()
    assert len(made) == 8
    out = os.fsencode(tmp_path) + b"/out"
    for name in (b"drawing-0.png", b"deep/two words.png", b"new\nline\xe9.png"):
        assert made[out + b"/" + name] == os.path.getsize(out + b"/" + name)
    assert run() == {}


# ---------------------------------------------------------------------------------------------- several processes


def start(*args: object, cwd: Path, **environ: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ibmd_cli", "sample", *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=os.environ | environ, stdout=pipe, stderr=pipe)


def test_processes_divide_the_inputs(sample, drawings, tmp_path):
    (drawings / "bad.png").write_text("no image")
    alone = sample("-i", drawings, "-o", "alone/")
    runs = [start("-i", drawings, "-o", "shared/", cwd=tmp_path, RANK=str(i), WORLD_SIZE="2") for i in range(2)]
    ends = [run.communicate() for run in runs]
    made = [set(out.decode().splitlines()) for out, _ in ends]
    assert sorted(run.returncode for run in runs) == [0, 3]
    assert [len(paths) for paths in made] == [4, 4]
    assert not made[0] & made[1]
    for path in alone.paths:
        assert (tmp_path / path).read_bytes() == (tmp_path / "shared" / Path(path).name).read_bytes()


@pytest.mark.slow
def test_runs_that_skip_share_a_folder(drawings, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(48):
        shutil.copy(drawings / f"drawing-{i % 8}.png", folder / f"{i:02d}.png")
    runs = [start("-i", folder, "-o", "out", "--on-exists", "skip", cwd=tmp_path) for _ in range(2)]
    ends = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], ends
    paths = [path for out, _ in ends for path in out.decode().splitlines()]
    assert sorted(paths) == [f"out/{i:02d}.png" for i in range(48)]  # each by one of the two, none by both
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [f"{i:02d}.png" for i in range(48)]


def test_claims(tmp_path):
    output = tmp_path / "out" / ("a" * 251 + ".png")
    with Claims() as mine, Claims() as others:
        assert mine.take(output)
        assert not others.take(output)
        mine.give_back(output)
        assert others.take(output)
        output.touch()
        others.give_back(output)
        assert not mine.take(output)  # it is done
        output.unlink()
        assert mine.take(output)
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "out" / _claim_file(output).name).touch()  # left by a process that was killed
    with Claims() as mine:
        assert mine.take(output)


def test_where_files_cannot_be_locked_nothing_is_skipped(sample, drawings, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    result = sample("-i", drawings, "-o", "out/", "--on-exists", "skip")
    assert (result.code, len(result.paths)) == (0, 8)
    assert result.err.count("files cannot be locked in the output's folder (No locks available)") == 1
    assert sorted(os.listdir("out")) == [f"drawing-{i}.png" for i in range(8)]
    assert "0 done, 8 skipped" in sample("-i", drawings, "-o", "out/", "--on-exists", "skip").err


def test_an_interrupted_run_continues(sample, drawings, tmp_path, monkeypatch):
    whole = {path: (tmp_path / path).read_bytes() for path in sample("-i", drawings, "-o", "out/").paths}
    shutil.rmtree("out")
    count = iter(range(100))

    def interrupted(handle: int) -> None:
        if next(count) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    interrupted_run = sample("-i", drawings, "-o", "out/", "--on-exists", "skip")
    assert interrupted_run.code == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    there = tree(tmp_path / "out")
    assert interrupted_run.paths == [f"out/{name}" for name in there]  # what is there was told
    assert f"interrupted: {len(there)} done, 0 skipped, 0 failed" in interrupted_run.err
    assert 0 < len(there) < 8
    assert not any(name.startswith(".") for name in there)
    rest = sample("-i", drawings, "-o", "out/", "--on-exists", "skip")
    assert len(rest.paths) == 8 - len(there)
    assert {path: (tmp_path / path).read_bytes() for path in whole} == whole


@pytest.mark.slow
def test_launcher(sample, drawings, tmp_path):
    """One bad file in the share of one process does not stop the other, and the launcher tells of it."""
    (drawings / "bad.png").write_text("no image")
    for i in range(40):
        shutil.copy(drawings / "drawing-0.png", drawings / f"more-{i}.png")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ibmd_cli", "sample"]
    command += ["-i", str(drawings), "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert done.stderr.count("48 done, 0 skipped, 1 failed") == 1
    assert len(done.stdout.splitlines()) == len(list((tmp_path / "out").iterdir())) == 48
    for file in sorted((tmp_path / "out").iterdir())[::2]:  # what is left is in the share of the second process
        file.unlink()
    again = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)
    absent = subprocess.run(
        [sys.executable, *command, "--on-exists", "skip", "--student", "absent"], capture_output=True
    )
    assert absent.stderr.count(b"error: no student 'absent'") == 1
    assert again.stderr.count("exists already; choose --on-exists skip or overwrite") == 1
    assert "gloo" not in again.stderr.lower()
    assert again.stdout == ""


@pytest.mark.slow
def test_memory_of_large_images(drawings, tmp_path):
    """Thirty photos of 24 megapixels: 72 MB each as RGB, and so are their results."""
    Image.effect_noise((6000, 4000), 30).convert("RGB").save(tmp_path / "photo.jpg")
    (tmp_path / "photos").mkdir()
    for i in range(30):
        os.link(tmp_path / "photo.jpg", tmp_path / "photos" / f"{i}.jpg")
    count, peak = peak_memory("-i", tmp_path / "photos", "-o", tmp_path / "out", "--restore-size", "--format", "jpg")
    assert count == 30
    assert peak < 700_000


@pytest.mark.slow
def test_benchmark_of_a_folder():
    script = Path(__file__).parents[2] / "examples" / "benchmarks" / "sample_folder.py"
    command = [sys.executable, script, "--count", "40", "--rounds", "1", "--threads", "1"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rates = [float(line.split("images/s")[0].split()[-1]) for line in table.splitlines() if "images/s" in line]
    assert len(rates) == 2
    assert min(rates) > 0


def peak_memory(*args: object) -> tuple[int, int]:
    """Run `ibmd sample` in a process of its own; returns the number of its results, and its peak memory in KiB."""
    code = (
        "import sys; from pathlib import Path; from ibmd_cli.cli import app\n"
        "sys.argv = ['ibmd', 'sample', *sys.argv[1:]]\n"
        "try: app()\n"
        "except SystemExit: print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, "-q", *map(str, args)], capture_output=True, text=True)
    *_, last = done.stderr.splitlines()  # after a warning of what the inputs show
    assert last.isdigit(), done.stderr
    return len(done.stdout.splitlines()), int(last)


@pytest.mark.slow
def test_memory_stays_flat(drawings, tmp_path):
    """Ten times as many images need no more memory, but for their names."""
    peaks = []
    for count in (200, 2000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            os.link(drawings / f"drawing-{i % 8}.png", folder / f"{i}.png")
        done, peak = peak_memory("-i", folder, "-o", tmp_path / f"out{count}", "--restore-size")
        assert done == count
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 30_000  # KiB; 1,800 images of 32×32 would be 22,000 as floats, without their results


# ------------------------------------------------------------------------------------------------- as a program


def test_pipe_between_programs(drawings, sample):
    content = (drawings / "drawing-0.png").read_bytes()
    code = (
        "import sys; from ibmd_cli.cli import main\n"
        "try: main()\n"
        "finally: assert not {'sympy', 'torch._dynamo', 'accelerate'} & set(sys.modules)"  # which would take seconds
    )
    piped = subprocess.run([sys.executable, "-c", code, "sample", "-i", "-"], input=content, capture_output=True)
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == sample("-i", "-", stdin=content).stdout
    assert b"\x1b" not in piped.stderr


@pytest.mark.slow
def test_progress_on_a_terminal_keeps_stdout_clean(drawings, tmp_path):
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "ibmd_cli", "sample", "--input", str(drawings), "--output", str(tmp_path / "out")]
    environ = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI")} | {"TERM": "xterm"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end, env=environ) as process:
        os.close(end)
        assert process.stdout is not None
        out, err = process.stdout.read(), b""
        try:
            while chunk := os.read(terminal, 4096):
                err += chunk
        except OSError:  # Linux tells the end of a terminal so
            pass
    os.close(terminal)
    assert out.decode().splitlines() == [str(tmp_path / "out" / f"drawing-{i}.png") for i in range(8)]
    assert b"8/8" in err
    assert b"8 done, 0 skipped, 0 failed" in err


def test_one_image_in_tiles_shows_progress(sample, student):
    Image.new("RGB", (100, 50)).save("large.png")
    result = sample("-i", "large.png", "--fit", "tile", "--student", student)
    assert "sample 32/32" in result.err
    assert "tiles/s" in result.err


def test_help_is_in_groups(sample):
    text = sample("--help").stdout.decode()
    titles = ["Inputs", "Outputs", "Model", "Size and transparency", "Run"]
    assert [title for line in text.splitlines() if (title := line.removesuffix(":")) in titles] == titles
    assert text.count("hf://OWNER/REPO") == 2


def test_embedded_student_is_there():
    assert (find_model("builtin:outline2emoji", "student") / "model.safetensors").is_file()
