"""The command line: four commands, each of which turns its flags into one call. Nothing heavy is imported here.

stdout carries results alone; progress, notes, warnings and errors go to stderr. Exit codes: 0 done, 1 failed,
2 usage, 3 some inputs failed, 4 model or data not available, 5 out of memory, 130 interrupted.
"""

import errno
import os
import sys
from contextlib import suppress

from ibmd_cli.cli import distill, sample, evaluate, export  # isort: skip (the order of `ibmd --help`)
from ibmd_cli.cli.commands import app, run_command
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.processes import Process, end_as_ctrl_c_does, this_process
from ibmd_cli.reporting import Reporter, accept_any_text

__all__ = ["app", "distill", "evaluate", "export", "main", "sample"]


def main() -> None:
    """Run the program; tell what the user can mend in one line, and keep tracebacks for --debug."""
    accept_any_text()
    end_as_ctrl_c_does()  # exit code 130, no temporary file
    try:
        sys.exit(run_command(sys.argv[1:]))
    except KeyboardInterrupt:  # before a command is entered
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv or os.environ.get("IBMD_DEBUG", "") not in ("", "0"):
            raise
        message, code = _explain(error)
        if message:
            Reporter().error(message)
        sys.exit(code)


def _explain(error: Exception) -> tuple[str, int]:
    """Return what is said of an error, and the exit code."""
    if isinstance(error, IbmdError):
        process = Process()
        with suppress(UsageError):  # where the launcher's variables are what is wrong
            process = this_process()
        if not (process.connected and process.rank > 0):
            return str(error), error.exit_code
        # Settings are the same in all of several processes, and the first tells what is wrong with them.
        usage = isinstance(error, UsageError)
        return "" if usage else f"process {process.rank + 1} of {process.count}: {error}", error.exit_code
    if isinstance(error, MemoryError | RuntimeError):
        words = str(error)
        if isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words:
            return "out of memory: lower --batch-size or --micro-batch", 5
        if "gloo/" in words or "NCCL" in words:
            return "another process of this run ended, and this one with it; the same command continues", 1
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"disk full while writing {error.filename or 'a file'}: free some space and run again", 1
        return f"{error.filename or 'system'}: {error.strerror or error}", 1
    return f"{type(error).__name__}: {error} (--debug shows where)", 1  # a fault of ours: still one line
