"""Random numbers that belong to a place: a step of a run, an image of a folder.

All randomness comes from streams that are named by where they are used. So nothing random is kept between steps, a
resumed run draws what an uninterrupted one draws, and the noise of an image does not depend on its batch. Numbers
are drawn on the CPU: every device sees the same ones.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Streams = torch.Generator | Sequence[torch.Generator]
"""One random stream for a whole batch, or one for each image."""


def stream(seed: int, *place: int | str) -> torch.Generator:
    """Return the random stream of a place, e.g. `stream(seed, "student", step, micro_batch, process)`."""
    digest = hashlib.sha256(repr((seed, *place)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def randn(shape: Sequence[int], rng: Streams) -> Tensor:
    """Draw standard normal numbers of shape (B, …), float32; with one stream per image, image by image."""
    if isinstance(rng, torch.Generator):
        return torch.randn(*shape, generator=rng)
    return torch.stack([torch.randn(*shape[1:], generator=r) for r in rng])


def noise_like(x: Tensor, rng: Streams) -> Tensor:
    """Draw ε ~ N(0, I) with the shape, dtype and device of `x`."""
    return randn(x.shape, rng).to(x)
