"""Settings: each is declared once, as a field of the record of its command, and everything else is derived from that.

    lr: float = setting(5e-5, "Learning rate of the student", OPTIMIZER, above=0)

is the option `--lr`, its line in `--help`, a key of `--config` files, the variable `IBMD_LR`, a row of `--dry-run` and
a property of the JSON schema, with one type, default and check. Nothing heavy is imported here.
"""

import dataclasses
import difflib
import json
import math
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from ibmd_cli.errors import UsageError

R = TypeVar("R")
UNSET = "default"
"""Origin of a setting that nobody gave."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is known of a setting.

    Attributes:
        name: of the field.
        hint: type of the field.
        default: value of the field.
        help: a whole phrase without a full stop.
        panel: heading in `--help` under which it stands.
        metavar: what stands for the value in `--help`; by default N for a number, NAME for a text.
        flags: spellings on the command line, where `--name` is not meant, the long one first; one without dashes is an
            argument; () for a setting that only files and variables give.
        choices: the texts that are allowed (a number may be given in their place if the type says so).
        at_least: least value.
        above: what the value must exceed.
        below: what the value must stay below.
        at_most: largest value.
        shown: the default in words, where the value does not tell it.
        also: flags that people type and mean this one, without dashes.
        commas: whether one flag may give several texts with commas between them.
        changeable: whether a run may be continued with another value.
    """

    name: str
    hint: Any
    default: Any
    help: str
    panel: str
    metavar: str = ""
    flags: tuple[str, ...] | None = None
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    shown: str = ""
    also: tuple[str, ...] = ()
    commas: bool = False
    changeable: bool = False

    @property
    def kinds(self) -> list[Any]:
        """Types of the value, without None; of the items, for a tuple."""
        hint = self.hint
        if get_origin(hint) is tuple:
            return [kind for kind in get_args(hint) if kind is not ...]
        union = get_origin(hint) in (Union, types.UnionType)
        return [kind for kind in get_args(hint) if kind is not type(None)] if union else [hint]

    @property
    def several(self) -> bool:
        """Whether the value is a tuple, and the flag repeatable."""
        return get_origin(self.hint) is tuple

    @property
    def switch(self) -> bool:
        """Whether the flag takes no value."""
        return self.hint is bool

    @property
    def spellings(self) -> tuple[str, ...]:
        """Flags, the long one first."""
        return (f"--{self.name.replace('_', '-')}",) if self.flags is None else self.flags

    @property
    def variable(self) -> str:
        """Environment variable."""
        return f"IBMD_{self.key.upper()}"

    @property
    def key(self) -> str:
        """Name in files: the flag's."""
        return self.flag.lstrip("-").replace("-", "_")

    @property
    def flag(self) -> str:
        """What messages call the setting."""
        return next((flag for flag in self.spellings if flag.startswith("--")), self.name)

    @property
    def expected(self) -> str:
        """The values that are allowed, in words."""
        words = list(filter(None, self.choices))
        if set(self.kinds) & {int, float}:
            whole = "whole " if int in self.kinds else ""
            number = f"{whole}numbers" if self.several else f"a {whole}number"
            low, high = self.at_least if self.above is None else self.above, self.at_most
            more = (
                f" of at least {low:g}" if self.at_least is not None else f" above {low:g}" if low is not None else ""
            )
            more += f"{' and' if more else ''} below {self.below:g}" if self.below is not None else ""
            more = f" from {low:g} to {high:g}" if high is not None and low is not None else more
            words = [number + more, *words]
        elif bool in self.kinds:
            words = ["true", "false"]
        return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words or ["a text"])

    def convert(self, value: Any, where: str, commas: bool = True) -> Any:
        """Give `value`, perhaps text, the type of the setting, and check its range.

        Args:
            value: from a flag, a variable, or a file.
            where: how a message names setting and value.
            commas: whether commas separate the items of a text.

        Raises:
            UsageError: the type or the range is wrong.
        """
        try:
            if self.several:
                items = [value] if isinstance(value, str | int | float | Path) else list(value)
                if self.commas or self.kinds[0] in (int, float) or (commas and isinstance(value, str)):
                    items = [word for item in items for word in (item.split(",") if isinstance(item, str) else [item])]
                    items = [word.strip() if isinstance(word, str) else word for word in items]
                kinds = self.kinds
                if ... not in get_args(self.hint) and len(items) != len(kinds):
                    raise ValueError
                value = tuple(_typed([kinds[min(i, len(kinds) - 1)]], item) for i, item in enumerate(items))
            elif value is not None:
                value = _typed(self.kinds, value)
        except (TypeError, ValueError):
            raise UsageError(f"{where}: expected {self.expected}") from None
        self.check(value, where)
        return value

    def check(self, value: Any, where: str = "") -> None:
        """Refuse a value out of range.

        Raises:
            UsageError: it is.
        """
        for item in value if isinstance(value, tuple) else (value,):
            if item is None or item == self.default:
                continue
            if isinstance(item, int | float) and not isinstance(item, bool):
                good = (
                    math.isfinite(item)
                    and (self.at_least is None or item >= self.at_least)
                    and (self.above is None or item > self.above)
                    and (self.below is None or item < self.below)
                    and (self.at_most is None or item <= self.at_most)
                )
            else:
                good = not self.choices or item in self.choices
            if not good:
                raise UsageError(f"{where or f'{self.flag} {item}'}: expected {self.expected}")


def setting(default: Any, help: str, panel: str, **more: Any) -> Any:
    """Declare a field of a record as a setting.

    Args:
        default: of the field.
        help: a whole phrase without a full stop.
        panel: heading in `--help`.
        more: further attributes of `Setting`.
    """
    return dataclasses.field(default=default, metadata={"setting": {"help": help, "panel": panel, **more}})


class Record:
    """Base of a command's record: its values are checked when it is made.

    Attributes:
        ORDER: the panels of its settings in the order of `--help`.
    """

    ORDER: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            UsageError: one is.
        """
        for known in settings(type(self)):  # type: ignore[arg-type]
            known.check(getattr(self, known.name))


@cache
def settings(record: Any) -> tuple[Setting, ...]:
    """Return the settings of a record, in the order of its fields."""
    hints = get_type_hints(record)
    return tuple(
        Setting(name=field.name, hint=hints[field.name], default=field.default, **field.metadata["setting"])
        for field in dataclasses.fields(record)
    )


class Layer(NamedTuple):
    """Values of settings that come from one origin; `where` spells one of them for a message."""

    origin: str
    values: Mapping[str, Any]
    where: Callable[[Setting, Any], str]


def resolve(
    record: type[R],
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    file: Path | None = None,
    further: Callable[[Callable[[str], Any]], Iterable[tuple[str, Mapping[str, Any]]]] | None = None,
    others: Iterable[Setting] = (),
) -> tuple[R, dict[str, str]]:
    """Resolve every setting: its flag, else the environment, else the file, else what `further` says, else the default.

    Args:
        record: of the command.
        flags: name → value given on the command line; None means not given.
        environ: the environment; an empty variable counts as unset.
        file: of `--config` (TOML or JSON), or None.
        further: from a function that looks up what was given, more origins and their values.
        others: settings of other records, which the file may hold, too.

    Returns:
        The record, and for each setting where it came from.

    Raises:
        UsageError: an unknown name, or a value of the wrong type or out of range.
    """
    known = {one.name: one for one in settings(record)}  # type: ignore[arg-type]
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    layers = [Layer("flag", given, lambda one, value: f"{one.flag} {_spelled(value)}")]
    variables = {name: environ[one.variable] for name, one in known.items() if environ.get(one.variable)}
    layers.append(Layer("environment", variables, lambda one, value: f"{one.variable}={value}"))
    if file is not None:
        content = _read(file)
        keys = {one.key: one.name for one in (*known.values(), *others)}
        if unknown := [key for key in content if key not in keys]:
            raise UsageError(
                f"--config {file}: no setting {unknown[0]!r}{nearest_flag(unknown[0], [*known.values(), *others])}"
            )
        content = {keys[key]: value for key, value in content.items() if keys[key] in known}
        layers.append(Layer(f"config {file}", content, lambda one, value: f"--config {file}, {one.key} = {value!r}"))

    def given_value(name: str) -> Any:
        return next((layer.values[name] for layer in layers if name in layer.values), None)

    for origin, values in further(given_value) if further else ():
        layers.append(Layer(origin, values, lambda one, value: f"{one.flag} {_spelled(value)}"))
    result: dict[str, Any] = {}
    origins = dict.fromkeys(known, UNSET)
    for origin, values, where in reversed(layers):
        for name, value in values.items():
            commas = origin != "flag"
            result[name] = known[name].convert(value, where(known[name], value), commas)
            origins[name] = origin
    return record(**result), origins


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
    known = list(known)
    wanted = name.lstrip("-").replace("_", "-")
    spelled = {one.flag.lstrip("-"): one for one in known}
    meant = next((one for one in known if wanted in one.also), None)
    near = difflib.get_close_matches(wanted, spelled, n=1, cutoff=0.6)
    if meant is None and near:
        meant = spelled[near[0]]
    if meant is None:
        return ""
    return f"; did you mean {meant.flag if name.startswith('-') else repr(meant.key)}?"


def to_json(record: Any) -> dict[str, Any]:
    """Return the values of a record as a JSON object."""
    return {name: _plain(value) for name, value in dataclasses.asdict(record).items()}


def json_schema(known: Iterable[Setting]) -> dict[str, Any]:
    """Return the JSON schema of `--config` files of a command with these settings."""
    names = {int: "integer", float: "number", bool: "boolean", str: "string", Path: "string"}
    bounds = {"at_least": "minimum", "above": "exclusiveMinimum", "below": "exclusiveMaximum", "at_most": "maximum"}
    properties: dict[str, Any] = {}
    for one in known:
        kinds: list[dict[str, Any]] = [{"type": names[kind]} for kind in one.kinds]
        for kind in kinds:
            if kind["type"] in ("integer", "number"):
                kind |= {word: getattr(one, name) for name, word in bounds.items() if getattr(one, name) is not None}
            elif one.choices:
                kind["enum"] = list(one.choices)
        value = kinds[0] if len(kinds) == 1 or one.several else {"anyOf": kinds}
        value = {"type": "array", "items": value} if one.several else value
        default = {} if one.default is None else {"default": _plain(one.default)}
        properties[one.key] = {"description": one.help, **value, **default}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _spelled(value: Any) -> str:
    return (",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)) or "''"


def _typed(kinds: list[Any], value: Any) -> Any:
    """Return a value in the first of the types that it can have.

    Raises:
        ValueError: it can have none.
    """
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    for kind in kinds:
        if kind is bool:
            if isinstance(value, bool):
                return value
            if str(value).lower() in words:
                return words[str(value).lower()]
        elif isinstance(value, bool) or not isinstance(value, str | int | float | Path):
            continue
        elif kind is int:
            if not isinstance(value, float) or value.is_integer():
                try:
                    return int(value)  # type: ignore[arg-type]
                except ValueError:
                    continue
        elif kind is float:
            try:
                return float(value)  # type: ignore[arg-type]
            except ValueError:
                continue
        else:
            return kind(value)
    raise ValueError(value)


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        content = json.loads(text) if file.suffix.lower() == ".json" else tomllib.loads(text)
        if not isinstance(content, dict):
            raise ValueError("expected a table of settings")
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {file}: cannot be read ({error})") from error
    return {name.replace("-", "_"): value for name, value in content.items()}
