"""Names for files that are no images or not of a kind that is read, and for Pillow's errors, with what mends each."""

import re
import struct
from typing import Any, BinaryIO

from PIL import Image

from ibmd_cli.images import table

READABLE = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "PPM")
EXPECTED = "expected PNG, JPEG, WebP, TIFF, BMP, PNM, GIF or AVIF"


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
    if (known := _by_beginning("beginnings", head)) is not None:
        return _named(*known)
    if head[4:8] == b"ftyp":
        return _named(*(_by_beginning("brands", head[8:]) or table("brands")[""]))
    if head[257:262] == b"ustar":
        return _named("a tar archive", "unpack it (tar xf) and give the images in it")
    return _text(head) or f"not an image, or a damaged one: {EXPECTED}"


def trouble(reason: str, name: str = "damaged or incomplete") -> str:
    """Say what an error of Pillow's about a file of a format that is read means, and what mends it."""
    for part, meaning in table("reasons").items():
        if part in reason:
            return str(meaning).replace("REASON", reason)
    return f"{name}{f' ({reason})' if reason.isprintable() and reason else ''}: fetch, copy or save it again"


def _by_beginning(name: str, head: bytes) -> Any:
    """Return the entry of a table whose key a file begins with; of a text, three letters are not enough."""
    least = 4 if _text(head) else 1
    keys = (key for key in table(name) if len(key) >= least and head.startswith(key.encode("latin-1")))
    return next((table(name)[key] for key in keys), None)


def _named(what: str, mend: str = "") -> str:
    image = any(word in what for word in (" image", " photo", " icon", " texture", " drawing"))
    return f"{'' if image else 'not an image but '}{what}: {mend or EXPECTED}"


def _form(head: bytes) -> str | None:
    """Return the format, of those that are read, that a file begins like."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp" and (b"avif" in head[8:40] or b"avis" in head[8:40]):
        return "AVIF"
    form: str | None = _by_beginning("formats", head)
    return form


def _unopened(stream: BinaryIO, form: str) -> str:
    """Say why Pillow does not open a file that begins as one of a format that is read."""
    if form not in Image.OPEN:
        return f"an {form} image, which this Pillow cannot read: convert it to PNG first, or pip install a newer Pillow"
    stream.seek(0)
    try:
        Image.OPEN[form][0](stream, "")
    except Exception as error:  # the reason, which Image.open drops
        reason = str(error)
    else:
        reason = ""
    if form == "TIFF" and (kind := _tiff_kind(stream, reason)):
        return f"a TIFF image of {kind}, which is not read: save it as PNG with 8 or 16 bits"
    return trouble(reason, f"a damaged or incomplete {form} image")


def _tiff_kind(stream: BinaryIO, reason: str) -> str:
    """Name the compression or the samples that Pillow's error is about; nothing if it is about something else."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    if reason.isdigit():  # a number of TIFF's that Pillow does not know
        return f"compression {table('compression').get(reason, reason)}"
    if reason not in ("unknown pixel mode", "unknown data organization", "string index out of range"):
        return ""
    try:
        stream.seek(0)
        head = stream.read(16)
        directory = ImageFileDirectory_v2(head if b"+" in head[2:4] else head[:8])
        stream.seek(directory.next)
        directory.load(stream)
        photometric, count = directory.get(262, 0), directory.get(277, 1)
        bits, formats = directory.get(258, (1,)), directory.get(339, (1,))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return ""
    depth = "/".join(map(str, sorted(set(bits))))
    form = table("sample_format").get(str(min(formats)), "unknown")
    colour = table("photometric").get(str(photometric), f"photometric {photometric}")
    more = count - {2: 3, 5: 4, 6: 3, 8: 3}.get(photometric, 1)
    return f"{depth}-bit {form} {colour} samples" + (f" with {more} more" if more > 0 else "")


def _text(head: bytes) -> str:
    """Name what is text; nothing if it is none."""
    text = head.decode("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8", "replace")
    start = text.lstrip("\ufeff").lstrip().lower()
    if "<svg" in start and start.startswith(("<svg", "<?xml", "<!--", "<!doctype svg")):
        return _named("an SVG drawing", "convert it to PNG first: rsvg-convert IN.svg -o OUT.png")
    if start.startswith(("<!doctype html", "<html", "<head", "<body")) or "<html" in start[:1000]:
        return _named("an HTML page (a download that failed?)", "fetch the file itself")
    if start.startswith("<?xml") or re.match(r'\{\s*["}]|\[\s*["{\[\]\d-]', start):
        return _named(f"{'an XML' if start[0] == '<' else 'a JSON'} file")
    text = text.rstrip("\ufffd")  # a character that was cut
    return _named("a text file") if text and all(c.isprintable() or c.isspace() for c in text) else ""
