"""An exported student, whatever its file: NumPy arrays in and out, noise, times, checks of its description.

Nothing here needs PyTorch.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from ibmd_cli.errors import IbmdError
from ibmd_cli.files import sha256
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
