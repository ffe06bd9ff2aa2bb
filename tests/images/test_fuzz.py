"""Damaged files end in a picture or in one line; nothing hangs, and nothing is written half."""

import io
import random
import signal
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from imagefiles import curve_tag, write_icc, write_png, write_tiff
from PIL import Image

from ibmd_cli.errors import IbmdError
from ibmd_cli.images.decode import decode, own_limits
from ibmd_cli.reporting import Reporter
from ibmd_cli.sampling.config import SampleConfig
from ibmd_cli.sampling.pipeline import sample

SECONDS = 20  # for one file, on a machine that does other things, too
MAX_PIXELS = 1_000_000


def seeds() -> list[bytes]:
    """Small files of all formats and of the modes that take different ways through the decoder."""
    rng = np.random.default_rng(0)
    base = Image.fromarray(rng.integers(0, 256, (20, 28, 3), dtype=np.uint8)).resize((56, 40))
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "Ann"
    grey16 = Image.fromarray(rng.integers(0, 65536, (20, 28), dtype=np.uint16))
    made: list[tuple[Image.Image, str, dict]] = [
        (base, "PNG", {"exif": exif, "dpi": (300, 300)}),
        (base.convert("P"), "PNG", {"transparency": 3}),
        (base.convert("LA"), "PNG", {}),
        (grey16, "PNG", {}),
        (base, "PNG", {"save_all": True, "append_images": [base.rotate(90)]}),
        (base, "JPEG", {"exif": exif}),
        (base, "JPEG", {"progressive": True}),
        (base.convert("CMYK"), "JPEG", {}),
        (base, "WEBP", {"exif": exif}),
        (base.convert("RGBA"), "WEBP", {"lossless": True}),
        (base, "WEBP", {"save_all": True, "append_images": [base.rotate(90)]}),
        (base, "TIFF", {}),
        (base, "TIFF", {"compression": "tiff_lzw"}),
        (base, "TIFF", {"compression": "tiff_deflate"}),
        (base.convert("1"), "TIFF", {"compression": "group4"}),
        (grey16, "TIFF", {}),
        (base.convert("L").convert("F"), "TIFF", {}),
        (base, "BMP", {}),
        (base.convert("P"), "BMP", {}),
        (base, "GIF", {"save_all": True, "append_images": [base.rotate(90)]}),
        (base, "AVIF", {}),
        (base, "PPM", {}),
        (base.convert("CMYK"), "TIFF", {}),
        (
            base,
            "WEBP",
            {"lossless": True, "icc_profile": write_icc(curve_tag("para4", 2, 0.9, 0, 0.5, 0.2, 0.0676, 0))},
        ),
        (base.convert("L"), "PNG", {"icc_profile": write_icc(curve_tag("curv", 0, 0.2, 1), ())}),
    ]
    deep = np.asarray(base).astype("u2") * 257
    linear = write_icc(curve_tag("para0", 1))
    gamma, chromaticities = (
        struct.pack(">I", 100000),
        struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000),
    )
    contents = [
        write_png(deep, 16, 2, (b"iCCP", b"x\0\0" + zlib.compress(linear)), (b"tRNS", bytes(6))),
        write_png(deep[..., 0], 16, 0, (b"cICP", bytes([12, 8, 0, 1]))),
        write_png(deep[..., :2], 16, 4, (b"gAMA", gamma), (b"cHRM", chromaticities)),
        write_tiff(deep, 16, 2, ">", tags={34675: ("B", tuple(linear))}),
        write_tiff(deep[..., 0] >> 4, 12, 1),
        write_tiff(deep[..., 0].astype("u4"), 32, 1),
        write_tiff(deep[..., 0].astype("f4") / 65535, 32, 0, ">", 3, deflate=True),
        write_tiff(
            (deep[..., 0] >> 8).astype("u1"), 8, 3, tags={320: ("H", tuple(range(0, 65536, 86))[:762] + (0,) * 6)}
        ),
    ]
    for image, form, options in made:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        contents.append(buffer.getvalue())
    return contents


def mutated(contents: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Damage files: bits, numbers at their limits, pieces cut, doubled, or taken from another file."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(rng.choice(contents))
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            # headers are where formats differ: half of the damage goes there
            at = rng.randrange(min(len(data), 200) if rng.random() < 0.5 else len(data)) if data else 0
            match rng.randrange(6):
                case 0 if data:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at : at + 1] = rng.randbytes(1)
                case 2:
                    number = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x01"))
                    data[at : at + 4] = number
                case 3:
                    del data[at : at + rng.randrange(1, 64)]
                case 4:
                    data[at:at] = data[at : at + rng.randrange(1, 64)]
                case 5:
                    other = rng.choice(contents)
                    start = rng.randrange(len(other))
                    data[at : at + 32] = other[start : start + 32]
        yield bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.1 else data)


@contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """End what takes too long, even inside of Pillow's C code when it returns."""

    def ring(*_: object) -> None:
        raise BaseException(f"more than {seconds} seconds")  # not caught as a damaged file

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def decode_all(count: int, seed: int) -> tuple[int, int]:
    """Decode damaged files; returns how many became pictures and how many were refused."""
    good = refused = 0
    with own_limits():
        for content in mutated(seeds(), count, seed):
            with alarm(SECONDS):
                try:
                    picture = decode(io.BytesIO(content), "some.png", MAX_PIXELS, ("white", "keep", "drop")[good % 3])
                except IbmdError as error:
                    refused += 1
                    message = str(error)
                    assert message.startswith("some.png: "), message
                    assert "\n" not in message, message
                else:
                    good += 1
                    assert picture.rgb.mode == "RGB"
                    assert picture.rgb.width * picture.rgb.height <= MAX_PIXELS
                    assert picture.alpha is None or picture.alpha.size == picture.rgb.size
    return good, refused


def test_damaged_files():
    good, refused = decode_all(500, seed=0)
    assert good > 50  # the damage is not so great that nothing but the first bytes is tried
    assert refused > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_twenty_thousand_damaged_files(seed: int):
    assert sum(decode_all(5000, seed)) == 5000


def test_damaged_files_through_the_program(tmp_path: Path, capfdbinary):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i, content in enumerate(mutated(seeds(), 60, seed=99)):
        (folder / f"{i:03d}.png").write_bytes(content)
    config = SampleConfig(inputs=(str(folder),), output=str(out), restore_size=True, max_pixels=MAX_PIXELS)
    with alarm(120):
        assert sample(config, Reporter(quiet=True)) == 3
    printed, told = capfdbinary.readouterr()
    names = printed.decode().splitlines()
    assert sorted(map(str, out.iterdir())) == sorted(names)  # what is there is whole, and nothing else is
    for name in names:
        with Image.open(name) as image:
            image.load()
    errors = [line for line in told.decode().splitlines() if line.startswith("error: ")]
    assert len(names) + len(errors) == 60
    assert b"Traceback" not in told
