"""Writes a folder of files that image tools stumble on, each with what is to become of it.

python tests/hostile.py FOLDER
"""

import io
import os
import socket
import struct
import sys
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms


def png(width: int, height: int, *chunks: tuple[bytes, bytes], rows: bytes = b"", depth: int = 1) -> bytes:
    """A grey PNG with whatever its header and chunks claim."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(width: int, height: int) -> bytes:
    """A grey TIFF of that size, according to its header, with one strip of 8 bytes."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, min(width * height, 2**32 - 1))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def bombs() -> dict[str, bytes]:
    """Small files that claim, or unpack to, very much."""
    jpeg = bytearray(_file(Image.new("RGB", (8, 8)), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65500, 65500)
    bmp = bytearray(_file(Image.new("RGB", (8, 8)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 200_000, 200_000)
    gif = bytearray(_file(Image.new("P", (8, 8)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    text, profile = (b"zTXt", b"Comment\0\0" + _zeros()), (b"iCCP", b"name\0\0" + _zeros())
    return {
        "bomb.png": png(60_000, 60_000, rows=bytes(1000)),
        "bomb-just-above.png": png(10_001, 10_000, rows=bytes(1000)),
        "bomb-tif.tif": tiff(100_000, 100_000),
        "bomb-jpg.jpg": bytes(jpeg),
        "bomb-bmp.bmp": bytes(bmp),
        "bomb-gif.gif": bytes(gif),
        "bomb-text.png": png(8, 8, text, rows=bytes(16)),
        "bomb-profile.png": png(8, 8, profile, rows=bytes(16)),
    }


@cache
def _zeros() -> bytes:
    """300 MB of zeros, compressed."""
    packer, megabyte = zlib.compressobj(1), bytes(1_000_000)
    return b"".join(packer.compress(megabyte) for _ in range(300)) + packer.flush()


def write_corpus(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Write the files; returns name → size (width, height) of the image, or None if it is to be refused.

    Names that a folder search passes over are not in it.
    """
    folder.mkdir(parents=True)
    base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    size: tuple[int, int] | None = base.size
    grey = base.convert("L")
    upright: tuple[int, int] | None = (base.height, base.width)
    expected: dict[str, tuple[int, int] | None] = {}

    def write(name: str | bytes, content: bytes, want: tuple[int, int] | None) -> None:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
        expected[os.fsdecode(name)] = want

    plain = _file(base, "PNG")
    # modes and formats
    for mode, form, ending in (
        ("1", "PNG", "png"), ("L", "PNG", "png"), ("LA", "PNG", "png"), ("P", "PNG", "png"), ("RGBA", "PNG", "png"),
        ("I;16", "PNG", "png"), ("CMYK", "JPEG", "jpg"), ("L", "JPEG", "jpg"), ("YCbCr", "JPEG", "jpg"),
        ("CMYK", "TIFF", "tif"), ("I", "TIFF", "tif"), ("F", "TIFF", "tif"), ("I;16", "TIFF", "tif"),
        ("RGBX", "TIFF", "tif"), ("P", "GIF", "gif"), ("P", "BMP", "bmp"), ("RGBA", "WEBP", "webp"),
        ("RGB", "AVIF", "avif"),
    ):  # fmt: skip
        if mode == "I;16":
            image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        else:
            image = (grey if mode in ("I", "F", "LA") else base).convert(mode)
        write(f"mode-{mode.replace(';', '')}-{form}.{ending}", _file(image, form), size)
    # what stands beside the pixels
    for orientation in (0, 1, 3, 6, 8, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = orientation in (6, 8)
        write(f"turned-{orientation}.jpg", _file(base, "JPEG", exif=exif), upright if turned else size)
    write("exif-damaged.jpg", _file(base, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"), size)
    write("profile-damaged.jpg", _file(base, "JPEG", icc_profile=b"no profile at all"), size)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    write("profile-of-another-mode.png", _file(base, "PNG", icc_profile=lab), size)
    write("resolution-absurd.jpg", _file(base, "JPEG", dpi=(65535, 1)), size)
    for form, ending in (("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")):
        frames = [Image.new("RGB", base.size, (40 * i, 0, 0)) for i in range(5)]
        write(f"frames.{form}.{ending}", _file(base, form, save_all=True, append_images=frames), size)
    # sizes
    write("size-one.png", _file(Image.new("RGB", (1, 1)), "PNG"), (1, 1))
    write("size-wide.png", _file(Image.new("RGB", (4001, 37)), "PNG"), (4001, 37))
    # content and name
    write("jpeg-in-truth.png", _file(base, "JPEG"), size)
    write("text.png", b"no image", None)
    write("empty.jpg", b"", None)
    write("eps-in-truth.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", None)
    for form, ending in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("TIFF", "tif"), ("BMP", "bmp")):
        whole = _file(base, form)
        write(f"cut-{form}.{ending}", whole[: len(whole) * 2 // 3], None)
    broken = bytearray(plain)
    broken[broken.index(b"IDAT") + 8] ^= 0xFF
    write("checksum.png", bytes(broken), None)
    for name, content in bombs().items():
        write(name, content, None)
    write("values-unknown.tif", _file(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), None)
    # names
    for name in (
        "two words.png", "new\nline.png", "-dash.png", "[br]*?.png", "ünï 🎨.png", "escape\x1b[31m.png", "UPPER.PNG",
        "a" * 245 + ".png", "deep/er/still.png", "deep/d..ots...png",
    ):  # fmt: skip
        write(name, plain, size)
    write(b"latin\xe9.png", plain, size)
    # what is passed over
    for name in (".hidden.png", ".hidden/x.png", "notes.txt", "made.ibmd.png", "made.ibmd.2.jpg"):
        write(name, plain, size)
        del expected[name]
    os.mkfifo(folder / "fifo.png")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(folder)  # names of sockets are short
        server.bind("socket.png")
        os.chdir(here)
    (folder / "folder.png").mkdir()
    (folder / "deep" / "loop").symlink_to(folder)
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "nothing.png").symlink_to("absent.png")
    (folder / "device.png").symlink_to("/dev/zero")
    # links to files are followed
    (folder / "link.png").symlink_to("two words.png")
    expected["link.png"] = size
    return expected


def _file(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]))
