"""Who this process is among others: the launcher's variables, read in one place by one rule."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ibmd_cli
from ibmd_cli.cli import app
from ibmd_cli.errors import UsageError
from ibmd_cli.processes import Process, connect, this_process

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
WRONG = [
    {"RANK": "x", "WORLD_SIZE": "2"},
    {"RANK": "2", "WORLD_SIZE": "2"},
    {"RANK": "-1", "WORLD_SIZE": "2"},
    {"RANK": "1"},
    {"RANK": "0", "WORLD_SIZE": ""},
    {"RANK": "", "WORLD_SIZE": "1"},
    {"RANK": "0", "WORLD_SIZE": "1.0"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "y"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"},
]
COMMANDS = {
    "sample": ["sample", "-i", "drawings", "-o", "out/"],
    "eval": ["eval", "--data", "pairs", "--out", "out"],
    "distill": ["distill", "--data", "drawings", "--out", "out"],
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Process()),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}, Process(launched=True)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Process(1, 2, launched=True)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"},
            Process(5, 8, 1, 4, launched=True, connected=True),
        ),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Process(1, 2, 1, 2, launched=True)),
    ],
)
def test_launcher_variables_are_read(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Process):
    set_all(monkeypatch, variables)
    assert this_process() == expected


@pytest.mark.parametrize("variables", WRONG, ids=str)
@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_launcher_variables_are_refused_by_name_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], command: str
):
    monkeypatch.chdir(tmp_path)  # without drawings or pairs
    set_all(monkeypatch, variables)
    error = CliRunner().invoke(app, [*COMMANDS[command], "--device", "cpu"]).exception
    assert isinstance(error, UsageError)
    wrong = [f"{name}={value}" for name, value in variables.items()]
    assert any(part in str(error) for part in wrong)
    assert re.fullmatch(r"(\w+)=.* and (\w+)=.*: expected 0 ≤ \1 < \2; or unset both", str(error))
    assert not list(tmp_path.iterdir())


def test_processes_that_cannot_reach_each_other_do_not_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    set_all(monkeypatch, {"RANK": "0", "WORLD_SIZE": "2"})
    error = CliRunner().invoke(app, [*COMMANDS["distill"], "--device", "cpu"]).exception
    assert isinstance(error, UsageError)
    assert "without MASTER_ADDR: start them with --processes 2" in str(error)


def test_process_alone_gathers_its_own_value():
    with connect() as all_gather:
        assert all_gather("x") == ["x"]


def test_launcher_variables_are_read_in_one_module():
    package = Path(ibmd_cli.__file__).parent
    readers = {
        f.name for f in package.rglob("*.py") if re.search(r'"(LOCAL_)?(RANK|WORLD_SIZE)"', f.read_text("utf-8"))
    }
    assert readers == {"processes.py"}
