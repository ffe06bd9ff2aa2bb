"""Help texts: in panels, as narrow as the terminal, of whole phrases, with what to type first."""

import re
from contextlib import redirect_stdout
from io import StringIO

import pytest

from ibmd_cli.cli.commands import RECORDS, run_command, settings_of
from ibmd_cli.errors import UsageError

RESEARCH = [
    *("--t-power", "--[no-]t-even", "--weight-power", "--noise-init", "--noise-grid", "--reuse", "--bridge-warmup"),
    *("--[no-]recompute", "--head-channels", "--attention-order"),
]


def help_of(*command: str, width: int = 80) -> str:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as written:
        patch.setenv("COLUMNS", str(width))
        assert run_command([*command, "--help"]) == 0
    return written.getvalue()


def panels(text: str) -> dict[str, str]:
    parts = re.split(r"\n\n(?=[A-Z][A-Za-z ]+:\n  )", text)
    return {part.partition(":\n")[0]: part for part in parts}


def told(*arguments: str) -> str:
    """What is said of arguments that are wrong."""
    with pytest.raises(UsageError) as error:
        run_command([*arguments])
    assert error.value.exit_code == 2
    return str(error.value)


@pytest.mark.parametrize("command", [[], *([name] for name in RECORDS)], ids=lambda command: "".join(command) or "ibmd")
@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal_or_cut(command: list[str], width: int):
    text = help_of(*command, width=width)
    options, _, examples = text.partition("\n  Examples:\n")
    assert [line for line in options.splitlines() if len(line) > width] == []
    assert [line for line in examples.splitlines() if len(line) > 80] == []  # commands are not broken
    assert "…" not in text
    assert not re.search(r"\w\.\.\.$", options, re.M)
    assert "\x1b" not in text


def test_help_of_distill_is_short():
    assert len(help_of("distill").splitlines()) <= 110


@pytest.mark.parametrize(
    ("command", "titles"),
    [
        (
            "distill",
            [
                "Teacher",
                "Data",
                "New teacher",
                "Student",
                "Training",
                "Memory and speed",
                "Run folder",
                "Research",
                "Run",
            ],
        ),
        ("sample", ["Inputs", "Outputs", "Model", "Size and transparency", "Run"]),
        ("eval", ["Models", "Data", "Metrics", "Run"]),
        ("export", ["File", "Hub", "Run"]),
    ],
)
def test_options_are_in_panels(command: str, titles: list[str]):
    assert [title for title in panels(help_of(command)) if not title.startswith("Usage")] == titles


def test_research_switches_have_a_panel_of_their_own():
    found = panels(help_of("distill", width=120))
    rows = re.findall(r"^  (--\S+)", found["Research"], re.M)
    assert sorted(rows) == sorted(RESEARCH)


@pytest.mark.parametrize("command", RECORDS)
def test_each_default_is_said_once_in_single_brackets(command: str):
    text = " ".join(help_of(command, width=120).split())
    assert "[default" not in text
    assert ") (default" not in text
    assert len(re.findall(r"[(;] ?default: ", text)) == sum(
        bool(one.shown) or (one.default not in (None, "", ()) and one.default is not False)
        for one in settings_of(command)
        if one.spellings
    )


@pytest.mark.parametrize("command", RECORDS)
def test_values_are_named_in_one_style(command: str):
    for line in help_of(command, width=120).splitlines():
        if row := re.match(r"^  (-\S+, )?--\S+ (\S+) ", line):
            assert row[2] == "" or re.fullmatch(r"[A-Z0-9|=,./]+(\|all)?", row[2]), line


@pytest.mark.parametrize("command", RECORDS)
def test_examples_are_commands_that_the_program_knows(command: str):
    lines = help_of(command).partition("\n  Examples:\n")[2].strip().splitlines()
    assert lines
    for line in lines:
        typed = line.partition("#")[0]
        assert f"ibmd {command}" in typed
        for flag in re.findall(r"(?<= )--[a-z0-9-]+", typed.partition(f"ibmd {command}")[2]):
            assert flag in {spelling for one in settings_of(command) for spelling in one.spellings}


def test_the_first_page_says_what_to_type_first():
    text = help_of()
    assert text.index("distill ") < text.index("sample ") < text.index("eval ") < text.index("export ")
    assert "Type first" in text
    assert "  ibmd distill\n" in text


MEANT = [
    ("sample", "--size", "--restore-size"),
    ("sample", "-n", "--variants"),
    ("sample", "--out", "--output"),
    ("sample", "--model", "--student"),
    ("sample", "--steps", "--nfe"),
    ("sample", "--recursve", "--recursive"),
    ("distill", "--epochs", "--steps"),
    ("distill", "--stepz", "--steps"),
    ("distill", "--learning-rate", "--lr"),
    ("distill", "--learning_rate", "--lr"),
    ("distill", "-n", "--nfe"),
    ("distill", "--output", "--out"),
    ("distill", "--batch", "--batch-size"),
    ("distill", "--bs", "--batch-size"),
    ("distill", "--fp16", "--precision"),
    ("distill", "--gpu", "--device"),
    ("distill", "--batch_size", "--batch-size"),
    ("eval", "--output", "--out"),
    ("eval", "--metrics", "--metric"),
    ("eval", "--model", "--student"),
    ("export", "--push", "--push-to"),
    ("export", "--out", "--output"),
    ("export", "--precision", "--dtype"),
]


@pytest.mark.parametrize(("command", "typed", "meant"), MEANT)
def test_a_flag_that_does_not_exist_names_the_one_that_was_meant(command: str, typed: str, meant: str):
    assert told(command, typed, "3") == f"{typed}: ibmd {command} has no such option; did you mean {meant}?"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--metric", "psnr"], "--metric: ibmd distill has no such option; ibmd eval has it"),
        (["distill", "--qqqq"], "--qqqq: ibmd distill has no such option; ibmd distill --help lists what there is"),
        (["distill", "--steps"], "--steps: expected a value"),
        (["distill", "--fsdp=yes"], "--fsdp: expected no value"),
        (["distill", "drawings/"], "drawings/: ibmd distill takes flags alone; did you mean --data drawings/?"),
        (["export", "a"], "a: ibmd export takes flags alone; ibmd export --help lists its flags"),
        (["evl"], "evl: no such command; did you mean ibmd eval?"),
        (["train"], "train: no such command; did you mean ibmd distill?"),
        (["translate", "x.png"], "translate: no such command; did you mean ibmd sample?"),
        (["qqqq"], "qqqq: no such command; expected distill, sample, eval, export"),
        (["--qqqq"], "--qqqq: ibmd has no such option; ibmd --help lists what there is"),
    ],
)
def test_usage_errors_have_the_form_of_all_others(arguments: list[str], message: str):
    assert told(*arguments) == message
