"""Devices that networks run on, and how much memory they have."""

import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from ibmd_cli.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """Return the device that `--device` names.

    Args:
        name: `cpu`, `cuda`, `cuda:N`, `mps`, or `auto`: the first of cuda, mps and cpu that is there.

    Raises:
        UsageError: the name is none of these, or this machine has no such device.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name):
        raise UsageError(f"--device {name!r}: expected auto, cpu, cuda, cuda:N or mps")
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= cuda:
        raise UsageError(f"--device {name}: PyTorch sees {cuda or 'no'} CUDA device{'s' * (cuda > 1)}; use auto or cpu")
    if device.type == "mps" and not mps:
        raise UsageError("--device mps: PyTorch sees no Apple GPU; use auto or cpu")
    return device


def tune(device: torch.device) -> None:
    """Let a GPU use what training wants: TF32 for float32, and the fastest of cuDNN's kernels for each shape.

    TF32 keeps 10 of 23 bits of the factors of a product, and sums in float32.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


@contextmanager
def single_threaded() -> Iterator[int]:
    """Have each operation on the CPU use one thread, within the block; returns how many it used before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: on the GPU it trains on, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):  # not ru_maxrss, which begins with the peak of the process that started this
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def free_memory(device: torch.device) -> int:
    """Return how many bytes are free on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available
