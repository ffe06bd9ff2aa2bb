"""Source images for training: folders of files, or the outlines that are embedded in the package."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ibmd_cli.errors import IbmdError, NotAvailable
from ibmd_cli.images import find_images, fit, read_image, to_uint8
from ibmd_cli.mosaics import embedded_sources
from ibmd_cli.reporting import Reporter

LARGEST_BROKEN_SHARE = 0.01


class SourceImages:
    """Sources of one size, kept in memory as bytes.

    Args:
        references: folders (searched recursively), files, or `builtin:NAME`.
        size: height and width; images are scaled by their shorter side and cropped at the centre.
        reporter: told of images that cannot be read, which are skipped.

    Raises:
        NotAvailable: a folder is absent or holds no image.
        IbmdError: more than 1 % of the images cannot be read.
    """

    def __init__(self, references: Sequence[str], size: int, reporter: Reporter) -> None:
        if not references:
            raise NotAvailable("no source images: give a folder of them with --data")
        self.pixels = torch.cat([_read(reference, size, reporter) for reference in references])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Tensor:
        """Return source `i`, float32 (3, H, W) in [-1, 1]."""
        return self.pixels[i].float() / 127.5 - 1

    def batch(self, size: int, rng: torch.Generator, flip: bool) -> Tensor:
        """Draw sources at random, mirrored at random if `flip` is set; float32 (size, 3, H, W) in [-1, 1]."""
        rows = torch.randint(len(self.pixels), (size,), generator=rng)
        x_T = self.pixels[rows].float() / 127.5 - 1
        mirrored = torch.rand(size, 1, 1, 1, generator=rng) < (0.5 if flip else 0.0)
        return torch.where(mirrored, x_T.flip(3), x_T)


def _read(reference: str, size: int, reporter: Reporter) -> Tensor:
    if reference.startswith("builtin:"):
        x_T = embedded_sources(reference.removeprefix("builtin:"))
        if x_T.shape[-1] != size:
            raise IbmdError(f"--data {reference}: images of {x_T.shape[-1]} pixels, but the teacher is for {size}")
        return x_T
    path = Path(reference)
    if not path.exists():
        raise NotAvailable(f"--data {reference}: no such folder")
    files = find_images(path)
    if not files:
        raise NotAvailable(f"--data {reference}: no images in it")
    images, broken = [], []
    for file in files:
        try:
            images.append(to_uint8(fit(read_image(file), size, "crop")[0]))
        except IbmdError as error:
            broken.append(file)
            reporter.warn(f"{error}; skipped")
    if len(broken) > LARGEST_BROKEN_SHARE * len(files):
        raise IbmdError(
            f"--data {reference}: {len(broken)} of {len(files)} images cannot be read, more than "
            f"{LARGEST_BROKEN_SHARE:.0%}: mend or remove them (the first: {broken[0]})"
        )
    return torch.stack(images)
