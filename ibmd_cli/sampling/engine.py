"""PyTorch models as engines of a `Translator`: NumPy arrays in and out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ibmd_cli.data.degradations import fill_hole
from ibmd_cli.devices import resolve_device, single_threaded
from ibmd_cli.method.distillation import Sources
from ibmd_cli.method.noise import stream
from ibmd_cli.models.folder import load_student
from ibmd_cli.models.model import StudentModel, TeacherModel
from ibmd_cli.models.references import TeacherRef, load_teacher
from ibmd_cli.processes import this_process


class TorchEngine:
    """Runs a student or a teacher; methods as `translator.Engine` says.

    Args:
        model: on the device where it is to run.
        nfe: network calls per image; None for what the model says.
        sampler: of a teacher, see `samplers.SAMPLERS`; None for what it says.
        options: of the sampler.

    Raises:
        UsageError: a student does not know so many calls.
    """

    def __init__(
        self,
        model: StudentModel | TeacherModel,
        nfe: int | None = None,
        sampler: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.config, self.name = model, model.config, model.name
        self.image_size, self.source_scale = model.image_size, model.source_scale
        if isinstance(model, TeacherModel):
            self.nfe = nfe or int(model.config["sampling"]["nfe"])
            self.settings = {"nfe": self.nfe, "sampler": sampler, **(options or {})}
        else:
            self.nfe = nfe or model.nfe
            model.setup_for(self.nfe)  # refuses too many
            self.settings = {"nfe": self.nfe}
        self.place = next(model.predictor.parameters()).device
        self.device = str(self.place)

    def digest(self) -> str:
        """Return the SHA-256 of the weights' file; nothing if they come from none."""
        return self.model.digest() if self.model.weights else ""

    stream = staticmethod(stream)
    spread = staticmethod(single_threaded)

    def fill_hole(self, x_T: np.ndarray, mask: np.ndarray, rng: Sequence[torch.Generator]) -> np.ndarray:
        """Fill the holes of sources as the model expects them."""
        return fill_hole(torch.from_numpy(x_T), torch.from_numpy(mask), self.config["mask"]["fill"], rng).numpy()

    def translate(
        self,
        x_T: np.ndarray,
        rng: Sequence[torch.Generator],
        mask: np.ndarray | None = None,
        label: np.ndarray | None = None,
    ) -> np.ndarray:
        """Translate sources; too many of them for the memory raise MemoryError."""
        source, hole, kind = (None if v is None else torch.from_numpy(v).to(self.place) for v in (x_T, mask, label))
        assert source is not None
        try:
            with torch.inference_mode():
                return self.model.translate(Sources(source, kind, hole), rng, **self.settings).cpu().numpy()
        except RuntimeError as error:
            words = str(error)
            if "out of memory" not in words and "can't allocate memory" not in words:
                raise
        if self.place.type == "cuda":  # here, the error holds no tensors any more
            torch.cuda.empty_cache()
        raise MemoryError(words)


def load_engine(
    model: str | TeacherRef,
    *,
    device: str = "auto",
    quiet: bool = False,
    **settings: Any,
) -> TorchEngine:
    """Load a student by its reference, or a teacher, on its device.

    Args:
        model: which.
        device: see `devices.resolve_device`; with several processes, each takes a GPU of its own.
        quiet: show no progress of downloads.
        settings: of `TorchEngine`.

    Raises:
        NotAvailable, UsageError, IbmdError: see `folder.load_student` and `teachers.load_teacher`.
    """
    place = resolve_device(device)
    if place.type == "cuda" and place.index is None and (process := this_process()).launched:
        place = torch.device("cuda", process.local_rank)
    if isinstance(model, TeacherRef):
        return TorchEngine(load_teacher(model, device=place, quiet=quiet), **settings)
    student = load_student(model)
    student.to(place)
    return TorchEngine(student, **settings)
