"""Commands from records: the options of a command are the settings of its records (`ibmd_cli.settings`).

A command is a function of records, e.g. `def export(config: ExportConfig, common: Common)`: its flags are all their
settings, and it is called with the records that flags, environment and `--config` make. A usage error is an
`IbmdError` as any other, and names the flag or command that was meant.
"""

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ibmd_cli import __version__
from ibmd_cli.cli.help import Option, write_help
from ibmd_cli.cli.show import print_json
from ibmd_cli.errors import UsageError
from ibmd_cli.settings import (
    Record,
    Setting,
    check_variables,
    json_schema,
    nearest_flag,
    resolve,
    setting,
    settings,
)

_Usage: type[Exception] = typer.BadParameter.__mro__[1]  # of Click, which newer versions of Typer carry themselves


@dataclass(frozen=True)
class Common(Record):
    """What all commands know."""

    config: Path | None = setting(None, "TOML or JSON file of settings: steps = 500", "Run", metavar="FILE")
    schema: bool = setting(False, "Print the JSON schema of such files and exit", "Run", flags=("--schema",))
    as_json: bool = setting(False, "Print the result as JSON", "Run", flags=("--json",))
    quiet: bool = setting(False, "Show no progress and no notes", "Run", flags=("--quiet", "-q"), also=("silent",))
    debug: bool = setting(False, "Show tracebacks", "Run", flags=("--debug",), also=("verbose", "v"))


@dataclass(frozen=True)
class Given:
    """What was given for a record that its command resolves itself: names and values of flags, and the file."""

    flags: dict[str, Any]
    file: Path | None
    others: tuple[Setting, ...] = field(default=())


ORDER = ("distill", "sample", "eval", "export")
RECORDS: dict[str, tuple[type, ...]] = {}
"""Name of a command → its records."""


def settings_of(name: str) -> list[Setting]:
    """Return the settings of a command; of two records that have one of a name, the first declares it."""
    every: dict[str, Setting] = {}
    for one in (one for record in RECORDS.get(name, ()) for one in settings(record)):
        every.setdefault(one.name, one)
    return list(every.values())


class _Refusing:
    """What commands and the program share: usage errors are told as all others are."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments.

        Raises:
            UsageError: they are not those of the command.
        """
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc]
        except _Usage as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                raise
            raise UsageError(_reason(error, ctx)) from None


class Command(_Refusing, TyperCommand):
    """A command whose help has a panel for each kind of setting."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help on stdout."""
        name, every = str(self.name), settings_of(str(self.name))
        panels: dict[str, list[Option]] = {}
        for one in sorted(every, key=lambda one: one.panel in ("Run", "Research")):
            if one.spellings:
                panels.setdefault(one.panel, []).append(Option.of(one))
        panels.setdefault("Run", []).append(Option("-h, --help", "Show this message and exit"))
        hidden = [one.key for one in every if not one.spellings]
        notes = [f"Only in --config files and the environment: {', '.join(hidden)}."] if hidden else []
        paths = " [PATH]..." if any("PATH" in one.spellings for one in every) else ""
        write_help(f"ibmd {name} [OPTIONS]{paths}", str(self.help), panels, notes, (self.epilog or "").splitlines())


class Group(_Refusing, TyperGroup):
    """The program: its help says what to type first."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that the arguments name.

        Raises:
            UsageError: there is no such command.
        """
        known = self.commands
        if args and args[0] not in known and not args[0].startswith("-"):
            near = _COMMANDS_MEANT.get(args[0]) or next(iter(difflib.get_close_matches(args[0], known, n=1)), None)
            hint = f"did you mean ibmd {near}?" if near else f"expected {', '.join(ORDER)}"
            raise UsageError(f"{args[0]}: no such command; {hint}")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help on stdout."""
        commands = [Option(name, str(self.commands[name].help).partition("\n\n")[0]) for name in ORDER]
        options = [
            Option("--version", "Print the version and exit"),
            Option("--install-completion", "Install completion for this shell"),
            Option("--show-completion", "Show completion for this shell"),
            Option("-h, --help", "Show this message and exit"),
        ]
        panels = {"Commands": commands, "Options": options}
        write_help("ibmd COMMAND [OPTIONS]", str(self.help), panels, [], (self.epilog or "").splitlines())


_COMMANDS_MEANT = {
    **dict.fromkeys(["train", "distil", "fit", "finetune"], "distill"),
    **dict.fromkeys(["translate", "infer", "inference", "run", "predict", "generate", "convert"], "sample"),
    **dict.fromkeys(["evaluate", "evaluation", "test", "measure", "benchmark", "compare"], "eval"),
    **dict.fromkeys(["push", "save", "onnx", "upload"], "export"),
}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ibmd {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="ibmd",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Type first, each takes a minute or two, offline:\n"
    "  ibmd distill\n  ibmd sample drawing.png --student runs/outline2emoji\n"
    "Flags and examples of a command:\n  ibmd sample --help",
)


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Distil slow diffusion-bridge teachers into one-step image translators, and run them."""


def command(name: str, *examples: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of records a command of `ibmd`.

    A parameter is a record, or `Annotated[Given, RECORD]` for one that the function resolves itself.

    Args:
        name: of the command.
        examples: lines to type, each perhaps with two spaces, # and what it does.
    """

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.get_annotations(body)
        records = {
            key: hint.__metadata__[0] if hasattr(hint, "__metadata__") else hint
            for key, hint in parameters.items()
            if key != "return"
        }
        RECORDS[name] = tuple(records.values())

        def run(**flags: Any) -> None:
            check_variables(os.environ, {record for records in RECORDS.values() for record in records})
            if flags["schema"]:
                return print_json(json_schema(settings_of(name)), 2)
            resolved = {key for key, hint in parameters.items() if not hasattr(hint, "__metadata__")}
            body(**{key: _given(name, record, flags, key in resolved) for key, record in records.items()})

        run.__doc__, run.__name__ = body.__doc__, name
        run.__signature__ = inspect.Signature([one for each in settings_of(name) for one in _parameters(each)])  # type: ignore[attr-defined]
        run.__annotations__ = {key: one.annotation for key, one in run.__signature__.parameters.items()}  # type: ignore[attr-defined]
        app.command(name, cls=Command, epilog="\n".join(["Examples:", *(f"  {line}" for line in examples)]))(run)
        return body

    return register


def _given(name: str, record: type, flags: Mapping[str, Any], resolved: bool) -> Any:
    """Return a record of a command that was called with these flags, or what was given for it.

    Raises:
        UsageError: a value, a variable or the file of `--config` is wrong.
    """
    file = flags.get("config") or os.environ.get("IBMD_CONFIG")
    values = {}
    for one in settings(record):
        value, more = flags.get(one.name), flags.get(f"{one.name}_")  # given with the flag, and without it
        values[one.name] = [*(value or ()), *more] if more else value
    given = Given(values, Path(file) if file else None, tuple(settings_of(name)))
    return resolve(record, values, os.environ, given.file, others=given.others)[0] if resolved else given


def spread(processes: str, device: str) -> Any:
    """Return the device; with several processes asked for, run the same command in each of them, and exit."""
    from ibmd_cli.devices import resolve_device
    from ibmd_cli.processes import count_processes, relaunch, this_process

    resolved = resolve_device(device)
    if processes != "1" and not this_process().launched and (count := count_processes(processes, resolved)) > 1:
        raise typer.Exit(relaunch(count, sys.argv[1:]))
    return resolved


def _parameters(one: Setting) -> Iterable[inspect.Parameter]:
    """Yield the parameters of Typer for a setting: all take text, which `Setting.convert` reads."""
    flags = [flag for flag in one.spellings if flag.startswith("-")]
    kind: Any = bool if one.switch else list[str] if one.several else str
    if flags:
        if one.switch:
            flags[0] = f"{flags[0]}/--no-{flags[0].lstrip('-')}"
        option = typer.Option(*flags, help=one.help, show_default=False)
        yield _parameter(one.name, Annotated[kind | None, option])
    if len(flags) < len(one.spellings):
        yield _parameter(f"{one.name}_", Annotated[kind | None, typer.Argument(help=one.help)])


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _reason(error: Any, ctx: Any) -> str:
    """Say in one line what is wrong with the arguments, and what was meant."""
    name = str(ctx.command.name)
    command = f"ibmd {name}" if name in RECORDS else "ibmd"
    own = [one for one in settings_of(name) if one.spellings]
    message = " ".join(error.format_message().split())
    flag = getattr(error, "option_name", "")
    if extra := re.search(r"extra arguments?\W.*\((.*)\)", message):
        takes = next((one for one in own if "data" in (one.name, *one.also)), None)
        hint = f"did you mean {takes.flag} {extra[1]}?" if takes else f"{command} --help lists its flags"
        return f"{extra[1]}: {command} takes flags alone; {hint}"
    if not flag:
        return f"{message[:1].lower()}{message[1:].rstrip('.')}; {command} --help lists what there is"
    if "No such option" not in message:
        return f"{flag}: expected {'no value' if 'take a value' in message else 'a value'}"
    elsewhere = [other for other in RECORDS for one in settings_of(other) if flag in one.spellings]
    other = f"; ibmd {elsewhere[0]} has it" if elsewhere else f"; {command} --help lists what there is"
    return f"{flag}: {command} has no such option{nearest_flag(flag, own) or other}"
