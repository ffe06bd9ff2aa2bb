"""How a picture of a data set becomes pixels: layouts of files, surface normals, scaling to the square of a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torch import Tensor

from ibmd_cli.data.degradations import degrade, is_slow
from ibmd_cli.data.embedded import enlarge
from ibmd_cli.errors import IbmdError
from ibmd_cli.images.fit import fit, to_uint8

LAYOUTS = {
    "": "an image is a source",
    "ab": "source and target side by side, the source on the left, as in edges2handbags",
    "ba": "source and target side by side, the source on the right",
    "normals": "surface normals: *_normal.npy as in DIODE, or *_normal.png as DDBM prepares them",
}
"""Name → what the files hold, in one line."""
FITS = ("pad", "stretch", "crop")


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the pixels of a source, or of the target that a source is made of.

    Square pictures are scaled as the teachers' authors did: halves of pairs by a bicubic filter, ImageNet's
    photos (what is degraded) by a bilinear one, normal maps to the nearest pixel, and others by `images.fit`.

    Attributes:
        size: height and width.
        layout: key of `LAYOUTS`.
        degradation: that will follow; a slow one is done here.
        scale: sources are read smaller by this, and enlarged by repetition of pixels.
        fit: what becomes of pictures that are not square: one of `FITS`; "none" refuses all that are not of the size;
            "published": as the authors did (halves and normal maps are stretched, others cropped).
    """

    size: int
    layout: str = ""
    degradation: str = ""
    scale: int = 1
    fit: str = "published"

    def __call__(self, picture: Image.Image, name: str) -> Tensor:
        """Return uint8 (3, size, size).

        Raises:
            IbmdError: the picture, called `name`, cannot be a pair, or is of another size and may not be fitted.
        """
        if self.layout in ("ab", "ba"):
            width, height = picture.size
            if width < height:
                raise IbmdError(f"{name}: {width}×{height} pixels: expected two pictures side by side")
            half = (0, 0, width // 2, height) if self.layout == "ab" else (width // 2, 0, width, height)
            picture = picture.crop(half)
        elif self.fit != "published" and not self.degradation and picture.size == (self.size, self.size):
            return to_uint8(picture)
        if self.fit == "none" and set(picture.size) != {self.size // self.scale}:
            raise IbmdError(
                f"{name}: {picture.width}×{picture.height}, but the model is for {self.size}×{self.size}: "
                "--fit crop brings images to its size"
            )
        return enlarge(self._scaled(picture)[None], self.scale)[0]

    def _scaled(self, picture: Image.Image) -> Tensor:
        side, published = self.size // self.scale, self.fit == "published" or picture.width == picture.height
        if self.layout and published:
            nearest = self.layout == "normals"
            return to_uint8(
                picture.resize((side, side), Image.Resampling.NEAREST if nearest else Image.Resampling.BICUBIC)
            )
        slow = is_slow(self.degradation)
        if self.degradation and not slow and (published or self.fit == "crop"):
            return to_uint8(_shorter_side(picture, side))
        fitted = fit(picture, side, self.fit if self.fit in FITS else "crop")[0][None]
        return to_uint8(degrade(fitted, self.degradation) if slow else fitted)[0]


def _shorter_side(picture: Image.Image, side: int) -> Image.Image:
    """Scale the shorter side by a bilinear filter, and take the centre: torchvision's Resize and CenterCrop."""
    short = min(picture.size)
    width, height = (int(side * length / short) for length in picture.size)
    left, upper = round((width - side) / 2), round((height - side) / 2)
    return picture.resize((width, height), Image.Resampling.BILINEAR).crop((left, upper, left + side, upper + side))


def read_normals(content: Path | BinaryIO, name: str, size: int) -> Image.Image:
    """Read surface normals and colour them as DDBM does.

    They are reduced to the nearest pixel (as OpenCV does: the upper left one of each block); pixels without a normal
    become black; the smallest number of the picture becomes 0, and what lies 2 above it 255.

    Args:
        content: a file of NumPy, (H, W, 3) floats in [-1, 1], 0 where there is no normal.
        name: for messages.
        size: height and width of the result.

    Raises:
        IbmdError: it holds something else, or cannot be read.

    Source: github.com/alexzhou907/DDBM, datasets/preprocess_depth.py.
    """
    try:
        normals = np.load(content, allow_pickle=False).astype(np.float32)
    except (OSError, ValueError, EOFError) as error:
        raise IbmdError(f"{name}: no file of NumPy, or a damaged one: copy it again") from error
    if normals.ndim != 3 or normals.shape[2] != 3 or normals.size == 0 or not np.isfinite(normals).all():
        raise IbmdError(f"{name}: shape {normals.shape}: expected finite surface normals (H, W, 3)")
    rows, columns = (np.arange(size) * length // size for length in normals.shape[:2])
    normals = normals[rows][:, columns]
    absent = normals.sum(2, keepdims=True) == 0
    normals = normals + absent * normals.min()
    return Image.fromarray((np.clip((normals - normals.min()) / 2, 0, 1) * 255).astype(np.uint8))
