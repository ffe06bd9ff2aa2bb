"""Signals while a run trains: the first lets it finish the update it is at, the second ends it at once."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ibmd_cli.processes import STOPPING, this_process

SAME = 2.0
"""Seconds in which a terminal's Ctrl-C reaches a launcher's process twice: from the terminal and from the launcher."""
NOTICE = b"stopping after this update; once more ends now\n"


@contextmanager
def interrupts(quiet: bool = False) -> Iterator[list[int]]:
    """Collect the signals that stop a program in a list, in place of stopping; the second one ends it with code 130.

    Args:
        quiet: do not say so on stderr.
    """
    received: list[int] = []
    twice, began = this_process().launched, 0.0

    def remember(number: int, _: Any) -> None:
        nonlocal began
        if received and not (twice and time.monotonic() - began < SAME):
            os._exit(130)
        if not received:
            began = time.monotonic()
            if not quiet:
                os.write(sys.__stderr__.fileno(), NOTICE)  # type: ignore[union-attr]  # not through its buffer
        received.append(number)

    before = {n: signal.signal(n, remember) for n in STOPPING if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
