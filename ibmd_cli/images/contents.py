"""Contents of files that are no images or not of a kind that is read, named with what mends it."""

import struct
from typing import BinaryIO

from PIL import Image

EXPECTED = "expected PNG, JPEG, WebP, TIFF, BMP, PNM, GIF or AVIF"
_CONVERT = "convert it to PNG first"

# Beginnings of files: what they are, and what mends it.
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer", "fetch it with git lfs pull"),
    (b"PK\3\4", "a ZIP archive (or a document that is one)", "unpack it and give the images in it"),
    (b"PK\5\6", "an empty ZIP archive", EXPECTED),
    (b"\x1f\x8b", "a gzip archive", "unpack it (gunzip or tar xzf)"),
    (b"BZh", "a bzip2 archive", "unpack it (bunzip2 or tar xjf)"),
    (b"\xfd7zXZ", "an xz archive", "unpack it (unxz or tar xJf)"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it and give the images in it"),
    (b"Rar!", "a RAR archive", "unpack it and give the images in it"),
    (b"%PDF", "a PDF document", "make an image of its page first: pdftoppm -png IN.pdf OUT"),
    (b"%!PS", "a PostScript drawing", "make an image of it first: gs -sDEVICE=png16m -r150 -o OUT.png IN"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript drawing", "make an image of it first: gs -sDEVICE=png16m -r150 -o OUT.png IN"),
    (b"8BPS", "a Photoshop document", "export it as PNG"),
    (b"gimp xcf", "a GIMP document", "export it as PNG"),
    (b"\xff\x0a", "a JPEG XL image", f"{_CONVERT}: djxl IN.jxl OUT.png"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image", f"{_CONVERT}: djxl IN.jxl OUT.png"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image", _CONVERT),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image", _CONVERT),
    (b"\0\0\1\0", "a Windows icon", _CONVERT),
    (b"icns", "a macOS icon", _CONVERT),
    (b"DDS ", "a DDS texture", _CONVERT),
    (b"v/1\1", "an OpenEXR image", "tone-map it and save it as PNG first"),
    (b"#?RADIANCE", "a Radiance HDR image", "tone-map it and save it as PNG first"),
    (b"\x93NUMPY", "a NumPy array", "save it as an image: Image.fromarray(numpy.load(IN)).save(OUT.png)"),
    (b"\x89HDF", "an HDF5 file", EXPECTED),
    (b"SIMPLE  =", "a FITS image", _CONVERT),
    (b"qoif", "a QOI image", _CONVERT),
    (b"\x80\x04\x95", "a Python pickle", EXPECTED),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video", "take single images from it first: ffmpeg -i IN OUT%04d.png"),
    (b"OggS", "an Ogg file", EXPECTED),
    (b"ID3", "an MP3 file", EXPECTED),
    (b"\x7fELF", "a program", EXPECTED),
    (b"MZ", "a Windows program", EXPECTED),
)
_BRANDS = {  # of ISO media files
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
        ("a HEIC image", "convert it to JPEG or PNG first: heif-convert IN.heic OUT.jpg"),
    ),
    b"crx ": ("a raw photo of a camera (CR3)", "develop it to TIFF or JPEG first"),
}
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}


def refusal(stream: BinaryIO) -> str:
    """Say what the content of a file that is not read is, and what mends it."""
    size = stream.seek(0, 2)
    stream.seek(0)
    head = stream.read(4096)
    if not head:
        return "not an image but an empty file (0 bytes): fetch or save it again"
    if not head.strip(b"\0"):
        where = " at its beginning" if size > len(head) else ""
        return f"not an image but nothing but zeros{where}, as of a copy that broke off: fetch it again"
    if (form := _form(head)) is not None:
        return _unopened(stream, form)
    for magic, what, mend in _KINDS:
        if head.startswith(magic):
            return _named(what, mend)
    if head[4:8] == b"ftyp":
        video = ("a video (MP4, MOV)", "take single images from it first: ffmpeg -i IN OUT%04d.png")
        return _named(*_BRANDS.get(head[8:12], video))
    return _text(head) or f"not an image, or a damaged one: {EXPECTED}"


def _named(what: str, mend: str) -> str:
    image = any(word in what for word in (" image", " photo", " icon", " texture", " drawing"))
    return f"{'' if image else 'not an image but '}{what}: {mend}"


def _form(head: bytes) -> str | None:
    """Return the format, of those that are read, that a file begins like."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    return next((form for magic, form in _MAGIC.items() if head.startswith(magic)), None)


def _unopened(stream: BinaryIO, form: str) -> str:
    """Say why Pillow does not open a file that begins as one of a format that is read."""
    damaged = f"a damaged or incomplete {form} image"
    if form not in Image.OPEN:
        return f"an {form} image, which this Pillow cannot read: {_CONVERT}, or pip install a newer Pillow"
    stream.seek(0)
    try:
        Image.OPEN[form][0](stream, "")
    except Exception as error:  # the reason, which Image.open drops
        reason = str(error)
    else:
        reason = ""
    if form == "TIFF" and reason in ("unknown pixel mode", "unknown data organization", "string index out of range"):
        return f"{_tiff_kind(stream) or damaged}: save it as PNG with 8 or 16 bits"
    if reason.startswith("cannot handle"):
        return f"a JPEG image of a kind that cannot be read ({reason}): save it as PNG"
    return f"{damaged}{f' ({reason})' if reason and reason.isprintable() else ''}: fetch or save it again"


def _tiff_kind(stream: BinaryIO) -> str:
    """Name the kind of samples of a TIFF image, as far as its first directory can be read."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    try:
        stream.seek(0)
        head = stream.read(16)
        directory = ImageFileDirectory_v2(head if head[2:3] == b"+" or head[3:4] == b"+" else head[:8])
        stream.seek(directory.next)
        directory.load(stream)
        tags = dict(directory)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return ""
    photometric = tags.get(262, 0)
    colours = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELab", 9: "ICCLab"}
    colours |= {10: "ITULab", 32803: "raw sensor", 32844: "LogL", 32845: "LogLuv", 34892: "raw sensor"}
    bits, formats = tags.get(258, (1,)), set(tags.get(339, (1,)))
    samples = tags.get(277, len(bits))
    kind = {1: "unsigned", 2: "signed", 3: "float", 5: "complex integer", 6: "complex float"}
    depth = f"{'/'.join(map(str, sorted(set(bits))))}-bit {kind.get(min(formats, default=1), 'unknown')}"
    extra = f" with {samples - own} more" if samples > (own := {2: 3, 5: 4, 6: 3, 8: 3}.get(photometric, 1)) else ""
    colour = colours.get(photometric, f"photometric {photometric}")
    order = "big-endian " if head[:2] == b"MM" else ""
    return f"a TIFF image of {order}{depth} {colour} samples{extra}, which is not read"


def _text(head: bytes) -> str:
    """Name what is text; nothing if it is none."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in start and start.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")):
        return _named("an SVG drawing", f"{_CONVERT}: rsvg-convert IN.svg -o OUT.png")
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")) or b"<html" in start[:1000]:
        return _named("an HTML page (a download that failed?)", "fetch the file itself")
    if start.startswith((b"{", b"[")) or start.startswith(b"<?xml"):
        return _named(f"{'an XML' if start[:1] == b'<' else 'a JSON'} file", EXPECTED)
    try:
        text = head.decode("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    except UnicodeDecodeError as error:
        text = head[: error.start].decode() if error.start > 4092 else "\0"  # a character that was cut
    if all(c.isprintable() or c.isspace() for c in text):
        return _named("a text file", EXPECTED)
    return ""
