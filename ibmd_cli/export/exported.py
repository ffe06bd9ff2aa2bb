"""Exported students at work, on the CPU: `load_exported("student.onnx")` or `.pt2`, also `hf://OWNER/REPO/FILE`.

NumPy arrays go in and come out. For an ONNX file, ONNX Runtime does: PyTorch is not imported.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ibmd_cli.errors import IbmdError, NotAvailable
from ibmd_cli.files import sha256
from ibmd_cli.hub import download, parse_hf
from ibmd_cli.method.numpy_noise import Normals
from ibmd_cli.models import FORMAT_VERSION

INPUTS = ("x_T", "z", "eps", "mask", "label")
METADATA = "ibmd"
"""Name under which a file holds its `config.json`."""

SEAL = b"\x72\x4f\x0a\x0bibmd.sha256\x12\x40"
"""Begins the last entry of an ONNX file's metadata (field 14 of a ModelProto, of 79 bytes); 64 digits follow."""

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
        size_multiple: height and width of sources are multiples of it.
        device: "cpu".

    Raises:
        IbmdError: `config` does not describe a student.
    """

    device = "cpu"

    def __init__(self, config: dict[str, Any], file: Path, inputs: Sequence[str]) -> None:
        self.config, self.file, self.inputs = config, file, tuple(inputs)
        try:
            sampling, image = config["sampling"], config["image"]
            self.name = str(config["name"])
            self.image_size = int(image["size"])
            self.source_scale = int(image.get("source_scale", 1))
            self.nfe = len(sampling["timesteps"])
            network = config["network"]
            self.size_multiple = network.get("patch_size", 1) * 2 ** (len(network["channel_mult"]) - 1)
            noise = sampling["noise"]
            self.noise_shape = (noise["channels"], noise["grid"], noise["grid"]) if noise["channels"] else None
        except (KeyError, TypeError, ValueError) as error:
            raise IbmdError(f"{file}: its configuration does not describe a student ({error!r})") from error

    def translate(
        self, x_T: np.ndarray, rng: Sequence[Draw], mask: np.ndarray | None = None, label: np.ndarray | None = None
    ) -> np.ndarray:
        """Translate sources, with the noise that the student itself would draw.

        Args:
            x_T: float32 (B, 3, H, W) in [-1, 1]; holes filled, see `fill_hole`.
            rng: a random stream for each image, see `stream`.
            mask: float32 (B, 1, H, W), 1 = hole.
            label: class indices, int64 (B,).

        Returns:
            float32 (B, 3, H, W) in [-1, 1].

        Raises:
            IbmdError: x_T has another shape, or H and W are no multiples of `size_multiple`.
        """
        multiple, sides = self.size_multiple, x_T.shape[2:]
        if x_T.ndim != 4 or x_T.shape[1] != 3 or any(side % multiple or not side for side in sides):
            wanted = f"(B, 3, H, W), height and width multiples of {multiple}"
            raise IbmdError(f"{self.file.name}: x_T of shape {x_T.shape}: expected {wanted}")
        if not len(x_T):
            return x_T.astype(np.float32)
        z, eps = [], []  # drawn in the order of `distillation.translate`
        for n in range(self.nfe):
            if self.noise_shape is not None:
                z.append(np.stack([draw(self.noise_shape) for draw in rng]))
            if n + 1 < self.nfe:
                eps.append(np.stack([draw(x_T.shape[1:]) for draw in rng]))
        given = {"x_T": x_T, "mask": mask, "label": label}
        given |= {name: np.concatenate(parts, axis=1) for name, parts in (("z", z), ("eps", eps)) if parts}
        return self.run({name: np.ascontiguousarray(given[name]) for name in self.inputs})[0]

    def digest(self) -> str:
        """Return the SHA-256 of the file."""
        return sha256(self.file)

    def fill_hole(self, x_T: np.ndarray, mask: np.ndarray, rng: Sequence[Draw]) -> np.ndarray:
        """Fill the holes of sources as the student expects them, before `translate`; see `degradations.fill_hole`."""
        fill = self.config["mask"]["fill"]
        if fill == "noise":
            filling = np.stack([draw(x_T.shape[1:]) for draw in rng])
        else:
            filling = np.full_like(x_T, {"zero": 0, "white": 1}[fill])
        return np.where(mask > 0.5, filling, x_T)

    @abstractmethod
    def stream(self, seed: int, *place: int | str) -> Draw:
        """Return the random stream of a place, as `noise.stream`: for an image its name and variant."""

    @abstractmethod
    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Compute x_0 from the tensors that the file takes, see `programs`; noise that it drew itself comes after."""

    @abstractmethod
    def spread(self) -> AbstractContextManager[int]:
        """Give each batch one thread of the CPU, see `translating.Engine`."""


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


def sealed(content: bytes) -> bytes:
    """Add to the bytes of an ONNX file the SHA-256 of all before it, as one more entry of its metadata."""
    return content + SEAL + hashlib.sha256(content).hexdigest().encode()


def check_seal(file: Path) -> None:
    """Compare the content of an ONNX file with the SHA-256 at its end, if there is one: ONNX itself has none.

    Raises:
        IbmdError: they differ.
    """
    content = file.read_bytes()
    body, seal = content[: -len(SEAL) - 64], content[-len(SEAL) - 64 :]
    if seal.startswith(SEAL) and seal != sealed(body)[len(body) :]:
        raise IbmdError(f"{file}: damaged: its content is not what was written; export or fetch it again")


SUFFIXES = (".onnx", ".pt2")
"""Endings of the names of such files."""


def is_exported(reference: str) -> bool:
    """Tell whether a reference names such a file, on this machine or on the Hub."""
    if reference.startswith("hf://"):
        reference = parse_hf(reference)[2] or ""
    return reference.endswith(SUFFIXES)


def load_exported(reference: str | Path, quiet: bool = False) -> ExportedStudent:
    """Load a student from an ONNX file or a PyTorch program, to translate with.

    Args:
        reference: a path, or `hf://OWNER/REPO[@REVISION]/FILE`.
        quiet: show no progress of a download.

    Raises:
        NotAvailable: there is no such file, or what runs it is not installed.
        IbmdError: the file is no student of ibmd, is damaged, or draws its noise itself.
    """
    if str(reference).startswith("hf://"):
        repo, revision, name = parse_hf(str(reference))
        file = download(repo, name or "", revision=revision, quiet=quiet)
    else:
        file = Path(reference)
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
    from ibmd_cli.export.torch_export import ProgramStudent

    return ProgramStudent(file)


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
        self.threads = threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
        check_seal(file)
        self.session = _session(file, self.threads)
        metadata = self.session.get_modelmeta().custom_metadata_map
        super().__init__(check(metadata.get(METADATA, ""), file), file, [i.name for i in self.session.get_inputs()])

    def stream(self, seed: int, *place: int | str) -> Draw:
        """Return the random stream of a place, equal to PyTorch's to about 1.4e-6."""
        return Normals(seed, *place)

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Compute x_0, and what comes after it."""
        return self.session.run(None, inputs)

    @contextmanager
    def spread(self) -> Iterator[int]:
        """Give each batch one thread of the CPU, see `translating.Engine`."""
        session = self.session
        if self.threads != 1:
            self.session = _session(self.file, threads=1)
        try:
            yield self.threads or os.cpu_count() or 1
        finally:
            self.session = session


def _session(file: Path, threads: int) -> Any:
    """Open an ONNX file for so many threads; 0: one for each core."""
    try:
        import onnxruntime
    except ImportError as error:
        raise NotAvailable(f"{file}: needs ONNX Runtime: pip install 'ibmd-cli[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # widens int8 weights now, not in each run
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a class of its own for each cause, and no common one
        raise IbmdError(f"{file}: ONNX Runtime cannot read it ({str(error).splitlines()[0]})") from error
