"""Scores of sets of images by their features: Kernel Inception Distance, Fréchet distance, Inception Score.

The first two are means of terms, as `metrics` tells of scores. Features are (N, D), float32; sums are in float64, of
pieces, so that the features themselves are the most that is in memory.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ibmd_cli.method.noise import stream
from ibmd_cli.metrics.intervals import Estimate, interval, pseudo_values
from ibmd_cli.metrics.scores import IS_SPLIT, KID_IMAGES

PIECE = 4096
"""Features that are turned into float64 at a time."""

# ----------------------------------------------------------------------------------------------------------- kernel


def kid_terms(samples: Tensor, truth: Tensor, usual: bool = False) -> Tensor:
    """Kernel Inception Distance, as terms: unbiased MMD² with the kernel (x·y/D + 1)³.

    The terms are h_ij = k(x_i, x_j) + k(y_i, y_j) − k(x_i, y_j) − k(x_j, y_i), averaged over the m samples x of each
    drawing; the distance is their mean over i ≠ j. Sample and truth of one drawing are never compared. So it is
    unbiased although both sets show the same drawings, where the usual form, which keeps k(x_i, y_i), is biased low.

    Args:
        samples: features (m, N, D).
        truth: features (N, D) of the true images of the same drawings, in the same order.
        usual: shift the terms so that their mean is that of the usual form, which published figures use.

    Returns:
        (N, N), symmetric; the diagonal means nothing. The distance is 0 for equal laws and may be negative.

    Source: Bińkowski et al., arXiv:1801.01401, Sec. 4; Gretton et al., 2012, Eq. (4).
    """
    terms = _kernel(truth, truth)
    for x in samples:
        cross = _kernel(x, truth)
        terms = terms + (_kernel(x, x) - cross - cross.T) / len(samples)
        if usual:
            terms = terms - 2 * (cross.mean() - _mean_of_others(cross)) / len(samples)
    return terms


def kid_blocks(samples: Tensor, truth: Tensor, seed: int, usual: bool = False) -> Tensor:
    """Return terms of the KID of any number of images: `kid_terms`, or those of random blocks of images.

    Args:
        samples: features (m, N, D).
        truth: features (N, D) of the true images of the same drawings.
        seed: of the blocks, which are the same for all models.
        usual: see `kid_terms`.

    Returns:
        (N, N) for up to 2 · `KID_IMAGES` images; else (N,), the jackknife's terms in blocks of at least `KID_IMAGES`.
    """
    n = len(truth)
    if n <= 2 * KID_IMAGES:
        return kid_terms(samples, truth, usual)
    blocks = torch.randperm(n, generator=stream(seed, "blocks")).tensor_split(n // KID_IMAGES)
    return torch.cat([pseudo_values(kid_terms(samples[:, rows], truth[rows], usual)) for rows in blocks])


def _mean_of_others(terms: Tensor) -> Tensor:
    n = len(terms)
    return (terms.sum() - terms.diagonal().sum()) / (n * (n - 1))


def kid_floor(truth: Tensor, repeats: int, rng: torch.Generator) -> Estimate:
    """Distance of real images from real images: random halves of the truth against each other.

    The value is about 0, because the distance is unbiased; the interval is what chance alone makes of it with ⌊N/2⌋
    images on either side. It shrinks as 1/N, so that with all N images it would be about half as wide.

    Args:
        truth: features (N, D).
        repeats: random partitions.
        rng: random stream.
    """
    half = len(truth) // 2
    kernel = _kernel(truth, truth)
    orders = torch.stack([torch.randperm(len(truth), generator=rng) for _ in range(repeats)])
    side = torch.zeros(2, repeats, len(truth), dtype=kernel.dtype)
    side[0].scatter_(1, orders[:, :half], 1.0)
    side[1].scatter_(1, orders[:, half : 2 * half], 1.0)
    within = ((side @ (kernel - torch.diag(kernel.diagonal()))) * side).sum((0, 2)) / (half * (half - 1))
    across = ((side[0] @ kernel) * side[1]).sum(1) / half**2
    values = within - 2 * across
    return Estimate(float(values.mean()), *interval(values))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double(), y.double()
    return (x @ y.T / x.shape[1] + 1) ** 3


# ---------------------------------------------------------------------------------------------------------- Fréchet


class Moments(NamedTuple):
    """Mean and covariance of features.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, of divisor N − 1.
        images: N; 0 if it is not known.
    """

    mean: Tensor
    covariance: Tensor
    images: int


def moments(batches: Iterable[Tensor]) -> Moments:
    """Compute mean and covariance of features that come in batches (n, D).

    Source: Chan, Golub and LeVeque, 1983, Eq. (1.5).
    """
    count, mean, scatter = 0, torch.zeros(()).double(), torch.zeros(()).double()
    for batch in batches:
        for piece in batch.split(PIECE):
            x = piece.double()
            n, own = len(x), x.mean(0)
            gap = own - mean
            scatter = scatter + (x - own).T @ (x - own)
            if count:
                scatter += gap.outer(gap) * (count * n / (count + n))
            mean = mean + gap * (n / (count + n))
            count += n
    return Moments(mean, scatter / max(1, count - 1), count)


def frechet(a: Moments, b: Moments) -> float:
    """Return the squared Fréchet distance of two normal laws, ‖μ_a − μ_b‖² + Tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½).

    Source: Heusel et al., arXiv:1706.08500, Eq. (6).
    """
    root, _ = _power(a.covariance, 0.5)
    return _frechet(a, b, _power(root @ b.covariance @ root, 0.5)[0])


def _frechet(a: Moments, b: Moments, middle: Tensor) -> float:
    spread = a.covariance.trace() + b.covariance.trace() - 2 * middle.trace()
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))  # sums of rounded numbers may fall below


def frechet_terms(x: Tensor, a: Moments, b: Moments, y: Tensor | None = None) -> Tensor:
    """Return what each image adds to the Fréchet distance: terms whose mean is the distance.

    They are its linear part: the derivative with respect to the weight of an image among all. So they carry its
    interval, but not its bias, which is upwards and falls as 1/N.

    Args:
        x: features (N, D) of the samples.
        a: their moments.
        b: moments of the truth.
        y: features (N, D) of the truth, if the same images are to be drawn again with the samples.

    Returns:
        (N,) float64.

    Source: Efron, 1982, Ch. 6 (the infinitesimal jackknife); the derivative is that of the optimal transport between
    normal laws, Olkin and Pukelsheim, 1982.
    """
    root, inverse = _power(a.covariance, 0.5)
    middle, inner = _power(root @ b.covariance @ root, 0.5)
    terms = torch.full((len(x),), _frechet(a, b, middle), dtype=torch.float64)
    gap = 2 * (a.mean - b.mean)
    terms += _influence(x, a, gap, inverse @ middle @ inverse)
    if y is not None:
        terms += _influence(y, b, -gap, root @ inner @ root)
    return terms


def _influence(x: Tensor, law: Moments, gap: Tensor, transport: Tensor) -> Tensor:
    """Return the derivative for each of `x`: (x − μ)·gap + (x − μ)ᵀ (1 − transport) (x − μ), less its mean."""
    shape = torch.eye(len(transport), dtype=torch.float64) - transport
    parts = []
    for piece in x.split(PIECE):
        u = piece.double() - law.mean
        parts.append(u @ gap + ((u @ shape) * u).sum(1))
    values = torch.cat(parts)
    return values - values.mean()


def _power(matrix: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Return a power of a positive semi-definite matrix, and the inverse of that (of its range alone)."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0)
    kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    powers = values**power
    inverses = torch.where(kept, powers, math.inf).reciprocal()
    return (vectors * powers) @ vectors.T, (vectors * inverses) @ vectors.T


# -------------------------------------------------------------------------------------------------- Inception Score


def inception_score(logits: Tensor) -> float:
    """Return the Inception Score, exp E KL(p(class | image) ‖ p(class)), the mean over splits of 5000 in order.

    Args:
        logits: of the classes, (N, K).

    Source: Salimans et al., arXiv:1606.03498, Sec. 4.
    """
    scores = []
    for part in logits.tensor_split(max(1, round(len(logits) / IS_SPLIT))):
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).sum(1).mean().exp())
    return float(torch.stack(scores).mean())
