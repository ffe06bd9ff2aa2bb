"""Files of every kind of samples, made by rule, give the colours of their plain 8-bit twin, or are refused by name."""

import io
import itertools
import struct

import numpy as np
import pytest
from imagefiles import file_of, read, refusal, rgb_of, write_png, write_tiff
from PIL import Image

from ibmd_cli.images.decode import decode

TWIN = np.random.default_rng(0).integers(0, 256, (6, 10, 3))
TWIN[0, :2] = [[255] * 3, [0] * 3]
GREY = np.repeat(TWIN[..., :1], 3, 2)
BOTH = ("<", ">")


def assert_twin(content: bytes, twin: np.ndarray, tolerance: int = 1) -> None:
    assert np.abs(rgb_of(content) - twin).max() <= tolerance


def levels(twin: np.ndarray, depth: int, form: int = 1) -> np.ndarray:
    """Return 8-bit samples at another depth: unsigned (1), signed from 0 (2), or float (3)."""
    if form == 3:
        return (twin / 255).astype(f"f{depth // 8}")
    full = 2**depth - 1 if form == 1 else 2 ** (depth - 1) - 1
    return (
        np.rint(twin / 255 * full)
        .astype("u4" if form == 1 else "i4" if depth > 16 else "i2")
        .astype({8: "ui"[form - 1] + "1", 16: "ui"[form - 1] + "2", 32: "ui"[form - 1] + "4"}.get(depth, "u2"))
    )


def at_depth(twin: np.ndarray, depth: int) -> np.ndarray:
    """Return what is left of 8-bit samples at a lesser depth."""
    full = 2**depth - 1
    return np.rint(np.rint(twin / 255 * full) * 255 / full) if depth < 8 else twin


# -------------------------------------------------------------------------------------------------------- TIFF


def tiff_greys() -> list[tuple[str, int, bool, int, int, int]]:
    depths = [(bits, 1) for bits in (1, 2, 4, 8, 12, 16, 32)] + [(8, 2), (16, 2), (32, 2), (16, 3), (32, 3), (64, 3)]
    return [
        (order, fill, deflate, photometric, bits, form)
        for order, fill, deflate, photometric in itertools.product(BOTH, (1, 2), (False, True), (0, 1))
        for bits, form in depths
    ]


def tiff_grey_is_read(order: str, fill: int, deflate: bool, photometric: int, bits: int, form: int) -> bool:
    """Tell what this package promises to read; Pillow knows no others."""
    if bits in (1, 2, 4, 8) and form == 1:
        return not (photometric == 0 and bits == 8 and fill == 2 and not deflate)
    if fill == 2:
        return (order, photometric, bits, form) == ("<", 1, 16, 1)
    if photometric == 0:
        return (bits, form) == (32, 3) or (order, bits, form) == ("<", 16, 1)
    return (bits, form) in ((8, 2), (16, 1), (16, 2), (32, 2), (32, 3)) or (order, form) == ("<", 1)


@pytest.mark.parametrize(("order", "fill", "deflate", "photometric", "bits", "form"), tiff_greys())
def test_tiff_grey_of_every_depth_and_kind(order, fill, deflate, photometric, bits, form):
    white_is_zero = photometric == 0
    twin = 255 - GREY if white_is_zero else GREY
    content = write_tiff(levels(GREY[..., 0], bits, form), bits, photometric, order, form, fill=fill, deflate=deflate)
    if tiff_grey_is_read(order, fill, deflate, photometric, bits, form):
        assert_twin(content, at_depth(twin, bits))
    else:
        told = refusal(content)
        assert "which is not read: save it" in told
        kind = f"{bits}-bit {({1: 'unsigned', 2: 'signed', 3: 'float'})[form]} grey"
        assert kind in told or "order of its samples or bits" in told


@pytest.mark.parametrize("value", [0, 1, 40, 255, 256, 4095])
def test_tiff_depth_is_the_files_own_not_that_of_its_values(value):
    """A dark 12-bit, 16-bit or int16 image stays dark."""
    samples = np.full((3, 4), value)
    assert_twin(write_tiff(samples.astype("u2"), 12, 1), np.full((3, 4, 3), value * 255 / 4095))
    assert_twin(write_tiff(samples.astype("u2"), 16, 1), np.full((3, 4, 3), value * 255 / 65535))
    assert_twin(write_tiff(samples.astype("i2"), 16, 1, form=2), np.full((3, 4, 3), value * 255 / 32767))


@pytest.mark.parametrize(("bits", "form"), [(8, 2), (16, 2), (32, 2), (32, 3)])
@pytest.mark.parametrize("order", BOTH)
def test_tiff_values_below_zero_are_refused(bits, form, order):
    samples = np.array([[-1, 0], [100, 101]]).astype(f"{'if'[form - 2]}{bits // 8}")
    assert "values from -1 to 101" in refusal(write_tiff(samples, bits, 1, order, form))


def test_tiff_unsigned_values_are_named_as_they_are():
    """No bits of a uint32 are taken for a sign."""
    assert "uint32 values from 0 to 1e+06" in refusal(write_tiff(np.array([[0, 10**6]], "u4"), 32, 1))
    assert_twin(write_tiff(np.array([[0, 2**32 - 1]], "u4"), 32, 1), np.array([[[0] * 3, [255] * 3]]))


@pytest.mark.parametrize("extra", [(), (0,), (1,), (2,)])
@pytest.mark.parametrize(("bits", "form"), [(8, 1), (16, 1), (16, 3), (32, 1), (32, 3), (8, 2)])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", BOTH)
def test_tiff_rgb_of_every_depth_and_alpha(order, deflate, planar, bits, form, extra):
    samples = levels(TWIN, bits, form)
    twin: np.ndarray = TWIN
    if extra:
        full = 1 if form == 3 else 2**bits - 1 if form == 1 else 2 ** (bits - 1) - 1
        half = np.full_like(samples[..., :1], full)
        half[3:] = 0 if extra == (0,) else full if extra == (1,) else 0
        samples = np.concatenate([samples, half], 2)
        if extra == (2,):
            twin = TWIN.copy()
            twin[3:] = 255
    content = write_tiff(samples, bits, 2, order, form, extra=extra, planar=planar, deflate=deflate)
    if form == 1 and bits in (8, 16) and (planar == 1 or deflate or (bits == 8 and extra in ((), (2,)))):
        assert_twin(content, twin)
    else:
        assert "not read" in refusal(content)
        assert "save it" in refusal(content)


@pytest.mark.parametrize("extra", [(0,), (1,), (2,)])
@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_grey_with_alpha(bits, extra):
    samples = np.stack([levels(GREY[..., 0], bits), np.full((6, 10), 2**bits - 1)], 2).astype(f"u{bits // 8}")
    content = write_tiff(samples, bits, 1, extra=extra)
    if bits == 8:
        assert_twin(content, GREY)
    else:
        assert "16-bit unsigned grey samples with 1 more, which is not read" in refusal(content)


@pytest.mark.parametrize("order", BOTH)
@pytest.mark.parametrize("full", [65535, 255])  # the second as some programs write it
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_tiff_palettes_of_16_and_8_bits(bits, full, order):
    rng = np.random.default_rng(bits)
    palette = rng.integers(0, 256, (3, 2**bits))
    palette[:, 0] = 255
    rows = rng.integers(0, 2**bits, (6, 10)).astype("u1")
    stored = tuple((palette * (full // 255)).ravel().tolist())
    assert_twin(write_tiff(rows, bits, 3, order, tags={320: ("H", stored)}), palette.T[rows], 0)


def test_tiff_palette_of_16_bit_samples_is_refused():
    content = write_tiff(np.zeros((2, 2), "u2"), 16, 3, tags={320: ("H", (0,) * 16)})
    assert "16-bit unsigned palette samples" in refusal(content)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", BOTH)
@pytest.mark.parametrize("deflate", [False, True])
def test_tiff_cmyk_without_profile(deflate, order, bits):
    inks = np.random.default_rng(1).integers(0, 256, (6, 10, 4))
    twin = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    samples = (inks * (257 if bits == 16 else 1)).astype(f"u{bits // 8}")
    assert_twin(write_tiff(samples, bits, 5, order, deflate=deflate), twin)


def test_tiff_of_other_inks_is_refused():
    told = refusal(write_tiff(np.zeros((2, 2, 4), "u1"), 8, 5, tags={332: ("H", (2,))}))
    assert "inks that are not CMYK" in told


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("order", BOTH)
def test_tiff_ycbcr(order, deflate):
    samples = np.asarray(Image.fromarray(TWIN.astype("u1")).convert("YCbCr"))
    reference = (0, 1, 255, 1, 128, 1, 255, 1, 128, 1, 255, 1)
    content = write_tiff(samples, 8, 6, order, deflate=deflate, tags={530: ("H", (1, 1)), 532: ("I", reference)})
    content = content.replace(struct.pack(f"{order}HHI", 532, 4, 12), struct.pack(f"{order}HHI", 532, 5, 6))
    assert_twin(content, TWIN, 3)  # of 8 bits of YCbCr


def test_tiff_ycbcr_that_is_subsampled_or_of_studio_range_is_refused():
    samples = np.zeros((4, 4, 3), "u1")
    assert "subsampled YCbCr" in refusal(write_tiff(samples, 8, 6, tags={530: ("H", (2, 2))}))
    reference = (16, 1, 235, 1, 128, 1, 240, 1, 128, 1, 240, 1)
    content = write_tiff(samples, 8, 6, tags={530: ("H", (1, 1)), 532: ("I", reference)})
    content = content.replace(struct.pack("<HHI", 532, 4, 12), struct.pack("<HHI", 532, 5, 6))
    assert "reference black" in refusal(content)


def lab_of(rgb: np.ndarray) -> np.ndarray:
    """Return CIELab under D50, by the formulas of the CIE."""
    x = rgb / 255
    light = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
    t = light @ np.array(to_xyz).T / [0.96422, 1, 0.82521]
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)


@pytest.mark.parametrize("order", BOTH)
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("planar", [1, 2])
def test_tiff_lab(planar, deflate, order):
    twin = np.linspace(40, 215, 180).reshape(6, 10, 3).round()  # far from where 8 bits of a and b end
    lab = lab_of(twin)
    samples = np.stack([lab[..., 0] * 2.55, lab[..., 1] % 256, lab[..., 2] % 256], -1).round().astype("u1")
    content = write_tiff(samples, 8, 8, order, planar=planar, deflate=deflate)
    if planar == 1:
        assert_twin(content, twin, 3)  # of 8 bits of Lab
    else:
        assert "CIELab in planes" in refusal(content)


def test_tiff_lab_under_another_white_is_refused():
    white = (3127, 10000, 3290, 10000)
    content = write_tiff(np.zeros((2, 2, 3), "u1"), 8, 8, tags={318: ("I", white)})
    content = content.replace(struct.pack("<HHI", 318, 4, 4), struct.pack("<HHI", 318, 5, 2))
    assert "CIELab under another white than D50" in refusal(content)


@pytest.mark.parametrize(("photometric", "bits", "name"), [(8, 16, "CIELab"), (9, 8, "ICCLab"), (10, 8, "ITULab")])
def test_tiff_lab_of_other_kinds_is_refused(photometric, bits, name):
    assert name in refusal(write_tiff(np.zeros((2, 2, 3), f"u{bits // 8}"), bits, photometric))


def test_raw_photos_are_refused_not_read_as_their_thumbnails():
    assert "raw photo" in refusal(write_tiff(TWIN.astype("u1"), 8, 2, tags={50706: ("B", (1, 4, 0, 0))}))
    assert "raw photo" in refusal(write_tiff(TWIN.astype("u1"), 8, 2, tags={254: ("I", (1,)), 330: ("I", (8,))}))
    assert "raw sensor" in refusal(write_tiff(np.zeros((2, 2), "u2"), 16, 32803))


# --------------------------------------------------------------------------------------------------------- PNG

PNG_TYPES = [(0, d) for d in (1, 2, 4, 8, 16)] + [(2, 8), (2, 16)] + [(3, d) for d in (1, 2, 4, 8)]
PNG_TYPES += [(4, 8), (4, 16), (6, 8), (6, 16)]


@pytest.mark.parametrize(("colour", "depth"), PNG_TYPES)
def test_png_of_every_type(colour, depth):
    """Alpha is 0 in one half, which is then white."""
    twin = (TWIN if colour in (2, 3, 6) else GREY).astype(float)
    chunks = []
    if colour == 3:
        palette = np.random.default_rng(depth).integers(0, 256, (2**depth, 3))
        samples = np.random.default_rng(1).integers(0, 2**depth, (6, 10))
        twin, chunks = palette[samples], [(b"PLTE", palette.astype("u1").tobytes())]
    else:
        channels = twin if colour in (2, 6) else twin[..., :1]
        samples = np.rint(channels / 255 * (2**depth - 1))
        twin = at_depth(twin, depth)
    if colour in (4, 6):
        alpha = np.full((6, 10, 1), 2**depth - 1)
        alpha[3:], twin = 0, twin.copy()
        twin[3:] = 255
        samples = np.concatenate([samples, alpha], 2)
    assert_twin(write_png(samples.astype("u2" if depth == 16 else "u1"), depth, colour, *chunks), twin)


@pytest.mark.parametrize(("colour", "depth"), [(c, d) for c, d in PNG_TYPES if c < 4])
def test_png_transparent_colour_is_compared_at_the_files_depth(colour, depth):
    """Of each of two neighbouring colours, at both ends and within, exactly the key is transparent."""
    top = 2**depth - 1
    for key, other in {(0, 1), (top, top - 1), (top // 2, top // 2 + 1), (min(8, top), min(8, top) - 1)}:
        samples = np.array([[key, other]] * 2, "u2" if depth == 16 else "u1")
        chunks = []
        if colour == 3:
            chunks = [(b"PLTE", bytes(3 * (top + 1))), (b"tRNS", bytes(0 if i == key else 255 for i in range(top + 1)))]
        else:
            chunks = [(b"tRNS", struct.pack(">H", key) * (3 if colour == 2 else 1))]
            samples = np.repeat(samples[..., None], 3, 2) if colour == 2 else samples
        picture = read(write_png(samples, depth, colour, *chunks), alpha="keep")
        assert np.asarray(picture.alpha).tolist() == [[0, 255]] * 2
        assert np.asarray(picture.rgb)[:, 0].min() == 255


def test_png_key_that_differs_in_one_channel_is_opaque():
    for depth in (8, 16):
        samples = np.array([[[9, 9, 9], [9, 9, 8], [8, 9, 9]]], "u2" if depth == 16 else "u1")
        alpha = read(write_png(samples, depth, 2, (b"tRNS", struct.pack(">3H", 9, 9, 9))), alpha="keep").alpha
        assert np.asarray(alpha).tolist() == [[0, 255, 255]]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_png_key_beyond_the_depth_counts_by_its_low_bits(depth):
    samples = np.array([[1, 0]], "u1")
    alpha = read(write_png(samples, depth, 0, (b"tRNS", struct.pack(">H", 2**depth + 1))), alpha="keep").alpha
    assert np.asarray(alpha).tolist() == [[0, 255]]


# ------------------------------------------------------------------------------------------------- other formats


@pytest.mark.parametrize("top", [1, 15, 255, 1000, 65535])
@pytest.mark.parametrize("kind", ["P1", "P2", "P3", "P4", "P5", "P6"])
def test_pnm_of_every_kind_and_range(kind, top):
    if kind in ("P1", "P4"):
        bits = (TWIN[..., 0] > 127).astype("u1")
        rows = b" ".join(b"%d" % v for v in bits.ravel()) if kind == "P1" else np.packbits(bits, axis=1).tobytes()
        return assert_twin(b"%s\n10 6\n%s" % (kind.encode(), rows), np.repeat(255 - 255 * bits[..., None], 3, 2), 0)
    twin = TWIN if kind in ("P3", "P6") else GREY[..., 0]
    samples = np.rint(twin / 255 * top).astype(int)
    plain = b" ".join(b"%d" % v for v in samples.ravel())
    body = plain if kind in ("P2", "P3") else samples.astype("u1" if top < 256 else ">u2").tobytes()
    want = samples * 255 / top
    content = b"%s\n# a comment\n10 6\n%d\n%s" % (kind.encode(), top, body)
    return assert_twin(content, want if want.ndim == 3 else np.repeat(want[..., None], 3, 2))


def test_dark_pnm_stays_dark():
    assert_twin(b"P5 2 1 65535\n" + struct.pack(">2H", 255, 200), np.ones((1, 2, 3)))


@pytest.mark.parametrize("order", BOTH)
def test_pfm(order):
    body = (GREY[::-1, :, 0] / 255).astype(f"{order}f4").tobytes()  # from the last row to the first
    assert_twin(b"Pf\n10 6\n%s1.0\n" % (b"-" if order == "<" else b"") + body, GREY)


@pytest.mark.parametrize("bits", [1, 4, 8, 16, 24, 32])
def test_bmp_of_every_depth(bits):
    palette = np.random.default_rng(bits).integers(0, 256, (2 ** min(bits, 8), 3))
    if bits <= 8:
        rows = np.random.default_rng(2).integers(0, 2**bits, (6, 10))
        twin = palette[rows]
        packed = ((rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1).astype("u1").reshape(6, -1)
        lines = np.packbits(packed, axis=1)
    elif bits == 16:
        five = np.rint(TWIN / 255 * 31).astype("<u2")
        twin = np.rint(five * 255 / 31)
        lines = (five[..., 0] << 10 | five[..., 1] << 5 | five[..., 2]).astype("<u2").view("u1").reshape(6, -1)
    else:
        twin = TWIN
        lines = np.concatenate([TWIN[..., ::-1], np.zeros((6, 10, bits // 8 - 3))], 2).astype("u1").reshape(6, -1)
    lines = np.pad(lines, ((0, 0), (0, -lines.shape[1] % 4)))[::-1]
    colours = b"".join(bytes([*colour[::-1], 0]) for colour in palette.tolist()) if bits <= 8 else b""
    info = struct.pack("<IiiHHIIiiII", 40, 10, 6, 1, bits, 0, lines.size, 0, 0, 2**bits if bits <= 8 else 0, 0)
    start = 14 + 40 + len(colours)
    content = b"BM" + struct.pack("<IHHI", start + lines.size, 0, 0, start) + info + colours + lines.tobytes()
    assert_twin(content, twin, 4 if bits == 16 else 0)


def bmp_with_masks(lines: np.ndarray, bits: int, masks: tuple[int, ...], top_down: bool = False) -> bytes:
    """Return a BMP file with a header of version 5."""
    rows = (lines if top_down else lines[::-1]).astype(f"<u{bits // 8}").tobytes()
    height = -len(lines) if top_down else len(lines)
    info = struct.pack("<IiiHHIIiiII4I", 124, lines.shape[1], height, 1, bits, 3, len(rows), 0, 0, 0, 0, *masks)
    return b"BM" + struct.pack("<IHHI", 138 + len(rows), 0, 0, 138) + info + b"BGRs" + bytes(64) + rows


@pytest.mark.parametrize("top_down", [False, True])
def test_bmp_of_565_bits_in_either_order_of_rows(top_down):
    r, g, b = (np.rint(TWIN[..., i] / 255 * full).astype(int) for i, full in enumerate((31, 63, 31)))
    content = bmp_with_masks(r << 11 | g << 5 | b, 16, (0xF800, 0x7E0, 0x1F, 0), top_down)
    assert_twin(content, TWIN, 5)


@pytest.mark.parametrize(("red", "blue", "alpha"), [(16, 0, 0), (16, 0, 0xFF000000), (0, 16, 0xFF000000)])
def test_bmp_with_transparency_is_laid_on_white_if_the_header_says_it(red, blue, alpha):
    lines = TWIN[..., 0] << red | TWIN[..., 1] << 8 | TWIN[..., 2] << blue
    lines[3:] |= 0xFF000000
    twin = TWIN.copy()
    if alpha:
        twin[:3] = 255
    assert_twin(bmp_with_masks(lines, 32, (0xFF << red, 0xFF00, 0xFF << blue, alpha)), twin, 0)


def test_bmp_of_16_bits_with_transparency_is_refused():
    told = refusal(bmp_with_masks(np.zeros((2, 2), int), 16, (0x7C00, 0x3E0, 0x1F, 0x8000)))
    assert "16 bits with transparency" in told


def test_what_the_first_frame_of_a_gif_leaves_free_is_transparent():
    content = bytearray(file_of(Image.new("P", (4, 3), 0), "GIF"))
    content[6:10] = struct.pack("<HH", 8, 6)  # the canvas
    at = content.index(b",\0\0\0\0\x04\0\x03\0")
    content[at + 1 : at + 5] = struct.pack("<HH", 2, 1)
    picture = read(bytes(content), alpha="keep")
    want = np.zeros((6, 8), int)
    want[1:4, 2:6] = 255
    assert np.array_equal(np.asarray(picture.alpha), want)
    assert np.array_equal(np.asarray(picture.rgb)[..., 0], 255 - want)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("form", ["JPEG", "MPO"])
def test_jpeg_of_every_colour_type(form, mode):
    flat = Image.new("RGB", (32, 32), (180, 120, 60)).convert(mode)
    if (form, mode) == ("MPO", "CMYK"):
        return
    options = {"save_all": True, "append_images": [Image.new(mode, (32, 32))]} if form == "MPO" else {}
    want = np.asarray(flat.convert("RGB")).astype(int)
    assert_twin(file_of(flat, form, quality=95, **options), want, 3)


def test_first_picture_of_an_mpo_counts():
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("white", "black"))
    content = file_of(first, "MPO", save_all=True, append_images=[second])
    assert_twin(content, np.full((32, 32, 3), 255))


@pytest.mark.parametrize(
    ("form", "options"),
    [("PNG", {}), ("GIF", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("AVIF", {"quality": 100})],
)
def test_first_frame_counts_and_others_are_said(form, options):
    first, second = (Image.new("RGB", (32, 32), colour) for colour in ("white", "black"))
    picture = decode(io.BytesIO(file_of(first, form, save_all=True, append_images=[second], **options)), "x")
    assert "several frames" in picture.notes[0]
    assert np.asarray(picture.rgb).min() >= 250


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM", "MPO"])
@pytest.mark.parametrize("percent", range(0, 100, 10))
def test_truncated_at_every_tenth(form, percent):
    """Never a picture with a grey or black rest."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    content = file_of(image, form)
    told = refusal(content[: len(content) * percent // 100])
    assert any(word in told for word in ("damaged", "incomplete", "empty file"))
    assert "again" in told
