"""Help texts: panels of options in two columns, as wide as the terminal, without boxes."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def rows(options: Iterable[tuple[str, str]], width: int, column: int = COLUMN, plain: bool = True) -> Iterator[str]:
    """Yield the lines of two columns: names, and texts that are broken between words.

    Args:
        options: name and text of each row.
        width: of the lines.
        column: where the texts begin; at half the width at most.
        plain: no escape codes.
    """
    column = min(column, width // 2)
    for name, text in options:
        first, *rest = textwrap.wrap(text, width - column, break_on_hyphens=False) or [""]
        if len(name) + 4 > column:
            yield "  " + _styled(name, "36", plain)
            yield " " * column + first
        else:
            yield "  " + _styled(name, "36", plain) + " " * (column - 2 - len(name)) + first
        yield from (" " * column + line for line in rest)


def heading(text: str, plain: bool) -> str:
    """Return the line above a panel."""
    return _styled(text, "1", plain)


def _styled(text: str, code: str, plain: bool) -> str:
    return text if plain else f"\033[{code}m{text}\033[0m"


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
    width, plain = min(shutil.get_terminal_size().columns, WIDEST), is_plain(sys.stdout)
    lines = [heading("Usage: ", plain) + usage, ""]
    lines += textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)
    for title, options in panels.items():
        lines += ["", heading(title, plain), *rows(options, width, plain=plain)]
    for note in notes:
        lines += ["", *textwrap.wrap(note, width, break_on_hyphens=False)]
    lines += ["", *(line if line.startswith(" ") else heading(line, plain) for line in epilog)]
    sys.stdout.write("\n".join(lines) + "\n")
