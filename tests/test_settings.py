"""A setting is declared once: its flag, variable, key of a file, check, help and schema follow from the field."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ibmd_cli.cli import app
from ibmd_cli.cli.commands import RECORDS, settings_of
from ibmd_cli.errors import UsageError
from ibmd_cli.settings import Record, check_variables, json_schema, nearest_flag, resolve, setting, settings, to_json


@dataclass(frozen=True)
class Ovens(Record):
    """A record whose fields have every type that there is."""

    trays: int = setting(2, "Trays", "Oven", at_least=1, also=("sheets",))
    heat: float = setting(180.0, "Heat", "Oven", above=0, below=300)
    share: float | None = setting(None, "Share", "Oven", at_least=0, at_most=1)
    fan: bool = setting(False, "Fan", "Oven")
    mode: str = setting("grill", "Mode", "Oven", choices=("grill", "bake"))
    batch: int | str = setting(0, "Batch", "Oven", at_least=0, choices=("auto",))
    log: Path | None = setting(None, "Log", "Oven")
    times: tuple[int, ...] = setting((), "Times", "Oven", at_least=0)
    names: tuple[str, ...] = setting((), "Names", "Oven")
    pair: tuple[float, float] = setting((1.0, 2.0), "Pair", "Oven")
    as_json: bool = setting(False, "JSON", "Oven", flags=("--json",))


GOOD: list[tuple[str, Any, Any]] = [
    ("trays", "3", 3),
    ("heat", "1e2", 100.0),
    ("share", "0", 0.0),
    ("fan", "yes", True),
    ("fan", "0", False),
    ("mode", "bake", "bake"),
    ("batch", "auto", "auto"),
    ("batch", "8", 8),
    ("log", "a/b", Path("a/b")),
    ("times", "1,2", (1, 2)),
    ("names", "x,y", ("x", "y")),
    ("pair", "3,4", (3.0, 4.0)),
    ("as_json", "1", True),
]
WRONG = [
    *[("trays", text) for text in ("0", "-1", "1.5", "x", "inf", "nan", "true")],
    *[("heat", text) for text in ("0", "-1", "300", "inf", "-inf", "nan", "x")],
    *[("share", text) for text in ("-0.1", "1.1", "nan")],
    *[("batch", text) for text in ("-1", "most", "1.5")],
    *[("pair", text) for text in ("1", "1,2,3", "1,x", "1,nan")],
    *[("times", text) for text in ("1,-1", "1,x", "1.5")],
    ("fan", "perhaps"),
    ("mode", "boil"),
]


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_a_text_has_the_type_of_its_field_wherever_it_comes_from(name: str, text: str, value: Any, tmp_path: Path):
    known = {one.name: one for one in settings(Ovens)}[name]
    file = tmp_path / "oven.json"
    file.write_text(json.dumps({known.key: text}))
    for origin, (record, origins) in {
        "flag": resolve(
            Ovens, {name: [text] if name in ("times", "pair") else text.split(",") if known.several else text}, {}
        ),
        "environment": resolve(Ovens, {}, {known.variable: text}),
        f"config {file}": resolve(Ovens, {}, {}, file),
    }.items():
        assert getattr(record, name) == value
        assert origins[name] == origin


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_a_value_out_of_type_or_range_is_refused_by_its_name(name: str, text: str, tmp_path: Path):
    known = {one.name: one for one in settings(Ovens)}[name]
    file = tmp_path / "oven.json"
    file.write_text(json.dumps({known.key: text}))
    for where, call in {
        known.flag: lambda: resolve(Ovens, {name: text}, {}),
        known.variable: lambda: resolve(Ovens, {}, {known.variable: text}),
        f"--config {file}, {known.key}": lambda: resolve(Ovens, {}, {}, file),
    }.items():
        with pytest.raises(UsageError) as error:
            call()
        assert str(error.value).startswith(where)
        assert "expected" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", RECORDS)
@pytest.mark.parametrize("text", ["9" * 20, "9" * 400, "1e300", "-" + "9" * 30])
def test_a_number_too_large_for_a_tensor_is_refused_by_its_name(command: str, text: str):
    for one in settings_of(command):
        if set(one.kinds) & {int, float} and not (one.kinds == [int] and "e" in text):
            with pytest.raises(UsageError, match=f"{one.flag}.*expected"):
                one.convert(text, one.flag)


def test_a_record_made_in_python_is_checked():
    with pytest.raises(UsageError, match="--heat inf: expected a number above 0 and below 300"):
        Ovens(heat=float("inf"))


def test_an_empty_variable_counts_as_unset():
    assert resolve(Ovens, {}, {"IBMD_TRAYS": "", "IBMD_MODE": ""})[0] == Ovens()


@pytest.mark.parametrize(
    ("key", "meant"), [("trys", "trays"), ("sheets", "trays"), ("hEat", "heat"), ("as-json", "json"), ("zzz", "")]
)
def test_an_unknown_key_names_the_nearest(key: str, meant: str, tmp_path: Path):
    file = tmp_path / "oven.toml"
    file.write_text(f"{key} = 1")
    with pytest.raises(UsageError) as error:
        resolve(Ovens, {}, {}, file)
    assert str(error.value).endswith(f"did you mean {meant!r}?" if meant else f"no setting {key!r}")


@pytest.mark.parametrize("name", ["STPES", "BATCHSIZE", "LEARNING_RATE", "ZZZ"])
def test_an_unknown_variable_is_refused_by_every_command(name: str):
    records = {record for records in RECORDS.values() for record in records}
    with pytest.raises(UsageError, match=f"IBMD_{name}=3: no such setting"):
        check_variables({f"IBMD_{name}": "3"}, records)
    check_variables({f"IBMD_{name}": "", "IBMD_CACHE": "x", "HOME": "y"}, records)
    for command in RECORDS:
        result = CliRunner().invoke(app, [command, "--schema"], env={f"IBMD_{name}": "3"})
        assert isinstance(result.exception, UsageError)


def test_the_nearest_variable_is_named():
    with pytest.raises(UsageError, match="did you mean IBMD_STEPS"):
        check_variables({"IBMD_STPES": "3"}, [record for records in RECORDS.values() for record in records])


@pytest.mark.parametrize("command", RECORDS)
def test_every_setting_of_every_command_has_one_spelling_and_a_help_text(command: str):
    known = settings_of(command)
    for record in RECORDS[command]:
        assert {field.name for field in fields(record)} == {one.name for one in settings(record)}
    flags = [flag for one in known for flag in one.spellings]
    assert len(flags) == len(set(flags))
    for one in known:
        assert not one.help.endswith(".") or one.help.endswith("...")
        meant = [other.name for other in known if set(one.also) & {flag.lstrip("-") for flag in other.spellings}]
        assert meant == [], f"--{one.also} are flags of their own"


@pytest.mark.parametrize("command", RECORDS)
def test_the_schema_of_config_files_follows_from_the_records(command: str):
    result = CliRunner().invoke(app, [command, "--schema"])
    schema = json.loads(result.stdout)
    assert schema == json.loads(json.dumps(json_schema(settings_of(command))))
    assert set(schema["properties"]) == {one.key for one in settings_of(command)}


def test_schema_of_each_type():
    properties = json_schema(settings(Ovens))["properties"]
    assert properties["heat"] == {
        "description": "Heat", "type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 300, "default": 180.0
    }  # fmt: skip
    assert properties["mode"]["enum"] == ["grill", "bake"]
    assert properties["batch"]["anyOf"] == [{"type": "integer", "minimum": 0}, {"type": "string", "enum": ["auto"]}]
    assert properties["times"] == {
        "description": "Times", "type": "array", "items": {"type": "integer", "minimum": 0}, "default": []
    }  # fmt: skip


def test_json_round_trip(tmp_path: Path):
    record = Ovens(trays=4, log=Path("x"), names=("a,b", "c"), share=0.5)
    file = tmp_path / "oven.json"
    file.write_text(
        json.dumps(
            {one.key: to_json(record)[one.name] for one in settings(Ovens) if to_json(record)[one.name] is not None}
        )
    )
    assert resolve(Ovens, {}, {}, file)[0] == record


@pytest.mark.parametrize(("typed", "meant"), [("--tray", "--trays"), ("--sheets", "--trays"), ("--qqq", "")])
def test_a_flag_that_does_not_exist_names_the_one_that_was_meant(typed: str, meant: str):
    assert nearest_flag(typed, settings(Ovens)) == (f"; did you mean {meant}?" if meant else "")
