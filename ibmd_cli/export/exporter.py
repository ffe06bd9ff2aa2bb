"""`ibmd export`: write a student as one file, run it back on real sources, and keep it only if it agrees."""

import math
import os
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ibmd_cli.data.degradations import fill_hole
from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.errors import IbmdError
from ibmd_cli.export.config import FORMATS, ExportConfig
from ibmd_cli.export.runner import open_exported
from ibmd_cli.export.torch_export import Unrolled
from ibmd_cli.files import atomic_file
from ibmd_cli.locks import Claims
from ibmd_cli.method.noise import randn, stream
from ibmd_cli.models.folder import load_student
from ibmd_cli.models.interface import noise_shapes
from ibmd_cli.models.model import StudentModel


class Tolerance(NamedTuple):
    """How much a file may differ from its student: at any pixel, on the scale [-1, 1], and on the whole, in dB."""

    max_difference: float
    psnr: float


TOLERANCE = {
    "fp32": Tolerance(0.001, 80),
    "fp16": Tolerance(0.02, 60),
    "bf16": Tolerance(0.1, 45),
    "int8": Tolerance(0.25, 40),
}
"""By the dtype of the weights. A grey level of 8 bits is 0.0078; 40 dB is a mean error of about one."""

PIXELS = 32 * 32 * 32  # in the images that are compared
TIMED = 8  # images in the batch that is timed, at most


class Exporter:
    """Writes one student to files, and keeps those that agree with it.

    Args:
        reference: of the student.
        note: told of each step before it begins.

    Raises:
        NotAvailable: there is no such student.
    """

    def __init__(self, reference: str, note: Callable[[str], None] = lambda text: None) -> None:
        self.student, self.note = load_student(reference), note
        self.graphs: dict[tuple[int, bool], Any] = {}

    def export(self, config: ExportConfig) -> dict[str, Any]:
        """Write a file. Unless it may be replaced, it is claimed before work begins, and one that appears stays.

        Returns:
            Its size, what `compare` finds, and what can be done with it `next`.

        Raises:
            UsageError: there is no such opset.
            NotAvailable: what the format needs is not installed.
            IbmdError: the file does not agree with the student; it is not left behind. Or another command writes it.
        """
        output, replace, steps = config.path, config.on_exists == "overwrite", count(1)
        mend = "give another --output, or --on-exists overwrite"

        def say(what: str) -> None:
            self.note(f"{output}: step {next(steps)} of {FORMATS[str(config.format)].steps}, {what}")

        with Claims() as claims:
            if not replace and not claims.take(output):
                there = "exists" if os.path.lexists(output) else "another export is writing it"
                raise IbmdError(f"{output}: {there}; {mend}")
            try:
                with atomic_file(output, replace) as new:
                    report = self._write_checked(config, new, say)
                    report["bytes"] = new.stat().st_size
            except FileExistsError as error:
                raise IbmdError(f"{output}: appeared meanwhile, and is left as it is; {mend}") from error
        use = FORMATS[str(config.format)].use.format(output=output)
        if config.noise_inside:
            use = "its description says how it is called: ibmd sample cannot give it noise"
        return {
            "schema": 1,
            "output": str(output),
            "format": config.format,
            "dtype": config.dtype,
            **report,
            "next": use,
        }

    def _write_checked(self, config: ExportConfig, new: Path, say: Callable[[str], None]) -> dict[str, Any]:
        """Write a file and run it back; returns what `compare` finds."""
        row = FORMATS[str(config.format)]
        with TemporaryDirectory() as folder:
            file = Path(folder) / "student.onnx" if row.pack else new
            row.write(self, config, file, say)
            say("running it back, and comparing it with the student")
            report = compare(self.student, file, config.noise_inside, config.seed, row.run)
            exact = config.format == "safetensors" and config.dtype == "fp32"  # a copy
            allowed = Tolerance(0.0, math.inf) if exact else TOLERANCE[config.dtype]
            psnr = math.inf if report["psnr"] is None else report["psnr"]
            if not (report["max_difference"] <= allowed.max_difference and psnr >= allowed.psnr):  # also if it is NaN
                raise IbmdError(
                    f"{config.output}: differs from {config.student} by up to {report['max_difference']:.3g}, "
                    f"{psnr:.1f} dB; {config.dtype} may by {allowed.max_difference:g}, {allowed.psnr:g} dB; "
                    f"nothing was written. Try --dtype fp32"
                )
            if row.pack:
                say("packing it with its runtime into a page")
                row.pack(self.student, file, new)
        return report


def compare(
    student: StudentModel, file: Path, noise_inside: bool = False, seed: int = 0, run_file: Any = None
) -> dict[str, Any]:
    """Run a student and an exported file on the same real sources and the same noise, on the CPU.

    One image comes alone, then the others together; and, for a file that holds a graph, one of another size.

    Args:
        student: on the CPU.
        file: that was exported.
        noise_inside: whether it draws its noise itself; the student then gets what it drew.
        seed: of the noise.
        run_file: `Format.run`; None: by the file's ending.

    Returns:
        `images`; `max_difference` and `mean_difference` over pixels on the scale [-1, 1], and `psnr` of the file
        against the student in dB (None if they are equal); `ms_per_image` of each, in batches of `batch` images.
    """
    own = _runner(student)
    if run_file is not None:
        other = run_file(file)
    elif file.suffix == ".safetensors":
        other = _runner(load_student(str(file)))
    else:
        other = open_exported(file, torch.get_num_threads()).run
    x_T = sources(student)
    batches = [x_T[:1], x_T[1:]]
    if file.suffix != ".safetensors":
        step = student.predictor.backbone.size_multiple
        batches.append(F.interpolate(x_T[:1], (x_T.shape[2] + step, x_T.shape[3] + 2 * step)))
    differences = []
    for batch in batches:
        inputs = make_inputs(student, batch, seed, noise_inside)
        theirs, *noise = other(inputs)
        drawn = dict(zip(noise_shapes(student, batch.shape[1:]), noise, strict=True)) if noise_inside else {}
        differences.append(np.abs(theirs - own({**inputs, **drawn})[0]).ravel())
    difference = np.concatenate(differences).astype(np.float64)
    mse = float(np.mean(difference**2))

    timed = x_T[1 : 1 + TIMED]
    times = {"student": math.inf, "exported": math.inf}
    for _ in range(3):  # by turns, as other programs may slow both down
        for name, run, inside in (("student", own, False), ("exported", other, noise_inside)):
            inputs = make_inputs(student, timed, seed, inside)
            began = time.perf_counter()
            run(inputs)
            times[name] = min(times[name], 1000 * (time.perf_counter() - began) / len(timed))
    return {
        "images": len(x_T),
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "psnr": 10 * math.log10(4 / mse) if mse else None,
        "ms_per_image": times,
        "batch": len(timed),
        "threads": torch.get_num_threads(),
    }


Arrays = dict[str, np.ndarray]


def _runner(student: StudentModel) -> Callable[[Arrays], list[np.ndarray]]:
    module = Unrolled(student)

    @torch.no_grad()
    def run(inputs: Arrays) -> list[np.ndarray]:
        return [module(**{name: torch.from_numpy(v) for name, v in inputs.items()}).numpy()]

    return run


def sources(student: StudentModel) -> Tensor:
    """Return held-out sources for a student, float32 (B, 3, H, W) in [-1, 1]: at least three, fewer of large ones.

    They are those of the embedded data that it was distilled from, or drawings, enlarged or reduced to its size.
    """
    kind, _, name = str((student.config.get("teacher") or {}).get("reference")).partition(":")
    pairs = embedded_pairs(name if kind == "builtin" else "outline2emoji")
    side = student.image_size
    x_T = pairs.x_T[: max(3, PIXELS // side**2)].float() / 127.5 - 1
    return x_T if x_T.shape[-1] == side else F.interpolate(x_T, (side, side), mode="area")


def make_inputs(student: StudentModel, x_T: Tensor, seed: int, noise_inside: bool = False) -> Arrays:
    """Return all inputs of an exported student for sources (B, 3, H, W): noise, and holes and classes by a rule."""
    rng = stream(seed, "export")
    inputs = {}
    if not noise_inside:
        for name, shape in noise_shapes(student, x_T.shape[1:]).items():
            inputs[name] = randn((len(x_T), *shape), rng)
    if student.config.get("mask"):
        mask = torch.zeros_like(x_T[:, :1])
        mask[..., x_T.shape[2] // 4 : -x_T.shape[2] // 4, x_T.shape[3] // 4 : -x_T.shape[3] // 4] = 1
        inputs["mask"] = mask
        x_T = fill_hole(x_T, mask, student.config["mask"]["fill"], rng)
    if student.config.get("classes"):
        inputs["label"] = torch.arange(len(x_T)) % student.config["classes"]
    return {name: v.numpy() for name, v in {"x_T": x_T.contiguous(), **inputs}.items()}
