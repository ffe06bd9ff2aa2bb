"""The command line: four commands, each of which turns its flags into one call. Nothing heavy is imported here.

stdout carries results alone; progress, notes, warnings and errors go to stderr. Exit codes: 0 done, 1 failed,
2 usage, 3 some inputs failed, 4 model or data not available, 5 out of memory, 130 interrupted.
"""

import errno
import os
import sys
from contextlib import suppress
from typing import Any

from ibmd_cli.cli import distill, evaluate, export, sample
from ibmd_cli.cli.commands import app
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.processes import Process, end_as_ctrl_c_does, this_process
from ibmd_cli.reporting import Reporter, accept_any_text, is_plain

__all__ = ["app", "distill", "evaluate", "export", "main", "sample"]


def main() -> None:
    """Run the program; tell what the user can mend in one line, and keep tracebacks for --debug."""
    accept_any_text()
    reporter = Reporter()
    if is_plain(sys.stdout):
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # Typer writes escape codes where GITHUB_ACTIONS is set
    end_as_ctrl_c_does()  # exit code 130, no temporary file
    try:
        app()
    except IbmdError as error:
        # Settings are the same in all of several processes, and the first tells what is wrong with them.
        process = _process()
        other = process.connected and process.rank > 0
        message = f"process {process.rank + 1} of {process.count}: {error}" if other else str(error)
        _fail(reporter, message, error.exit_code, told=other and isinstance(error, UsageError))
    except KeyboardInterrupt:  # before a command is entered
        sys.exit(130)
    except MemoryError:
        _fail(reporter, "out of memory: lower --batch-size or --micro-batch", 5)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: say nothing more
        sys.exit(1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(reporter, f"disk full while writing {error.filename or 'a file'}: free some space and run again", 1)
        _fail(reporter, f"{error.filename or 'system'}: {error.strerror or error}", 1)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            _fail(reporter, f"{type(error).__name__}: {error} (--debug shows where)", 1)
        _fail(reporter, "out of memory: lower --batch-size or --micro-batch", 5)
    except Exception as error:  # a fault of ours: still one line
        _fail(reporter, f"{type(error).__name__}: {error} (--debug shows where)", 1)


def _process() -> Process:
    """Return `this_process()`; one alone where the launcher's variables are what is wrong."""
    with suppress(UsageError):
        return this_process()
    return Process()


def _fail(reporter: Reporter, message: str, exit_code: int, told: bool = False) -> Any:
    if "--debug" in sys.argv or os.environ.get("IBMD_DEBUG", "") not in ("", "0"):
        raise  # noqa: PLE0704 (always called while an exception is handled)
    if not told:
        reporter.error(message)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
