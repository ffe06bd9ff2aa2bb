"""The README: its two set-up commands, and flags that exist."""

import re
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from ibmd_cli.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)\n```", README, re.S | re.M)
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for kind, block in BLOCKS
        if kind == "sh"
        for line in block.splitlines()
        if "ibmd" in line
    }
)


def test_quick_start_begins_with_two_blocks_of_one_line():
    section = README.split("## Quick start")[1].lstrip()
    first, second = re.findall(r"^```sh\n(.*?)\n```", section, re.S | re.M)[:2]
    assert section.startswith("```sh")
    assert "\n" not in first + second
    assert "ibmd distill" in first
    assert "ibmd sample" in first
    assert second.rstrip().endswith("pytest -n 2")


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_exist(command: str):
    for name, arguments in re.findall(r"\bibmd (distill|sample|eval|export)\b([^|;&>]*)", command):
        text = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [name, "--help"]).stdout
        for flag in re.findall(r"(?<=\s)--[a-z-]+", arguments):
            assert flag in text, f"{flag} is not an option of ibmd {name}"


def test_pictures_are_there():
    for file in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (Path(__file__).parent.parent / file).is_file(), file


def test_every_command_has_help():
    names = {command.name for command in typer.main.get_command(app).commands.values()}
    assert names == {"distill", "sample", "eval", "export"}
