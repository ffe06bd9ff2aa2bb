"""`ibmd sample`: what it writes and where, what it refuses, and that a picture depends on name and seed alone."""

import errno
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from ibmd_cli import sampling
from ibmd_cli.cli import main
from ibmd_cli.devices import resolve_device
from ibmd_cli.errors import UsageError
from ibmd_cli.images import fit, read_image
from ibmd_cli.jobs import Job, Source
from ibmd_cli.models import Student, load_model, resolve, save_model
from ibmd_cli.networks import make_predictor
from ibmd_cli.noise import randn, stream


class Result(NamedTuple):
    code: int
    stdout: bytes
    err: str

    @property
    def paths(self) -> list[str]:
        return self.stdout.decode().splitlines()

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.stdout.splitlines()]


@pytest.fixture(autouse=True)
def _one_model(monkeypatch):
    """Load each model once: most of the time of these tests would be spent there."""
    loaded = {}

    def load(reference: str, kind: str):
        if (reference, kind) not in loaded:
            loaded[reference, kind] = load_model(reference, kind)
        return loaded[reference, kind]

    monkeypatch.setattr(sampling, "load_model", load)


@pytest.fixture
def sample(monkeypatch, capfdbinary, tmp_path) -> Callable[..., Result]:
    """Run `ibmd sample` in `tmp_path`, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IBMD_DEBUG", raising=False)

    def run(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["ibmd", "sample", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfdbinary.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfdbinary.readouterr()
        assert b"\x1b" not in err
        assert b"Traceback" not in err
        return Result(end.value.code or 0, out, err.decode())

    return run


@pytest.fixture
def student(tmp_path, tiny_config) -> Path:
    """A student of 16×16 pixels whose random weights make much of z."""
    noise = {"channels": 3, "grid": 4}
    config = tiny_config | {
        "format": "ibmd-student",
        "network": tiny_config["network"] | {"in_channels": 9},
        "noise_channels": 3,
        "sampling": {"timesteps": [1.0, 0.5], "noise": noise, "rollout": "chain", "transition": "marginal"},
    }
    predictor = make_predictor(config).eval()
    for name, p in predictor.named_parameters():
        p.data = 0.2 * randn(p.shape, stream(0, name))
    save_model(Student(predictor, config), tmp_path / "student")
    return tmp_path / "student"


def tree(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


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
    assert result.stdout.decode() == f"{Path(name).stem}.ibmd.png\n"
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
        "width": 32,
        "height": 32,
        "seconds": 0,
        "seed": 7,
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
    model = load_model("builtin:outline2emoji", "student")
    pieces = []
    for file in sorted(drawings.iterdir()):
        x_T, geometry = fit(read_image(file), 32)
        pieces.append(sampling._Piece(Job(Source(file, file.name), 1, None), x_T, geometry, 0.0))
    together = sampling._translate(model, 1, pieces, 0, 8)
    for i in range(8):
        assert torch.equal(sampling._translate(model, 1, pieces[i : i + 1], 0, 8)[0], together[i])
    assert torch.equal(sampling._translate(model, 1, pieces[5:1:-1], 0, 8), together[[5, 4, 3, 2]])


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
        (["-i", "a.png", "--fit", "tile"], "--fit"),
        (["-i", "a.png", "--device", "gpu"], "expected auto, cpu, cuda, cuda:N or mps"),
        (["-i", "a.png", "-i", "b.png", "-o", "c.png"], "one file for 2 images"),
        (["-i", "a.png", "-i", "b.png", "-o", "-"], "stdout takes one picture"),
        (["-i", "a.png", "--variants", "2", "-o", "-"], "stdout takes one picture"),
        (["-i", "a.png", "-o", "-", "--json"], "image bytes already go to stdout"),
        (["-i", "-", "-i", "a.png"], "stdout takes one picture"),
        (["-i", "a.png", "-o", "c.gif"], "expected a name with .png"),
        (["-i", "a.png", "-o", "plain"], "is a file"),
        (["-i", "a.png", "-o", "a.png"], "is an input, too"),
        (["-i", "a.png", "-o", "./"], "is an input, too"),
        (["-i", "a.png", "-o", "link.png"], "is an input, too"),
        (["-i", "a.png", "-i", "a.jpg"], "a.png and a.jpg would both become a.ibmd.png"),
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


def test_fail_fast(sample, drawings):
    (drawings / "drawing-00.png").write_text("no image")
    result = sample("-i", drawings, "-o", "out/", "--fail-fast")
    assert result.code == 1
    assert "drawing-00.png: not an image" in result.err
    assert result.stdout == b""


def test_pixel_limit(sample, drawings):
    assert sample("-i", drawings, "-o", "a/", "--max-pixels", 1024).code == 0
    result = sample("-i", drawings, "-o", "b/", "--max-pixels", 1023)
    assert result.code == 3
    assert "32×32 pixels, more than 1,023" in result.err
    assert "raise --max-pixels" in result.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), 3, "0 done, 0 skipped, 8 failed"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "disk full while writing"),
        (KeyboardInterrupt(), 130, "the same command with --on-exists skip does the rest"),
    ],
)
def test_a_broken_write_leaves_nothing(sample, drawings, tmp_path, monkeypatch, error, code, message):
    def write(self: Path, data: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(data[: len(data) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", write)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "drawing-0.png").touch()
    result = sample("-i", drawings, "-o", "out/", "--on-exists", "overwrite")
    assert result.code == code
    assert message in result.err
    assert tree(tmp_path / "out") == ["drawing-0.png"]
    assert (tmp_path / "out" / "drawing-0.png").read_bytes() == b""


def test_output_folder_that_cannot_be(sample, drawings):
    Path("file").touch()
    result = sample("-i", drawings / "drawing-0.png", "-o", "file/out.png")
    assert result.code == 3
    assert "file/out.png: cannot be written" in result.err


# ------------------------------------------------------------------------------------------------- as a program


def test_pipe_between_programs(drawings, sample):
    content = (drawings / "drawing-0.png").read_bytes()
    command = [sys.executable, "-m", "ibmd_cli", "sample", "--input", "-"]
    piped = subprocess.run(command, input=content, capture_output=True, check=True)
    assert piped.stdout == sample("-i", "-", stdin=content).stdout
    assert b"\x1b" not in piped.stderr


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


def test_embedded_student_is_there():
    assert (resolve("builtin:outline2emoji", "student") / "model.safetensors").is_file()
