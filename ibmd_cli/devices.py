"""The devices that networks run on."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

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
