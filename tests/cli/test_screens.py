"""Every screen of the four commands, in terminals of three widths, without colours, and without a terminal."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from screens import Screen, Screens

TERMINALS: dict[str, dict[str, Any]] = {
    "60": {"columns": 60},
    "80": {"columns": 80},
    "120": {"columns": 120},
    "NO_COLOR": {"columns": 80, "NO_COLOR": "1"},
    "dumb": {"columns": 80, "TERM": "dumb"},
    "COLUMNS": {"columns": 80, "COLUMNS": "60", "NO_COLOR": "1"},
    "none": {"columns": 0},
}
SMALL = ["--steps", "3", "--bridge-steps", "1", "--batch-size", "2", "--device", "cpu"]
DISTILL = ["distill", "--teacher", "tiny-teacher", "--data", "drawings", "--out", "run", *SMALL]
DRY_RUN = [*DISTILL, "--dry-run"]
SAMPLE = ["sample", "drawings", "--student", "run", "--output", "out/", "--device", "cpu"]
EVAL = ["eval", "--student", "none", "--teacher", "tiny-teacher", "--data", "pairs", "--samples", "2"]
EVAL += ["--teacher-nfe", "1,2", "--metric", "psnr,mse", "--fit", "crop", "--device", "cpu"]
EXPORT = ["export", "--student", "run", "--output", "student.safetensors"]
WRONG = ["distill", "--learning-rate", "1", "--data", "a folder with a long name", "--out", "x" * 90]
LISTED = ["distill", "--list-teachers"]


@pytest.fixture(scope="module")
def screens() -> Iterator[Screens]:
    screens = Screens()
    yield screens
    screens.close()


@pytest.fixture
def home(tiny_teacher: Path, drawings: Path, tmp_path: Path) -> Path:
    """A folder with a teacher, drawings, and pairs."""
    for side in ("source", "target"):
        shutil.copytree(drawings, tmp_path / "pairs" / side)
    return tmp_path


def check(screen: Screen, terminal: dict[str, Any]) -> None:
    """Nothing is wider than the terminal, cut, or in codes that it does not read."""
    width = int(terminal.get("COLUMNS") or terminal["columns"])
    if width:
        assert [line for line in screen.seen if len(line) > width] == []
    assert "…" not in screen.raw
    assert "Traceback" not in screen.raw
    if terminal.keys() - {"columns"} or not width:
        assert "\x1b" not in screen.raw


FAST = ("60", "none")


@pytest.mark.parametrize(
    "terminal",
    [pytest.param(value, id=name, marks=() if name in FAST else pytest.mark.slow) for name, value in TERMINALS.items()],
)
def test_screens_of_the_four_commands(screens: Screens, home: Path, terminal: dict[str, Any]):
    made = {}
    commands = {"plan": DRY_RUN, "distill": DISTILL, "sample": SAMPLE, "listed": LISTED, "wrong": WRONG}
    commands |= {"again": DISTILL, "eval": EVAL, "export": EXPORT}
    for name, command in commands.items():
        made[name] = screens(*command, cwd=home, **terminal)
        assert made[name].code == 2 * (name == "wrong"), made[name].raw
        check(made[name], terminal)
    text = {name: " ".join(" ".join(screen.lines).split()) for name, screen in made.items()}
    assert "error: --learning-rate: ibmd distill has no such option; did you mean --lr?" in text["wrong"]
    assert "drawings: 8 sources" in text["plan"]
    assert "32×32 pixels and becomes 16×16" in text["plan"]
    assert re.search(r"about \d+ (seconds?|minutes?) on this machine", text["plan"])
    assert "ibmd sample drawing.png --student run" in text["distill"]
    assert "run/run.html" in text["distill"]
    assert "ibmd sample --student student.safetensors" in text["export"]
    assert "--out report" in text["eval"]


@pytest.mark.parametrize(
    "width", [pytest.param(60, marks=pytest.mark.slow), 80, pytest.param(120, marks=pytest.mark.slow)]
)
def test_progress_has_bar_count_and_time_left_first(screens: Screens, home: Path, width: int):
    screen = screens(*DISTILL, cwd=home, columns=width)
    bars = [line for line in screen.seen if line.startswith("distilling ━")]
    assert bars
    for line in bars:
        assert re.match(r"distilling ━{8,} +\d/3  (starting|warm-up \d+/\d+|in \d+:\d\d|\d+:\d\d left)( |$)", line), (
            line
        )
    if width == 120:
        assert any("bridge loss" in line for line in bars)


def test_progress_without_a_terminal_is_whole_lines(screens: Screens, home: Path):
    screen = screens(*DISTILL, cwd=home)
    assert "\r" not in screen.raw
    (line,) = [line for line in screen.lines if line.startswith("distilling 3/3")]
    assert re.match(r"distilling 3/3  in \d+:\d\d  [\d.]+ step/s  bridge loss -?[\d.]+  student loss -?[\d.]+", line)


@pytest.mark.slow
def test_quiet_says_nothing_but_the_result(screens: Screens, home: Path):
    assert screens(*DISTILL, "--quiet", cwd=home).raw == "run/student\n"
    assert screens(*EXPORT, "--quiet", cwd=home).raw == "student.safetensors\n"
