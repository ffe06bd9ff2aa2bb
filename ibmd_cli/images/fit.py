"""Images as arrays and tensors, in the sizes that models see, and back.

Only what returns tensors imports PyTorch, and only when it is called: `ibmd sample` runs exported students without it.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


def to_array(image: Image.Image) -> np.ndarray:
    """Return the pixels of an RGB image, uint8 (3, H, W); for one of mode 1, bool (1, H, W)."""
    return np.atleast_3d(np.array(image)).transpose(2, 0, 1)


def scaled(x: np.ndarray) -> np.ndarray:
    """Bring uint8 pixels to float32 in [-1, 1]; what is float32 stays as it is."""
    return x / np.float32(127.5) - np.float32(1) if x.dtype == np.uint8 else x


def to_image(x: "np.ndarray | Tensor") -> Image.Image:
    """Convert float (3, H, W) in [-1, 1] to an RGB image, rounded as by `to_uint8`."""
    pixels = np.rint((np.asarray(x) + 1) * 127.5)
    pixels = np.fmin(np.fmax(pixels, 0), 255).astype(np.uint8)  # NaN, of a student that is no good, becomes 0
    return Image.fromarray(pixels.transpose(1, 2, 0))


def to_tensor(image: Image.Image) -> "Tensor":
    """Convert an RGB image to float32 (3, H, W) in [-1, 1]."""
    import torch

    return torch.from_numpy(scaled(to_array(image)))


def to_uint8(x: "Tensor | Image.Image") -> "Tensor":
    """Quantise (…, H, W) in [-1, 1] to uint8, or give the pixels of an RGB image, (3, H, W).

    Rounds, so that pixels which come from a file are the same again; published evaluations of DDBM and DBIM truncate.
    """
    import torch

    if isinstance(x, Image.Image):
        return torch.from_numpy(to_array(x))
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


@dataclass(frozen=True)
class Geometry:
    """How an image lies in the canvas that a model sees. Boxes are (left, upper, right, lower) in pixels."""

    size: tuple[int, int]  # (width, height) of the image
    seen: tuple[int, int, int, int]  # the part of the image that the model sees
    place: tuple[int, int, int, int]  # the part of the canvas that it fills
    canvas: tuple[int, int]  # (width, height) of the canvas: the model's square, or larger, to be translated in tiles


def arrange(size: tuple[int, int], side: int, mode: str = "pad") -> Geometry:
    """Say how an image of a size (width, height) is to lie in the square of a model.

    Args:
        size: of the image.
        side: of the square.
        mode: "pad" (all of the image, centred on the median colour of its own border: paper stays paper), "crop" (its
            central square), "stretch" (all of it, distorted), or "tile" (all of it in its own size, for `tiles`, which
            do not see each other; padded where it is smaller than the model).
    """
    width, height = size
    seen, canvas = (0, 0, width, height), (side, side)
    filled = canvas
    if mode == "crop":
        short = min(width, height)
        left, upper = (width - short) // 2, (height - short) // 2
        seen = (left, upper, left + short, upper + short)
    elif mode == "pad":
        w, h = (max(1, round(length * side / max(width, height))) for length in (width, height))
        filled = (w, h)
    elif mode == "tile":
        filled, canvas = (width, height), (max(width, side), max(height, side))
    left, upper = (canvas[0] - filled[0]) // 2, (canvas[1] - filled[1]) // 2
    return Geometry(size, seen, (left, upper, left + filled[0], upper + filled[1]), canvas)


def fit(image: Image.Image, side: int, mode: str = "pad") -> "tuple[Tensor, Geometry]":
    """Return an RGB image on the canvas of a model, float32 in [-1, 1], and the way back; arguments as `arrange`."""
    geometry = arrange(image.size, side, mode)
    return to_tensor(lay(image, geometry)), geometry


def lay(image: Image.Image, geometry: Geometry) -> Image.Image:
    """Lay an image of `geometry.size` on the canvas, the rest of which gets the median colour of its border."""
    part = _resize(image, _size(geometry.place), geometry.seen)
    if part.size == geometry.canvas:
        return part
    canvas = Image.new(image.mode, geometry.canvas, _border_colour(part))
    canvas.paste(part, geometry.place)
    return canvas


def lay_mask(mask: Image.Image, geometry: Geometry) -> Image.Image:
    """Lay a mask (mode 1) on the canvas as `lay` does with its image; the rest is False."""
    canvas = Image.new("1", geometry.canvas)
    canvas.paste(mask.resize(_size(geometry.place), Image.Resampling.NEAREST, geometry.seen), geometry.place)
    return canvas


def unfit(image: Image.Image, geometry: Geometry) -> Image.Image:
    """Undo `lay` for a canvas or an enlargement of it; what the model did not see (mode "crop") is white."""
    part = _resize(image, _size(geometry.seen), enlarged(geometry.place, image.width // geometry.canvas[0]))
    if part.size == geometry.size:
        return part
    whole = Image.new("RGB", geometry.size, "white")
    whole.paste(part, geometry.seen)
    return whole


def enlarged(box: tuple[int, int, int, int], scale: int) -> tuple[int, int, int, int]:
    """Return a box in an image that is `scale` times as large."""
    left, upper, right, lower = (scale * v for v in box)
    return left, upper, right, lower


def _size(box: tuple[int, int, int, int]) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Scale part of an image. For reduction, a filter without overshoot: thin lines stay lines on clean paper."""
    smaller = math.prod(size) < math.prod(_size(box))
    return image.resize(size, Image.Resampling.HAMMING if smaller else Image.Resampling.BICUBIC, box)


def _border_colour(image: Image.Image) -> tuple[int, ...]:
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return tuple(int(v) for v in np.median(border, axis=0))
