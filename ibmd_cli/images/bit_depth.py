"""Samples of image files at their own depth: what Pillow's modes do not say of PNG, TIFF, PNM, BMP and AVIF files."""

import struct
import sys
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from ibmd_cli.images.colour import NotRead

_SAVE = "save it as PNG with 8 or 16 bits"


class Header(NamedTuple):
    """What a file says of its samples."""

    full: int = 0  # the sample that is white, of single-channel modes; 0 if only the values can tell
    inverted: bool = False  # whether black and white are to be exchanged
    form: str = ""  # of samples as NumPy names it, where Pillow holds them in another: "i1" or "u4"
    key: tuple[int, ...] = ()  # the transparent colour, at the file's own depth: one sample or three
    depth: int = 8  # bits of a sample of a PNG file
    codes: tuple[int, ...] = ()  # cICP, or AVIF's nclx: primaries, transfer, matrix and full range


def read_header(image: Any) -> Header:
    """Read what an opened image file says of its samples; mend or refuse what Pillow takes from it wrongly."""
    if image.format == "TIFF" and hasattr(image, "tag_v2"):
        return _tiff(image, image.tag_v2)
    stream = getattr(image, "fp", None)
    if stream is not None and not stream.closed and image.format in ("PNG", "AVIF", "BMP"):
        back = stream.seek(0, 1)
        stream.seek(0)
        header = _png(stream, image) if image.format == "PNG" else _other(stream.read(1 << 16), image.format)
        stream.seek(back)
        return header
    return Header(65535 if image.mode.startswith("I;16") or image.format == "PPM" and image.mode == "I" else 0)


def _other(head: bytes, form: str) -> Header:
    if form == "BMP" and head[14] >= 56 and head[28] == 16 and any(head[66:70]):
        raise NotRead(f"a BMP image of 16 bits with transparency, which is not read: {_SAVE}")
    at = head.find(b"colrnclx")
    return Header(codes=struct.unpack_from(">HH", head, at + 8)) if 0 <= at < len(head) - 12 else Header()


def _png(stream: BinaryIO, image: Image.Image) -> Header:
    """Read the chunks before the pixels."""
    stream.seek(8)
    chunks: dict[bytes, bytes] = {}
    while len(start := stream.read(8)) == 8 and start[4:] not in (b"IDAT", b"IEND"):
        length = int.from_bytes(start[:4], "big")
        if start[4:] in (b"IHDR", b"tRNS", b"cICP", b"CgBI") and length <= 256:
            chunks[start[4:]] = stream.read(length)
            length = 0
        stream.seek(length + 4, 1)
    if b"CgBI" in chunks:
        raise NotRead("a PNG image for iPhones (CgBI): Xcode's pngcrush -revert-iphone-optimizations mends it")
    depth, key = chunks[b"IHDR"][8], chunks.get(b"tRNS", b"")
    count = 3 if image.mode == "RGB" else 1
    known = image.mode in ("1", "L", "I;16", "RGB") and len(key) >= 2 * count
    samples = tuple(v & (2**depth - 1) for v in struct.unpack_from(f">{count}H", key)) if known else ()
    codes = chunks.get(b"cICP", b"")
    return Header(65535, key=samples, depth=depth, codes=tuple(codes) if len(codes) == 4 else ())


def _tiff(image: Any, tags: Any) -> Header:
    photometric, bits, form = tags.get(262, 0), tags.get(258, (1,))[0], tags.get(339, (1,))[0]
    planes, ycbcr, lab = tags.get(284, 1) == 2 and tags.get(277, 1) > 1, photometric == 6, photometric == 8
    plain = any(tile.codec_name != "libtiff" for tile in image.tile)
    white = tags.get(318, (0.3457, 0.3585))
    for wrong, what in (
        (planes and lab, "of CIELab in planes"),
        (lab and abs(white[0] - 0.3457) > 0.005, "of CIELab under another white than D50"),
        (plain and planes and bits == 16, "of 16-bit planes, uncompressed"),
        (plain and ycbcr and tags.get(530, (1, 1)) != (1, 1), "of subsampled YCbCr, uncompressed"),
        (
            plain and ycbcr and tuple(tags.get(532, ())[::2]) not in ((), (0, 128, 128)),
            "of YCbCr with a reference black",
        ),
        (photometric == 5 and tags.get(332, 1) != 1, "of inks that are not CMYK"),
        (tags.get(259) == 50001, "compressed as WebP"),
    ):
        if wrong:
            raise NotRead(f"a TIFF image {what}, which is not read: {_SAVE}")
    if 50706 in tags or (tags.get(254, 0) & 1 and 330 in tags):
        raise NotRead("a raw photo of a camera (DNG, NEF …), of which only a thumbnail is readable: develop it first")
    native = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}  # libtiff has swapped the bytes already
    for i, tile in enumerate(image.tile):
        if tile.codec_name == "libtiff" and tile.args[0] in native:
            image.tile[i] = tile._replace(args=(native[tile.args[0]], *tile.args[1:]))
    if photometric == 3 and image.palette is not None and 0 < max(tags[320]) < 256:  # 8 bits, as some programs write
        image.palette.palette = bytes(tags[320])
    full = {1: 2**bits - 1, 2: 2 ** (bits - 1) - 1}.get(form, 0) if bits <= 16 else 0
    inverted = photometric == 0 and image.mode in ("I;16", "I;16B", "I", "F")
    return Header(full, inverted, {(8, 2): "i1", (32, 1): "u4"}.get((bits, form), ""))


def deep_samples(image: Any) -> np.ndarray | None:
    """Read an opened image of 16 bits again at its own depth, without alpha: uint16 (H, W) or (H, W, 3).

    Pillow keeps the high byte of such colours; the other one comes from the same bytes taken in the other order. None
    if the image has 8 bits, is no file, or grey, of which Pillow keeps all 16.
    """
    if image.mode not in ("RGB", "RGBA") or not getattr(image, "tile", ()) or getattr(image, "fp", None) is None:
        return None
    args: Any = image.tile[0].args
    raw: str = args if isinstance(args, str) else args[0]
    mode, _, order = raw.partition(";16")
    if not order or mode not in ("LA", "RGB", "RGBA", "RGBX"):
        return None
    little = order == "L" or (order == "N" and sys.byteorder == "little")
    back, halves = image.fp.tell(), []
    for form in ["RGBA"] if mode == "LA" else [raw, f"{mode};16{'B' if little else 'L'}"]:
        with Image.open(image.fp, formats=[str(image.format)]) as half:
            tiles: Any = half.tile
            half.tile = [t._replace(args=form if t.args == raw else (form, *t.args[1:])) for t in tiles]
            half.load()
            halves.append(np.asarray(half))
    image.fp.seek(back)
    if len(halves) == 1:  # grey and alpha, two bytes each
        return halves[0][..., 0].astype(np.uint16) << 8 | halves[0][..., 1]
    return halves[0][..., :3].astype(np.uint16) << 8 | halves[1][..., :3]


def single_channel(image: Image.Image, header: Header) -> np.ndarray | None:
    """Return the samples of a loaded image of one channel of more than 8 bits, or signed; None for other images.

    They are float32 (H, W), 0 black, 1 white; samples of an unknown range raise NotRead.
    """
    if not (image.mode.startswith("I") or image.mode == "F" or header.form == "i1"):
        return None
    values = np.asarray(image)
    if header.form:
        values = values.view(header.form)
    full = header.full or (65535 if image.mode.startswith("I;16") else _range(values))
    if (low := values.min()) < 0:
        raise NotRead(f"values from {low} to {values.max()}: expected none below 0: shift and {_SAVE}")
    scaled = values * np.float32(1 / full)
    return 1 - scaled if header.inverted else scaled


def _range(values: np.ndarray) -> int:
    """Return the smallest of the usual ranges, 0 to 1, 255, 65535 or all of an integer type, that holds all values."""
    low, high = float(values.min()), float(values.max())
    for full in (1, 255, 65535):
        if low >= 0 and high <= full:  # false for NaN
            return full
    if values.dtype.kind in "iu" and low >= 0 and high > np.iinfo(values.dtype).max / 2:
        return int(np.iinfo(values.dtype).max)
    kind = f"{values.dtype.name} " if values.dtype.kind in "iu" else ""
    raise NotRead(f"{kind}values from {low:g} to {high:g}: expected 0 to 1, 255 or 65535: rescale them and {_SAVE}")
