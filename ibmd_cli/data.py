"""Source images for training: folders of sources, or of clean images that are degraded; or the embedded ones."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ibmd_cli.degradations import check_name, degrade, draw_masks, fill_hole
from ibmd_cli.distillation import Sources
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.images import find_images, fit, read_image, to_uint8
from ibmd_cli.mosaics import embedded_sources, enlarge
from ibmd_cli.noise import stream
from ibmd_cli.reporting import Reporter

LARGEST_BROKEN_SHARE = 0.01


class SourceImages:
    """Images of one size, kept in memory as bytes, of which batches of sources are drawn.

    Images are scaled by their shorter side and cropped at the centre. Clean ones are kept clean and degraded as they
    are drawn, with a new mask and new noise each time; only edges, which take long, are found once.

    Args:
        references: folders (searched recursively), files, or `builtin:NAME`.
        teacher: its `config.json`: image size, `source_scale` (true low-resolution sources are fitted to that part of
            the size, and enlarged by repetition of pixels), `mask`, `degradation`, and `classes` (an image's is the
            folder that holds it: `_classes`).
        reporter: told of images that cannot be read, which are skipped, and of a degradation that is not the teacher's.
        degradation: key of `degradations.DEGRADATIONS`; "" if the images are sources already.
        masks: file of the free-form masks, see `degradations.read_masks`.

    Raises:
        UsageError: the degradation is unknown, or does not go with the teacher, its image size or the images.
        NotAvailable: a folder or the file of masks is absent, a folder holds no image, or see `degrade`.
        IbmdError: more than 1 % of the images cannot be read.
    """

    def __init__(
        self,
        references: Sequence[str],
        teacher: Mapping[str, Any],
        reporter: Reporter,
        degradation: str = "",
        masks: str = "",
    ) -> None:
        check_sources(references, teacher, degradation, reporter)
        self.size = int(teacher["image"]["size"])
        self.degradation, self.masks = degradation, masks
        self.fill = (teacher.get("mask") or {}).get("fill")
        scale = 1 if degradation else teacher["image"].get("source_scale", 1)

        def prepare(image: Image.Image) -> Tensor:
            x = fit(image, self.size // scale, "crop")[0][None]
            return enlarge(to_uint8(degrade(x, "edges") if degradation == "edges" else x), scale)[0]

        self._degrade(torch.zeros(1, 3, self.size, self.size), stream(0))  # refuses what cannot be, before the work
        classes = teacher.get("classes")
        found = [_read(reference, self.size, prepare, classes, reporter) for reference in references]
        self.pixels = torch.cat([pixels for pixels, _ in found])
        self.labels = torch.tensor([label for _, labels in found for label in labels]) if classes else None

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: Sequence[int], rng: torch.Generator, device: torch.device | str = "cpu") -> Sources:
        """Return sources by their numbers, float32 (len(rows), 3, H, W).

        They are in [-1, 1], except where a degradation goes beyond or noise fills a hole.
        """
        return self._labelled(self._degrade(self._images(rows, device), rng), rows)

    def batch(self, size: int, rng: torch.Generator, flip: bool, device: torch.device | str = "cpu") -> Sources:
        """Draw sources at random as `take` returns them, mirrored at random (before they are degraded) if `flip`."""
        rows = torch.randint(len(self.pixels), (size,), generator=rng)
        mirrored = torch.rand(size, 1, 1, 1, generator=rng).to(device) < (0.5 if flip else 0.0)
        x = self._images(rows, device)
        return self._labelled(self._degrade(torch.where(mirrored, x.flip(3), x), rng), rows)

    def _labelled(self, batch: Sources, rows: Sequence[int] | Tensor) -> Sources:
        if self.labels is None:
            return batch
        return batch._replace(label=self.labels[torch.as_tensor(rows)].to(batch.x_T.device))

    def _images(self, rows: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
        return self.pixels[torch.as_tensor(rows)].to(device).float() / 127.5 - 1

    def _degrade(self, x: Tensor, rng: torch.Generator) -> Sources:
        if self.degradation in ("", "edges"):
            return Sources(x)
        if self.fill is None:
            return Sources(degrade(x, self.degradation))
        mask = draw_masks(self.degradation, len(x), self.size, rng, self.masks).to(x.device)
        return Sources(fill_hole(x, mask, self.fill, rng), mask=mask)


def check_sources(references: Sequence[str], teacher: Mapping[str, Any], degradation: str, reporter: Reporter) -> None:
    """Refuse data that are not there, and a degradation that does not go with the teacher or the data.

    Arguments and errors are those of `SourceImages`.
    """
    if not references:
        raise NotAvailable("no source images: give a folder of them with --data")
    for reference in references:
        if not reference.startswith("builtin:") and not Path(reference).exists():
            raise NotAvailable(f"--data {reference}: no such folder")
    name, own = teacher.get("name", "the teacher"), teacher.get("degradation") or ""
    inpaints, masked = bool(teacher.get("mask")), degradation.startswith("inpaint-")
    if degradation:
        check_name(degradation)
        embedded = [reference for reference in references if reference.startswith("builtin:")]
        if embedded:
            raise UsageError(
                f"--degrade {degradation}: --data {embedded[0]} are sources already: --degrade none keeps them"
            )
    if inpaints and not masked:
        given = f"--degrade {degradation}" if degradation else "no --degrade"
        raise UsageError(f"{given}: {name} fills holes: give clean images and --degrade {own or 'inpaint-center'}")
    if masked and not inpaints:
        raise UsageError(f"--degrade {degradation}: {name} does not fill holes" + (f": expected {own}" if own else ""))
    if degradation and own and degradation != own:
        reporter.warn(f"--degrade {degradation}: {name} was trained with {own}")


def _read(
    reference: str, size: int, prepare: Callable[[Image.Image], Tensor], classes: int | None, reporter: Reporter
) -> tuple[Tensor, list[int]]:
    """Read the images that a reference names, uint8 (N, 3, size, size), and their classes if there are any."""
    if reference.startswith("builtin:"):
        x_T = embedded_sources(reference.removeprefix("builtin:"))
        if x_T.shape[-1] != size:
            raise IbmdError(f"--data {reference}: images of {x_T.shape[-1]} pixels, but the teacher is for {size}")
        if classes:
            raise UsageError(f"--data {reference}: has no classes, and the teacher needs them: give a folder")
        return x_T, []
    path = Path(reference)
    files = find_images(path)
    if not files:
        raise NotAvailable(f"--data {reference}: no images in it")
    numbers = _classes(path, files, classes) if classes else {}
    labels = []
    images, broken = [], []
    with reporter.progress("reading images", len(files), "image") as meter:
        for file in files:
            try:
                image = read_image(file)
            except IbmdError as error:
                broken.append(file)
                reporter.warn(f"{error}; skipped")
            else:
                images.append(prepare(image))
                labels += [numbers[file]] if classes else []
            meter.advance()
    if len(broken) > LARGEST_BROKEN_SHARE * len(files):
        raise IbmdError(
            f"--data {reference}: {len(broken)} of {len(files)} images cannot be read, more than "
            f"{LARGEST_BROKEN_SHARE:.0%}: mend or remove them (the first: {broken[0]})"
        )
    return torch.stack(images), labels


def _classes(path: Path, files: Sequence[Path], classes: int) -> dict[Path, int]:
    """Return the class of each image: the folder in `path` that holds it, by its number or its place in the alphabet.

    Raises:
        UsageError: an image is in no such folder, or the folders are neither numbers below `classes` nor that many.
    """
    names = {file: file.relative_to(path).parts[0] for file in files}
    loose = next((file for file in files if file.parent == path), None)
    folders = sorted(set(names.values()))
    if loose is None and all(name.isdecimal() and int(name) < classes for name in folders):
        return {file: int(name) for file, name in names.items()}
    if loose is None and len(folders) == classes:
        return {file: folders.index(name) for file, name in names.items()}
    found = f"{loose} lies outside of them" if loose else f"{len(folders)} folders, {folders[0]} … {folders[-1]}"
    raise UsageError(
        f"--data {path}: the teacher has {classes} classes: expected a folder for each, or folders that are called by "
        f"their numbers (0 … {classes - 1}); found {found}"
    )
