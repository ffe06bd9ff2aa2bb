"""Metadata: what is true of another picture comes along, in every format that holds it; places do not."""

import io
import warnings

import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import IFDRational

from ibmd_cli.images.decode import decode
from ibmd_cli.images.encode import encode
from ibmd_cli.images.metadata import EXIF_IFD

GPS_IFD = 0x8825
BASE = {0x010F: "Maker", 0x0110: "Model 5", 0x0132: "2024:05:06 07:08:09", 0x013B: "Ann", 0x8298: "© Ann"}
CAMERA = {
    0x829A: IFDRational(1, 125), 0x829D: IFDRational(28, 10), 0x8827: 400, 0x9003: "2024:05:06 07:08:09",
    0x9000: b"0232", 0x920A: IFDRational(50, 1), 0xA434: "Lens 50mm",
}  # fmt: skip
XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"
 xmlns:exif="http://ns.adobe.com/exif/1.0/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/" xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"
 tiff:Orientation="6" tiff:ImageWidth="4000" exif:PixelXDimension="4000" exif:GPSLatitude="52,30N" xmp:Rating="4"
 photoshop:City="Berlin" xmpMM:DocumentID="secret-id" dc:format="image/jpeg">
<dc:rights><rdf:Alt><rdf:li xml:lang="x-default">© Ann Ä</rdf:li></rdf:Alt></dc:rights>
<exif:GPSLongitude>13,24E</exif:GPSLongitude>
<xmp:Thumbnails><rdf:Alt><rdf:li rdf:parseType="Resource">tiny-picture</rdf:li></rdf:Alt></xmp:Thumbnails>
</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""
LIES = ("Orientation", "ImageWidth", "PixelX", "GPS", "52,30N", "13,24E", "Berlin", "secret-id", "tiny-picture")
FORMATS = [".png", ".jpg", ".webp", ".tif", ".avif"]


def photo(suffix: str, profile: bytes = b"") -> bytes:
    """A picture that says all sorts of things."""
    exif = Image.Exif()
    for tag, value in BASE.items():
        exif[tag] = value.encode() if "©" in value else value
    if suffix != ".avif":  # Pillow writes the orientation of AVIF elsewhere, and damages text on that way
        exif[0x0112] = 3
    exif.get_ifd(EXIF_IFD).update(CAMERA | {0xA002: 4000, 0xA003: 3000, 0x927C: b"x" * 2000})
    exif.get_ifd(GPS_IFD).update({1: "N", 2: (52.0, 30.0, 0.0)})
    exif[EXIF_IFD] = exif[GPS_IFD] = 0
    options: dict = {"exif": exif, "icc_profile": profile or None}
    if suffix == ".png":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP)
    elif suffix == ".tif":
        exif[0x02BC] = XMP.encode()
    else:
        options["xmp"] = XMP.encode()
    buffer = io.BytesIO()
    form = {".jpg": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper())
    Image.new("RGB", (40, 30), (200, 90, 30)).save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_true_of_another_picture_comes_along(suffix, to):
    picture = decode(io.BytesIO(photo(suffix)), "photo")
    made = encode(Image.new("RGB", (16, 16)), to, None, None, picture.metadata, "ibmd seed=0")
    for lie in (b"secret-id", b"52,30N", b"Berlin", b"tiny-picture", b"x" * 100):
        assert lie not in made
    with Image.open(io.BytesIO(made)) as image:
        image.load()
        exif = image.getexif()
        assert {tag: exif[tag].encode("latin-1").decode() for tag in BASE} == BASE
        inner = exif.get_ifd(EXIF_IFD)
        for tag, value in CAMERA.items():
            assert inner[tag] == value if isinstance(value, str | bytes) else float(inner[tag]) == float(value), hex(
                tag
            )
        assert exif[0x0131] == "ibmd seed=0"
        assert not exif.get_ifd(GPS_IFD)
        assert exif.get(0x0112, 1) == 1
        assert not {0x927C, 0xA002, 0xA003} & set(inner)
        packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
        text = packet.decode() if isinstance(packet, bytes) else packet
    assert "© Ann Ä" in text
    assert 'xmp:Rating="4"' in text
    assert not [lie for lie in LIES if lie in text]
    if to == ".png":
        assert image.info["Software"] == "ibmd seed=0"


@pytest.mark.parametrize("to", FORMATS)
def test_a_profile_comes_along_where_it_means_srgb(to):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    wide = bytearray(srgb)  # another red primary, so that the pixels are converted
    at = int.from_bytes(wide[(tags := wide.index(b"rXYZ")) + 4 : tags + 8])
    wide[at + 8 : at + 12] = (45000).to_bytes(4)
    for profile, stays in ((srgb, True), (lab, False), (bytes(wide), False), (b"no profile", False)):
        picture = decode(io.BytesIO(photo(".jpg", profile)), "photo")
        made = encode(Image.new("RGB", (16, 16)), to, None, None, picture.metadata)
        with Image.open(io.BytesIO(made)) as image:
            assert image.info.get("icc_profile") == (profile if stays else None)


@pytest.mark.parametrize(
    "xmp",
    [
        b"<x",
        b"\xff\xfe\x00",
        b"<!DOCTYPE a [<!ENTITY b 'bomb'>]><a>&b;</a>",
        b"<a>" + b"x" * 1_100_000 + b"</a>",
        b"<a xmlns:q='urn:q'><b:c/></a>",
    ],
)
def test_xmp_that_is_damaged_or_huge_is_left_out(xmp):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "WEBP", xmp=xmp)
    assert decode(buffer, "photo").metadata.xmp == b""


def test_exif_that_is_damaged_is_left_out():
    content = bytearray(photo(".jpg"))
    at = content.index(b"Exif\0\0") + 20
    for i in range(at, at + 400, 3):
        broken = bytearray(content)
        broken[i : i + 2] = b"\xff\xff"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, as in the program
            picture = decode(io.BytesIO(bytes(broken)), "photo")
        for to in FORMATS[:4]:
            assert encode(Image.new("RGB", (16, 16)), to, None, None, picture.metadata)
