"""Colour spaces of files, and the way from them to sRGB.

A space is judged by its curves and primaries, never by its name. Profiles of 8-bit images are converted by LittleCMS;
what PNG and AVIF say in numbers (gAMA, cHRM, cICP) and samples of 16 bits, which Pillow cannot convert, by `Space`.
"""

import struct
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from ibmd_cli.images import table

Curve = Callable[[np.ndarray], np.ndarray]  # from samples in [0, 1] to light in [0, 1]
_ROWS = 1 << 20  # pixels that are converted at a time
_D50 = np.array([0.96422, 1.0, 0.82521])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


class NotRead(Exception):
    """Why an image is not read, and what mends it, to be put after its name."""


def _power(g: float, a: float = 1, b: float = 0, c: float = 0, d: float = 0, e: float = 0, f: float = 0) -> Curve:
    """Return the curve (a·x + b)^g + e from x = d on, and c·x + f below."""
    return lambda x: np.where(x >= d, np.maximum(a * x + b, 0) ** g + e, c * x + f)


class Space(NamedTuple):
    """How samples become light."""

    curves: tuple[Curve, ...]  # one for all channels, or one for each of three
    matrix: np.ndarray = np.eye(3)  # from light in the space's primaries to linear sRGB

    def to_srgb(self, samples: np.ndarray) -> np.ndarray:
        """Convert uint8 or uint16 samples, (H, W) or (H, W, 3), to sRGB, uint8 (H, W, 3)."""
        levels = np.linspace(0, 1, np.iinfo(samples.dtype).max + 1)
        with np.errstate(all="ignore"):  # curves of damaged profiles
            light = [np.clip(np.nan_to_num(curve(levels)), -8, 8).astype(np.float32) for curve in self.curves]
        rgb, step = np.empty((*samples.shape[:2], 3), np.uint8), max(1, _ROWS // samples.shape[1])
        for top in range(0, len(samples), step):
            part = samples[top : top + step]
            lit = np.stack([light[i % len(light)][part if part.ndim == 2 else part[..., i]] for i in range(3)], -1)
            lit = lit @ np.clip(self.matrix.T, -1e6, 1e6).astype(np.float32)
            rgb[top : top + step] = _encoding()[np.rint(np.clip(lit, 0, 1) * 65535).astype(np.uint16)]
        return rgb

    def is_srgb(self) -> bool:
        """Tell whether it changes no 8-bit colour by more than one level."""
        colours = np.stack(np.meshgrid(*[np.arange(0, 256, 51)] * 3), -1).reshape(-1, 3)
        greys = np.repeat(np.arange(256)[:, None], 3, 1)
        probe = np.concatenate([colours, greys]).astype(np.uint8)[None]
        return int(np.abs(self.to_srgb(probe).astype(int) - probe).max()) <= 1


class Profile(NamedTuple):
    """An ICC profile: its bytes, its kind of samples ("RGB", "GRAY", "CMYK" …), and its space if it has no tables."""

    content: bytes
    kind: str
    space: Space | None


@lru_cache(1)
def _encoding() -> np.ndarray:
    """Return the 8-bit sRGB samples of light in steps of 1 / 65535."""
    light = np.linspace(0, 1, 65536)
    return np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)).astype("u1")


def _matrix(chromaticities: tuple[float, ...]) -> np.ndarray:
    """Return the matrix from light in these primaries to XYZ, white adapted to D50."""
    white, *primaries = (np.array([x, y, 1 - x - y]) / y for x, y in np.reshape(chromaticities, (4, 2)))
    columns = np.stack(primaries, 1)
    adapt = np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white)) @ _BRADFORD
    return adapt @ (columns * np.linalg.solve(columns, white))


_SRGB = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x and y of white, red, green and blue
_FROM_XYZ = np.linalg.inv(_matrix(_SRGB))
_HDR = {16: "PQ", 18: "HLG"}  # transfers of H.273


def from_codes(primaries: int, transfer: int, matrix: int = 0, full: int = 1, *, video: bool = False) -> Space | None:
    """Return the space of code points of ITU-T H.273 (cICP); None for sRGB; NotRead if there is no fixed way to sRGB.

    With `video`, the curves of television count as sRGB's, as browsers have it in AVIF.
    """
    mend = "save it as sRGB in a program that knows it"
    if (hdr := _HDR.get(transfer)) is not None:
        raise NotRead(f"an HDR image ({hdr} transfer), brighter than sRGB can show: save it as SDR (sRGB) first")
    if matrix != 0 or not full:
        raise NotRead(f"cICP says {'a Y′CbCr matrix' if matrix else 'narrow range'}: expected full-range RGB: {mend}")
    transfer = 13 if transfer == 2 or (video and transfer in (1, 6, 14, 15)) else transfer
    primaries = 1 if primaries == 2 else primaries
    if (primaries, transfer) == (1, 13):
        return None
    chromaticities, curve = table("primaries").get(str(primaries)), table("transfers").get(str(transfer))
    if chromaticities is None or curve is None:
        raise NotRead(f"colour primaries {primaries} with transfer {transfer} (ITU-T H.273) are not known: {mend}")
    return Space((_power(*curve),), _FROM_XYZ @ _matrix(chromaticities))


def from_gamma(gamma: float, chromaticities: tuple[float, ...] | None) -> Space | None:
    """Return the space of PNG's gAMA and cHRM; None for sRGB, which its own numbers stand for, too.

    Numbers that no image can have count as none, and cHRM without gAMA as well, as in browsers.
    """
    sane = chromaticities and all(0 <= v < 2 for v in chromaticities) and min(chromaticities[1::2]) > 0
    own = not sane or np.allclose(chromaticities or (), _SRGB, atol=1e-4)
    if not 16e-5 <= gamma <= 6250 or (own and abs(gamma - 0.45455) < 1e-4):
        return None
    try:
        matrix = np.eye(3) if own else _FROM_XYZ @ _matrix(chromaticities or ())
    except np.linalg.LinAlgError:  # primaries on one line
        matrix = np.eye(3)
    return Space((_power(1 / gamma),), matrix)


@lru_cache(4)
def from_profile(content: bytes) -> Profile | None:
    """Read an ICC profile; None for one that makes no difference to sRGB.

    A damaged one raises a ValueError, one of an HDR image NotRead.
    """
    try:
        kind, (count,) = content[16:20].decode("latin-1").strip(), struct.unpack_from(">I", content, 128)
        entries = [struct.unpack_from(">4sII", content, 132 + 12 * i) for i in range(min(count, 100))]
        tags = {name: content[at : at + size] for name, at, size in entries}
        if content[36:40] != b"acsp":
            raise ValueError("no signature")
        if b"cicp" in tags and tags[b"cicp"][9] in _HDR:
            from_codes(*tags[b"cicp"][8:10])
        space = None
        if kind == "GRAY":
            space = Space((_curve(tags[b"kTRC"]),))
        elif kind == "RGB" and b"A2B0" not in tags:
            columns = [np.frombuffer(tags[name], ">i4", 3, 8) / 65536 for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
            curves = tuple(_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC"))
            space = Space(curves, _FROM_XYZ @ np.stack(columns, 1))
    except (KeyError, IndexError, struct.error) as error:
        raise ValueError("damaged profile") from error
    return None if space is not None and space.is_srgb() else Profile(content, kind, space)


def _curve(tag: bytes) -> Curve:
    """Read a curve of an ICC profile."""
    if tag[:4] == b"curv":
        table = np.frombuffer(tag, ">u2", struct.unpack_from(">I", tag, 8)[0], 12)
        if len(table) < 2:
            return _power(float(table[0]) / 256 if len(table) else 1)
        return lambda x: np.interp(x, np.linspace(0, 1, len(table)), table / 65535)
    kind = struct.unpack_from(">H", tag, 8)[0]
    p = (np.frombuffer(tag, ">i4", (1, 3, 4, 5, 7)[kind], 12) / 65536).tolist()
    if kind in (1, 2):
        g, a, b, *rest = p
        offset = rest[0] if rest else 0
        return _power(g, a, b, 0, -b / a if a else 0, offset, offset)
    return _power(*p)


def to_srgb(pixels: Image.Image | np.ndarray, space: Profile | Space | None, copy: bool = True) -> Image.Image:
    """Convert an 8-bit image of a mode without transparency, or uint16 (H, W) or (H, W, 3), to a mode RGB image.

    Where nothing is to be done, it is copied, unless `copy` is false. Raises a ValueError if the profile is damaged, or
    not of the pixels' kind.
    """
    own = space.space if isinstance(space, Profile) else space
    for_grey = isinstance(space, Profile) and space.kind == "GRAY"
    if isinstance(pixels, np.ndarray):
        if own is not None and not (for_grey and pixels.ndim == 3):
            return Image.fromarray(own.to_srgb(pixels))
        pixels = Image.fromarray(np.rint(pixels / np.float32(257)).astype(np.uint8))
    if pixels.mode not in ("L", "RGB", "CMYK", "LAB"):
        pixels = pixels.convert("L" if pixels.mode == "1" else "RGB")
    if own is not None and (pixels.mode == "L" or isinstance(space, Space)):
        return Image.fromarray(own.to_srgb(np.asarray(pixels if pixels.mode == "L" else pixels.convert("RGB"))))
    if isinstance(space, Profile):
        return _through_cms(pixels.convert("RGB") if (space.kind, pixels.mode) == ("RGB", "L") else pixels, space)
    return pixels.convert("RGB") if copy or pixels.mode != "RGB" else pixels


def _through_cms(image: Image.Image, profile: Profile) -> Image.Image:
    if {"GRAY": "L", "Lab": "LAB"}.get(profile.kind, profile.kind) != image.mode:
        raise ValueError(f"a profile for {profile.kind if profile.kind.isprintable() else 'other samples'}")
    try:
        source, target = ImageCms.ImageCmsProfile(BytesIO(profile.content)), ImageCms.createProfile("sRGB")
        converted: Any = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, TypeError) as error:
        raise ValueError("damaged profile") from error
    return converted
