"""Estimates and their 95 % intervals: means of terms, of drawings or (U-statistics) of pairs of drawings.

The difference of two models on the same drawings is the estimate of the difference of their terms.
"""

from typing import NamedTuple

import torch
from torch import Tensor

HALVINGS = 2000
"""Random halves that the floor of a set distance is measured on."""


FEWEST = 5
"""Drawings; of fewer there is no interval."""


class Estimate(NamedTuple):
    """A score and the ends of its 95 % interval; None where there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None


def estimate(terms: Tensor, ends: tuple[float, float] | None = None) -> Estimate:
    """Average the terms of a score, with a 95 % interval over drawings; without one of fewer than `FEWEST`.

    The interval is Student's t with a third of the degrees of freedom. Those of n normal terms are n − 1, those of
    others about 2 (n − 1)/(κ − 1), where κ is their kurtosis: a third stands for κ = 7, between a normal (3) and an
    exponential distribution (9), as scores of images are skewed. So it is too wide rather than too narrow for few
    normal terms, and the usual one for many terms of any kind.

    Args:
        terms: (N,), or (N, N) of which the diagonal is left out; their mean is told with the jackknife's interval.
            Where the expectation is 0 for lack of any difference, the interval of (N, N) is too wide, never too narrow.
        ends: the range of terms that are shares. One more term at either end is counted for the interval, since equal
            terms do not show that others are impossible.

    Source: Box, 1954 (degrees of freedom); Efron, 1982, Ch. 3 (jackknife); Agresti and Coull, 1998 (`ends`).
    """
    from scipy.special import stdtrit

    terms = pseudo_values(terms) if terms.ndim == 2 else terms.double()
    value, n = float(terms.mean()), len(terms)
    if n < FEWEST:
        return Estimate(value)
    if ends is not None:
        terms = torch.cat([terms, torch.tensor(ends, dtype=terms.dtype)])
    quantile = float(stdtrit((n - 1) / 3, 0.975))
    middle, half = float(terms.mean()), quantile * float(terms.std()) / len(terms) ** 0.5
    return Estimate(value, min(middle - half, value), max(middle + half, value))


def pseudo_values(terms: Tensor) -> Tensor:
    """Return the jackknife's terms (N,) of a U-statistic (N, N): of the same mean, and of its spread over drawings."""
    n, rows = len(terms), (terms.double() - torch.diag(terms.double().diagonal())).sum(1)
    whole, others = rows.sum() / (n * (n - 1)), (rows.sum() - 2 * rows) / max(1, (n - 1) * (n - 2))
    return n * whole - (n - 1) * others if n > 2 else whole.expand(n)


def interval(values: Tensor) -> tuple[float, float]:
    """Return the range that holds the central 95 % of `values` (R,)."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
