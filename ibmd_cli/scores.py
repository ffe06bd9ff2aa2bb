"""Scores of images against images, as pure functions of tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor


def energy_score(samples: Tensor, truth: Tensor, pool: int = 4) -> Tensor:
    """Energy score of a conditional sampler, per truth: E‖X − y‖ − ½ E‖X − X'‖ on average-pooled pixels.

    A proper score: smallest in expectation for the true conditional law, so it rewards accuracy and calibrated
    diversity at once. Unbiased for any number m ≥ 2 of samples; for m = 1 (a deterministic predictor) the second
    term is 0.

    Args:
        samples: (m, N, C, H, W) in [-1, 1].
        truth: (N, C, H, W).
        pool: side of the pooling window, which makes the score forgiving of shifts by less than it.

    Returns:
        (N,), lower is better.

    Source: Gneiting and Raftery, 2007, Eq. (22).
    """
    m = len(samples)
    x = F.avg_pool2d(samples.flatten(0, 1), pool).flatten(1).unflatten(0, (m, -1))
    y = F.avg_pool2d(truth, pool).flatten(1)
    accuracy = (x - y).norm(dim=2).mean(0)
    if m == 1:
        return accuracy
    spread = torch.stack([(x[i] - x[j]).norm(dim=1) for i in range(m) for j in range(i)]).mean(0)
    return accuracy - 0.5 * spread
