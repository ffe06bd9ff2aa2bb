"""Screens: a command in a terminal of some width, and the lines that a person sees there at the end and on the way.

The commands run in children of one process that has imported everything and computed nothing, which saves seconds.
"""

import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path
from typing import Any, NamedTuple

ESCAPE = re.compile(r"\x1b(?:\[([0-9;?]*)([A-Za-z])|\][^\x07]*\x07|.)")
UNSET = ("COLUMNS", "LINES", "NO_COLOR", "GITHUB_ACTIONS", "FORCE_COLOR", "CI", "TTY_COMPATIBLE")


class Screen(NamedTuple):
    """What a terminal, or a pipe, got.

    Attributes:
        code: exit code.
        raw: every character, escape codes included.
        lines: at the end.
        seen: every line that stood there at some time.
    """

    code: int
    raw: str
    lines: list[str]
    seen: list[str]


class Screens:
    """Runs commands in terminals."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")

    def __call__(self, *arguments: object, columns: int = 0, cwd: Path, **environ: str) -> Screen:
        """Run `ibmd ARGUMENTS` in a terminal of so many columns; 0: stdout and stderr are a pipe."""
        request = {"arguments": [*map(str, arguments)], "columns": columns, "cwd": str(cwd), "environ": environ}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Screen(answer["code"], answer["raw"], *_play(answer["raw"]))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def _play(raw: str) -> tuple[list[str], list[str]]:
    """Return the lines at the end, and all that ever were; of what terminals can, only what rich uses."""
    lines, row, column, seen, at = [""], 0, 0, list[str](), 0
    while at < len(raw):
        if match := ESCAPE.match(raw, at):
            at = match.end()
            if match[2] == "A":
                row = max(0, row - int(match[1] or 1))
            elif match[2] == "K":
                seen.append(lines[row])
                lines[row] = "" if match[1] == "2" else lines[row][:column]
            continue
        letter = raw[at]
        at += 1
        if letter == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif letter == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
            column += 1
    return lines, list(dict.fromkeys([*seen, *lines]))


def _run(arguments: list[str], columns: int, cwd: str, environ: dict[str, str]) -> dict[str, Any]:
    """Run a command in a child, and return its exit code and what it wrote."""
    main, other = pty.openpty() if columns else os.pipe()
    if columns:
        ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    if not (child := os.fork()):
        os.setsid()
        if not columns:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (0, 1, 2) if columns else (1, 2):
            os.dup2(other, number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, "w" if number else "r", encoding="utf-8", buffering=1)  # noqa: SIM115 (to the end)
            for number in (0, 1, 2)
        )
        for name in UNSET:
            os.environ.pop(name, None)
        os.environ |= {"TERM": "xterm-256color", **environ}
        os.chdir(cwd)
        sys.argv = ["ibmd", *arguments]
        code = 1
        try:
            from ibmd_cli.cli import main as program

            program()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        sys.stdout.flush()
        os._exit(code)
    os.close(other)
    data = b""
    while select.select([main], [], [], 300)[0]:
        try:
            part = os.read(main, 65536)
        except OSError:  # a terminal whose last writer closed it
            part = b""
        if not part:
            break
        data += part
    os.close(main)
    return {"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "raw": data.decode()}


if __name__ == "__main__":
    import torch

    import ibmd_cli.evaluation.evaluate
    import ibmd_cli.export.exporter
    import ibmd_cli.sampling.engine
    import ibmd_cli.sampling.pipeline
    import ibmd_cli.training.loop
    import ibmd_cli.training.plan  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(**json.loads(line))) + "\n")
        sys.stdout.flush()
