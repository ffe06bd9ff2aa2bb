"""Colour spaces are judged by what they do: the same bytes give the same sRGB under any name."""

import itertools
import struct
import zlib

import numpy as np
import pytest
from imagefiles import (
    P3_COLORANTS,
    SRGB_COLORANTS,
    curve_tag,
    file_of,
    read,
    refusal,
    rgb_of,
    write_icc,
    write_png,
    write_tiff,
)
from PIL import Image, ImageCms

SRGB = curve_tag("para3", 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
SAMPLES = np.random.default_rng(3).integers(0, 256, (8, 12, 3))
SAMPLES[0] = np.arange(12)[:, None] * 5  # dark greys, where curves differ most
P3_TO_SRGB = np.array([[1.22494, -0.22494, 0], [-0.04206, 1.04206, 0], [-0.01964, -0.07864, 1.09828]])
NAMES = ["no name", "sRGB IEC61966-2.1", "GIMP built-in Linear sRGB"]


def encoded(light: np.ndarray) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def srgb_light(x: np.ndarray) -> np.ndarray:
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def rec709_light(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0.081, x / 4.5, ((x + 0.099) / 1.099) ** (1 / 0.45))


# Curves: as ICC tags, and as functions.
CURVES = {
    "sRGB": (SRGB, srgb_light),
    "sRGB table": (curve_tag("curv", *srgb_light(np.linspace(0, 1, 1024))), srgb_light),
    "linear": (b"curv" + bytes(8), lambda x: x),
    "linear table": (curve_tag("curv", 0, 1), lambda x: x),
    "linear gamma": (curve_tag("curv", 1), lambda x: x),
    "gamma 1.8": (curve_tag("para0", 1.8), lambda x: x**1.8),
    "gamma 2.2": (curve_tag("curv", 2.2), lambda x: x ** (563 / 256)),
    "para1": (curve_tag("para1", 2, 1.25, -0.25), lambda x: np.maximum(1.25 * x - 0.25, 0) ** 2),
    "para2": (curve_tag("para2", 2, 0.9, 0.1, -0.01), lambda x: (0.9 * x + 0.1) ** 2 - 0.01),
    "para4": (
        curve_tag("para4", 2, 0.9, 0, 0.5, 0.2, 0.0676, 0),
        lambda x: np.where(x < 0.2, 0.5 * x, (0.9 * x) ** 2 + 0.0676),
    ),
}  # fmt: skip


def icc_files(profile: bytes, samples: np.ndarray) -> dict[str, bytes]:
    """Return 8- and 16-bit files of samples in a profile's space."""
    chunk = (b"iCCP", b"name\0\0" + zlib.compress(profile))
    deep = (samples * 257).astype("u2")
    opaque = np.full_like(deep[..., :1], 65535)
    tag = {34675: ("B", tuple(profile))}
    return {
        "PNG": write_png(samples.astype("u1"), 8, 2, chunk),
        "PNG 16": write_png(deep, 16, 2, chunk),
        "PNG 16 RGBA": write_png(np.concatenate([deep, opaque], 2), 16, 6, chunk),
        "TIFF": write_tiff(samples.astype("u1"), 8, 2, tags=tag),
        "TIFF 16": write_tiff(deep, 16, 2, tags=tag),
        "TIFF 16 big-endian": write_tiff(deep, 16, 2, ">", tags=tag),
        "TIFF 16 deflate": write_tiff(deep, 16, 2, deflate=True, tags=tag),
        "TIFF 16 big-endian deflate": write_tiff(deep, 16, 2, ">", deflate=True, tags=tag),
        "TIFF 16 RGBA planes": write_tiff(
            np.concatenate([deep, opaque], 2), 16, 2, extra=(2,), planar=2, deflate=True, tags=tag
        ),
        "WEBP": file_of(Image.fromarray(samples.astype("u1")), "WEBP", lossless=True, icc_profile=profile),
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("wide", [False, True])
def test_profiles_of_rgb_are_judged_by_what_they_do(wide, curve, name):
    tag, light = CURVES[curve]
    profile = write_icc(tag, P3_COLORANTS if wide else SRGB_COLORANTS, name)
    want = light(SAMPLES / 255)
    want = encoded(want @ P3_TO_SRGB.T if wide else want)
    for form, content in icc_files(profile, SAMPLES).items():
        assert np.abs(rgb_of(content) - want).max() <= 2, form
        assert read(content).notes == ()


@pytest.mark.parametrize("curve", ["linear", "gamma 1.8"])
def test_sixteen_bits_keep_what_eight_would_lose(curve):
    """In linear light, 8 bits leave some ten levels of the darkest quarter."""
    light = srgb_light(SAMPLES / 255) ** (1 / 1.8 if curve == "gamma 1.8" else 1)
    chunk = (b"iCCP", b"name\0\0" + zlib.compress(write_icc(CURVES[curve][0])))
    samples = np.rint(light * 65535).astype("u2")
    files = [write_png(samples, 16, 2, chunk), write_png(samples[..., 0], 16, 0, chunk)]
    two = np.stack([samples[..., 0], np.full((8, 12), 65535)], 2).astype("u2")
    files.append(write_png(two, 16, 4, chunk))
    tag = {34675: ("B", tuple(write_icc(CURVES[curve][0])))}
    files += [write_tiff(samples, 16, 2, order, tags=tag) for order in ("<", ">")]
    files += [write_tiff(samples[..., 0], 16, 1, order, tags=tag) for order in ("<", ">")]
    files.append(write_tiff(light[..., 0].astype("f4"), 32, 1, form=3, tags=tag))
    for i, content in enumerate(files):
        want = SAMPLES if i in (0, 3, 4) else SAMPLES[..., :1]
        assert np.abs(rgb_of(content) - want).max() <= 2, i


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("for_grey", [True, False])
def test_profiles_of_grey_images(for_grey, curve):
    """A profile for grey, or one for RGB, on grey images of 8 and 16 bits, with and without alpha, and WhiteIsZero."""
    tag, light = CURVES[curve]
    profile = write_icc(tag, () if for_grey else P3_COLORANTS)
    grey = SAMPLES[..., 0]
    want = encoded(light(grey / 255))[..., None]
    chunk = (b"iCCP", b"name\0\0" + zlib.compress(profile))
    deep, tags = (grey * 257).astype("u2"), {34675: ("B", tuple(profile))}
    files = [
        write_png(grey.astype("u1"), 8, 0, chunk),
        write_png(deep, 16, 0, chunk),
        write_png(np.stack([grey, grey * 0 + 255], 2).astype("u1"), 8, 4, chunk),
        write_png(np.stack([deep, deep * 0 + 65535], 2), 16, 4, chunk),
        write_tiff(deep, 16, 1, ">", tags=tags),
        write_tiff(65535 - deep, 16, 0, tags=tags),
        write_tiff(255 - grey.astype("u1"), 8, 0, tags=tags),
    ]
    for i, content in enumerate(files):
        assert np.abs(rgb_of(content) - want).max() <= 2, i
        assert read(content).notes == ()


def test_pixels_of_srgb_stay_as_they_are():
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile, name in itertools.product((own, write_icc(SRGB)), NAMES):
        profile = write_icc(SRGB, name=name) if profile != own else own
        content = file_of(Image.fromarray(SAMPLES.astype("u1")), "PNG", icc_profile=profile)
        assert (rgb_of(content) == SAMPLES).all()


def test_a_profile_of_a_palette():
    profile = write_icc(CURVES["linear"][0])
    palette = Image.fromarray(SAMPLES.astype("u1")).quantize(64)
    want = encoded(np.asarray(palette.convert("RGB")) / 255)
    assert np.abs(rgb_of(file_of(palette, "PNG", icc_profile=profile)) - want).max() <= 2


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_a_profile_of_cmyk_is_used(form):
    """A made-up press: LittleCMS's own, which prints nothing but grey, differs from what inks are without a profile."""
    inks = Image.new("CMYK", (8, 8), (0, 200, 0, 0))
    plain = rgb_of(file_of(inks, form, **({"quality": 95} if form == "JPEG" else {})))
    assert np.abs(plain - [255, 55, 255]).max() <= 4
    profile = cmyk_profile()
    got = rgb_of(file_of(inks, form, icc_profile=profile, **({"quality": 95} if form == "JPEG" else {})))
    assert np.ptp(got.reshape(-1, 3), 1).max() <= 3  # grey
    assert 40 < got.mean() < 215


def cmyk_profile() -> bytes:
    """Return a profile of a press whose inks all are black: A2B0 as lut8 with two points for each ink."""
    grid = np.array([255 * (4 - sum(inks)) / 4 for inks in itertools.product((0, 1), repeat=4)])
    lab = np.stack([grid, np.full(16, 128), np.full(16, 128)], 1).round().astype("u1")
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut += ramp * 4 + lab.tobytes() + ramp * 3
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"wtpt": white, b"A2B0": lut}
    table, data, at = struct.pack(">I", 2), b"", 132 + 24
    for tag, value in tags.items():
        table += struct.pack(">4sII", tag, at + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12s4s", at + len(data), b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ", bytes(12), b"acsp"
    )
    return (head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)).ljust(128, b"\0") + table + data


@pytest.mark.parametrize("what", ["none at all", "cut", "of another kind", "curve cut"])
def test_a_profile_that_cannot_be_used_is_said(what):
    profile = {
        "none at all": b"no profile",
        "cut": write_icc(CURVES["linear"][0])[:200],
        "of another kind": cmyk_profile(),
        "curve cut": write_icc(curve_tag("curv", 0, 0.1, 1)[:12] + bytes([0])),
    }[what]
    for form in ("PNG", "TIFF", "JPEG"):
        picture = read(file_of(Image.new("RGB", (8, 8), (90, 90, 90)), form, icc_profile=profile))
        assert picture.rgb.getpixel((0, 0)) == (90, 90, 90)
        assert len(picture.notes) == 1
        assert picture.notes[0].startswith("its colour profile is ignored (")


# ------------------------------------------------------------------------------------------------ chunks of PNG

SRGB_CHRM = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
P3_CHRM = (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)


def gama(value: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(value * 100000))


def chrm(values: tuple[float, ...]) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(v * 100000) for v in values))


def cicp(*values: int) -> tuple[bytes, bytes]:
    return b"cICP", bytes(values)


def identity(x: np.ndarray) -> np.ndarray:
    return x


# Chunks, the curve, and whether primaries are P3's. What Chromium 14x shows of each is within two levels of it.
CHUNKS = {
    "linear": ([gama(1)], identity, False),
    "gamma 1.8": ([gama(1 / 1.8)], lambda x: x ** (1 / 0.55556), False),
    "gamma 2.2 is how files say sRGB": ([gama(0.45455)], srgb_light, False),
    "gamma 2.2 with primaries of sRGB is, too": ([gama(0.45455), chrm(SRGB_CHRM)], srgb_light, False),
    "linear with primaries": ([gama(1), chrm(P3_CHRM)], identity, True),
    "gamma 2.2 with primaries": ([gama(0.45455), chrm(P3_CHRM)], lambda x: x ** (1 / 0.45455), True),
    "primaries without gamma count as none": ([chrm(P3_CHRM)], srgb_light, False),
    "sRGB goes before gamma": ([gama(1), (b"sRGB", b"\0")], srgb_light, False),
    "a gamma of 0 counts as none": ([gama(0)], srgb_light, False),
    "cICP sRGB": ([cicp(1, 13, 0, 1)], srgb_light, False),
    "cICP unknown": ([cicp(2, 2, 0, 1)], srgb_light, False),
    "cICP linear": ([cicp(1, 8, 0, 1)], identity, False),
    "cICP P3": ([cicp(12, 13, 0, 1)], srgb_light, True),
    "cICP P3 linear": ([cicp(12, 8, 0, 1)], identity, True),
    "cICP BT.709": ([cicp(1, 1, 0, 1)], rec709_light, False),
    "cICP BT.470 M": ([cicp(1, 4, 0, 1)], lambda x: x**2.2, False),
    "cICP goes before sRGB": ([cicp(1, 8, 0, 1), (b"sRGB", b"\0")], identity, False),
    "cICP goes before iCCP": (
        [cicp(1, 13, 0, 1), (b"iCCP", b"x\0\0" + zlib.compress(write_icc(CURVES["linear"][0])))], srgb_light, False,
    ),
    "iCCP goes before gamma": (
        [gama(0.45455), (b"iCCP", b"x\0\0" + zlib.compress(write_icc(CURVES["linear"][0])))], identity, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour", [0, 2, 3, 4, 6])
@pytest.mark.parametrize("case", CHUNKS)
def test_colour_chunks_of_png(case, colour, depth):
    chunks, light, wide = CHUNKS[case]
    samples = SAMPLES if colour in (2, 3, 6) else np.repeat(SAMPLES[..., :1], 3, 2)
    want = light(samples / 255)
    want = encoded(want @ P3_TO_SRGB.T if wide else want)
    full = 257 if depth == 16 else 1
    stored = samples if colour in (2, 6) else samples[..., :1]
    if colour in (4, 6):
        stored = np.concatenate([stored, np.full((8, 12, 1), 255)], 2)
    if colour == 3:
        if depth == 16:
            return
        chunks = [*chunks, (b"PLTE", samples.reshape(-1, 3).astype("u1").tobytes())]
        stored = np.arange(96).reshape(8, 12)
    content = write_png((stored * full).astype("u2" if depth == 16 else "u1"), depth, colour, *chunks)
    assert np.abs(rgb_of(content) - want).max() <= 2


@pytest.mark.parametrize(
    ("codes", "word"),
    [
        ((9, 16, 0, 1), "HDR image (PQ"),
        ((9, 18, 0, 1), "HDR image (HLG"),
        ((1, 13, 0, 0), "narrow range"),
        ((1, 13, 1, 1), "matrix"),
        ((10, 8, 0, 1), "primaries 10"),
        ((1, 9, 0, 1), "transfer 9"),
        ((77, 13, 0, 1), "primaries 77"),
    ],
)
def test_cicp_without_a_fixed_way_to_srgb_is_refused_by_name(codes, word):
    told = refusal(write_png(SAMPLES.astype("u1"), 8, 2, cicp(*codes)))
    assert word in told
    assert "sRGB" in told


@pytest.mark.parametrize(
    ("codes", "light", "wide"),
    [((1, 13), srgb_light, False), ((1, 1), srgb_light, False), ((2, 2), srgb_light, False), ((1, 8), identity, False),
     ((12, 13), srgb_light, True), ((1, 4), lambda x: x**2.2, False)],
)  # fmt: skip
def test_colour_codes_of_avif(codes, light, wide):
    content = avif(*codes)
    want = light(np.array([200, 120, 60]) / 255)
    want = encoded(want @ P3_TO_SRGB.T if wide else want)
    assert np.abs(rgb_of(content) - want).max() <= 3  # 2, and what the format loses


@pytest.mark.parametrize(("transfer", "word"), [(16, "PQ"), (18, "HLG")])
def test_hdr_avif_is_refused_by_name(transfer, word):
    assert f"HDR image ({word}" in refusal(avif(9, transfer))


def avif(primaries: int, transfer: int) -> bytes:
    content = file_of(Image.new("RGB", (64, 64), (200, 120, 60)), "AVIF", quality=100, subsampling="4:4:4")
    at = content.index(b"colrnclx") + 8
    return content[:at] + struct.pack(">HH", primaries, transfer) + content[at + 4 :]
