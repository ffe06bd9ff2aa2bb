"""Settings: each is declared once, as a field of the record of its command, and everything else is derived from that.

    lr: float = setting(5e-5, "Learning rate of the student", OPTIMIZER, above=0)

is the option `--lr`, its line in `--help`, a key of `--config` files, the variable `IBMD_LR`, a row of `--dry-run` and
a property of the JSON schema, with one type, default and check. Nothing heavy is imported here.
"""

import dataclasses
import difflib
import json
import tomllib
import types
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import cache
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ibmd_cli.errors import UsageError

R = TypeVar("R")
Layers = list[tuple[str, Mapping[str, Any]]]
"""Origins and the values of settings that come from them; the first that has a setting decides."""
UNSET = "default"
"""Origin of a setting that nobody gave."""
LARGEST = 2**63
"""Of numbers, which are to fit into tensors."""
YES_OR_NO = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", Path: "string"}
BOUNDS = {"at_least": "minimum", "above": "exclusiveMinimum", "below": "exclusiveMaximum", "at_most": "maximum"}
"""Attribute of a setting → key of a JSON schema."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is known of a setting.

    Attributes:
        name, hint, default: name, type and value of the field.
        help: a whole phrase without a full stop.
        panel: heading in `--help` under which it stands.
        metavar: what stands for the value in `--help`; with a comma in it, one flag may give several texts so.
        flags: spellings on the command line, where `--name` is not meant, the long one first; one without dashes is an
            argument; () for a setting that only files and variables give.
        choices: the texts that are allowed (a number may be given in their place if the type says so).
        at_least, above, below, at_most: bounds of a number.
        shown: the default in words, where the value does not tell it.
        also: flags that people type and mean this one, without dashes.
        changeable: whether a run may be continued with another value.
    """

    name: str
    hint: Any
    default: Any
    help: str
    panel: str
    metavar: str = ""
    flags: tuple[str, ...] | None = None
    choices: Collection[str] = ()
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    shown: str = ""
    also: tuple[str, ...] = ()
    changeable: bool = False

    @property
    def kinds(self) -> list[Any]:
        """Types of the value, without None; of the items, for a tuple."""
        parts = get_args(self.hint) if get_origin(self.hint) in (tuple, Union, types.UnionType) else (self.hint,)
        return [kind for kind in parts if kind not in (..., type(None))]

    @property
    def several(self) -> bool:
        """Whether the value is a tuple, and the flag repeatable."""
        return get_origin(self.hint) is tuple

    @property
    def spellings(self) -> tuple[str, ...]:
        """Flags, the long one first."""
        return (f"--{self.name.replace('_', '-')}",) if self.flags is None else self.flags

    @property
    def flag(self) -> str:
        """What messages call the setting."""
        return next((flag for flag in self.spellings if flag.startswith("--")), self.name)

    @property
    def key(self) -> str:
        """Name in files: the flag's."""
        return self.flag.lstrip("-").replace("-", "_")

    @property
    def variable(self) -> str:
        """Environment variable."""
        return f"IBMD_{self.key.upper()}"

    @property
    def expected(self) -> str:
        """The values that are allowed, in words."""
        words = ["true", "false"] if bool in self.kinds else list(filter(None, self.choices))
        if set(self.kinds) & {int, float}:
            number = ("whole " if int in self.kinds else "") + "number"
            bounds = {"of at least": self.at_least, "above": self.above, "below": self.below, "at most": self.at_most}
            limits = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
            words.insert(0, f"{f'{number}s' if self.several else f'a {number}'} {limits}".rstrip())
        return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words or ["a text"])

    def convert(self, value: Any, where: str = "", commas: bool = True) -> Any:
        """Give `value` the type of the setting, and check its range; the default is always in range.

        Args:
            value: from a flag, a variable, a file, or Python.
            where: how a message names setting and value.
            commas: whether commas separate the items of a text, as they always do with numbers.

        Raises:
            UsageError: the type or the range is wrong.
        """
        if type(value) is type(self.default) and value == self.default:
            return value
        try:
            if not self.several:
                return self._typed(value)
            items = [value] if isinstance(value, str | int | float | Path) else list(value)
            if "," in self.metavar or self.kinds[0] in (int, float) or (commas and isinstance(value, str)):
                items = [part.strip() for item in items for part in str(item).split(",")]
            if ... not in get_args(self.hint) and len(items) != len(self.kinds):
                raise ValueError
            return tuple(map(self._typed, items))
        except (TypeError, ValueError):
            where, large = where or f"{self.flag} {_spelled(value)}", str(value).isdecimal() and float(value) >= LARGEST
            raise UsageError(f"{where}: expected {self.expected}{', below 2^63' if large else ''}") from None

    def _typed(self, item: Any) -> Any:
        """Return an item in the first of the types that it can have."""
        for kind in self.kinds:
            if not isinstance(item, str | int | float | Path) or (isinstance(item, bool) and kind is not bool):
                continue
            with suppress(KeyError, ValueError):
                typed = YES_OR_NO[str(item).lower()] if kind is bool else kind(str(item))
                if self._allows(typed):
                    return typed
        raise ValueError

    def _allows(self, item: Any) -> bool:
        if isinstance(item, bool) or not isinstance(item, int | float):
            return isinstance(item, bool) or not self.choices or item in self.choices
        bounds = ((self.at_least, ge), (self.above, gt), (self.below, lt), (self.at_most, le))
        return abs(item) < LARGEST and all(bound is None or holds(item, bound) for bound, holds in bounds)

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the value."""
        kinds: list[dict[str, Any]] = [{"type": JSON_TYPES[kind]} for kind in dict.fromkeys(self.kinds)]
        for kind in kinds:
            if kind["type"] in ("integer", "number"):
                kind |= {word: getattr(self, name) for name, word in BOUNDS.items() if getattr(self, name) is not None}
            elif self.choices:
                kind["enum"] = list(self.choices)
        value = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        value = {"type": "array", "items": value} if self.several else value
        return {
            "description": self.help,
            **value,
            **({} if self.default is None else {"default": _plain(self.default)}),
        }


def setting(default: Any, help: str, panel: str, **more: Any) -> Any:
    """Declare a field of a record as a setting; `more` are further attributes of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": {"help": help, "panel": panel, **more}})


class Record:
    """Base of a command's record: its values are checked when it is made."""

    def __post_init__(self) -> None:
        """Refuse values of the wrong type or out of range.

        Raises:
            UsageError: one is.
        """
        for one in settings(type(self)):  # type: ignore[arg-type]
            one.convert(getattr(self, one.name), commas=False)

    @classmethod
    def layered(cls, layers: Layers) -> Layers:
        """Return the layers of values, with those that follow from what was given: none, but for some records."""
        return layers


@cache
def settings(record: Any) -> tuple[Setting, ...]:
    """Return the settings of a record, in the order of its fields."""
    hints = get_type_hints(record)
    return tuple(
        Setting(name=field.name, hint=hints[field.name], default=field.default, **field.metadata["setting"])
        for field in dataclasses.fields(record)
    )


def resolve(
    record: type[R],
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    file: Path | None = None,
    others: Iterable[Setting] = (),
) -> tuple[R, dict[str, str]]:
    """Resolve every setting: its flag, else the environment, else the file, else the record's layers, else the default.

    Args:
        record: of the command.
        flags: name → value given on the command line; None means not given.
        environ: the environment; an empty variable counts as unset.
        file: of `--config` (TOML or JSON), or None.
        others: settings of other records, which the file may hold, too.

    Returns:
        The record, and for each setting where it came from.

    Raises:
        UsageError: an unknown name, or a value of the wrong type or out of range.
    """
    known = {one.name: one for one in settings(record)}  # type: ignore[arg-type]
    layers: Layers = [
        ("flag", {name: flags[name] for name in known if flags.get(name) not in (None, (), [])}),
        ("environment", {name: environ[one.variable] for name, one in known.items() if environ.get(one.variable)}),
    ]
    if file is not None:
        content, keys = _read(file), {one.key: one for one in (*others, *known.values())}
        if unknown := [key for key in content if key not in keys]:
            raise UsageError(f"--config {file}: no setting {unknown[0]!r}{nearest_flag(unknown[0], keys.values())}")
        names = {keys[key].name: value for key, value in content.items()}
        layers.append((f"config {file}", {name: value for name, value in names.items() if name in known}))
    result: dict[str, Any] = {}
    origins = dict.fromkeys(known, UNSET)
    for origin, values in reversed(record.layered(layers)):  # type: ignore[attr-defined]
        for name, value in values.items():
            result[name] = known[name].convert(value, _where(known[name], origin, value), origin != "flag")
            origins[name] = origin
    return record(**result), origins


def _where(one: Setting, origin: str, value: Any) -> str:
    """Name a setting and its value as its origin spells them."""
    if origin.startswith("config "):
        return f"--{origin}, {one.key} = {value!r}"
    return f"{one.variable}={value}" if origin == "environment" else f"{one.flag} {_spelled(value)}"


def check_variables(environ: Mapping[str, str], records: Iterable[type]) -> None:
    """Refuse a variable IBMD_… that is no setting of any command.

    Raises:
        UsageError: there is one; its nearest name is told.
    """
    known = {one.variable for record in records for one in settings(record)} | {"IBMD_CACHE"}
    for name, value in environ.items():
        if name.startswith("IBMD_") and value and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "expected IBMD_ and the name of a flag, e.g. IBMD_STEPS"
            raise UsageError(f"{name}={value}: no such setting; {hint}")


def nearest_flag(name: str, known: Iterable[Setting]) -> str:
    """Return "; did you mean …?" for a setting that does not exist, or nothing if none is near."""
    wanted = name.lstrip("-").replace("_", "-")
    spelled = {one.flag.lstrip("-"): one for one in known}
    meant = [one for one in spelled.values() if wanted in one.also]
    meant += [spelled[near] for near in difflib.get_close_matches(wanted, spelled, n=1)]
    return f"; did you mean {meant[0].flag if name.startswith('-') else repr(meant[0].key)}?" if meant else ""


def to_json(record: Any) -> dict[str, Any]:
    """Return the values of a record as a JSON object."""
    return {name: _plain(value) for name, value in dataclasses.asdict(record).items()}


def json_schema(known: Iterable[Setting]) -> dict[str, Any]:
    """Return the JSON schema of `--config` files of a command with these settings."""
    return {"type": "object", "properties": {one.key: one.schema for one in known}, "additionalProperties": False}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _spelled(value: Any) -> str:
    return (",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)) or "''"


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = json.loads(text) if file.suffix.lower() == ".json" else tomllib.loads(text)
        if not isinstance(content, dict):
            raise ValueError("expected a table of settings")
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {file}: cannot be read ({error})") from error
    return {name.replace("-", "_"): value for name, value in content.items()}
