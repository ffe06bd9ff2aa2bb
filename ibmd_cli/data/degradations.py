"""Degradations of clean images x_0 into sources x_T, as the published teachers were trained with.

All of them act on float images in [-1, 1], are computed in float32, and neither clamp nor quantise: x_T may leave
[-1, 1]. JPEG, super-resolution, blur and masks are those of I2SB (arXiv:2302.05872), whose blur has its code, and a
defect of it, from DDRM (arXiv:2201.11793). "edges" is in `edges.py`.
"""

import math
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ibmd_cli.data.edges import draw_edges
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError, nearest
from ibmd_cli.method.noise import Streams, noise_like, uniform


class Degradation(NamedTuple):
    """A row of `DEGRADATIONS`, which is all that a degradation needs. A name "inpaint-…" says that it makes holes.

    Attributes:
        help: what it does, in one line.
        function: float32 (B, 3, H, W) in [-1, 1] → the same, neither clamped nor quantised; None: a mask is drawn.
        multiple: what H and W must be multiples of.
        square: whether H and W must be equal.
        slow: whether an image is degraded once, as it is read, in place of each time that it is drawn.
        masks: what its free-form masks are called in Palette's file.
    """

    help: str
    function: Callable[[Tensor], Tensor] | None = None
    multiple: int = 1
    square: bool = False
    slow: bool = False
    masks: str = ""


DEGRADATIONS = {
    "jpeg-5": Degradation("JPEG of quality 5, by I2SB's own codec", lambda x: _jpeg(x, 5), multiple=16),
    "jpeg-10": Degradation("JPEG of quality 10, by I2SB's own codec", lambda x: _jpeg(x, 10), multiple=16),
    "sr4x-pool": Degradation(
        "a quarter of the size by 4×4 means, enlarged again by repetition",
        lambda x: _repeat(F.avg_pool2d(x, 4), 4),
        multiple=4,
    ),
    "sr4x-bicubic": Degradation(
        "a quarter of the size by a bicubic filter, enlarged again by repetition",
        lambda x: _reduce_bicubic(x),
        multiple=4,
    ),
    "blur-uni": Degradation(
        "nominally a 9×9 uniform blur, with the defect of the published code",
        lambda x: _blur(x, torch.ones(9, dtype=torch.float64) / 9),
        square=True,
    ),
    "blur-gauss": Degradation(
        "nominally a 5×5 Gaussian blur, with the defect of the published code",
        lambda x: _blur(x, torch.softmax(-((torch.arange(5, dtype=torch.float64) - 2) ** 2) / (2 * 10.0**2), 0)),
        square=True,
    ),
    "inpaint-center": Degradation(
        "the central square of half the side is missing",
        lambda x: fill_hole(x, _central_hole(*x.shape[2:]), "white"),  # for display; bridges start from `fill_hole`
        multiple=4,
    ),
    "inpaint-freeform1020": Degradation(
        "10-20 % are missing under brush strokes, from the published masks", masks="10-20% freeform"
    ),
    "inpaint-freeform2030": Degradation(
        "20-30 % are missing under brush strokes, from the published masks", masks="20-30% freeform"
    ),
    "edges": Degradation("black lines on white: edges found by a network, thinned", draw_edges, slow=True),
}
"""The degradations by their names."""


def check_name(name: str) -> None:
    """Raise a UsageError that lists the nearest names unless `name` is a key of `DEGRADATIONS`."""
    if name not in DEGRADATIONS:
        raise UsageError(f"no degradation {name!r}: {nearest(name, DEGRADATIONS)}")


def is_slow(name: str) -> bool:
    """Tell whether images are degraded once, as they are read."""
    return name in DEGRADATIONS and DEGRADATIONS[name].slow


def degrade(x_0: Tensor, name: str) -> Tensor:
    """Degrade clean images as published.

    The two blurs are *as published, defect included*: the teachers were trained on the outputs of that code, and a
    true convolution lies off their distribution.

    Args:
        x_0: (B, 3, H, W) in [-1, 1].
        name: key of `DEGRADATIONS`.

    Returns:
        x_T, shape, dtype and device of `x_0`; not clamped, not quantised.

    Raises:
        UsageError: an unknown name, one whose masks are drawn at random (`draw_masks`), or a size for which the
            degradation is not defined.
        NotAvailable: "edges" without the packages it needs.

    Source: github.com/NVlabs/I2SB (arXiv:2302.05872).
    """
    check_name(name)
    row, (height, width) = DEGRADATIONS[name], x_0.shape[2:]
    if row.function is None:
        raise UsageError(f"{name}: its masks are drawn at random: give a mask (--mask) in place of --degrade {name}")
    if row.square and height != width:
        raise UsageError(f"{name}: {width}×{height} pixels: expected a square image")
    if height % row.multiple or width % row.multiple:
        raise UsageError(f"{name}: {width}×{height} pixels: expected multiples of {row.multiple}")
    return row.function(x_0.float()).to(x_0)


def _repeat(x: Tensor, times: int) -> Tensor:
    return F.interpolate(x, scale_factor=float(times), mode="nearest")


# ------------------------------------------------------------------------------------------------------- JPEG

# Quantisation tables: ITU-T T.81, Annex K
_LUMA = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
_CHROMA = torch.full((8, 8), 99)
_CHROMA[:4, :4] = torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]])
_TO_YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]])
_TO_RGB = torch.tensor(  # the published code's, not quite the inverse of the matrix above
    [[1.0, -3.68199903e-5, 1.40198758], [1.0, -0.344113281, -0.714103821], [1.0, 1.77197812, -1.34583413e-4]]
)


def _jpeg(x: Tensor, quality: int) -> Tensor:
    """Compress and decompress. Unlike Pillow: chroma is every second pixel, and nothing is rounded but coefficients."""
    ycc = _mix_channels((x + 1) / 2 * 255, _TO_YCBCR)
    luma = _quantise(ycc[:, :1] - 128, _LUMA, quality) + 128
    chroma = _repeat(_quantise(ycc[:, 1:, ::2, ::2], _CHROMA, quality), 2)  # kept centred on 0
    return _mix_channels(torch.cat([luma, chroma], dim=1), _TO_RGB) / 255 * 2 - 1


def _mix_channels(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("ic,bchw->bihw", matrix.to(x.device), x)


def _quantise(plane: Tensor, table: Tensor, quality: int) -> Tensor:
    """Round the DCT coefficients of 8×8 blocks, (B, C, H, W), to multiples of the table."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = ((table * scale + 50) // 100).clamp(1, 255).to(plane)
    k = torch.arange(8, dtype=torch.float64)
    dct = (math.pi * (2 * k + 1) * k[:, None] / 16).cos() / 2  # orthonormal DCT-II
    dct[0] /= math.sqrt(2)
    dct = dct.to(plane)
    blocks = plane.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # (B, C, H/8, W/8, 8, 8)
    rounded = (dct @ blocks @ dct.T / steps).round() * steps
    return (dct.T @ rounded @ dct).transpose(3, 4).flatten(4).flatten(2, 3)


# ------------------------------------------------------------------------------------------- super-resolution


def _reduce_bicubic(x: Tensor) -> Tensor:
    rows, columns = (_bicubic(length).to(x.device) for length in x.shape[2:])
    return _repeat(rows @ x @ columns.T, 4)


@lru_cache(maxsize=4)
def _bicubic(length: int) -> Tensor:
    """Return the matrix (length/4, length) of the published reduction: Keys' kernel, a = −1/2, 16 taps.

    Borders are mirrored, the edge pixel included.
    """
    taps = torch.arange(16, dtype=torch.float64)
    d = (taps - 7.5).abs() / 4
    kernel = torch.where(d <= 1, 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2)
    kernel /= kernel.sum()
    rows = torch.arange(length // 4)[:, None]
    columns = (4 * rows + taps.long() - 6) % (2 * length)
    columns = torch.minimum(columns, 2 * length - 1 - columns)
    matrix = torch.zeros(length // 4, length, dtype=torch.float64)
    return matrix.index_put_((rows, columns), kernel.expand(columns.shape), accumulate=True).float()


# ------------------------------------------------------------------------------------------------------- blur


def _blur(x: Tensor, kernel: Tensor) -> Tensor:
    u, v, gain = (tensor.to(x.device) for tensor in _blur_operator(tuple(kernel.tolist()), x.shape[2]))
    return 2 * (u @ (gain * (v.T @ ((x + 1) / 2) @ v)) @ u.T) - 1


@lru_cache(maxsize=4)
def _blur_operator(taps: tuple[float, ...], size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, V (n, n) and gains (3, n, n) such that x ↦ U (gain · VᵀxV) Uᵀ blurs images in [0, 1] as published.

    Two defects of the published code are kept. The kernel lacks its last tap, so images get darker. And the gains,
    products S_i S_j of singular values in falling order, should each serve all three channels at one place (i, j);
    instead the list is laid three times end to end over the channels of all places, so most places get the gains of
    others, and each channel its own.
    """
    matrix = torch.zeros(size, size)
    for tap, weight in enumerate(taps[:-1]):
        offset = tap - len(taps) // 2
        if abs(offset) < size:
            matrix.diagonal(offset).fill_(weight)
    u, s, vh = torch.linalg.svd(matrix)
    s = torch.where(s < 3e-2, 0.0, s)
    # Stable: S_i S_j = S_j S_i are ties, which an unstable sort breaks as it likes. Results of the published code
    # differ by up to 4e-3 between machines for that reason.
    gains, places = torch.outer(s, s).flatten().sort(descending=True, stable=True)
    in_order = gains.repeat(3).reshape(-1, 3)  # of the p-th place in falling order, for each channel
    gain = torch.empty_like(in_order)
    gain[places] = in_order
    return u, vh.T.contiguous(), gain.T.reshape(3, size, size).contiguous()


# ------------------------------------------------------------------------------------------------------ masks

_MASK_SIDE = 256
_MASK_COUNT = 10_000
_MASK_PAGE = "https://drive.google.com/file/d/1-5YRGsekjiRKQWqo0BV5RVQu0bagc12w"


def draw_masks(name: str, count: int, size: int, rng: Streams, file: str | Path | None = None) -> Tensor:
    """Draw masks for inpainting: the central square, or one of the 10,000 published free-form masks at random.

    Args:
        name: "inpaint-center", "inpaint-freeform1020" or "inpaint-freeform2030".
        count: B.
        size: height and width.
        rng: random stream, or one for each image; not used by "inpaint-center".
        file: of the free-form masks, see `read_masks`.

    Returns:
        (B, 1, size, size) float32, 1 = hole.

    Raises:
        UsageError: a name that has no masks.
        NotAvailable: free-form masks without a file, or one that is not there.
        IbmdError: a file without such masks, or a size that is neither a multiple nor a divisor of 256.

    Source: github.com/NVlabs/I2SB (arXiv:2302.05872); the free-form masks are those of Palette (arXiv:2111.05826).
    """
    if name == "inpaint-center":
        return _central_hole(size, size).expand(count, 1, size, size)
    masks = read_masks(name, file)
    rows = (uniform(count, rng) * len(masks)).long()
    return torch.stack([_unpack(masks[i], size) for i in rows.tolist()])


def evaluation_mask(name: str, index: int, size: int, file: str | Path | None = None) -> Tensor:
    """Return the mask of test image `index`, (1, size, size): the published protocol gives mask i to image i.

    Arguments and errors are those of `draw_masks`; an index that the file does not have is an IbmdError.
    """
    if name == "inpaint-center":
        return _central_hole(size, size)[0]
    masks = read_masks(name, file)
    if not 0 <= index < len(masks):
        raise IbmdError(f"{file}: no mask {index}: it has {len(masks)}")
    return _unpack(masks[index], size)


def read_masks(name: str, file: str | Path | None) -> np.ndarray:
    """Read the free-form masks of a degradation, 8 pixels to a byte (82 MB); the last set read is kept.

    Args:
        name: "inpaint-freeform1020" or "inpaint-freeform2030".
        file: Palette's `imagenet_freeform_masks.npz`, or what I2SB caches of it, `imagenet_freeform1020_masks.npz` and
            so on (0.7 GB of memory while it is read).

    Returns:
        uint8 (N, 256 · 256 / 8).

    Raises:
        UsageError, NotAvailable, IbmdError: see `draw_masks`.
    """
    check_name(name)
    if not DEGRADATIONS[name].masks:
        free = [other for other, row in DEGRADATIONS.items() if row.masks]
        raise UsageError(f"{name}: has no mask; those that have: inpaint-center, {', '.join(free)}")
    if not file:
        raise NotAvailable(
            f"{name}: needs the published masks: get imagenet_freeform_masks.npz from {_MASK_PAGE} "
            "and give its path: --masks FILE"
        )
    if not Path(file).is_file():
        raise NotAvailable(f"--masks {file}: no such file; it is imagenet_freeform_masks.npz from {_MASK_PAGE}")
    return _packed_masks(DEGRADATIONS[name].masks, str(file))


@lru_cache(maxsize=1)
def _packed_masks(own_key: str, file: str) -> np.ndarray:
    if not zipfile.is_zipfile(file):
        raise IbmdError(f"--masks {file}: no npz file, or a part of one: fetch it again from {_MASK_PAGE}")
    side, bytes_each = _MASK_SIDE, _MASK_SIDE**2 // 8
    try:
        with np.load(file, allow_pickle=False) as archive:
            key = next((key for key in (own_key, "mask") if key in archive), None)
            bits = archive[key] if key else np.empty(0, np.uint8)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise IbmdError(f"--masks {file}: cannot be read ({error}): fetch it again from {_MASK_PAGE}") from error
    if key == "mask":
        bits = np.packbits(bits) if bits.shape[1:] == (side, side) else np.empty(0, np.uint8)
    count = min(bits.size // bytes_each, _MASK_COUNT)
    if bits.dtype != np.uint8 or count == 0:
        raise IbmdError(f"--masks {file}: no masks of {side} pixels in {own_key!r} or 'mask': see {_MASK_PAGE}")
    return bits.reshape(-1)[: count * bytes_each].reshape(count, bytes_each)


def _unpack(bits: np.ndarray, size: int) -> Tensor:
    """Return one mask, (1, size, size) float32; other sizes than its own are its nearest pixels."""
    if _MASK_SIDE % size and size % _MASK_SIDE:
        raise IbmdError(f"free-form masks are of {_MASK_SIDE}×{_MASK_SIDE} pixels, which {size} does not divide")
    mask = torch.from_numpy(np.unpackbits(bits)).reshape(1, 1, _MASK_SIDE, _MASK_SIDE).float()
    return F.interpolate(mask, (size, size), mode="nearest")[0]


def _central_hole(height: int, width: int) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
    return mask


def fill_hole(x: Tensor, mask: Tensor, fill: str, rng: Streams | None = None) -> Tensor:
    """Fill the hole of images; known pixels stay as they are, to the bit.

    Args:
        x: (B, C, H, W).
        mask: (B or 1, 1, H, W), 1 = hole.
        fill: "noise", a fresh N(0, 1) at each call (what I2SB's bridge starts from); "zero", mid-grey (DBIM); or
            "white" (the picture that I2SB shows).
        rng: random stream of "noise", or one for each image.

    Returns:
        Shape, dtype and device of `x`.

    Source: github.com/NVlabs/I2SB (arXiv:2302.05872); github.com/thu-ml/DiffusionBridge (arXiv:2405.15885).
    """
    if fill == "noise":
        if rng is None:
            raise ValueError('fill_hole: "noise" needs a random stream')
        filling = noise_like(x, rng)
    elif fill in ("zero", "white"):
        filling = torch.full_like(x, 0.0 if fill == "zero" else 1.0)
    else:
        raise UsageError(f"fill: {fill!r} is not one of noise, zero, white")
    return torch.where(mask.to(x.device) > 0.5, filling, x)
