"""Image files become upright sRGB by fixed rules, or are refused in one line.

- what a file is, its content says, not its name; of several frames or pages the first counts;
- EXIF orientation is applied once; a damaged EXIF block counts as none;
- colour profiles, gAMA with cHRM, and cICP are converted to sRGB; a damaged profile, and one of another kind than the
  pixels, counts as none, which is noted; HDR images are refused;
- transparency is laid on white, or dropped, and can be had beside the colours;
- samples are scaled by the file's own depth; 32-bit integers and floats by the smallest of the ranges 0 … 1, 0 … 255
  and 0 … 65535, or all of the integers, that holds their values, and refused if none does.
"""

import math
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Condition
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from ibmd_cli.errors import IbmdError
from ibmd_cli.files import why
from ibmd_cli.images.bit_depth import Header, deep_samples, read_header, single_channel
from ibmd_cli.images.colour import NotRead, Profile, Space, from_codes, from_gamma, from_profile, to_srgb
from ibmd_cli.images.metadata import Metadata, read_metadata
from ibmd_cli.images.other_files import READABLE, refusal, trouble

MAX_PIXELS = 100_000_000
AT_ONCE = 32_000_000  # pixels that threads decode, or encode, at the same time: about ten bytes for each
# EXIF orientation → what undoes it: flipped, turned by 180°, upside down, transposed, by 270°, transversed, by 90°.
_TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))


class Picture(NamedTuple):
    """What an image file holds."""

    rgb: Image.Image  # upright
    alpha: Image.Image | None = None  # mode L, 255 = opaque; None if it has none or it was not to be kept
    dpi: tuple[float, float] | None = None  # pixels per inch in width and height
    metadata: Metadata = Metadata()
    notes: tuple[str, ...] = ()  # what is to be said of how it was read


class Budget:
    """Pixels that threads may work on at the same time; an image that has more waits until it is alone."""

    def __init__(self, pixels: int = AT_ONCE) -> None:
        self.pixels = self.left = pixels
        self.changed = Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until there are so many left, and have them for the length of the block."""
        pixels = min(pixels, self.pixels)
        with self.changed:
            self.changed.wait_for(lambda: self.left >= pixels)
            self.left -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.left += pixels
                self.changed.notify_all()


_DECODING = Budget()


def shown(path: str | Path) -> str:
    """Spell a file's name on one line: control characters, and bytes that are not UTF-8, are escaped."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:  # text that is no path of this machine's locale
        name = os.fspath(path).encode("utf-8", "surrogateescape")
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def read_image(path: Path) -> Image.Image:
    """Read an image file as upright RGB, transparency laid on white; errors are those of `read_picture`."""
    return read_picture(path).rgb


def read_picture(path: Path, max_pixels: int = MAX_PIXELS, alpha: str = "white") -> Picture:
    """Read an image file; arguments and errors are those of `decode`, and it must be a regular file."""
    name = shown(path)
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise IbmdError(f"{name}: cannot be opened {why(error)}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise IbmdError(f"{name}: not a regular file: expected an image (a pipe is read with --input -)")
    with os.fdopen(handle, "rb") as stream:
        return decode(stream, name, max_pixels, alpha)


def decode(stream: BinaryIO, name: str, max_pixels: int = MAX_PIXELS, alpha: str = "white") -> Picture:
    """Decode an image by the rules of this module, or raise an IbmdError of one line that begins with `name`.

    Args:
        stream: seekable.
        name: for messages.
        max_pixels: larger images are refused before their pixels are decoded.
        alpha: "white": transparency is laid on white; "keep": that, and it is returned beside the colours; "drop": the
            colours as they are, also where they are transparent.
    """
    Image.init()  # all plugins: those for WebP, TIFF and AVIF are not loaded otherwise
    formats = [f for f in READABLE if f in Image.OPEN]
    with _one_line(name):
        try:
            opened = Image.open(stream, formats=formats)
        except UnidentifiedImageError:
            raise NotRead(refusal(stream)) from None
        with opened as image:
            width, height = image.size
            if width * height > max_pixels:
                raise NotRead(
                    f"{width}×{height} pixels, more than {max_pixels:,}: make it smaller or raise the limit "
                    "(--max-pixels; in Python, max_pixels)"
                )
            with _DECODING.take(width * height):
                return to_picture(image, name, alpha)


def to_picture(image: Image.Image, name: str, alpha: str = "white") -> Picture:
    """Convert a Pillow image by the rules of this module; arguments and errors as `decode`."""
    with _one_line(name):
        if 0 in image.size:
            raise NotRead(f"{image.width}×{image.height} pixels: expected one or more")
        header = read_header(image)
        space, notes = _space(image, header)
        wide = header.depth == 16 and len(header.key) == 3
        deep = deep_samples(image) if space is not None or wide else None
        frame = next((tile.extents for tile in getattr(image, "tile", ()) if image.format == "GIF"), None)
        image.load()
        orientation = _tried(lambda: int(image.getexif().get(0x0112, 1)), 1)
        try:
            rgb, transparency = _colours(image, header, space, deep)
        except ValueError as error:
            if not isinstance(space, Profile):
                raise
            notes.append(f"its colour profile is ignored ({error})")
            rgb, transparency = _colours(image, header, None, deep)
        if frame not in (None, (0, 0, *image.size)):  # what the first frame of a GIF leaves free is transparent
            covered = Image.new("L", image.size)
            covered.paste(255, frame)
            transparency = ImageChops.darker(covered, transparency) if transparency else covered
        if transparency is not None and alpha != "drop":
            rgb.paste("white", mask=ImageChops.invert(transparency))
        kept = transparency if alpha == "keep" else None
        if (turn := _TURNS.get(orientation)) is not None:
            rgb, kept = rgb.transpose(turn), kept and kept.transpose(turn)
        metadata = read_metadata(image, image.info.get("icc_profile", b"") if space is None and not notes else b"")
        several = _tried(lambda: getattr(image, "is_animated", False), True)  # it fails if the second one is damaged
        if several and image.format != "MPO":  # a photo with its preview
            notes.append("several frames or pages: of such files the first one counts")
        dpi = _tried(lambda: tuple(float(v) for v in image.info["dpi"]), ())
        known = len(dpi) == 2 and all(math.isfinite(v) and 1 < v < 1e5 for v in dpi)  # TIFF says 1 for "unknown"
        return Picture(rgb, kept, dpi if known else None, metadata, tuple(notes))


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Make one line of whatever goes wrong with an image."""
    try:
        yield
    except IbmdError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever damaged bytes lead to
        what = str(error) if isinstance(error, NotRead) else trouble(shown(str(error)))
        if isinstance(error, MemoryError):
            what = "does not fit in memory: make it smaller"
        raise IbmdError(f"{name}: {what}") from error


@contextmanager
def own_limits() -> Iterator[None]:
    """Turn off Pillow's own pixel limit and its warnings: they are global, so only a program may do this.

    And let it take the memory of an image in one block, which the system has back when the image is gone: each thread
    keeps smaller ones. Eight photos of 24 megapixels take 446 MiB in `ibmd sample --restore-size`, 716 without.
    """
    limit, block = Image.MAX_IMAGE_PIXELS, Image.core.get_block_size()
    Image.MAX_IMAGE_PIXELS = None
    Image.core.set_block_size(1 << 30)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.|ibmd_cli\.images")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
        Image.core.set_block_size(block)


def _space(image: Image.Image, header: Header) -> tuple[Profile | Space | None, list[str]]:
    """Return the colour space of an image, None for sRGB, and what is to be said of it."""
    info = image.info
    if image.format == "PNG" and header.codes:
        return from_codes(*header.codes), []
    if profile := info.get("icc_profile"):
        try:
            return from_profile(profile), []
        except ValueError as error:
            return None, [f"its colour profile is ignored ({error})"]
    if image.format == "AVIF" and header.codes:
        return from_codes(*header.codes, video=True), []
    if "srgb" not in info and "gamma" in info:
        return from_gamma(info["gamma"], info.get("chromaticity")), []
    return None, []


def _colours(
    image: Image.Image, header: Header, space: Profile | Space | None, deep: np.ndarray | None
) -> tuple[Image.Image, Image.Image | None]:
    """Return RGB, and transparency as mode L if there is any; `deep` are the samples of an RGB image of 16 bits."""
    values = single_channel(image, header)
    if values is not None:
        key = header.key or (() if (own := image.info.get("transparency")) is None else (own,))
        alpha = Image.fromarray(np.where(np.asarray(image) == key[0], 0, 255).astype(np.uint8)) if key else None
        if space is None:
            return Image.fromarray(np.rint(values * np.float32(255)).astype(np.uint8)).convert("RGB"), alpha
        return to_srgb(np.rint(values * np.float32(65535)).astype(np.uint16), space), alpha
    if deep is not None and len(header.key) == 3:
        opaque = (deep != np.array(header.key)).any(2)
        return to_srgb(deep, space), Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8))
    if header.key:  # Pillow compares it with 8 bits
        scaled = tuple(v * 255 // (2**header.depth - 1) for v in header.key)
        image.info["transparency"] = scaled if len(scaled) == 3 else scaled[0]
    if not image.has_transparency_data:
        return to_srgb(image if deep is None else deep, space), None
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    transparency = rgba.getchannel("A")
    colours = image.getchannel("L") if image.mode == "LA" else rgba.convert("RGB")
    del rgba  # large ones: as few copies at a time as will do
    return to_srgb(colours if deep is None else deep, space, copy=False), transparency


def _tried(read: Callable[[], Any], otherwise: Any) -> Any:
    """Return what a block beside the pixels says, or `otherwise` if it is damaged."""
    try:
        return read()
    except Exception:  # Pillow raises whatever damaged bytes lead to
        return otherwise
