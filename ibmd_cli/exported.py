"""Students that `ibmd export` wrote as ONNX or PyTorch programs, with NumPy arrays in and out, on the CPU.

`load_exported("student.onnx")` needs ONNX Runtime and NumPy alone. PyTorch is not imported, so it starts in a fraction
of a second. (A `.pt2` file needs PyTorch: see `programs`.)
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ibmd_cli.errors import IbmdError, NotAvailable
from ibmd_cli.normals import Normals

SUFFIXES = (".onnx", ".pt2")
INPUTS = ("x_T", "z", "eps", "mask", "label")
FORMAT_VERSION = 1
METADATA = "ibmd"
"""Name under which a file holds its `config.json`."""

Draw = Callable[[Sequence[int]], np.ndarray]
"""A random stream: returns standard normal numbers of the shape it is given, float32."""


class ExportedStudent(ABC):
    """A student that was exported.

    Args:
        config: the content of its `config.json`.
        file: where it was.
        inputs: the names of those tensors that it takes, of: x_T, z, eps, mask, label.

    Attributes:
        name: short name, for messages.
        image_size: height and width of the images it was trained on. Others may do, see `ibmd export`.
        source_scale: side of a result in units of its source's, which comes enlarged: 4 for 4× super-resolution.
        nfe: network calls per image.
    """

    def __init__(self, config: dict[str, Any], file: Path, inputs: Sequence[str]) -> None:
        self.config, self.file, self.inputs = config, file, tuple(inputs)
        sampling, image = config["sampling"], config["image"]
        self.name = str(config["name"])
        self.image_size = int(image["size"])
        self.source_scale = int(image.get("source_scale", 1))
        self.nfe = len(sampling["timesteps"])
        noise = sampling["noise"]
        self.noise_shape = (noise["channels"], noise["grid"], noise["grid"]) if noise["channels"] else None

    def translate(
        self, x_T: np.ndarray, rng: Sequence[Draw], mask: np.ndarray | None = None, label: np.ndarray | None = None
    ) -> np.ndarray:
        """Translate sources, with the noise that the student itself would draw.

        Args:
            x_T: float32 (B, 3, H, W) in [-1, 1].
            rng: a random stream for each image, see `stream`.
            mask: float32 (B, 1, H, W), 1 = hole; x_T is filled there as `config["mask"]["fill"]` says.
            label: class indices, int64 (B,).

        Returns:
            float32 (B, 3, H, W) in [-1, 1].
        """
        if mask is not None:
            x_T = np.where(mask > 0.5, self._filling(x_T, rng), x_T)
        z, eps = [], []  # drawn in the order of `distillation.translate`
        for n in range(self.nfe):
            if self.noise_shape is not None:
                z.append(np.stack([draw(self.noise_shape) for draw in rng]))
            if n + 1 < self.nfe:
                eps.append(np.stack([draw(x_T.shape[1:]) for draw in rng]))
        given = {"x_T": x_T, "mask": mask, "label": label}
        given |= {name: np.concatenate(parts, axis=1) for name, parts in (("z", z), ("eps", eps)) if parts}
        return self.run({name: np.ascontiguousarray(given[name]) for name in self.inputs})[0]

    def _filling(self, x_T: np.ndarray, rng: Sequence[Draw]) -> np.ndarray:
        fill = self.config["mask"]["fill"]
        if fill == "noise":
            return np.stack([draw(x_T.shape[1:]) for draw in rng])
        return np.full_like(x_T, {"zero": 0, "white": 1}[fill])

    @abstractmethod
    def stream(self, seed: int, *place: int | str) -> Draw:
        """Return the random stream of a place, as `noise.stream`: for an image its name and variant."""

    @abstractmethod
    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Compute x_0 from the tensors that the file takes, see `programs`; noise that it drew itself comes after."""


class OnnxStudent(ExportedStudent):
    """A student in an ONNX file.

    Args:
        file: that `ibmd export --format onnx` wrote.
        threads: of the network; None: OMP_NUM_THREADS, or one for each core.

    Raises:
        NotAvailable: ONNX Runtime is not installed.
        IbmdError: the file is no student, or damaged.
    """

    def __init__(self, file: Path, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise NotAvailable(f"{file}: needs ONNX Runtime: pip install 'ibmd-cli[onnx]'") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # widens int8 weights now, not in each run
        try:
            self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a class of its own for each cause, and no common one
            raise IbmdError(f"{file}: ONNX Runtime cannot read it ({str(error).splitlines()[0]})") from error
        metadata = self.session.get_modelmeta().custom_metadata_map
        super().__init__(check(metadata.get(METADATA, ""), file), file, [i.name for i in self.session.get_inputs()])

    def stream(self, seed: int, *place: int | str) -> Draw:
        """Return the random stream of a place, equal to PyTorch's to about 1.4e-6."""
        return Normals(seed, *place)

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Compute x_0, and what comes after it."""
        return self.session.run(None, inputs)


def load_exported(file: Path) -> ExportedStudent:
    """Load a student from an ONNX file or a PyTorch program, to translate with.

    Raises:
        NotAvailable: there is no such file, or what runs it is not installed.
        IbmdError: the file is no student of ibmd, is damaged, or draws its noise itself.
    """
    if not file.is_file():
        raise NotAvailable(f"no student {str(file)!r}: no such file")
    student = open_exported(file)
    if student.noise_shape is not None and "z" not in student.inputs:
        raise IbmdError(f"{file}: draws its noise itself, so that a seed has no say: export without --noise-inside")
    return student


def open_exported(file: Path, threads: int | None = None) -> ExportedStudent:
    """Load any file that `ibmd export` wrote as ONNX or a PyTorch program; `threads` are those of ONNX Runtime."""
    if file.suffix == ".onnx":
        return OnnxStudent(file, threads)
    from ibmd_cli.programs import ProgramStudent

    return ProgramStudent(file)


def check(text: str, file: Path) -> dict[str, Any]:
    """Read the configuration that a file holds.

    Raises:
        IbmdError: it is not that of a student, or of a newer format.
    """
    try:
        config = json.loads(text)
        version = config["format_version"] if config["format"] == "ibmd-student" else None
    except (ValueError, KeyError, TypeError):
        version = None
    if not isinstance(version, int):
        raise IbmdError(f"{file}: holds no student: expected a file that `ibmd export` wrote")
    if version > FORMAT_VERSION:
        written = config.get("ibmd_version", "?")
        raise IbmdError(f"{file}: format_version {version}, written by ibmd {written}: pip install -U ibmd-cli")
    return dict(config)
