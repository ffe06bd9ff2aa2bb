"""Image files, Pillow images and tensors.

The rules by which a file becomes red, green and blue:

- what a file is, its content says, not its name; of several frames or pages the first counts;
- EXIF orientation is applied once; a damaged EXIF block counts as none;
- transparency is laid on white;
- 16-bit grey is scaled by 255 / 65535; 32-bit integers and floats by the smallest of the ranges 0 … 1, 0 … 255
  and 0 … 65535 that holds all their values, and refused if none does; CMYK, Lab and palettes become RGB.
"""

import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ibmd_cli.errors import IbmdError

MAX_PIXELS = 100_000_000
READABLE = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF")
SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif")
"""Endings of the names that count as images when a folder is searched."""
WRITABLE: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
    ".tif": ("TIFF", {"compression": "tiff_deflate"}),
    ".tiff": ("TIFF", {"compression": "tiff_deflate"}),
    ".bmp": ("BMP", {}),
    ".avif": ("AVIF", {"quality": 90, "subsampling": "4:4:4"}),
}
"""Ending of a name → format that is written to it, and its options."""
WRITTEN = re.compile(r"\.ibmd(\.\d+)?\.png$")
"""Ends the name of a picture that `ibmd sample` wrote beside its input."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def shown(path: str | Path) -> str:
    """Spell a file's name on one line: control characters, and bytes that are not UTF-8, are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# ---------------------------------------------------------------------------------------------------- reading


def find_images(
    path: Path,
    recursive: bool = True,
    without: Path | None = None,
    on_error: Callable[[OSError], None] | None = None,
) -> list[Path]:
    """List the images of a folder, sorted; a path that is no folder stands for itself.

    They are known by the endings of their names. Hidden files and folders, links to folders, what is no regular file
    and what `ibmd sample` wrote beside its inputs (`*.ibmd.png`) are passed over.

    Args:
        path: folder.
        recursive: search folders in it, too.
        without: a folder that is not searched.
        on_error: told of folders that cannot be read, in place of an exception.

    Raises:
        IbmdError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise IbmdError(f"{shown(error.filename)}: cannot be listed ({error.strerror}): check its permissions")

    if not path.is_dir():
        return [path]
    found = []
    for here, folders, files in os.walk(path, onerror=on_error or refuse):
        folders[:] = sorted(f for f in folders if recursive and not f.startswith("."))
        if without is not None:
            folders[:] = [f for f in folders if os.path.realpath(Path(here, f)) != os.path.realpath(without)]
        images = (f for f in sorted(files) if not f.startswith(".") and not WRITTEN.search(f))
        found += [file for f in images if (file := Path(here, f)).suffix.lower() in SUFFIXES and file.is_file()]
    return found


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image file.

    Returns:
        RGB, upright.

    Raises:
        IbmdError: it cannot be opened, is no regular file, or see `decode`.
    """
    name = shown(path)
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise IbmdError(f"{name}: cannot be opened ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise IbmdError(f"{name}: not a regular file: expected an image (a pipe is read with --input -)")
    with os.fdopen(handle, "rb") as stream:
        return decode(stream, name, max_pixels)


def decode(stream: BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image by the rules of this module.

    Args:
        stream: seekable.
        name: for messages.
        max_pixels: larger images are refused before their pixels are decoded.

    Returns:
        RGB, upright.

    Raises:
        IbmdError: the content is no image, damaged, too large, or of values without a known range.
    """
    Image.init()  # all plugins: those for WebP, TIFF and AVIF are not loaded otherwise
    try:
        with Image.open(stream, formats=[f for f in READABLE if f in Image.OPEN]) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise IbmdError(
                    f"{name}: {width}×{height} pixels, more than {max_pixels:,}: make it smaller or raise --max-pixels"
                )
            image.load()
            turn = _TURNS.get(_orientation(image))
            rgb = _to_rgb(image, name)
            return rgb if turn is None else rgb.transpose(turn)
    except IbmdError:
        raise
    except UnidentifiedImageError:
        expected = "expected PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF"
        raise IbmdError(f"{name}: not an image, or a damaged one: {expected}") from None
    except MemoryError as error:
        raise IbmdError(f"{name}: does not fit in memory: make it smaller") from error
    except Exception as error:  # Pillow's plugins raise whatever damaged bytes lead to
        why = shown(str(error)) or type(error).__name__
        raise IbmdError(f"{name}: damaged or incomplete ({why}): copy or save it again") from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        full = 65535 if image.mode.startswith("I;16") else _range(values, name)
        grey = np.rint(values * np.float32(255 / full)).astype(np.uint8)
        if (key := image.info.get("transparency")) is not None:
            grey[values == key] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, "white")
        rgb.paste(image, mask=image)
        return rgb
    return image.convert("RGB")


def _range(values: np.ndarray, name: str) -> int:
    low, high = float(values.min()), float(values.max())
    for full in (1, 255, 65535):
        if low >= 0 and high <= full:  # false for NaN
            return full
    raise IbmdError(f"{name}: values from {low:g} to {high:g}: expected 0 to 1, 255 or 65535: rescale them")


@contextmanager
def own_limits() -> Iterator[None]:
    """Turn off Pillow's own pixel limit and its warnings: they are global, so only a program may do this."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.|ibmd_cli\.images")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


# ---------------------------------------------------------------------------------------------------- writing


def encode(image: Image.Image, suffix: str = ".png") -> bytes:
    """Return the bytes of an image file whose name ends in `suffix`, a key of `WRITABLE`.

    Raises:
        IbmdError: the format cannot hold the image; WebP ends at 16,383 pixels a side.
    """
    form, options = WRITABLE[suffix.lower()]
    buffer = io.BytesIO()
    try:
        image.save(buffer, form, **options)
    except (OSError, ValueError) as error:
        raise IbmdError(f"{image.width}×{image.height} pixels do not fit in {form} ({error}): use .png") from error
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------- tensors


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to float32 (3, H, W) in [-1, 1]."""
    return to_uint8(image).float() / 127.5 - 1


def to_image(x: Tensor) -> Image.Image:
    """Convert (3, H, W) in [-1, 1] to an RGB image."""
    return Image.fromarray(to_uint8(x).permute(1, 2, 0).contiguous().numpy())


def to_uint8(x: Tensor | Image.Image) -> Tensor:
    """Quantise (…, H, W) in [-1, 1] to uint8, or give the pixels of an RGB image, (3, H, W).

    Rounds, so that pixels which come from a file are the same again; published evaluations of DDBM and DBIM truncate.
    """
    if isinstance(x, Tensor):
        return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
    return torch.from_numpy(np.array(x)).permute(2, 0, 1)


# ------------------------------------------------------------------------------------------------------ sizes


@dataclass(frozen=True)
class Geometry:
    """How an image lies in the square that a model sees. Boxes are (left, upper, right, lower) in pixels.

    Attributes:
        size: (width, height) of the image.
        seen: the part of the image that the model sees.
        place: the part of the square that it fills.
    """

    size: tuple[int, int]
    seen: tuple[int, int, int, int]
    place: tuple[int, int, int, int]


def fit(image: Image.Image, side: int, mode: str = "pad") -> tuple[Tensor, Geometry]:
    """Bring an RGB image to the square size of a model.

    Args:
        image: of any size.
        side: height and width of the result.
        mode: "pad" (all of the image, centred on the median colour of its own border: paper stays paper), "crop" (its
            central square) or "stretch" (all of it, distorted).

    Returns:
        x: float32 (3, side, side) in [-1, 1].
        geometry: the way back, for `unfit`.
    """
    width, height = image.size
    seen, place = (0, 0, width, height), (0, 0, side, side)
    if mode == "crop":
        short = min(width, height)
        left, upper = (width - short) // 2, (height - short) // 2
        seen = (left, upper, left + short, upper + short)
    elif mode == "pad":
        w, h = (max(1, round(length * side / max(width, height))) for length in (width, height))
        left, upper = (side - w) // 2, (side - h) // 2
        place = (left, upper, left + w, upper + h)
    part = _resize(image, _size(place), seen)
    if part.size != (side, side):
        square = Image.new("RGB", (side, side), _border_colour(part))
        square.paste(part, place)
        part = square
    return to_tensor(part), Geometry(image.size, seen, place)


def unfit(image: Image.Image, geometry: Geometry) -> Image.Image:
    """Undo `fit`: an image of the original size; what the model did not see (mode "crop") is white."""
    part = _resize(image, _size(geometry.seen), geometry.place)
    if part.size == geometry.size:
        return part
    whole = Image.new("RGB", geometry.size, "white")
    whole.paste(part, geometry.seen)
    return whole


def _size(box: tuple[int, int, int, int]) -> tuple[int, int]:
    return box[2] - box[0], box[3] - box[1]


def _resize(image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Scale part of an image. For reduction, a filter without overshoot: thin lines stay lines on clean paper."""
    (w, h), (from_w, from_h) = size, _size(box)
    smaller = w * h < from_w * from_h
    return image.resize(size, Image.Resampling.HAMMING if smaller else Image.Resampling.BICUBIC, box)


def _border_colour(image: Image.Image) -> tuple[int, ...]:
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return tuple(int(v) for v in np.median(border, axis=0))
