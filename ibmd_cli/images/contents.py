"""Contents of files that are no images or not of a kind that is read, named with what mends it."""

import struct
import tomllib
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

EXPECTED = "expected PNG, JPEG, WebP, TIFF, BMP, PNM, GIF or AVIF"
_CONVERT = "convert it to PNG first"


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("contents.toml").read_text(encoding="utf-8"))


def _by_beginning(table: str, head: bytes) -> Any:
    """Return the entry of a table whose key a file begins with; of a text, three letters are not enough."""
    least = 4 if _text(head) else 1
    keys = (key for key in _tables()[table] if len(key) >= least and head.startswith(key.encode("latin-1")))
    return next((_tables()[table][key] for key in keys), None)


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
        video = ("a video (MP4, MOV)", "take single images from it first: ffmpeg -i IN OUT%04d.png")
        return _named(*(_by_beginning("brands", head[8:]) or video))
    return _text(head) or f"not an image, or a damaged one: {EXPECTED}"


def _named(what: str, mend: str = "") -> str:
    image = any(word in what for word in (" image", " photo", " icon", " texture", " drawing"))
    return f"{'' if image else 'not an image but '}{what}: {mend or EXPECTED}"


def _form(head: bytes) -> str | None:
    """Return the format, of those that are read, that a file begins like."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    form: str | None = _by_beginning("formats", head)
    return form


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
    bits, formats = tags.get(258, (1,)), set(tags.get(339, (1,)))
    samples = tags.get(277, len(bits))
    kind = _tables()["sample_format"].get(str(min(formats, default=1)), "unknown")
    depth = f"{'/'.join(map(str, sorted(set(bits))))}-bit {kind}"
    extra = f" with {samples - own} more" if samples > (own := {2: 3, 5: 4, 6: 3, 8: 3}.get(photometric, 1)) else ""
    colour = _tables()["photometric"].get(str(photometric), f"photometric {photometric}")
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
        return _named(f"{'an XML' if start[:1] == b'<' else 'a JSON'} file")
    try:
        text = head.decode("utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    except UnicodeDecodeError as error:
        text = head[: error.start].decode() if error.start > 4092 else "\0"  # a character that was cut
    if all(c.isprintable() or c.isspace() for c in text):
        return _named("a text file")
    return ""
