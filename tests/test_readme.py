"""The pages for people: set-up commands, links that lead somewhere, commands that the programs understand."""

import ast
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer.main

from ibmd_cli.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted(ROOT.glob("examples/**/README.md")), ROOT / "tests/parity/README.md")
}
SCRIPTS = {
    str(script.relative_to(ROOT)): ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    for script in sorted(ROOT.glob("examples/**/*.py"))
}
COMMANDS = typer.main.get_command(app).commands


def shell_lines() -> list[tuple[str, str]]:
    """Every line of a shell block or of inline code, and of a script's docstring: (where, line)."""
    found = []
    for page, text in PAGES.items():
        for block in re.findall(r"^```sh\n(.*?)\n```", text, re.S | re.M):
            found += [(page, line) for line in block.splitlines()]
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        found += [(page, " ".join(code.split())) for code in re.findall(r"`([^`]+)`", prose)]
    for script, text in SCRIPTS.items():
        lines = [line.strip() for line in text.splitlines()]
        found += [(script, line) for line in lines if line.startswith(("python ", "ibmd ", "pip "))]
    return found


def invocations(program: str) -> list[tuple[str, tuple[str, ...]]]:
    """The arguments of each call of a program, up to a pipe, a redirection, a comment or a column of remarks."""
    calls = set()
    for where, line in shell_lines():
        for part in re.split(r"\s#\s|\s{3,}|[|;&<>]+", re.sub(r"\[[^]]*\]", "", line)):
            if re.match(rf"\s*{program}(\s|$)", part):
                calls.add((where, tuple(shlex.split(part.replace("…", ""))[1:])))
    return sorted(calls)


def named(value: str | tuple[str, ...]) -> str:
    return value if isinstance(value, str) else " ".join(value)[:80]


def test_quick_start_begins_with_two_blocks_of_one_line():
    section = README.split("## Quick start")[1].lstrip()
    first, second = re.findall(r"^```sh\n(.*?)\n```", section, re.S | re.M)[:2]
    assert section.startswith("```sh")
    assert "\n" not in first + second
    assert "ibmd distill" in first
    assert "ibmd sample" in first
    assert second.rstrip().endswith("pytest -n 2")


def test_readme_is_one_page():
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page: str):
    assert "@@" not in PAGES[page]
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page]):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str):
    for name in re.findall(r"`((?:ibmd_cli|tests|examples)/[\w./-]+)`", PAGES[page]):
        assert (ROOT / name).exists() or ".ibmd." in name, name  # what a command writes is not there yet


@pytest.mark.parametrize(("where", "words"), invocations("ibmd"), ids=named)
def test_commands_of_ibmd_are_understood(where: str, words: tuple[str, ...]):
    if words and words[0] in COMMANDS:
        COMMANDS[words[0]].make_context(words[0], list(words[1:]))  # raises what a wrong flag raises; runs nothing
    else:
        assert not words or words[0].startswith("--"), f"{where}: no command {words[0]!r}"


@pytest.mark.parametrize(("where", "words"), invocations("python"), ids=named)
def test_commands_of_examples_are_understood(where: str, words: tuple[str, ...]):
    script = next((word for word in words if word.endswith(".py")), None)
    assert script in SCRIPTS, f"{where}: python {' '.join(words)}"
    source = (ROOT / script).read_text(encoding="utf-8")
    for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert f'"{flag}"' in source, f"{script} has no option {flag}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_examples_import_exists(script: str):
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ibmd_cli"):
            module = import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}"), alias.name


def test_every_command_has_help():
    assert set(COMMANDS) == {"distill", "sample", "eval", "export"}
