"""Accelerate for a run: device, precision, processes, trackers; and whether the settings fit them."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from ibmd_cli.devices import tune
from ibmd_cli.errors import UsageError
from ibmd_cli.processes import this_process
from ibmd_cli.training.config import AUTO, DistillConfig


def check_processes(config: DistillConfig, processes: int) -> None:
    """Raise a UsageError unless the batch can be shared by so many processes."""
    share, rest = divmod(config.batch_size, processes)
    micro_batch = 1 if config.micro_batch == AUTO else int(config.micro_batch) or share
    if rest or share % micro_batch:
        raise UsageError(
            f"--batch-size {config.batch_size} is not a multiple of {processes} process(es) × "
            f"--micro-batch {micro_batch}: choose a multiple"
        )
    if config.fsdp and processes == 1:
        raise UsageError("--fsdp splits the networks over several processes, and there is one: add --processes N")


def make_accelerator(config: DistillConfig, out: Path, device: torch.device) -> Accelerator:
    """Return Accelerate's view of a run: device, precision, processes and trackers.

    Raises:
        UsageError: the precision is not for the device, the tracker is not installed, or `accelerate config` asks for a
            way of splitting networks that is not `--fsdp`.
    """
    if config.precision == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU: on a CPU use fp32 or bf16")
    if config.track and find_spec(config.track) is None:
        raise UsageError(f"--track {config.track}: it is not installed: pip install {config.track}")
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UsageError(
                f"ACCELERATE_USE_{name}: turn it off in `accelerate config`: --fsdp splits the networks over processes"
            )
    if device.type == "cuda" and device.index is not None and not this_process().launched:
        torch.cuda.set_device(device)  # the one that Accelerate takes
    tune(device)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with=config.track or None,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        project_config=ProjectConfiguration(str(out), logging_dir=str(out / "tensorboard")),
    )
