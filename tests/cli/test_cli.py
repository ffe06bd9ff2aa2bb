"""The program as a whole: start-up, exit codes, one-line errors, and what a terminal or a pipe gets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LIMITED = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "


def ibmd(*arguments: object, code: str | None = None, **environ: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)] if code else [sys.executable, "-m", "ibmd_cli"]
    command += [] if code else list(map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CI": "", **environ})


def test_help_names_the_four_commands():
    done = ibmd("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("distill", "sample", "eval", "export"))
    assert "\x1b" not in done.stdout


def test_version():
    assert ibmd("--version").stdout.startswith("ibmd 0.")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["distill", "--teacher", "builtin:outline2emojy"], 4, "nearest: builtin:outline2emoji"),
        (["distill", "--lr", "-1"], 2, "--lr -1: expected a number above 0"),
        (["distill", "--stepz", "1"], 2, "--stepz: ibmd distill has no such option; did you mean --steps?"),
        (["distill", "--device", "tpu"], 2, "expected auto, cpu, cuda"),
        (["distill", "--processes", "none"], 2, "expected a number or all"),
        (["export", "--dtype", "fp8"], 2, "--dtype fp8: expected fp32, fp16, bf16 or int8"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(arguments: list[str], exit_code: int, message: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "ibmd_cli", *arguments], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == exit_code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_debug_shows_where():
    assert "Traceback" in ibmd("distill", "--teacher", "no/such", "--debug").stderr
    assert "Traceback" in ibmd("distill", "--teacher", "no/such", IBMD_DEBUG="1").stderr


def test_a_write_that_fails_leaves_nothing(tmp_path: Path):
    """The system refuses files above 100 kB here, as a full disk would: one line, no partial file."""
    code = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " + LIMITED
    code += "from ibmd_cli.cli import main; main()"
    done = ibmd("export", "--quiet", "--output", tmp_path / "student.safetensors", code=code)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


TERMINATED = """
import os, signal
from ibmd_cli.cli import main

sync = os.fsync

def fsync(handle):  # of a temporary file, which has not got its name yet
    os.fsync = sync
    os.kill(os.getpid(), signal.SIGTERM)
    sync(handle)

os.fsync = fsync
main()
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "--output", "OUT/student.safetensors"],
        ["eval", "--data", "builtin:outline2emoji", "--teacher", "none", "--metric", "mse", "--out", "OUT"],
        ["sample", "--input", "DRAWINGS", "--output", "OUT/"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_sigterm_ends_as_an_interrupt_does(arguments: list[str], tmp_path: Path, drawings: Path):
    places = {"OUT": tmp_path / "out", "DRAWINGS": drawings}
    for word, place in places.items():
        arguments = [argument.replace(word, str(place)) for argument in arguments]
    done = ibmd(*arguments, code=TERMINATED)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert [file for file in (tmp_path / "out").rglob("*") if file.name.startswith(".")] == []


def test_a_checkpoint_that_fails_leaves_the_one_before(tmp_path: Path, tiny_teacher: Path, drawings: Path):
    settings = ["--steps", "4", "--bridge-steps", "1", "--batch-size", "2", "--checkpoint-every", "1", "--quiet"]
    arguments = ["distill", "--teacher", tiny_teacher, "--data", drawings, "--out", tmp_path / "run", *settings]
    code = "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import ibmd_cli.training.loop; " + LIMITED
    code = code.replace("100_000", "500_000") + "from ibmd_cli.cli import main; main()"
    done = ibmd(*arguments, code=code)
    assert done.returncode == 1
    # On a slow machine the first checkpoint is one between updates of the bridge model.
    assert re.search(r"step-00000[01](-bridge-\d+)?: cannot be written", done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert ibmd(*arguments).returncode == 0


def test_one_of_several_processes_says_which_it_is():
    """What is wrong with the settings is told by the first alone; anything else may be wrong with one of them."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    command = ["distill", "--dry-run", "--teacher"]
    done = ibmd(*command, "builtin:outline2emojy", **place)
    assert done.stderr.startswith("error: process 2 of 2: no teacher 'builtin:outline2emojy'")
    assert ibmd(*command, "builtin:outline2emoji", "--lr", "-1", **place).stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["distill", "--help"], ["sample", "--help"], ["distill", "--list-teachers"], ["distill", "--ÄΩ…"]],
    ids=lambda arguments: "-".join(arguments[:2]),
)
def test_text_never_dies_of_a_character(arguments: list[str], encoding: str):
    done = subprocess.run(
        [sys.executable, "-m", "ibmd_cli", *arguments], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == (2 if "--ÄΩ…" in arguments else 0), done.stderr
    assert b"Traceback" not in done.stderr
    assert b"codec" not in done.stderr
    (done.stdout + done.stderr).decode("utf-8" if encoding == "ascii" else encoding)


def test_names_in_json_survive_an_encoding_that_lacks_their_letters(tmp_path: Path):
    command = ["distill", "--dry-run", "--json", "--out", str(tmp_path / "Ωμέγα"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "ibmd_cli", *command], capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"}, encoding="latin-1",
    )  # fmt: skip
    assert json.loads(done.stdout)["plan"]["run folder"] == str(tmp_path / "Ωμέγα")
