"""Metadata of an image file, as far as they are true of another picture made from it.

Kept: camera, lens, exposure and times (EXIF), description, artist, copyright, XMP, and an RGB profile that makes no
difference to sRGB, which results are in. Left out: orientation, sizes, thumbnails, places (GPS and names), makers'
notes, regions, editing history, and a profile of another space, from which the pixels were converted.
"""

from contextlib import suppress
from typing import Any, NamedTuple
from xml.dom import minidom

from PIL import Image

from ibmd_cli.images import table

EXIF_IFD = 0x8769
DESCRIPTION, ARTIST, COPYRIGHT = 0x010E, 0x013B, 0x8298
_BASE = (DESCRIPTION, 0x010F, 0x0110, 0x0132, ARTIST, COPYRIGHT)  # and make, model, time
_CAMERA = (
    *(0x829A, 0x829D, 0x8822, *range(0x8827, 0x8836), 0x9000, 0x9003, 0x9004, *range(0x9010, 0x9013)),
    *(*range(0x9201, 0x920B), *range(0x9290, 0x9293), 0xA217, 0xA300, 0xA301, *range(0xA401, 0xA40B)),
    *range(0xA430, 0xA436),
)
_LIMIT = 1 << 20  # bytes of XMP


class Metadata(NamedTuple):
    """What is kept of a file: EXIF of the picture and of the camera, an XMP packet, an ICC profile that means sRGB."""

    base: dict[int, Any] = {}
    camera: dict[int, Any] = {}
    xmp: bytes = b""
    profile: bytes = b""


def read_metadata(image: Image.Image, profile: bytes) -> Metadata:
    """Read what is true of another picture, too, and not damaged; `profile` is the file's if it means sRGB."""
    base: dict[int, Any] = {}
    camera: dict[int, Any] = {}
    try:
        exif = image.getexif()
        base = {tag: value for tag in _BASE if (value := _writable_value(exif.get(tag))) is not None}
        inner = exif.get_ifd(EXIF_IFD)
        camera = {tag: value for tag in _CAMERA if (value := _writable_value(inner.get(tag))) is not None}
        to_exif(base, camera).tobytes()
    except Exception:  # Pillow raises whatever damaged bytes lead to
        camera = {}
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    return Metadata(base, camera, _true(xmp), profile if profile[16:20] == b"RGB " else b"")


def to_exif(base: dict[int, Any], camera: dict[int, Any]) -> Image.Exif:
    """Return an EXIF block."""
    exif = Image.Exif()
    exif.update(base)
    if camera:
        exif.get_ifd(EXIF_IFD).update(camera)
        exif[EXIF_IFD] = 0  # stands for its offset: TIFF leaves the part out where there is none
    return exif


def _writable_value(value: Any) -> Any:
    """Return a number, a line of UTF-8, some bytes, or a few of these; None for all else, and what is damaged."""
    if isinstance(value, str):
        with suppress(UnicodeError):
            value = value.encode("latin-1").decode("utf-8")  # as most programs write it
        line = "".join(c for c in value if c.isprintable())[:1000]
        return line if line.isascii() and line else line.encode("utf-8", "backslashreplace") or None
    if isinstance(value, bytes):
        return value if 0 < len(value) <= 64 else None
    if isinstance(value, tuple):
        return value if 0 < len(value) <= 8 and all(_writable_value(part) is not None for part in value) else None
    try:
        return value if abs(float(value)) < 2**32 else None
    except (TypeError, ValueError, ZeroDivisionError):
        return None


def _true(xmp: bytes | str) -> bytes:
    """Return an XMP packet without what is false of another picture; nothing if it is damaged or hides things."""
    content = xmp.encode("utf-8", "surrogatepass") if isinstance(xmp, str) else bytes(xmp)
    if not content or len(content) > _LIMIT or b"<!" in content:
        return b""
    try:
        packet = minidom.parseString(content.rstrip(b"\0"))
        for node in packet.getElementsByTagName("*"):
            for attribute in list(node.attributes.values()):
                if _false(attribute):
                    node.removeAttributeNode(attribute)
            if _false(node) and node.parentNode is not None:
                node.parentNode.removeChild(node)
        return "".join(child.toxml() for child in packet.childNodes).encode()
    except Exception:  # expat and minidom raise several kinds
        return b""


def _false(node: Any) -> bool:
    space, name, known = node.namespaceURI or "", node.localName or "", table("false_xmp")
    if any(part in space for part in known["spaces"]):
        return True
    return space != "http://www.w3.org/2000/xmlns/" and (name in known["names"] or name.startswith("GPS"))
