"""Small images and what becomes of their files, for the tests of this folder."""

import io
import struct
import zlib
from collections.abc import Mapping

import numpy as np
import pytest
from PIL import Image

from ibmd_cli.errors import IbmdError
from ibmd_cli.images.decode import Picture, decode

FORMATS = ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"]


def quarters() -> Image.Image:
    """Four flat quarters of different colours and sizes, which no format distorts much and no turn leaves alone."""
    image = Image.new("RGB", (48, 32), (250, 250, 250))
    image.paste((200, 40, 40), (0, 0, 32, 16))
    image.paste((40, 160, 40), (32, 0, 48, 16))
    image.paste((30, 30, 200), (0, 16, 32, 32))
    return image


def file_of(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rgb_of(content: bytes, **options) -> np.ndarray:
    image = decode(io.BytesIO(content), "test", **options).rgb
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def read(content: bytes, **options) -> Picture:
    return decode(io.BytesIO(content), "test", **options)


def refusal(content: bytes, **options) -> str:
    with pytest.raises(IbmdError) as caught:
        decode(io.BytesIO(content), "some.png", **options)
    message = str(caught.value)
    assert message.startswith("some.png: ")
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------- files by hand


def write_png(samples: np.ndarray, depth: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG file of samples (H, W) or (H, W, C) of `depth` bits, with `chunks` before its pixels."""
    height, width = samples.shape[:2]
    rows = (b"\0" + row for row in _packed(samples, depth, ">"))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def write_tiff(
    samples: np.ndarray,
    depth: int,
    photometric: int,
    order: str = "<",
    form: int = 1,
    *,
    extra: tuple[int, ...] = (),
    planar: int = 1,
    deflate: bool = False,
    fill: int = 1,
    tags: Mapping[int, tuple[str, tuple[int, ...]]] | None = None,
) -> bytes:
    """Return a TIFF file of samples (H, W) or (H, W, C).

    Args:
        samples: integers or floats that `depth` bits hold.
        depth: bits of a sample.
        photometric: what they mean.
        order: of bytes: "<" or ">".
        form: of samples: 1 unsigned, 2 signed, 3 float.
        extra: kinds of the channels beyond the colours.
        planar: 1: channels of a pixel side by side; 2: one plane after the other.
        deflate: whether it is compressed.
        fill: order of bits in a byte: 1 or 2 (reversed).
        tags: further ones: number → its type ("H", "I", "B") and values.
    """
    height, width = samples.shape[:2]
    count = 1 if samples.ndim == 2 else samples.shape[2]
    planes = [samples] if planar == 1 or count == 1 else [samples[..., i] for i in range(count)]
    strips = [b"".join(_packed(plane, depth, order)) for plane in planes]
    strips = [zlib.compress(strip) if deflate else strip for strip in strips]
    if fill == 2:
        reverse = bytes(int(f"{i:08b}"[::-1], 2) for i in range(256))
        strips = [strip.translate(reverse) for strip in strips]
    short = "H" * count
    entries = {256: ("I", (width,)), 257: ("I", (height,)), 258: (short, (depth,) * count)}
    entries |= {259: ("H", (8 if deflate else 1,)), 262: ("H", (photometric,)), 266: ("H", (fill,))}
    entries |= {277: ("H", (count,)), 278: ("I", (height,)), 284: ("H", (planar,)), 339: (short, (form,) * count)}
    entries |= {273: ("I" * len(strips), (0,) * len(strips)), 279: ("I" * len(strips), tuple(map(len, strips)))}
    if extra:
        entries[338] = ("H" * len(extra), extra)
    entries |= {tag: (kind * len(values), values) for tag, (kind, values) in (tags or {}).items()}
    at, offsets = 8, []
    for strip in strips:
        offsets.append(at)
        at += len(strip) + len(strip) % 2
    entries[273] = (entries[273][0], tuple(offsets))
    directory, more = struct.pack(f"{order}H", len(entries)), b""
    beyond = at + 2 + 12 * len(entries) + 4
    for tag, (kinds, values) in sorted(entries.items()):
        data = struct.pack(f"{order}{kinds}", *values)
        size = struct.pack(f"{order}HHI", tag, {"B": 7, "H": 3, "I": 4}[kinds[0]], len(values))
        if len(data) > 4:
            data, more = struct.pack(f"{order}I", beyond + len(more)), more + data + b"\0" * (len(data) % 2)
        directory += size + data.ljust(4, b"\0")
    body = b"".join(strip + b"\0" * (len(strip) % 2) for strip in strips)
    magic = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    return magic + body + directory + bytes(4) + more


def _packed(samples: np.ndarray, depth: int, order: str) -> list[bytes]:
    """Return the bytes of each row."""
    rows = samples.reshape(len(samples), -1)
    if depth in (16, 32, 64) or samples.dtype.kind == "f":
        return [row.tobytes() for row in rows.astype(rows.dtype.newbyteorder(order))]
    bits = (rows.astype(np.int64)[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return [np.packbits(row).tobytes() for row in bits.astype(np.uint8).reshape(len(rows), -1)]


SRGB_COLORANTS = (0.43607, 0.22249, 0.01392, 0.38515, 0.71687, 0.09708, 0.14307, 0.06061, 0.71410)  # under D50
P3_COLORANTS = (0.51512, 0.24120, -0.00105, 0.29198, 0.69225, 0.04189, 0.15710, 0.06657, 0.78407)


def curve_tag(kind: str, *values: float) -> bytes:
    """Return a curve of an ICC profile: "curv" of samples in [0, 1] or one gamma, or "para0" … "para4"."""
    if kind == "curv":
        numbers = [round(values[0] * 256)] if len(values) == 1 else [round(v * 65535) for v in values]
        return b"curv\0\0\0\0" + struct.pack(f">I{len(numbers)}H", len(numbers), *numbers)
    numbers = [round(v * 65536) for v in values]
    return b"para\0\0\0\0" + struct.pack(f">HH{len(numbers)}i", int(kind[-1]), 0, *numbers)


def write_icc(curve: bytes, colorants: tuple[float, ...] = SRGB_COLORANTS, name: str = "no name") -> bytes:
    """Return an ICC profile (version 4) of a curve and of colorants under D50; without colorants, for grey."""
    text = name.encode("utf-16-be")
    xyz = [b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in part)) for part in _triples(colorants)]
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"desc": b"mluc\0\0\0\0" + struct.pack(">II4sII", 1, 12, b"enUS", len(text), 28) + text, b"wtpt": white}
    tags |= {f"{c}XYZ".encode(): value for c, value in zip("rgb", xyz, strict=False)}
    tags |= {f"{c}TRC".encode(): curve for c in ("rgb" if xyz else "k")}
    table, data, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, value in tags.items():
        table += struct.pack(">4sII", tag, at + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = struct.pack(">I4sI4s4s4s12s4s", at + len(data), b"lcms", 0x04300000, b"mntr", b"RGB " if xyz else b"GRAY",
                       b"XYZ ", bytes(12), b"acsp")  # fmt: skip
    return (head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0") + table + data


def _triples(values: tuple[float, ...]) -> list[tuple[float, ...]]:
    return [values[i : i + 3] for i in range(0, len(values), 3)]
