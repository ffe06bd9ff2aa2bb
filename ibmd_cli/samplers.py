"""The teachers' own samplers, for comparison with their students and for previews.

Source: arXiv:2405.15885 (DBIM), as in the published code.
"""

from typing import Any

import torch
from torch import Tensor

from ibmd_cli.bridges import Bridge, expand_to
from ibmd_cli.distillation import Denoiser, Sources
from ibmd_cli.noise import Streams, noise_like


@torch.no_grad()
def sample_dbim(
    predictor: Denoiser, bridge: Bridge, batch: Sources, nfe: int, rng: Streams, eta: float = 1.0
) -> Tensor:
    """Translate sources with the teacher itself (DBIM's η-sampler).

    The first call is at t = T, where the state is x_T; then the state is drawn near T and descends a uniform grid of
    times to t_min. With one call the result is x̂_0(x_T, T), the conditional mean.

    Args:
        predictor: x̂_0(x_t, t, x_T, label=…).
        bridge: its process, in continuous time.
        batch: sources (B, C, H, W).
        nfe: number of calls of the predictor, ≥ 1.
        rng: random stream of all noise, or one for each image.
        eta: 0 deterministic after the first noise, 1 Markovian.

    Returns:
        (B, C, H, W) in [-1, 1].

    Source: arXiv:2405.15885, Eq. (13) and Algorithm 1.
    """
    x_T = batch.x_T
    ones = torch.ones(len(x_T), device=x_T.device)

    def predict(x: Tensor, t: float) -> Tensor:
        x_0 = predictor(x, t * ones, x_T, label=batch.label).clamp(-1, 1)
        return x_0 if batch.mask is None else batch.mask * x_0 + (1 - batch.mask) * x_T

    x_0 = predict(x_T, bridge.T)
    if nfe == 1:
        return x_0
    times = torch.linspace(bridge.T - 1e-3, bridge.t_min, nfe, dtype=torch.float32).tolist()
    x = bridge.sample(x_0, x_T, times[0] * ones, noise_like(x_T, rng))
    for i, (s, t) in enumerate(zip(times[:-1], times[1:], strict=True)):
        x_0 = predict(x, s)
        eps = noise_like(x_T, rng) if i < nfe - 2 else torch.zeros_like(x_T)  # the last step adds no noise
        x = _dbim_update(bridge, x, x_0, x_T, s * ones, t * ones, eta, eps)
    return x.clamp(-1, 1)


def _dbim_update(
    bridge: Bridge, x_s: Tensor, x_0: Tensor, x_T: Tensor, s: Tensor, t: Tensor, eta: float, eps: Tensor
) -> Tensor:
    """Step from time s down to t: x_t = k x_s + (b_t − k b_s) x̂_0 + (a_t − k a_s) x_T + ω ε."""
    a_s, b_s, c_s = bridge.coefficients(s)
    a_t, b_t, c_t = bridge.coefficients(t)
    (_, rho_s), (alpha_t, rho_t) = bridge.alpha_rho(s), bridge.alpha_rho(t)
    omega = eta * alpha_t * rho_t * (1 - rho_t**2 / rho_s**2).sqrt()
    k = (c_t**2 - omega**2).clamp(min=0).sqrt() / c_s
    terms = (k, x_s), (b_t - k * b_s, x_0), (a_t - k * a_s, x_T), (omega, eps)
    return sum((expand_to(c, x) * x for c, x in terms), start=torch.zeros_like(x_s))


def sample_teacher(
    teacher: Any,
    x_T: Tensor,
    *,
    sampler: str,
    nfe: int,
    noise: Any = None,
    mask: Tensor | None = None,
    label: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Interim: the η-sampler alone."""
    predict = getattr(teacher, "predict_x0", teacher)
    return sample_dbim(predict, teacher.bridge, Sources(x_T, label, mask), nfe, noise, **options)
