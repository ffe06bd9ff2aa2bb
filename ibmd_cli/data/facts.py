"""Facts of pairs that spoil a teacher trained on them, told before the training: too few, copies, no shared shapes."""

import hashlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 300
"""Pairs below which a teacher soon knows them by heart."""
COPY = 2.0
"""Levels of 255 by which the channels of source and target differ at most, if one is a copy of the other."""
COPIES = 0.05
"""Share of copies that is worth a word."""
RELATED = 0.04
"""By so much the edges of a source are more like those of its target than like those of another one."""
LEAST = 16
"""Pairs from which it is told."""
LOOK_AT = 256
"""Pairs that are looked at."""


def warnings_of(x_T: Tensor, x_0: Tensor, count: int) -> Iterator[str]:
    """Say what is wrong with pairs.

    Args:
        x_T: sources, uint8 (N, 3, H, W), of some pairs.
        x_0: their targets, uint8, the same shape.
        count: pairs in all.
    """
    if count < FEW:
        yield f"{count} pairs for training: a teacher soon knows so few by heart; {FEW} or more are better"
    copies = int(((x_T.float() - x_0.float()).abs().amax((1, 2, 3)) <= COPY).sum())
    if copies > COPIES * len(x_T):
        yield f"{copies} of {len(x_T)} pairs are a picture and its copy: is the right folder in target/?"
    elif len(x_T) >= LEAST:
        agreement = shared_edges(x_T, x_0)
        own, other = agreement[0].flatten(), agreement[1].flatten()
        best, side = int(own.argmax()), agreement.shape[-1]
        if own.max() - other.max() < RELATED:
            yield (
                f"sources and targets share no shapes (their edges agree by {own[0]:.2f}, those of unrelated pictures "
                f"by {other[0]:.2f}): are the pairs in the right order?"
            )
        elif own.max() > own[0] + RELATED and best:
            down, right = ((v + side // 2) % side - side // 2 for v in divmod(best, side))
            yield f"targets lie {right} pixels to the right of and {down} below their sources: are the pairs aligned?"


def shared_edges(x_T: Tensor, x_0: Tensor) -> Tensor:
    """Correlate the edges of sources with those of their own targets, and with those of other ones, shifted.

    Args:
        x_T: sources, uint8 (N, 3, H, H).
        x_0: their targets, uint8, the same shape.

    Returns:
        (2, H, H): own and other, means over the pairs; at [:, i, j] for targets moved i pixels down and j to the right
        (the last indices: up and to the left).
    """
    a, b = (torch.fft.rfft2(_edges(x)) for x in (x_T, x_0))
    means = torch.stack([(a.conj() * other).mean(0) for other in (b, b.roll(len(b) // 2, 0))])
    return torch.fft.irfft2(means, x_T.shape[-2:])


def _edges(x: Tensor) -> Tensor:
    """Return the slope of the brightness of images at each pixel, (N, H, W) of mean 0 and length 1 (0 if flat)."""
    grey = F.avg_pool2d(x.float().mean(1), 3, 1, 1, count_include_pad=False)  # which forgives a pixel
    dy, dx = grey.diff(dim=1, append=grey[:, -1:]), grey.diff(dim=2, append=grey[..., -1:])
    slope = (dx**2 + dy**2).sqrt()
    return F.normalize((slope - slope.mean((1, 2), keepdim=True)).flatten(1), dim=1).unflatten(1, x.shape[-2:])


def digests(x: Tensor) -> list[bytes]:
    """Return what tells pictures (N, 3, H, W) from each other: equal pictures have equal digests."""
    return [hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in x]
