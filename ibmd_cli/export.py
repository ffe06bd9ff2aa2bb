"""`ibmd export`: write a student as one file, run it back on real sources, and keep it only if it agrees."""

import time
from pathlib import Path
from typing import Any

import torch

from ibmd_cli.distillation import Sources
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.files import atomic_file
from ibmd_cli.models import DTYPES, Student, load_model, save_weights
from ibmd_cli.mosaics import embedded_pairs
from ibmd_cli.noise import stream

TOLERANCE = {"fp32": 0.0, "fp16": 0.02, "bf16": 0.1}
"""Largest difference allowed at any pixel, on the scale [-1, 1]. fp32 is a copy, so it must agree to the bit."""


def export(
    reference: str, dtype: str, output: Path, overwrite: bool, device: torch.device, seed: int
) -> dict[str, Any]:
    """Write a student to one safetensors file with its configuration inside.

    Args:
        reference: of the student.
        dtype: of the weights in the file: "fp32", "fp16" or "bf16". They are read back as float32.
        output: the file.
        overwrite: whether a file that is there may be replaced.
        device: to compare on.
        seed: of the noise.

    Returns:
        Sizes, times and the differences between the file and the student on the embedded test sources.

    Raises:
        UsageError: an unknown dtype, or `output` exists.
        IbmdError: the file does not agree with the student; it is not left behind.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if output.suffix != ".safetensors":
        raise UsageError(f"--output {output}: expected a name that ends in .safetensors")
    if output.exists() and not overwrite:
        raise UsageError(f"{output}: exists; give another --output, or --on-exists overwrite")
    student = load_model(reference, "student")
    assert isinstance(student, Student)
    with atomic_file(output) as new:
        save_weights(student, new, dtype)
        report = compare(student, new, device, seed)
        if not report["max_difference"] <= TOLERANCE[dtype]:  # also if it is not a number
            raise IbmdError(
                f"{output}: differs from {reference} by up to {report['max_difference']:.4g}, more than "
                f"{TOLERANCE[dtype]:g}; nothing was written. Try --dtype fp32"
            )
        size = new.stat().st_size
    return {"schema": 1, "output": str(output), "format": "safetensors", "dtype": dtype, "bytes": size, **report}


def compare(student: Student, file: Path, device: torch.device, seed: int, images: int = 32) -> dict[str, Any]:
    """Run a student and an exported file on the same real sources and the same noise.

    Returns:
        `max_difference` and `mean_difference` over pixels on the scale [-1, 1], `psnr` of the file against the
        student in dB, and `ms_per_image` of each.
    """
    size = student.image_size
    x_T = embedded_pairs().x_T[:images].float() / 127.5 - 1
    x_T = torch.nn.functional.interpolate(x_T, (size, size), mode="area") if x_T.shape[-1] != size else x_T
    exported = load_model(f"{file}", "student")
    outputs, times = [], []
    for model in (student, exported):
        assert isinstance(model, Student)
        model.to(device)
        batch = Sources(x_T.to(device))
        model.translate(batch, stream(seed))  # the first call is slower: not timed
        began = time.perf_counter()
        outputs.append(model.translate(batch, [stream(seed, "export", i) for i in range(len(x_T))]).cpu())
        times.append(1000 * (time.perf_counter() - began) / len(x_T))
    difference = (outputs[0] - outputs[1]).abs()
    mse = float(difference.square().mean())
    return {
        "images": len(x_T),
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "psnr": 10 * float(torch.log10(torch.tensor(4 / mse))) if mse else None,
        "ms_per_image": {"student": times[0], "exported": times[1]},
    }
