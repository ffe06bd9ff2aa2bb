"""Files that are no images, or not of a kind that is read, are named as what they are, with what mends it."""

import base64
import io
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from imagefiles import file_of, quarters, refusal, rgb_of, write_png, write_tiff
from PIL import Image, features

from ibmd_cli.images.other_files import EXPECTED

PNG, JPEG = (file_of(quarters(), form) for form in ("PNG", "JPEG"))


def archive(kind: str = "zip") -> bytes:
    content = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=content, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("a.png"))
        return content.getvalue()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("a.png", b"x")
    return content.getvalue()


def media(brand: bytes) -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1" + brand + bytes(200)


SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><path d="M1 1h7"/></svg>'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
# Content, what it is called, and the mend.
OTHERS = {
    "nothing": (b"", "not an image but an empty file (0 bytes)", "fetch or save it again"),
    "zeros": (bytes(5000), "not an image but nothing but zeros", "fetch it again"),
    "git-lfs": (LFS, "not an image but a git-lfs pointer", "git lfs pull"),
    "svg": (SVG.encode(), "an SVG drawing", "rsvg-convert"),
    "svg with its declaration": (b'<?xml version="1.0"?>\n<!-- made -->\n' + SVG.encode(), "an SVG drawing", "rsvg"),
    "svg with a BOM": (b"\xef\xbb\xbf" + SVG.encode(), "an SVG drawing", "rsvg-convert"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "not an image but an HTML page", "fetch the file itself"),
    "html in capitals": (b"\n <HTML><HEAD></HEAD></HTML>", "not an image but an HTML page", "fetch the file itself"),
    "heic": (media(b"heic"), "a HEIC image", "heif-convert"),
    "heif of the other brand": (media(b"mif1"), "a HEIC image", "heif-convert"),
    "cr3": (media(b"crx "), "a raw photo", "develop it"),
    "mp4": (media(b"isom"), "not an image but a video", "ffmpeg -i"),
    "zip": (archive(), "not an image but a ZIP archive", "unpack it"),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), "not an image but a gzip archive", "unpack it"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "not an image but a PDF document", "pdftoppm -png"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0", "a PostScript drawing", "gs -sDEVICE"),
    "photoshop": (b"8BPS\0\1" + bytes(40), "not an image but a Photoshop document", "export it as PNG"),
    "jpeg xl": (b"\xff\x0a" + bytes(40), "a JPEG XL image", "convert it to PNG"),
    "jpeg 2000": (file_of(quarters(), "JPEG2000"), "a JPEG 2000 image", "convert it to PNG"),
    "icon": (file_of(quarters(), "ICO"), "a Windows icon", "convert it to PNG"),
    "macOS icon": (file_of(quarters(), "ICNS"), "a macOS icon", "convert it to PNG"),
    "tga": (file_of(quarters(), "TGA"), "a TGA image", "convert it to PNG"),
    "compressed tga": (file_of(quarters(), "TGA", compression="tga_rle"), "a TGA image", "convert it to PNG"),
    "pcx": (file_of(quarters(), "PCX"), "a PCX image", "convert it to PNG"),
    "sgi": (file_of(quarters(), "SGI"), "an SGI image", "convert it to PNG"),
    "dds": (file_of(quarters(), "DDS"), "a DDS texture", "convert it to PNG"),
    "xbm": (file_of(quarters().convert("1"), "XBM"), "an XBM image", "convert it to PNG"),
    "xpm": (b'/* XPM */\nstatic char *a[] = {"1 1 1 1", "  c #000000", " "};', "an XPM image", "convert it to PNG"),
    "mng": (b"\x8aMNG\r\n\x1a\n" + bytes(40), "an MNG image", "convert it to PNG"),
    "pam": (b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 3\nMAXVAL 255\nENDHDR\n\0\0\0", "a PAM image", "pamtopng"),
    "pfm in colour": (b"PF\n1 1\n-1.0\n" + bytes(12), "a PFM image in colour", "convert it to PNG"),
    "avi": (b"RIFF\xff\0\0\0AVI LIST" + bytes(40), "not an image but a video or a sound", "ffmpeg -i"),
    "numpy": (b"\x93NUMPY\1\0v\0", "not an image but a NumPy array", "Image.fromarray"),
    "text": (b"hello\n" * 2000, "not an image but a text file", EXPECTED),
    "text that begins as BMP does": (b"BMI, age\n23, 40\n", "not an image but a text file", EXPECTED),
    "text that begins as a program does": (b"MZ is a name\n", "not an image but a text file", EXPECTED),
    "text beyond ASCII": ("für über ".encode() * 999, "not an image but a text file", EXPECTED),
    "text in UTF-16": ("hello".encode("utf-16"), "not an image but a text file", EXPECTED),
    "json": (b'{"error": "not found"}', "not an image but a JSON file", EXPECTED),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "not an image but an XML file", EXPECTED),
    "rtf": (rb"{\rtf1\ansi hello}", "not an image but an RTF document", "make an image"),
    "ini": (b"[InternetShortcut]\r\nURL=https://example.org\r\n", "not an image but a text file", EXPECTED),
    "svg in UTF-16": (SVG.encode("utf-16"), "an SVG drawing", "rsvg-convert"),
    "html in Latin-1": ("<html><title>Größe".encode("latin-1"), "not an image but an HTML page", "fetch the file"),
    "git-annex": (b"/annex/objects/SHA256E-s1--00.png\n", "not an image but a git-annex pointer", "git annex get"),
    "tar": (archive("tar"), "not an image but a tar archive", "unpack it"),
    "png with Unix line ends": (PNG.replace(b"\r\n", b"\n"), "a PNG image whose line ends", "as binary"),
    "png with Windows line ends": (PNG.replace(b"\n", b"\r\n"), "a PNG image whose line ends", "as binary"),
    "png written as UTF-8": (PNG.decode("latin-1").encode(), "a PNG image that was taken for text", "as binary"),
    "jpeg written as UTF-8": (JPEG.decode("latin-1").encode(), "a JPEG image that was taken for text", "as binary"),
    "jpeg read as UTF-8": (JPEG.decode("utf-8", "replace").encode(), "an image (JPEG?) that was", "as binary"),
    "png behind a BOM": (b"\xef\xbb\xbf" + PNG, "a PNG image behind a byte order mark", "tail -c +4"),
    "png in Base64": (base64.b64encode(PNG), "a PNG image as Base64 text", "base64 -d"),
    "jpeg in Base64": (base64.b64encode(JPEG), "a JPEG image as Base64 text", "base64 -d"),
    "AppleDouble": (b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(60), "not an image but macOS's data", "give the file"),
    "unknown bytes": (bytes(range(128, 256)) * 9, "not an image, or a damaged one", EXPECTED),
    "a program": (b"\x7fELF\2\1\1" + bytes(90), "not an image but a program", EXPECTED),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_content_is_named(kind):
    content, what, mend = OTHERS[kind]
    told = refusal(content)
    assert told.startswith(f"some.png: {what}")
    assert mend in told
    assert "damaged or incomplete" not in told


@pytest.mark.parametrize(
    ("form", "count"), [("PNG", 8), ("JPEG", 2), ("GIF", 6), ("BMP", 10), ("TIFF", 8), ("WEBP", 20), ("AVIF", 30)]
)
def test_an_image_cut_in_its_header_is_called_incomplete(form, count):
    told = refusal(file_of(quarters(), form)[:count])
    assert "damaged or incomplete" in told
    assert told.endswith("save it again")


def test_jpeg_of_twelve_bits_and_of_two_channels():
    content = bytearray(file_of(quarters(), "JPEG"))
    at = content.index(b"\xff\xc0")
    content[at + 4] = 12
    assert "a JPEG image of a kind that cannot be read (cannot handle 12-bit layers)" in refusal(bytes(content))
    content[at + 4], content[at + 9] = 8, 2
    assert "cannot handle 2-layer images" in refusal(bytes(content))


@pytest.mark.parametrize("chunk", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_text_too_large_is_named_and_its_mend_mends(chunk, tmp_path):
    packed = zlib.compress(bytes(80_000_000))
    body = b"Comment\0\1\0\0\0" + packed if chunk == b"iTXt" else b"Comment\0\0" + packed
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    content = write_png(pixels, 8, 2, (chunk, body))
    told = refusal(content)
    assert "a text or profile in it of more than 1 MB" in told
    assert "copy or save it again" not in told
    if shutil.which("pngfix") is None:
        pytest.skip("no pngfix: apt-get install libpng-tools")
    (tmp_path / "FILE").write_bytes(content)
    command = told[told.index("pngfix --strip") :].split(" (")[0]
    command = command.replace("unused", "color") if chunk == b"iCCP" else command
    subprocess.run(command.split(), cwd=tmp_path, check=False)  # it ends with 1 where something was mended
    assert np.array_equal(rgb_of((tmp_path / "OUT.png").read_bytes()), pixels)


def test_a_format_that_this_pillow_cannot_read(monkeypatch):
    """A Pillow without AVIF: the file is named, and so is the way."""
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    content = file_of(quarters(), "AVIF")
    monkeypatch.delitem(Image.OPEN, "AVIF")
    assert "an AVIF image, which this Pillow cannot read: convert it to PNG first" in refusal(content)


@pytest.mark.parametrize(
    ("number", "name"),
    [(34712, "JPEG 2000"), (33003, "JPEG 2000"), (34887, "LERC"), (50001, "WebP"), (52546, "JPEG XL"), (777, "777")],
)
def test_compressions_of_tiff_that_are_not_read_are_named(number, name):
    content = write_tiff(np.zeros((2, 2, 3), "u1"), 8, 2)
    content = content.replace(struct.pack("<HHIH", 259, 3, 1, 1), struct.pack("<HHIH", 259, 3, 1, number))
    told = refusal(content)
    assert name in told
    assert told.endswith("which is not read: save it as PNG with 8 or 16 bits")


@pytest.mark.parametrize(
    ("bits", "compression", "masks"),
    [(2, 0, ()), (0, 4, ()), (0, 5, ()), (16, 3, (0xF00, 0xF0, 0xF)), (32, 3, (0x3FF00000, 0xFFC00, 0x3FF))],
)
def test_kinds_of_bmp_that_are_not_read_are_not_called_damaged(bits, compression, masks):
    """2 bits, JPEG and PNG within, 4 and 10 bits of a colour."""
    info = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, bits, compression, 64, 0, 0, 0, 0)
    start = 54 + 4 * len(masks)
    content = b"BM" + struct.pack("<IHHI", start + 64, 0, 0, start) + info + struct.pack(f"<{len(masks)}I", *masks)
    told = refusal(content + bytes(64))
    assert "of a kind that is not read (Unsupported BMP" in told
    assert told.endswith("save it as PNG")


def test_png_of_iphones_is_named():
    told = refusal(write_png(np.zeros((2, 2, 3), "u1"), 8, 2, (b"CgBI", b"\x50\0\x20\2")))
    assert "a PNG image for iPhones (CgBI): Xcode's pngcrush -revert-iphone-optimizations" in told


def test_names_of_exceptions_are_no_reasons():
    assert "Error" not in refusal(write_png(np.zeros((2, 2), "u1"), 8, 3))  # a palette image without one
