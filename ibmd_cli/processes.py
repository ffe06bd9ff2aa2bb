"""Processes that work together: who this one is among them, how they are started, what they tell each other.

PyTorch and Accelerate are imported only where several processes are started.
"""

import ctypes
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ibmd_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

Gather = Callable[[Any], list[Any]]


def count_processes(processes: str, device: "torch.device") -> int:
    """Return how many processes `--processes` asks for: a number, or "all" for as many as there are GPUs.

    Raises:
        UsageError: no such number of processes can be started.
    """
    import torch

    gpus = torch.cuda.device_count()
    if processes == "all" and not gpus:
        raise UsageError("--processes all: PyTorch sees no GPU; give a number, e.g. --processes 2")
    if processes != "all" and not (processes.isdigit() and int(processes) > 0):
        raise UsageError(f"--processes {processes!r}: expected a number or all")
    count = gpus if processes == "all" else int(processes)
    if device.type == "cuda" and count > gpus:
        raise UsageError(f"--processes {processes}: PyTorch sees {gpus} GPU(s); give at most that, or --device cpu")
    return count


def relaunch(count: int, arguments: list[str]) -> int:
    """Run `ibmd ARGUMENTS` in `count` ≥ 2 processes, one a GPU where there are GPUs, and return the exit code.

    The launcher runs in this process, so that it passes on signals; the processes it starts find RANK in their
    environment and do not launch again.
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
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would print a traceback
    try:
        launch_command(launch_command_parser().parse_args([*options, "-m", "ibmd_cli", *arguments]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 1
    except (SignalException, KeyboardInterrupt):
        return 130
    return 0


def place() -> tuple[int, int]:
    """Return the number of this process and how many there are: (0, 1) for one that was started alone.

    Raises:
        UsageError: RANK and WORLD_SIZE do not say so.
    """
    process, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (process.isdecimal() and processes.isdecimal() and int(process) < int(processes)):
        raise UsageError(f"RANK={process} and WORLD_SIZE={processes}: expected 0 ≤ RANK < WORLD_SIZE; or unset both")
    return int(process), int(processes)


@contextmanager
def company() -> Iterator[Gather]:
    """Give a function that lists what the processes of a launcher say, by their numbers; it waits for the last.

    All must call it, and the first reports for all at the end, since a launcher stops all processes as soon as one of
    them fails. A process that no launcher connects to others gets what it said itself.
    """
    _, processes = place()
    if processes == 1 or "MASTER_ADDR" not in os.environ:
        yield lambda value: [value]
        return

    import torch.distributed as dist  # several processes: the seconds that it takes do not matter

    def gather(value: Any) -> list[Any]:
        values = [None] * processes
        dist.all_gather_object(values, value)
        return values

    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield gather
    finally:
        dist.destroy_process_group()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
"""Parameters of glibc's `mallopt`: free bytes at the end of a heap, of which −1 is any number, are given back; blocks
that are larger are mapped by themselves, and given back when they are freed; how many such blocks there may be at a
time; how many heaps there may be for the threads."""
BLOCK = 32 << 20  # bytes: the most that glibc takes for M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Have all freed memory kept for the next tensors, where it would be given back to the system.

    Else the system maps and clears the pages of large tensors anew in each step.
    """
    _set(M_MMAP_MAX, 0)
    _set(M_TRIM_THRESHOLD, -1)


def share_freed_memory() -> None:
    """Have what one thread frees used by the next, and 64 MB of it kept; blocks above 32 MB are given back at once.

    Else each thread keeps a heap of its own, as large as it ever was, and the pages of a network's tensors are given
    back and cleared anew in each layer: a tenth of its time, where images are small.
    """
    _set(M_ARENA_MAX, 1)
    _set(M_MMAP_THRESHOLD, BLOCK)
    _set(M_TRIM_THRESHOLD, 2 * BLOCK)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(parameter, value)
