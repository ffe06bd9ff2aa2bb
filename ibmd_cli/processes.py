"""Processes that work together: who this one is among them, how they are started, what they tell each other.

PyTorch and Accelerate are imported only where several processes are started.
"""

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ibmd_cli.errors import IbmdError, UsageError

if TYPE_CHECKING:
    import torch

AllGather = Callable[[Any], list[Any]]

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a program to end: Ctrl-C, the system, a terminal that is closed."""


def end_as_ctrl_c_does() -> None:
    """Have every signal that asks this program to end raise KeyboardInterrupt; one that is ignored (nohup) stays so."""
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def ignore_signals() -> None:
    """Have them ignored from now on, for a program that is ending: it needs no other reason to."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def count_processes(processes: str, device: "torch.device") -> int:
    """Return how many processes `--processes` asks for: a number, or "all" for as many as there are GPUs.

    Raises:
        UsageError: no such number of processes can be started.
    """
    import torch

    gpus = torch.cuda.device_count()
    if processes == "all" and not gpus:
        raise UsageError("--processes all: PyTorch sees no GPU; give a number, e.g. --processes 2")
    if processes != "all" and not (processes.isdecimal() and int(processes) > 0):
        raise UsageError(f"--processes {processes!r}: expected a number or all")
    count = gpus if processes == "all" else int(processes)
    if device.type == "cuda" and count > gpus:
        raise UsageError(f"--processes {processes}: PyTorch sees {gpus} GPU(s); give at most that, or --device cpu")
    return count


def relaunch(count: int, arguments: list[str]) -> int:
    """Run `ibmd ARGUMENTS` in `count` ≥ 2 processes, one a GPU where there are GPUs, and return the exit code.

    The launcher runs in this process, so that it passes on signals; the processes it starts find RANK in their
    environment and do not launch again.

    Raises:
        IbmdError: one of them was killed.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # "multi_gpu" is Accelerate's word for torchrun; with --device cpu the processes talk through gloo.
    options = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "--main_process_port", str(port)]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    before = logging.root.manager.disable
    logging.disable()  # the launcher would tell of every signal, and print a traceback
    try:
        launch_command(launch_command_parser().parse_args([*options, "-m", "ibmd_cli", *arguments]))
    except ChildFailedError as error:
        # The launcher ends the others with SIGTERM, and they may fail for want of the one that was killed.
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:
                raise IbmdError(
                    f"process {rank + 1} of {count} was killed (signal {-failure.exitcode}); the same command continues"
                ) from None
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 1
    except (SignalException, KeyboardInterrupt):
        return 130
    finally:
        logging.disable(before)
    return 0


@dataclass(frozen=True)
class Process:
    """This process among those that a launcher (`torchrun`, `accelerate launch`, `--processes`) started together.

    Attributes:
        rank: its number, from 0; the first reports for all.
        count: how many there are.
        local_rank: its number among those on this machine, and that of its GPU.
        local_count: how many are on this machine.
        launched: whether a launcher started it.
        connected: whether there are others that it can reach.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    launched: bool = False
    connected: bool = False


def this_process() -> Process:
    """Read the launcher's variables; nothing else in the package does.

    Raises:
        UsageError: they are not numbers, or contradict each other.
    """
    environ = os.environ
    rank, count = _rank("RANK", "WORLD_SIZE", "1")
    local = _rank("LOCAL_RANK", "LOCAL_WORLD_SIZE", str(count) if "LOCAL_RANK" in environ else "1")
    return Process(rank, count, *local, "RANK" in environ, count > 1 and "MASTER_ADDR" in environ)


def _rank(name: str, count_name: str, default: str) -> tuple[int, int]:
    """Return a number, and of how many, from two variables."""
    rank, count = os.environ.get(name, "0"), os.environ.get(count_name, default)
    if not (rank.isdecimal() and count.isdecimal() and int(rank) < int(count)):
        raise UsageError(f"{name}={rank} and {count_name}={count}: expected 0 ≤ {name} < {count_name}; or unset both")
    return int(rank), int(count)


@contextmanager
def connect() -> Iterator[AllGather]:
    """Connect the processes of a launcher, and give them an all-gather: a function that every one must call.

    It takes a picklable value and returns those of all processes by rank, when the last has called it. One process
    alone, or one that cannot reach the others, gets its own value back.
    """
    process = this_process()
    if not process.connected:
        yield lambda value: [value]
        return

    import torch.distributed as dist  # several processes: the seconds that it takes do not matter

    def all_gather(value: Any) -> list[Any]:
        values = [None] * process.count
        dist.all_gather_object(values, value)
        return values

    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield all_gather
    finally:
        dist.destroy_process_group()
