"""Pictures become files: formats by the ending of the name, and what is written beside the pixels."""

import io
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ibmd_cli.errors import IbmdError
from ibmd_cli.images.metadata import Metadata, to_exif

SOFTWARE, XMP = 0x0131, 0x02BC  # EXIF tags
JPEG_SEGMENT = 65_000  # bytes, the most of XMP that a JPEG holds in one piece
WRITABLE: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    **dict.fromkeys((".jpg", ".jpeg"), ("JPEG", {"quality": 95, "subsampling": 0})),
    ".webp": ("WEBP", {"lossless": True}),
    **dict.fromkeys((".tif", ".tiff"), ("TIFF", {"compression": "tiff_deflate"})),
    ".bmp": ("BMP", {}),
    ".avif": ("AVIF", {"quality": 90, "subsampling": "4:4:4"}),
}
"""Ending of a name → format that is written to it, and its options."""
LOSSY = (".jpg", ".jpeg", ".webp", ".avif")  # have a quality
OPAQUE = (".jpg", ".jpeg", ".bmp")  # hold no transparency


def encode(
    image: Image.Image,
    suffix: str = ".png",
    quality: int | None = None,
    dpi: tuple[float, float] | None = None,
    metadata: Metadata | None = None,
    software: str = "",
) -> bytes:
    """Return the bytes of an image file, or raise an IbmdError: WebP ends at 16,383 pixels a side.

    Args:
        image: RGB or RGBA.
        suffix: ending of its name, a key of `WRITABLE`.
        quality: 1 … 100, for `LOSSY` formats; None: 95 for JPEG, lossless WebP, 90 for AVIF.
        dpi: pixels per inch, where the format knows them (PNG, JPEG, TIFF, BMP).
        metadata: what else it is to say, where the format knows it (all but BMP).
        software: what made it and how, as EXIF tag and, in PNG, as text.
    """
    form, options = WRITABLE[suffix.lower()]
    if quality is not None:
        options = {key: value for key, value in options.items() if key != "lossless"} | {"quality": quality}
    if dpi is not None:
        options = options | {"dpi": dpi}
    if form != "BMP" and (software or metadata):
        options = options | _options_of_metadata(form, metadata or Metadata(), software)
    buffer = io.BytesIO()
    try:
        image.save(buffer, form, **options)
    except (OSError, ValueError) as error:
        raise IbmdError(f"{image.width}×{image.height} pixels do not fit in {form} ({error}): use .png") from error
    return buffer.getvalue()


def _options_of_metadata(form: str, metadata: Metadata, software: str) -> dict[str, Any]:
    """Return Pillow's options for metadata."""
    base = metadata.base | ({SOFTWARE: software.encode("utf-8", "backslashreplace")} if software else {})
    exif = to_exif(base, metadata.camera)
    options: dict[str, Any] = {"exif": exif}
    if metadata.profile:
        options["icc_profile"] = metadata.profile
    if form == "PNG":
        text = PngInfo()
        if software:
            text.add_itxt("Software", software)
        if metadata.xmp:
            text.add_itxt("XML:com.adobe.xmp", metadata.xmp.decode())
        options["pnginfo"] = text
    elif form == "TIFF":
        if metadata.xmp:
            exif[XMP] = metadata.xmp
        if metadata.camera:  # which Pillow cannot write beside compressed pixels
            options["compression"] = None
    elif metadata.xmp and (form != "JPEG" or len(metadata.xmp) < JPEG_SEGMENT):
        options["xmp"] = metadata.xmp
    return options
