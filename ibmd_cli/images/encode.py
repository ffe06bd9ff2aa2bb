"""Pictures become files: formats by the ending of the name, and what is written beside the pixels."""

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ibmd_cli.errors import IbmdError

SOFTWARE = 0x0131  # EXIF tag
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
LOSSY = (".jpg", ".jpeg", ".webp", ".avif")
"""Endings of the formats that have a quality."""
OPAQUE = (".jpg", ".jpeg", ".bmp")
"""Endings of the formats that hold no transparency."""


def encode(
    image: Image.Image,
    suffix: str = ".png",
    quality: int | None = None,
    dpi: tuple[float, float] | None = None,
    tags: Mapping[int, str] | None = None,
) -> bytes:
    """Return the bytes of an image file.

    Args:
        image: RGB or RGBA.
        suffix: ending of its name, a key of `WRITABLE`.
        quality: 1 … 100, for `LOSSY` formats; None: 95 for JPEG, lossless WebP, 90 for AVIF.
        dpi: pixels per inch, where the format knows them (PNG, JPEG, TIFF, BMP).
        tags: EXIF tag → text, written as UTF-8, where the format knows them (all but BMP).

    Raises:
        IbmdError: the format cannot hold the image; WebP ends at 16,383 pixels a side.
    """
    form, options = WRITABLE[suffix.lower()]
    if quality is not None:
        options = {key: value for key, value in options.items() if key != "lossless"} | {"quality": quality}
    if dpi is not None:
        options = options | {"dpi": dpi}
    if tags:
        exif = Image.Exif()
        exif.update({tag: text.encode("utf-8", "backslashreplace") for tag, text in tags.items()})
        options = options | {"exif": exif}
    buffer = io.BytesIO()
    try:
        image.save(buffer, form, **options)
    except (OSError, ValueError) as error:
        raise IbmdError(f"{image.width}×{image.height} pixels do not fit in {form} ({error}): use .png") from error
    return buffer.getvalue()
