"""`--processes`: start the same command in several processes with Accelerate's own launcher."""

import socket
import subprocess
import sys

import torch

from ibmd_cli.errors import UsageError


def relaunch(processes: str, arguments: list[str]) -> int:
    """Run `ibmd ARGUMENTS` in several processes, one a GPU where there are GPUs, and return the exit code.

    Args:
        processes: a number, or "all" for as many as there are GPUs.
        arguments: of the command line; a process that finds itself launched ignores `--processes` in them.

    Raises:
        UsageError: no such number of processes can be started.
    """
    gpus = torch.cuda.device_count()
    if processes == "all" and not gpus:
        raise UsageError("--processes all: PyTorch sees no GPU; give a number, e.g. --processes 2")
    if processes != "all" and not (processes.isdigit() and int(processes) > 0):
        raise UsageError(f"--processes {processes!r}: expected a number or all")
    count = gpus if processes == "all" else int(processes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # "multi_gpu" is Accelerate's word for torchrun; with --device cpu the processes talk through gloo.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count), "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    launch += ["--multi_gpu"] if count > 1 else []
    return subprocess.run([*launch, "-m", "ibmd_cli", *arguments]).returncode
