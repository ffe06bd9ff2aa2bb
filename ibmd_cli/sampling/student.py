"""A student in Python: images or tensors in, the same out."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from PIL import Image
from torch import Tensor

from ibmd_cli.devices import resolve_device
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.export.exported import ExportedStudent
from ibmd_cli.export.runner import is_exported, load_exported
from ibmd_cli.images.decode import to_picture
from ibmd_cli.models import model as models
from ibmd_cli.models.folder import load_student
from ibmd_cli.sampling.engine import TorchEngine
from ibmd_cli.sampling.plan import Job
from ibmd_cli.sampling.translator import Engine, Translator


class Student:
    """A one-step image translator, to be called.

        student = Student.from_pretrained("builtin:outline2emoji")
        coloured = student(Image.open("drawing.png"))

    Args:
        model: as `folder.load_student` returns it, on its device; or as `runners.load_exported` does.
    """

    def __init__(self, model: models.StudentModel | ExportedStudent) -> None:
        self.model = model
        self.engine: Engine = model if isinstance(model, ExportedStudent) else TorchEngine(model)

    @classmethod
    def from_pretrained(cls, reference: str = "builtin:outline2emoji", device: str = "auto") -> "Student":
        """Load a student.

        Args:
            reference: `builtin:NAME`, `hf://OWNER/REPO[/FILE]`, the path of a model folder, of a run folder, or of a
                file that `ibmd export` wrote.
            device: "auto", "cpu", "cuda", "cuda:N" or "mps".

        Raises:
            NotAvailable: there is no such model.
            UsageError: there is no such device.
            IbmdError: the model is damaged, or is a teacher.
        """
        if is_exported(reference):
            if device not in ("auto", "cpu"):
                raise UsageError(f"device {device!r}: {reference} runs on the CPU")
            return cls(load_exported(reference))
        model = load_student(reference)
        model.to(resolve_device(device))
        return cls(model)

    @overload
    def __call__(self, images: Image.Image, **options: Any) -> Image.Image: ...
    @overload
    def __call__(self, images: Sequence[Image.Image], **options: Any) -> list[Image.Image]: ...
    @overload
    def __call__(self, images: Tensor, **options: Any) -> Tensor: ...

    def __call__(  # type: ignore[misc]
        self,
        images: Image.Image | Sequence[Image.Image] | Tensor,
        *,
        seed: int = 0,
        names: Sequence[str] | None = None,
        fit: str = "pad",
        restore_size: bool = False,
        batch_size: int = 16,
        mask: Image.Image | Tensor | None = None,
        label: int | None = None,
    ) -> Image.Image | list[Image.Image] | Tensor:
        """Translate images.

        Args:
            images: a Pillow image of any mode and size, several, or a float tensor (B, 3, H, W) in [-1, 1], with H and
                W the model's size (for 4× super-resolution: a quarter of it), or larger with `fit="tile"`.
            seed: of the noise.
            names: name the noise of each image, as file names do on the command line. Unless given: "0", "1", …
            fit: "pad", "stretch", "crop" or "tile", see `images.fit`; tensors are not scaled.
            restore_size: give Pillow images their own size back. Otherwise results have the model's, with "tile" their
                own (for 4× super-resolution: four times that).
            batch_size: images at a time; on a CPU, the model's image size decides alone.
            mask: hole for models that fill one: a Pillow image, white = hole; for a tensor, (B, 1, H, W), 1 = hole.
            label: class, for models that have classes.

        Returns:
            What `images` is: an RGB image, a list of them, or a tensor (B, 3, H', W') in [-1, 1] on the CPU. With the
            same seed, name and image the same result, whatever else is in the call (bit-equal on a CPU).

        Raises:
            UsageError: no such `fit`.
            IbmdError: `images` is something else, an image is damaged, or a tensor has the wrong shape or NaNs; the
                model needs a mask or label, or does not take one; or there are not as many names as images.
        """
        _check_images(images)
        translator = Translator(self.engine, seed=seed, fit=fit, restore_size=restore_size, batch_size=batch_size)
        count = 1 if isinstance(images, Image.Image) else len(images)
        names = [str(i) for i in range(count)] if names is None else names
        if len(names) != count:
            raise IbmdError(f"names: {len(names)} of them for {count} images")
        if isinstance(images, Tensor):
            x_T = images.float().cpu().numpy()
            holes = mask.cpu().numpy() if isinstance(mask, Tensor) else [None] * count
            jobs = [Job(name, hole=hole) for name, hole in zip(names, holes, strict=True)]
            canvases = [translator.canvas(x, job, label) for x, job in zip(x_T, jobs, strict=True)]
            return torch.stack([torch.from_numpy(job.x_0) for job in translator.run(canvases)])
        hole = mask if isinstance(mask, Image.Image) else None
        pictures = [images] if isinstance(images, Image.Image) else images
        jobs = [translator.prepare(to_picture(p, n), Job(n), hole, label) for p, n in zip(pictures, names, strict=True)]
        results = [translator.finish(job) for job in translator.run(jobs)]
        return results[0] if isinstance(images, Image.Image) else results


def _check_images(images: object) -> None:
    """Refuse what is neither a Pillow image, nor a sequence of them, nor a batch of images as a tensor."""
    if isinstance(images, Tensor):
        if images.ndim != 4 or not len(images) or not images.is_floating_point() or not images.isfinite().all():
            raise IbmdError(
                f"a tensor of shape {list(images.shape)} and {images.dtype}: expected one or more images (B, 3, H, W) "
                "of finite floats in [-1, 1]"
            )
    elif not isinstance(images, Image.Image):
        several = isinstance(images, Sequence) and len(images) and all(isinstance(i, Image.Image) for i in images)
        if not several:
            raise IbmdError(f"{type(images).__name__}: expected a Pillow image, one or more in a list, or a tensor")
