"""`--processes`: run the same command in several processes with Accelerate's own launcher."""

import logging
import socket

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ibmd_cli.errors import UsageError


def count_processes(processes: str, device: torch.device) -> int:
    """Return how many processes `--processes` asks for: a number, or "all" for as many as there are GPUs.

    Raises:
        UsageError: no such number of processes can be started.
    """
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
