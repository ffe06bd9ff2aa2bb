"""Commands from records: the options of a command are the settings of its records (`ibmd_cli.settings`).

A command is a function of records, e.g. `def export(config: ExportConfig, common: Common)`: its flags are all their
settings, and it is called with the records that flags, environment and `--config` make.
"""

import difflib
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ibmd_cli import __version__
from ibmd_cli.cli.printing import print_json
from ibmd_cli.errors import UsageError
from ibmd_cli.settings import Record, Setting, check_variables, json_schema, nearest_flag, resolve, setting, settings


@dataclass(frozen=True)
class Common(Record):
    """What all commands know."""

    # fmt: off
    config: Path | None = setting(None, "TOML or JSON file of settings: steps = 500", "Run", metavar="FILE")
    schema: bool = setting(False, "Print the JSON schema of such files and exit", "Run", flags=("--schema",))
    as_json: bool = setting(False, "Print the result as JSON", "Run", flags=("--json",))
    quiet: bool = setting(
        False,
        "Show no progress and no notes; warnings and errors still appear",
        "Run",
        flags=("--quiet", "-q"),
        also=("silent",),
    )
    debug: bool = setting(False, "Show tracebacks", "Run", flags=("--debug",), also=("verbose", "v"))
    # fmt: on


RECORDS: dict[str, tuple[type, ...]] = {}
"""Name of a command → its records."""
LAST = ("Research", "Run")
"""Panels that stand after all others."""
MEANT = {
    "distill": ("train", "distil", "fit", "finetune"),
    "sample": ("translate", "infer", "inference", "run", "predict", "generate", "convert"),
    "eval": ("evaluate", "evaluation", "test", "measure", "benchmark", "compare"),
    "export": ("push", "save", "onnx", "upload"),
}
"""Command → what people type and mean it."""


def settings_of(name: str) -> list[Setting]:
    """Return the settings of a command; of two records that have one of a name, the first declares it."""
    every: dict[str, Setting] = {}
    for one in (one for record in RECORDS.get(name, ()) for one in settings(record)):
        every.setdefault(one.name, one)
    return list(every.values())


class Command(TyperCommand):
    """A command whose help has a panel for each kind of setting."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the panels."""
        every, panels = settings_of(str(self.name)), dict[str, list[tuple[str, str]]]()
        for one in sorted(every, key=lambda one: one.panel in LAST and 1 + LAST.index(one.panel)):
            if one.spellings:
                panels.setdefault(one.panel, []).append((_typed(one), _explained(one)))
        panels["Run"].append(("-h, --help", "Show this message and exit"))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows, col_max=23)
        if hidden := [one.key for one in every if not one.spellings]:
            note = f"Only in --config files and the environment: {', '.join(hidden)}."
            formatter.write("\n" + textwrap.fill(note, formatter.width) + "\n")


def _typed(one: Setting) -> str:
    """Return the flags of a setting, the short one first, and what stands for its value."""
    flags = sorted((flag for flag in one.spellings if flag.startswith("-")), key=lambda flag: flag[:2] == "--")
    if one.hint is bool:
        return ", ".join(flags if one.flags else [flag.replace("--", "--[no-]") for flag in flags])
    return f"{', '.join(flags)} {one.metavar or ('N' if int in one.kinds else 'X' if float in one.kinds else 'NAME')}"


def _explained(one: Setting) -> str:
    """Return the help of a setting, and its default if that says something."""
    values = one.default if isinstance(one.default, tuple) else (one.default,)
    known = ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    default = one.shown or ("yes" if one.default is True else "" if known in ("None", "False") else known)
    if not default:
        return one.help
    return f"{one.help[:-1]}; default: {default})" if one.help.endswith(")") else f"{one.help} (default: {default})"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ibmd {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="ibmd",
    no_args_is_help=True,
    subcommand_metavar="COMMAND [OPTIONS]",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="\b\nType first, each takes a minute or two, offline:\n"
    "  ibmd distill\n  ibmd sample drawing.png --student runs/outline2emoji\n"
    "Flags and examples of a command:\n  ibmd sample --help",
)


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    """Distil slow diffusion-bridge teachers into one-step image translators, and run them."""


def command(name: str, *examples: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of records a command of `ibmd`; a parameter `origins` tells where its settings come from.

    Args:
        name: of the command.
        examples: lines to type, each perhaps with two spaces, # and what it does.
    """

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        hints = inspect.get_annotations(body)
        records = {key: hint for key, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Record)}
        RECORDS[name] = tuple(records.values())

        def run(**flags: Any) -> None:
            check_variables(os.environ, {record for known in RECORDS.values() for record in known})
            if flags["schema"]:
                return print_json(json_schema(settings_of(name)), 2)
            made, origins = _resolve(name, records, flags)
            body(**made, **({"origins": origins} if "origins" in hints else {}))

        parameters = [one for each in settings_of(name) for one in _parameters(each)]
        run.__doc__, run.__name__, short = body.__doc__, name, str(body.__doc__).partition("\n\n")[0]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        epilog = "\n  ".join(["\b\nExamples:", *examples])
        app.command(name, cls=Command, short_help=short, epilog=epilog)(run)
        return body

    return register


def _resolve(name: str, records: dict[str, Any], flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the records of a command that was called with these flags, and where those of the first come from."""
    flags |= {key[:-1]: [*(flags[key[:-1]] or ()), *value] for key, value in flags.items() if key[-1] == "_" and value}
    file = flags["config"] or os.environ.get("IBMD_CONFIG")
    path, every = Path(file) if file else None, settings_of(name)
    made = {key: resolve(record, flags, os.environ, path, every) for key, record in records.items()}
    return {key: record for key, (record, _) in made.items()}, next(iter(made.values()))[1]


def _parameters(one: Setting) -> Iterator[inspect.Parameter]:
    """Yield the parameters of Typer for a setting: all take text, which `Setting.convert` reads."""
    kind: Any = bool if one.hint is bool else list[str] if one.several else str
    flags = [flag for flag in one.spellings if flag.startswith("-")]
    if flags and kind is bool:
        flags[0] = f"{flags[0]}/--no-{flags[0].lstrip('-')}"
    if flags:
        yield _parameter(one.name, Annotated[kind | None, typer.Option(*flags)])
    for path in set(one.spellings) - set(flags) if kind is not bool else ():
        yield _parameter(f"{one.name}_", Annotated[kind | None, typer.Argument(metavar=path)])


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def run_command(arguments: list[str]) -> int:
    """Run `ibmd ARGUMENTS`, and return the exit code.

    Raises:
        UsageError: the arguments are not those of a command; the flag or command that was meant is named.
    """
    try:
        return app(arguments or ["--help"], prog_name="ibmd", standalone_mode=False) or 2 * (not arguments)
    except Exception as error:
        if not hasattr(error, "format_message"):  # Typer's: their class stands in another module in each version
            raise
        raise UsageError(_reason(error)) from None


def _reason(error: Any) -> str:
    """Say in one line what is wrong with the arguments, and what was meant."""
    name = str(error.ctx.command.name) if error.ctx else ""
    command = f"ibmd {name}" if name in RECORDS else "ibmd"
    own = [one for one in settings_of(name) if one.spellings]
    message, flag = " ".join(error.format_message().split()), getattr(error, "option_name", "")
    if unknown := re.search(r"No such command '(.*?)'", message):
        near = [known for known, meant in MEANT.items() if unknown[1] in meant]
        near += difflib.get_close_matches(unknown[1], RECORDS, n=1)
        hint = f"did you mean ibmd {near[0]}?" if near else f"expected {', '.join(RECORDS)}"
        return f"{unknown[1]}: no such command; {hint}"
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


def start_processes(processes: str, device: str) -> Any:
    """Return the device; with several processes asked for, run the same command in each of them, and exit."""
    from ibmd_cli.devices import resolve_device
    from ibmd_cli.processes import count_processes, relaunch, this_process

    resolved = resolve_device(device)
    if processes != "1" and not this_process().launched and (count := count_processes(processes, resolved)) > 1:
        raise typer.Exit(relaunch(count, sys.argv[1:]))
    return resolved
