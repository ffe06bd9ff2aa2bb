"""Files become RGB by the documented rules or are refused in one line."""

import io
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Lock

import numpy as np
import pytest
from hostile import bombs
from hypothesis import given, settings
from hypothesis import strategies as st
from imagefiles import FORMATS, file_of, quarters, refusal, rgb_of
from PIL import Image, ImageCms, ImageOps

from ibmd_cli.errors import IbmdError
from ibmd_cli.images.decode import Budget, Picture, decode, own_limits, read_image, shown, to_picture


@pytest.fixture
def picture() -> Image.Image:
    return quarters()


@pytest.mark.parametrize("form", FORMATS)
def test_formats_by_content(form, picture, tmp_path):
    file = tmp_path / "no-such-ending.txt"
    file.write_bytes(file_of(picture, form))
    error = np.abs(np.asarray(read_image(file)).astype(int) - np.asarray(picture))
    assert np.median(error) <= 4  # JPEG blurs colours at edges
    assert error[2:14, 2:30].max() <= 8


@pytest.mark.parametrize(
    ("mode", "form", "tolerance"),
    [
        ("1", "PNG", 0),
        ("1", "TIFF", 0),
        ("L", "PNG", 0),
        ("L", "JPEG", 2),
        ("LA", "PNG", 0),
        ("LA", "TIFF", 0),
        ("P", "PNG", 0),
        ("P", "GIF", 0),
        ("P", "BMP", 0),
        ("P", "TIFF", 0),
        ("RGB", "PNG", 0),
        ("RGBA", "PNG", 0),
        ("RGBA", "TIFF", 0),
        ("RGBX", "TIFF", 0),
        ("CMYK", "TIFF", 2),
        ("CMYK", "JPEG", 8),
        ("YCbCr", "TIFF", 2),
        ("YCbCr", "JPEG", 8),
        ("I", "TIFF", 0),
        ("F", "TIFF", 0),
    ],
)
def test_modes(mode, form, tolerance, picture):
    flat = picture.crop((0, 0, 32, 16)) if mode not in ("1",) else Image.new("RGB", (8, 8), "white")
    image = (
        flat.convert("L").convert(mode) if mode in ("I", "F") else flat.convert(mode, palette=Image.Palette.ADAPTIVE)
    )
    want = np.asarray((flat.convert("L") if mode in ("L", "LA", "I", "F") else flat).convert("RGB")).astype(int)
    assert np.abs(rgb_of(file_of(image, form)) - want).max() <= tolerance


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bit_grey_is_scaled(form, dtype):
    ramp = np.linspace(0, 65535, 64).round().astype(dtype).reshape(4, 16)
    got = rgb_of(file_of(Image.fromarray(ramp), form))
    assert np.abs(got - (ramp.astype(float) / 257)[..., None]).max() <= 0.5


def test_sixteen_bit_grey_with_a_transparent_value():
    ramp = np.array([[0, 1000], [30000, 65535]], np.uint16)
    got = rgb_of(file_of(Image.fromarray(ramp), "PNG", transparency=0))
    assert got[0, 0].tolist() == [255, 255, 255]
    assert got[0, 1].tolist() == [4, 4, 4]


@pytest.mark.parametrize(("top", "full"), [(0.9, 1), (1.0, 1), (200.0, 255), (60000.0, 65535)])
@pytest.mark.parametrize("mode", ["F", "I"])
def test_range_of_32_bit_values(top, full, mode):
    values = np.linspace(0, top, 12).reshape(3, 4).astype(np.float32 if mode == "F" else np.int32)
    got = rgb_of(file_of(Image.fromarray(values), "TIFF"))
    assert np.abs(got[..., 0] - values * 255 / full).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("value", [-1.0, 1e6, np.nan, np.inf])
def test_unknown_range_is_refused(value):
    values = np.full((3, 4), value, np.float32)
    assert "expected 0 to 1, 255 or 65535" in refusal(file_of(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_on_white(form):
    rgba = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    alpha = rgba[..., 3:] / 255
    want = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(rgb_of(file_of(Image.fromarray(rgba), form, **options)) - want).max() <= 1


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("P", 0), ("RGB", (1, 2, 3)), ("1", 1)])
def test_transparent_colour_is_white(mode, key):
    image = Image.new(mode, (4, 4), key)
    if mode == "P":
        image.putpalette([255, 0, 0] + [0] * 765)
    assert (rgb_of(file_of(image, "PNG", transparency=key)) == 255).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(form, orientation, picture):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = file_of(picture, form, exif=exif)
    upright = picture.copy()
    upright.getexif()[0x0112] = orientation
    want = np.asarray(ImageOps.exif_transpose(upright)).astype(int)
    got = rgb_of(content)
    assert got.shape == want.shape
    assert np.median(np.abs(got - want)) <= 4
    inner = tuple(slice(4, n - 4) for n in got.shape[:2])
    assert np.mean(np.abs(got - want)[inner]) < 8


def test_damaged_exif_counts_as_none(picture):
    content = file_of(picture, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    with own_limits():  # no warnings
        assert rgb_of(content).shape == (32, 48, 3)


def test_first_frame_counts(picture):
    content = file_of(picture, "GIF", save_all=True, append_images=[ImageOps.invert(picture)])
    assert np.abs(rgb_of(content) - np.asarray(picture)).max() <= 8


def test_colour_profiles_become_srgb(picture):
    """A profile whose primaries are green, red and blue: its red is our green."""
    swapped = swap_red_and_green(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for form in ("PNG", "TIFF"):
        got = rgb_of(file_of(picture, form, icc_profile=swapped))
        assert np.abs(got[..., [1, 0, 2]] - np.asarray(picture)).max() <= 3
    rgba = picture.convert("RGBA")
    got = rgb_of(file_of(rgba, "PNG", icc_profile=swapped))
    assert np.abs(got[..., [1, 0, 2]] - np.asarray(picture)).max() <= 3
    palette = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.abs(rgb_of(file_of(palette, "PNG", icc_profile=swapped))[..., [1, 0, 2]] - np.asarray(picture)).max() <= 3
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile", swapped[:300]):  # its own, and damaged ones, leave every pixel as it is
        assert (rgb_of(file_of(picture, "PNG", icc_profile=profile)) == np.asarray(picture)).all()
    grey = picture.convert("L")  # of another mode than its profile
    assert (rgb_of(file_of(grey, "PNG", icc_profile=swapped)) == np.asarray(grey.convert("RGB"))).all()


def swap_red_and_green(profile: bytes) -> bytes:
    """Exchange the names of two tags of an ICC profile, and take the word sRGB out of it."""
    profile = profile.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    return profile.replace("sRGB".encode("utf-16-be"), "gRBX".encode("utf-16-be")).replace(b"sRGB built", b"gRBX built")


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "P", "L", "RGB"])
def test_what_becomes_of_transparency(mode):
    """One half is transparent; what is under it differs from white."""
    image = Image.new("RGBA", (8, 4), (10, 10, 10, 255))
    image.paste((90, 90, 90, 0), (0, 0, 4, 4))
    if mode in ("LA", "RGBA"):
        content = file_of(image.convert(mode), "PNG")
    elif mode == "PA":
        content = file_of(image.quantize(), "PNG")
    else:
        opaque = image.convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
        key = opaque.getpixel((0, 0))
        content = file_of(opaque, "PNG", transparency=key)

    def read(alpha: str) -> Picture:
        return decode(io.BytesIO(content), "test", alpha=alpha)

    white, keep, drop = (read(alpha) for alpha in ("white", "keep", "drop"))
    assert (white.alpha, drop.alpha) == (None, None)
    assert keep.alpha is not None
    assert keep.alpha.tobytes() == image.getchannel("A").tobytes()
    assert keep.rgb.tobytes() == white.rgb.tobytes()
    assert white.rgb.getpixel((0, 0)) == (255, 255, 255)
    assert drop.rgb.getpixel((0, 0)) == (90, 90, 90)
    assert {p.rgb.getpixel((7, 0)) for p in (white, keep, drop)} == {(10, 10, 10)}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_transparency_is_turned_with_its_image(orientation, picture):
    rgba = picture.convert("RGBA")
    rgba.putalpha(picture.getchannel("R"))
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = decode(io.BytesIO(file_of(rgba, "PNG", exif=exif)), "test", alpha="keep")
    plain = decode(io.BytesIO(file_of(picture, "PNG", exif=exif)), "test")
    assert got.alpha is not None
    assert got.alpha.tobytes() == plain.rgb.getchannel("R").tobytes()


def test_what_is_read_beside_the_pixels(picture):
    exif = Image.Exif()
    exif[0x8298], exif[0x013B], exif[0x010F] = "© Ann\n".encode(), "\x1b[31mÜ".encode("latin-1"), "Camera"
    got = decode(io.BytesIO(file_of(picture, "JPEG", exif=exif, dpi=(300, 150))), "test")
    assert got.metadata.base == {0x8298: "© Ann".encode(), 0x013B: "[31mÜ".encode(), 0x010F: "Camera"}
    assert got.dpi == (300, 150)
    for dpi in ((0, 0), (1, 1)):
        assert decode(io.BytesIO(file_of(picture, "JPEG", dpi=dpi)), "test").dpi is None


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_further_frames_are_told(form, picture):
    several = file_of(picture, form, save_all=True, append_images=[ImageOps.invert(picture)])
    assert "several frames" in decode(io.BytesIO(several), "test").notes[0]
    assert not decode(io.BytesIO(file_of(picture, form)), "test").notes


SMALL = st.integers(1, 40)
IMAGES = st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"])


@settings(deadline=None, max_examples=150)
@given(
    IMAGES, st.integers(1, 40), st.integers(1, 40), st.sampled_from(FORMATS), st.sampled_from(["white", "keep", "drop"])
)
def test_any_mode_size_and_format(mode, width, height, form, alpha):
    values = np.random.default_rng(width * 41 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(values).convert("L" if mode in ("I", "F") else "RGB").convert(mode)
    try:
        content = file_of(image, form)
    except (OSError, ValueError):  # a mode that the format cannot hold
        return
    picture = decode(io.BytesIO(content), "test", alpha=alpha)
    assert picture.rgb.mode == "RGB"
    assert picture.rgb.size == (width, height)
    assert picture.alpha is None or (picture.alpha.mode, picture.alpha.size) == ("L", (width, height))
    if form in ("PNG", "TIFF", "BMP") and mode in ("1", "L", "RGB", "I;16", "P", "LA", "RGBA", "I", "F"):
        if mode in ("I", "F", "I;16"):
            grey = values[..., 0] if mode == "I;16" else np.asarray(image)
            want = np.repeat(grey[..., None], 3, 2) if mode == "I;16" or grey.max() > 1 else None
        else:
            want = np.asarray(image.convert("RGB"))
        if want is not None:
            assert np.abs(np.asarray(picture.rgb).astype(float) - want).max() <= 1


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_files(form, picture):
    content = file_of(picture, form)
    for share in (0, 0.1, 0.3, 0.5, 0.7):
        refusal(content[: int(share * len(content))])


def test_wrong_checksum(picture):
    content = bytearray(file_of(picture, "PNG"))
    content[content.index(b"IDAT") + 8] ^= 0xFF
    assert "damaged or incomplete" in refusal(bytes(content))


def test_bombs_are_refused_in_little_memory(tmp_path):
    """In a process of its own: peak memory of all of them together, Python and its libraries included.

    What is not unpacked takes no time either, which no test can measure on a machine that does other things as well.
    """
    for name, content in bombs().items():
        (tmp_path / name).write_bytes(content)
    code = (
        "import sys; from pathlib import Path\n"
        "from ibmd_cli.images.decode import own_limits, read_picture; from ibmd_cli.errors import IbmdError\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        with own_limits(): read_picture(Path(name))\n"
        "    except IbmdError as error: told = str(error)\n"
        "    else: sys.exit(f'{name}: decoded')\n"
        "    if '–' in told or '\\n' in told: sys.exit(told)\n"
        "peak = int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "sys.exit(f'{peak} KiB' if peak > 300_000 else 0)"
    )
    files = sorted(map(str, tmp_path.iterdir()))
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with own_limits():
        message = refusal(bombs()["bomb.png"])
    assert "60000×60000 pixels" in message
    assert "--max-pixels" in message


def test_pixel_limit_is_exact(picture):
    content = file_of(picture, "PNG")
    assert rgb_of(content, max_pixels=48 * 32).shape == (32, 48, 3)
    refusal(content, max_pixels=48 * 32 - 1)


def test_an_image_without_pixels():
    with pytest.raises(IbmdError, match="x: 0×3 pixels: expected one or more"):
        to_picture(Image.new("RGB", (0, 3)), "x")


def test_threads_share_a_budget_of_pixels():
    budget, lock, now, most = Budget(10), Lock(), [0, 0], [0, 0]  # pixels and threads
    meeting = Barrier(3, timeout=600)

    def work(pixels: int) -> None:
        with budget.take(pixels):
            with lock:
                now[0], now[1] = now[0] + pixels, now[1] + 1
                most[0], most[1] = max(most[0], now[0]), max(most[1], now[1])
            if pixels == 3:
                meeting.wait()  # three have their share at once
            with lock:
                now[0], now[1] = now[0] - pixels, now[1] - 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [3] * 12))
        assert most == [9, 3]
        most[:] = 0, 0
        list(pool.map(work, [99, 99, 99]))  # each alone
        assert most == [99, 1]


def test_own_limits_are_given_back():
    before = Image.MAX_IMAGE_PIXELS, Image.core.get_block_size()
    with own_limits():
        assert Image.MAX_IMAGE_PIXELS is None
        assert Image.core.get_block_size() > 1e8
    assert before == (Image.MAX_IMAGE_PIXELS, Image.core.get_block_size())


def test_what_is_no_file(tmp_path):
    fifo, sock = tmp_path / "fifo.png", tmp_path / "socket.png"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(sock))
        for path in (fifo, sock, tmp_path, tmp_path / "absent.png", Path("/dev/zero")):
            with pytest.raises(IbmdError, match=path.name):
                read_image(path)


def test_messages_stay_on_one_line(tmp_path):
    path = tmp_path / "a\nb\x1b[31m\udce9.png"
    path.write_text("no image")
    with pytest.raises(IbmdError, match="not an image") as caught:
        read_image(path)
    assert r"a\nb\x1b[31m\xe9.png" in str(caught.value)
    assert shown("ünï 🎨.png") == "ünï 🎨.png"
