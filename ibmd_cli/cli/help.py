"""Help texts: panels of options in two columns, as wide as the terminal, without boxes."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ibmd_cli.reporting import is_plain
from ibmd_cli.settings import Setting

COLUMN = 26  # where the help of an option begins
WIDEST = 110


class Option(NamedTuple):
    """A row: what is typed, and what it means."""

    name: str
    help: str

    @classmethod
    def of(cls, one: Setting) -> "Option":
        """Return the row of a setting: flags, short one first, kind of value, help and default."""
        flags = sorted((flag for flag in one.spellings if flag.startswith("-")), key=lambda flag: flag[:2] == "--")
        if one.switch and one.flags is None:
            flags = [flag.replace("--", "--[no-]") for flag in flags]
        value = (
            "" if one.switch else one.metavar or ("N" if int in one.kinds else "X" if float in one.kinds else "NAME")
        )
        default = one.shown or _default(one)
        help = one.help
        if default:
            help = f"{help[:-1]}; default: {default})" if help.endswith(")") else f"{help} (default: {default})"
        return cls(f"{', '.join(flags)} {value}".rstrip(), help)


def _default(one: Setting) -> str:
    if one.default in (None, "", ()) or one.default is False:
        return ""
    if one.default is True:
        return "yes"
    values = one.default if isinstance(one.default, tuple) else (one.default,)
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def write_help(
    usage: str, text: str, panels: Mapping[str, Sequence[Option]], notes: Iterable[str], epilog: Iterable[str]
) -> None:
    """Write a help text on stdout.

    Args:
        usage: the command's form.
        text: paragraphs.
        panels: heading → options.
        notes: paragraphs after the panels.
        epilog: lines that stand as they are; the ones that do not begin with spaces are headings.
    """
    width = min(shutil.get_terminal_size().columns, WIDEST)
    plain = is_plain(sys.stdout)

    def styled(line: str, code: str) -> str:
        return line if plain else f"\033[{code}m{line}\033[0m"

    lines = [styled("Usage: ", "1") + usage, ""]
    lines += textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)
    for heading, options in panels.items():
        lines += ["", styled(heading, "1")]
        for name, help in options:
            column = min(COLUMN, width // 2)
            first, *rest = textwrap.wrap(help, width - column, break_on_hyphens=False) or [""]
            if len(name) + 4 > column:
                lines.append("  " + styled(name, "36"))
                name = ""
            lines.append("  " + (styled(name, "36") if name else "") + " " * (column - 2 - len(name)) + first)
            lines += [" " * column + line for line in rest]
    for note in notes:
        lines += ["", *textwrap.wrap(note, width, break_on_hyphens=False)]
    lines += ["", *(line if line.startswith(" ") else styled(line, "1") for line in epilog)]
    sys.stdout.write("\n".join(lines) + "\n")
