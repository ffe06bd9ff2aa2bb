"""Signals while a run trains: the first is remembered, the second ends the process, ignored ones stay ignored."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from ibmd_cli.processes import STOPPING
from ibmd_cli.training.signals import interrupts


def script(body: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script in a process of its own."""
    head = "import os, signal, time\nfrom ibmd_cli.training import signals\nfrom ibmd_cli.training.signals import *\n"
    return subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("number", STOPPING)
def test_first_signal_is_remembered_and_said_once(number: int, capfd: pytest.CaptureFixture):
    before = {n: signal.getsignal(n) for n in STOPPING}
    with interrupts() as received:
        assert received == []
        os.kill(os.getpid(), number)
        assert received == [number]
    assert {n: signal.getsignal(n) for n in STOPPING} == before
    with interrupts(quiet=True) as received:
        os.kill(os.getpid(), number)
        assert received == [number]
    said = script(f"with interrupts(): os.kill(os.getpid(), {int(number)})")
    assert said.stderr == "stopping after this update; once more ends now\n"


@pytest.mark.parametrize("first", STOPPING)
@pytest.mark.parametrize("second", STOPPING)
def test_second_signal_ends_at_once_with_the_code_of_ctrl_c(first: int, second: int):
    ended = script(
        f"""
        with interrupts(quiet=True):
            os.kill(os.getpid(), {int(first)})
            os.kill(os.getpid(), {int(second)})
            print("still here")
        """
    )
    assert (ended.returncode, ended.stdout) == (130, "")


@pytest.mark.parametrize("number", STOPPING)
def test_ignored_signal_stays_ignored(number: int):
    ended = script(
        f"""
        signal.signal({int(number)}, signal.SIG_IGN)
        with interrupts() as received:
            os.kill(os.getpid(), {int(number)})
            os.kill(os.getpid(), {int(number)})
            print(received)
        """
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize(("same", "code"), [(1000.0, 0), (0.0, 130)])
def test_process_of_a_launcher_takes_signals_that_come_together_as_one(same: float, code: int):
    ended = script(
        f"""
        signals.SAME = {same}
        with interrupts(quiet=True) as received:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        """,
        RANK="0",
        WORLD_SIZE="2",
    )
    assert ended.returncode == code


def test_handlers_are_put_back_after_an_error():
    before = {n: signal.getsignal(n) for n in STOPPING}
    with pytest.raises(ZeroDivisionError), interrupts(quiet=True):
        1 / 0  # noqa: B018
    assert {n: signal.getsignal(n) for n in STOPPING} == before
