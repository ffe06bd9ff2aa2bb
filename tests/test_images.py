"""Files become RGB by the documented rules or are refused in one line; tensors and sizes come back as they went."""

import io
import os
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from ibmd_cli.errors import IbmdError
from ibmd_cli.images import (
    WRITABLE,
    decode,
    encode,
    find_images,
    fit,
    own_limits,
    read_image,
    shown,
    to_image,
    to_tensor,
    to_uint8,
    unfit,
)

FORMATS = ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"]


def file_of(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rgb_of(content: bytes, **options) -> np.ndarray:
    image = decode(io.BytesIO(content), "test", **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def refusal(content: bytes, **options) -> str:
    with pytest.raises(IbmdError) as caught:
        decode(io.BytesIO(content), "some.png", **options)
    message = str(caught.value)
    assert message.startswith("some.png: ")
    assert "\n" not in message
    return message


@pytest.fixture
def picture() -> Image.Image:
    """Four flat quarters of different colours and sizes, which no format distorts much and no turn leaves alone."""
    image = Image.new("RGB", (48, 32), (250, 250, 250))
    image.paste((200, 40, 40), (0, 0, 32, 16))
    image.paste((40, 160, 40), (32, 0, 48, 16))
    image.paste((30, 30, 200), (0, 16, 32, 32))
    return image


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


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("form", FORMATS)
def test_truncated_files(form, picture):
    content = file_of(picture, form)
    for share in (0, 0.1, 0.3, 0.5, 0.7):
        refusal(content[: int(share * len(content))])


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0", b"P6 1 1 255 abc"]
)
def test_other_content(content):
    assert "expected PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF" in refusal(content)


def test_wrong_checksum(picture):
    content = bytearray(file_of(picture, "PNG"))
    content[content.index(b"IDAT") + 8] ^= 0xFF
    assert "damaged or incomplete" in refusal(bytes(content))


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(width // 8 + 1) * 1000, 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 13_000, 60_000])
def test_bombs_are_refused_quickly(side):
    began = time.monotonic()
    with own_limits():
        message = refusal(bomb(side, side))
    assert f"{side}×{side} pixels" in message
    assert "--max-pixels" in message
    assert time.monotonic() - began < 0.5


def test_pixel_limit_is_exact(picture):
    content = file_of(picture, "PNG")
    assert rgb_of(content, max_pixels=48 * 32).shape == (32, 48, 3)
    refusal(content, max_pixels=48 * 32 - 1)


def test_own_limits_are_given_back():
    before = Image.MAX_IMAGE_PIXELS
    with own_limits():
        assert Image.MAX_IMAGE_PIXELS is None
    assert before == Image.MAX_IMAGE_PIXELS


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


# ------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("suffix", WRITABLE)
def test_written_files_come_back(suffix, picture):
    error = np.abs(rgb_of(encode(picture, suffix)) - np.asarray(picture))
    exact = suffix in (".png", ".webp", ".tif", ".tiff", ".bmp")
    assert error.max() <= (0 if exact else 40)  # at edges
    assert error.mean() <= 2


def test_what_a_format_cannot_hold():
    with pytest.raises(IbmdError, match=r"use \.png"):
        encode(Image.new("RGB", (20_000, 1)), ".webp")


# ------------------------------------------------------------------------------------------------------ tensors


def test_every_value_comes_back():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
    image = Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
    x = to_tensor(image)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(to_uint8(x), values)
    assert torch.equal(to_uint8(image), values)
    assert to_image(x).tobytes() == image.tobytes()


def test_quantising_clamps_and_rounds():
    x = torch.tensor([-3.0, -1, -1 + 0.9 / 127.5, 0.999, 1, 7]).reshape(1, 1, 1, 6)
    assert to_uint8(x).flatten().tolist() == [0, 0, 1, 255, 255, 255]


# -------------------------------------------------------------------------------------------------------- sizes

SIDES = st.integers(1, 70) | st.sampled_from([1, 37, 1000])
MODES = ["pad", "stretch", "crop"]


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, st.sampled_from([8, 32]), st.sampled_from(MODES), st.integers(0, 255))
def test_every_size_fits_and_comes_back(width, height, side, mode, grey):
    flat = Image.new("RGB", (width, height), (grey, 0, 255 - grey))
    x, geometry = fit(flat, side, mode)
    assert x.shape == (3, side, side)
    assert to_uint8(x).flatten(1).unique(dim=1).shape[1] == 1  # flat paper, flat padding
    back = unfit(to_image(x), geometry)
    assert back.size == flat.size
    left, upper, right, lower = geometry.seen
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    assert back.crop(geometry.seen).tobytes() == flat.crop(geometry.seen).tobytes()
    if mode != "crop":
        assert geometry.seen == (0, 0, width, height)


@pytest.mark.parametrize("mode", MODES)
def test_the_size_of_the_model_is_left_alone(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    x, geometry = fit(Image.fromarray(pixels), 32, mode)
    assert torch.equal(to_uint8(x).permute(1, 2, 0), torch.from_numpy(pixels))
    assert unfit(to_image(x), geometry).tobytes() == pixels.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (4001, 37), (37, 4001)])
@pytest.mark.parametrize("mode", MODES)
def test_extreme_sizes(size, mode):
    x, geometry = fit(Image.new("RGB", size, "teal"), 32, mode)
    assert unfit(to_image(x), geometry).size == size


def test_padding_keeps_proportions_and_paper(picture):
    drawing = Image.new("RGB", (60, 40), (240, 235, 220))
    drawing.paste("black", (0, 19, 60, 22))  # a line that touches the border
    x, geometry = fit(drawing, 30, "pad")
    assert geometry.place == (0, 5, 30, 25)
    padding = torch.cat([to_uint8(x)[:, :5], to_uint8(x)[:, 25:]], 1)
    assert padding.flatten(1).unique(dim=1).flatten().tolist() == [240, 235, 220]


def test_crop_shows_the_middle():
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    x, geometry = fit(wide, 10, "crop")
    assert to_uint8(x)[2, 1:-1, 1:-1].min() == 255
    back = np.asarray(unfit(to_image(x), geometry))
    assert (back[:, :30] == 255).all()
    assert (back[:, 60:] == 255).all()
    assert (back[:, 35:55, 2] == 255).all()


def test_lines_survive_reduction():
    drawing = Image.new("RGB", (600, 400), "white")
    drawing.paste("black", (290, 0, 310, 400))  # 1/30 of the width: one pixel of 32
    x, _ = fit(drawing, 32, "pad")
    ink = (1 - x[:, 8:24]).sum(dim=2) / 2
    assert ((ink - 32 / 30).abs() < 0.05).all()  # in every row
    assert x.max() == 1  # and the paper white, without overshoot


# ------------------------------------------------------------------------------------------------------ folders


def test_find_images(tmp_path, picture):
    for name in ["b.png", "a.JPG", "sub/c.webp", "sub/deep/d.tif", ".hidden.png", ".cache/e.png", "notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / name, "PNG")
    for name in ["b.ibmd.png", "b.ibmd.12.png", "sub/c.ibmd.png"]:
        picture.save(tmp_path / name)
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "link.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "absent.png")

    def names(**options) -> list[str]:
        return [str(f.relative_to(tmp_path)) for f in find_images(tmp_path, **options)]

    assert names(recursive=False) == ["a.JPG", "b.png", "link.png"]
    assert names() == ["a.JPG", "b.png", "link.png", "sub/c.webp", "sub/deep/d.tif"]
    assert names(without=tmp_path / "sub" / "deep") == ["a.JPG", "b.png", "link.png", "sub/c.webp"]
    assert find_images(tmp_path / "b.png") == [tmp_path / "b.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_unreadable_folder(tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(IbmdError, match="locked"):
        find_images(tmp_path)
