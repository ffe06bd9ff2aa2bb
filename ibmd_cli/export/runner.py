"""Exported students at work, on the CPU: `load_exported("student.onnx")` or `.pt2`, also `hf://OWNER/REPO/FILE`.

For an ONNX file, ONNX Runtime and NumPy do: PyTorch is not imported, and it starts in a fraction of a second.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ibmd_cli.errors import IbmdError, NotAvailable
from ibmd_cli.export.exported import METADATA, Draw, ExportedStudent, check, check_seal
from ibmd_cli.hub import download, parse_hf
from ibmd_cli.method.numpy_noise import Normals

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
