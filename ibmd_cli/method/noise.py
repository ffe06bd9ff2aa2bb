"""Random numbers that belong to a place: a step of a run, an image of a folder.

All randomness comes from streams that are named by where they are used. So nothing random is kept between steps, a
resumed run draws what an uninterrupted one draws, and the noise of an image does not depend on its batch. Numbers
are drawn on the CPU: every device sees the same ones.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from ibmd_cli.method.numpy_noise import seed_of

Streams = torch.Generator | Sequence[torch.Generator]
"""One random stream for a whole batch, or one for each image."""

Noise = Streams | Tensor | Sequence[Tensor] | Callable[[int], Tensor] | None
"""Where a sampler's noise comes from: see `noise_draws`."""


def stream(seed: int, *place: int | str) -> torch.Generator:
    """Return the random stream of a place, e.g. `stream(seed, "student", step)`."""
    return torch.Generator().manual_seed(seed_of(seed, *place))


class BatchStreams(list[torch.Generator]):
    """The random streams of a batch: one for each image, and `shared` for what is drawn once for all.

    An image's stream is named by its place in the whole batch. So nothing changes when the batch is cut into parts.

    Args:
        rows: places of these images in the whole batch.
        seed: of the run.
        place: of the whole batch.
        size: of the whole batch; 0: these images are all of it.
    """

    def __init__(self, rows: Sequence[int], seed: int, *place: int | str, size: int = 0) -> None:
        super().__init__(stream(seed, *place, row) for row in rows)
        self.rows, self.size = rows, size or len(rows)
        self.shared = stream(seed, *place)


def randn(shape: Sequence[int], rng: Streams) -> Tensor:
    """Draw standard normal numbers of shape (B, …), float32; with one stream per image, image by image."""
    if isinstance(rng, torch.Generator):
        return torch.randn(*shape, generator=rng)
    return torch.stack([torch.randn(*shape[1:], generator=r) for r in rng])


def uniform(count: int, rng: Streams) -> Tensor:
    """Draw numbers from [0, 1), float64 (count,); with one stream per image, one from each."""
    if isinstance(rng, torch.Generator):
        return torch.rand(count, generator=rng, dtype=torch.float64)
    return torch.stack([torch.rand((), generator=r, dtype=torch.float64) for r in rng])


def evenly_spaced(count: int, rng: Streams) -> Tensor:
    """Draw numbers from [0, 1), float64 (count,), at equal distances over the whole batch, from a random start.

    Each is uniform by itself; their mean over the batch varies less than that of independent ones.

    Source: Kingma et al., arXiv:2107.00630, App. I.1.
    """
    start = torch.rand((), generator=_shared(rng), dtype=torch.float64)
    rows, size = (rng.rows, rng.size) if isinstance(rng, BatchStreams) else (range(count), count)
    return (start + torch.tensor([row / size for row in rows], dtype=torch.float64)) % 1


def common_integer(below: int, rng: Streams) -> int:
    """Draw a number 0 … below − 1 for a whole batch; with one stream per image, from the one they share."""
    return int(torch.randint(below, (), generator=_shared(rng)))


def _shared(rng: Streams) -> torch.Generator:
    return rng.shared if isinstance(rng, BatchStreams) else rng if isinstance(rng, torch.Generator) else rng[0]


def noise_like(x: Tensor, rng: Streams) -> Tensor:
    """Draw ε ~ N(0, I) with the shape, dtype and device of `x`."""
    return randn(x.shape, rng).to(x)


def noise_draws(noise: Noise, x: Tensor, count: int) -> Iterator[Tensor]:
    """Return `count` successive draws of ε ~ N(0, I), each with the shape, dtype and device of `x`.

    Args:
        noise: random streams, drawn from in turn (None: `stream(0)`); or the draws themselves, for comparison with
            other code: a sequence, a stacked tensor (dim 0 = draw), or a function of the number of the draw, from 0.
        x: what the draws are to fit, (B, …).
        count: how many there will be.

    Raises:
        ValueError: fewer than `count` tensors are given, or one does not have the shape of `x`.
    """
    if noise is None:
        noise = stream(0)
    if callable(noise):
        return (_shaped(noise(k), x) for k in range(count))
    if isinstance(noise, torch.Generator) or (len(noise) and isinstance(noise[0], torch.Generator)):
        rng = cast(Streams, noise)
        return (_shaped(noise_like(x, rng), x) for _ in range(count))
    tensors = cast(Sequence[Tensor], noise)  # a stacked tensor, too
    if len(tensors) < count:
        raise ValueError(f"{len(tensors)} tensors of noise are given, expected {count}")
    return (_shaped(tensors[k], x) for k in range(count))


def _shaped(eps: Tensor, x: Tensor) -> Tensor:
    if eps.shape != x.shape:
        raise ValueError(f"a draw of noise has the shape {list(eps.shape)}, expected {list(x.shape)}")
    return eps.to(x)
