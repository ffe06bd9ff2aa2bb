"""The teachers' own samplers: DDBM's hybrid Heun, DBIM, and I2SB's posterior sampler, as their authors run them.

Each walks down a grid of times from T, where the state is the source x_T, and calls the teacher at each:
D = x̂_0(x_s, s, x_T). `SAMPLERS` lists them with their options; `sample_teacher` runs one.

Coefficients are Python floats (float64): all images of a batch share their times. The state is float64 for DDBM and
DBIM, as in DBIM's code (1/c_t² amplifies rounding near both ends), and float32 for I2SB; the teacher sees it in the
dtype of the x_T that was given.

Sources: arXiv:2309.16948 (DDBM); arXiv:2405.15885 (DBIM); arXiv:2302.05872 (I2SB); with the grids, clamps and counts
of the published code.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibmd_cli.errors import UsageError
from ibmd_cli.method.bridges import Bridge, I2SBBridge, float64_device
from ibmd_cli.method.log_times import LogTimes
from ibmd_cli.method.noise import Noise, noise_draws

Denoise = Callable[[Tensor, float, Tensor], Tensor]
"""denoise(x_t, t, x_T) → x̂_0: one call of the teacher at one time, in and out in the dtype of the state."""


@torch.no_grad()
def sample_teacher(
    teacher: Any,
    x_T: Tensor,
    *,
    sampler: str,
    nfe: int,
    noise: Noise = None,
    mask: Tensor | None = None,
    label: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Translate sources with the teacher itself.

    Args:
        teacher: has a `bridge`, and `predict_x0(x_t, t, x_T, label=…)` or is itself called like that. `t` is (B,), of
            the dtype in `SAMPLERS`.
        x_T: sources (B, …), of any shape; images in [-1, 1].
        sampler: a name in `SAMPLERS`.
        nfe: network calls, counted as published; see `network_calls` for those that are really made.
        noise: a random stream, one per image, or the draws themselves: see `noise_draws`. Draws are used in this
            order: "ddbm", one per interval; "dbim", the first state, then one per step but the last; "i2sb", the hole
            if there is a mask, then in each step its own (not in the last) and, with a mask, the known pixels'.
        mask: broadcasts against x_T, 1 = to be generated, 0 = kept from x_T. "ddbm" takes none, as published.
        label: class indices (B,), for a class-conditional teacher.
        options: of the sampler, see `SAMPLERS`.

    Returns:
        (B, …), in the dtype of `x_T`; in [-1, 1], but not clamped by "i2sb".

    Raises:
        UsageError: the sampler or an option is unknown, or does not fit the teacher.
        ValueError: the given noise has too few tensors, or one of another shape.
    """
    bridge: Bridge | None = getattr(teacher, "bridge", None)
    if bridge is None:
        raise UsageError(f"a teacher needs a bridge: give the {type(teacher).__name__} an attribute `bridge`")
    settings, chosen = check_sampler(sampler, nfe, options, bridge), SAMPLERS[sampler]
    predict = getattr(teacher, "predict_x0", teacher)
    state, time = chosen.state, chosen.time
    if float64_device(x_T) != x_T.device:
        state, time = (torch.float32 if dtype == torch.float64 else dtype for dtype in (state, time))

    def denoise(x_t: Tensor, t: float, source: Tensor) -> Tensor:
        times = torch.full((len(x_t),), t, dtype=time, device=x_t.device)
        known = {} if label is None else {"label": label}
        x_0: Tensor = predict(x_t.to(x_T.dtype), times, source.to(x_T.dtype), **known)
        return x_0.to(state)

    if mask is not None:
        mask = mask.to(x_T.device, state)
    return chosen.sample(denoise, bridge, x_T.to(state), mask, nfe, noise, **settings).to(x_T.dtype)


def network_calls(sampler: str, nfe: int, **options: Any) -> int:
    """Return how often the teacher is called when `nfe` calls are asked for: Heun's come in groups.

    Raises:
        UsageError: as `sample_teacher`.
    """
    return SAMPLERS[sampler].calls(nfe, check_sampler(sampler, nfe, options))


# ------------------------------------------------------------------------------------------------------- DDBM


def _sample_ddbm(
    denoise: Denoise,
    bridge: Bridge,
    x_T: Tensor,
    mask: Tensor | None,
    nfe: int,
    noise: Noise,
    *,
    churn: float,
    guidance: float,
    rho: float,
) -> Tensor:
    """Hybrid Heun: a stochastic Euler step over the first part of each interval, Heun on the ODE over the rest.

        SDE: dx = (f x − g² (s − w h)) dt + g dw       ODE: dx = (f x − g² (½ s − w h)) dt
        s = ∇ log q(x_t | x_T) = (a_t x_T + b_t D − x)/c_t²       h = ∇ log q(x_T | x_t) = (a_t x_T − x ρ_t²/ρ_T²)/c_t²

    DDBM's code leaves h out of the stochastic step for VE alone; here, as in DBIM's, it is in every step.

    Source: arXiv:2309.16948 (hybrid sampler); guidance w and the grid as in its code.
    """
    if mask is not None:
        raise UsageError("sampler ddbm: takes no mask (its authors' ignores it): use dbim")
    rho_T = _at(bridge.alpha_rho, bridge.T)[1]

    def drift(x: Tensor, t: float, share: float) -> Tensor:
        a, b, c = _at(bridge.coefficients, t)
        f, g2 = _at(bridge.drift, t)
        rho_t = _at(bridge.alpha_rho, t)[1]
        x_0 = denoise(x, t, x_T).clamp(-1, 1)
        score = (a * x_T + b * x_0 - x) / c**2
        h = (a * x_T - (rho_t / rho_T) ** 2 * x) / c**2
        return f * x - g2 * (share * score - guidance * h)

    n = _ddbm_intervals(nfe, churn)
    eps = noise_draws(noise, x_T, n if churn else 0)
    x = x_T
    for start, t in pairwise(_ddbm_times(bridge, n, rho)):
        s = start + churn * (t - start)
        if churn:
            g2 = _at(bridge.drift, start)[1]
            x = x + (s - start) * drift(x, start, 1.0) + math.sqrt(g2 * (start - s)) * next(eps)
        d = drift(x, s, 0.5)
        euler = x + (t - s) * d
        x = x + (t - s) * (d + drift(euler, t, 0.5)) / 2 if t > 0 else euler
    return x.clamp(-1, 1)


def _ddbm_times(bridge: Bridge, n: int, rho: float) -> list[float]:
    """Return the ends of `n` intervals, from just below T, where the drift is singular, over t_min to 0."""
    first, last = (bridge.T - 1e-4) ** (1 / rho), bridge.t_min ** (1 / rho)
    return [*(torch.linspace(first, last, n, dtype=torch.float64) ** rho).tolist(), 0.0]


def _ddbm_intervals(nfe: int, churn: float) -> int:
    return max(1, round((nfe + 1) / (3 if churn else 2)))


def _ddbm_calls(nfe: int, settings: Mapping[str, Any]) -> int:
    """Return the calls: 3 an interval with churn, 2 without; the last one, which ends at 0, has one less."""
    churn = settings["churn"]
    return (3 if churn else 2) * _ddbm_intervals(nfe, churn) - 1


# ------------------------------------------------------------------------------------------------------- DBIM


def _sample_dbim(
    denoise: Denoise,
    bridge: Bridge,
    x_T: Tensor,
    mask: Tensor | None,
    nfe: int,
    noise: Noise,
    *,
    eta: float,
    order: int,
    **grid: float,
) -> Tensor:
    """DBIM: draw a state near T from x̂_0(x_T, T), then step down a grid of times, uniform in t or in ℓ, to t_min.

        x_t = k x_s + (a_t − k a_s) x_T + (b_t − k b_s) D + ω ε
        k = √(c_t² − ω²)/c_s       ω = η α_t ρ_t √(1 − ρ_t²/ρ_s²)

    Orders 2 and 3 take η = 0 and add, to all steps but the first and last, what the earlier D tell of its slope.
    With one call the result is x̂_0(x_T, T), the conditional mean.

    Source: arXiv:2405.15885, Eq. (13), Algorithm 1; orders 2 and 3 as in its code.
    """

    def predict(x: Tensor, t: float) -> Tensor:
        x_0 = denoise(x, t, x_T).clamp(-1, 1)
        return x_0 if mask is None else mask * x_0 + (1 - mask) * x_T

    random = eta > 0 and order == 1
    eps = noise_draws(noise, x_T, nfe - 1 if random else min(nfe - 1, 1))
    x_0 = predict(x_T, bridge.T)
    if nfe == 1:
        return x_0
    times = torch.linspace(bridge.T - 1e-3, bridge.t_min, nfe, dtype=torch.float32).tolist()
    if log_times := _log_times(**grid):
        times[:-1] = log_times.grid(bridge, nfe - 1).float().tolist()
    a_s, b_s, c_s = _at(bridge.coefficients, times[0])
    x = a_s * x_T + b_s * x_0 + c_s * next(eps)
    past: list[tuple[float, Tensor]] = []  # λ = ln(b/c) and D of the steps so far
    for s, t in pairwise(times):
        x_0 = predict(x, s)
        a_s, b_s, c_s = _at(bridge.coefficients, s)
        a_t, b_t, c_t = _at(bridge.coefficients, t)
        (_, rho_s), (alpha_t, rho_t) = _at(bridge.alpha_rho, s), _at(bridge.alpha_rho, t)
        omega = eta * alpha_t * rho_t * math.sqrt(1 - rho_t**2 / rho_s**2) if random else 0.0
        k = math.sqrt(max(c_t**2 - omega**2, 0)) / c_s
        x = k * x + (a_t - k * a_s) * x_T + (b_t - k * b_s) * x_0
        if t == times[-1]:
            break  # the last step is of first order and adds no noise
        if random:
            x = x + omega * next(eps)
        lambda_s = math.log(b_s / c_s)
        if past and past[-1][0] == lambda_s:
            past.pop()  # two times on one row of a table: no slope between them
        past.append((lambda_s, x_0))
        if order > 1 and len(past) > 1:
            x = x + b_t * _higher_order(past[-order:], math.log(b_t / c_t))
    return x.clamp(-1, 1)


def _higher_order(past: list[tuple[float, Tensor]], lambda_t: float) -> Tensor:
    """(e^−h + h − 1) D' + (h²/2 − h + 1 − e^−h) D'', with D', D'' at λ_s from the last two or three D."""
    (lambda_u, D_u), (lambda_s, D) = past[-2:]
    h, h_s = lambda_t - lambda_s, lambda_s - lambda_u
    slope = (D - D_u) / h_s
    if len(past) == 2:
        return (math.expm1(-h) + h) * slope
    lambda_v, D_v = past[0]
    h_u = lambda_u - lambda_v
    bend = 2 * (slope - (D_u - D_v) / h_u) / (h_s + h_u)
    return (math.expm1(-h) + h) * (slope + h_s / 2 * bend) + (h**2 / 2 - h - math.expm1(-h)) * bend


# ------------------------------------------------------------------------------------------------------- I2SB


def _sample_i2sb(
    denoise: Denoise,
    bridge: I2SBBridge,
    x_T: Tensor,
    mask: Tensor | None,
    nfe: int,
    noise: Noise,
    *,
    clip: bool,
    **grid: float,
) -> Tensor:
    """Draw from the posterior q(x_s | D, x_t) at steps evenly spaced in t or in ℓ, from the last to step 0.

    With a mask the hole of x_T is filled with noise, and after each step the known pixels are set to what the bridge
    has there. Step 0 still holds a little of x_t: the result is not D itself.

    Source: arXiv:2302.05872, Algorithm 2, Eq. (4).
    """
    if nfe >= bridge.n_steps:
        raise UsageError(f"nfe {nfe}: expected 1 to {bridge.n_steps - 1} for this teacher of {bridge.n_steps} steps")
    # A running sum of floats, then rounded half to even: as published, which decides ties such as 499.5.
    stride = (bridge.n_steps - 1) / nfe
    steps = [round(u) for u in accumulate(repeat(stride, nfe), initial=0.0)][::-1]
    if log_times := _log_times(**grid):
        steps = _distinct([bridge.n_steps - 1, *log_times.grid(bridge, nfe - 1).tolist(), 0])
    random, inpaint = not bridge.noise_free, mask is not None
    # The hole, the steps but the last, the known pixels.
    eps = noise_draws(noise, x_T, inpaint + random * (nfe - 1 + inpaint * nfe))
    if mask is not None:
        x_T = mask * next(eps) + (1 - mask) * x_T
    x = x_T
    for t, s in pairwise(steps):
        x_0 = denoise(x, t, x_T)
        if clip:
            x_0 = x_0.clamp(-1, 1)
        fresh = next(eps) if random and s > 0 else torch.zeros_like(x)
        x = bridge.posterior(x_0, x, torch.tensor([s]), torch.tensor([t]), fresh)
        if mask is not None:
            known = x_T + _at(bridge.coefficients, s)[2] * next(eps) if random else x_T
            x = mask * x + (1 - mask) * known
    return x


# ------------------------------------------------------------------------------------------------------- grid


def _log_times(log_grid: float, sigma_min: float, sigma_max: float) -> LogTimes | None:
    """Return the times of the options `LOG_GRID`, None for the published grid."""
    if not log_grid:
        return None
    if sigma_min >= sigma_max:
        raise UsageError(f"sigma_min {sigma_min:g}: expected less than sigma_max, {sigma_max:g}")
    return LogTimes(sigma_min, sigma_max)


def _distinct(steps: list[int]) -> list[int]:
    """Move steps that do not fall apart, as little as that needs, between the first and the last, which is 0."""
    n = torch.arange(len(steps))
    rows = (torch.tensor(steps[::-1]) - n).cummax(0).values.clamp(max=steps[0] - len(steps) + 1) + n
    return rows.tolist()[::-1]


# ------------------------------------------------------------------------------------------------------ table


class SamplerOption(NamedTuple):
    """A number (or a switch, 0 or 1) that a sampler takes."""

    default: float
    low: float
    high: float
    meaning: str


@dataclass(frozen=True)
class Sampler:
    """A row of `SAMPLERS`.

    Attributes:
        meaning: one line.
        sample: sample(denoise, bridge, x_T, mask, nfe, noise, **options) → x_0.
        whole_steps: whether it is for bridges whose times are integer steps, or for the others.
        state: dtype of the state (float32 for float64 where the device has none).
        time: dtype of the times that the teacher is given (likewise). float64 for "ddbm": in float32 its first time
            would be as coarse as 4 % of its distance from T = 80 (VE).
        calls: calls(nfe, options): network calls that are really made.
        options: by name.
    """

    meaning: str
    sample: Callable[..., Tensor]
    whole_steps: bool
    state: torch.dtype
    time: torch.dtype
    calls: Callable[[int, Mapping[str, Any]], int]
    options: dict[str, SamplerOption]


LOG_GRID = {
    "log_grid": SamplerOption(False, 0, 1, "times uniform in ℓ = log(b/c), in place of the published grid"),
    "sigma_min": SamplerOption(0.02, 1e-4, 1e4, "with log_grid: noise c/b of the time nearest to the target"),
    "sigma_max": SamplerOption(200.0, 1e-4, 1e4, "with log_grid: noise c/b of the time nearest to T"),
}
SAMPLERS = {
    "ddbm": Sampler(
        "DDBM's hybrid Heun; 3n − 1 calls for n intervals (2n − 1 without churn)",
        _sample_ddbm,
        False,
        torch.float64,
        torch.float64,
        _ddbm_calls,
        {
            "churn": SamplerOption(0.33, 0, 0.999, "share of each interval that is walked with noise"),
            "guidance": SamplerOption(1.0, 0, 100, "w, weight of the pull towards x_T"),
            "rho": SamplerOption(7.0, 1, 100, "how densely times lie near 0"),
        },
    ),
    "dbim": Sampler(
        "DBIM",
        _sample_dbim,
        False,
        torch.float64,
        torch.float32,
        lambda nfe, _: nfe,
        {
            "eta": SamplerOption(1.0, 0, 1, "η: 1 Markovian (as sample.py), 0 deterministic but for the first draw"),
            "order": SamplerOption(1, 1, 3, "1: the η-sampler; 2 or 3: multistep with η = 0, whatever eta says"),
            **LOG_GRID,
        },
    ),
    "i2sb": Sampler(
        "I2SB's posterior sampler",
        _sample_i2sb,
        True,
        torch.float32,
        torch.int64,
        lambda nfe, _: nfe,
        {"clip": SamplerOption(False, 0, 1, "clamp each x̂_0 to [-1, 1]"), **LOG_GRID},
    ),
}


def check_sampler(sampler: str, nfe: int, options: Mapping[str, Any], bridge: Bridge | None = None) -> dict[str, Any]:
    """Return all options of a sampler, after a check that they, and it, fit the bridge.

    Raises:
        UsageError: as `sample_teacher`.
    """
    if sampler not in SAMPLERS:
        raise UsageError(f"sampler {sampler!r}: expected {', '.join(SAMPLERS)}")
    if nfe < 1:
        raise UsageError(f"nfe {nfe}: expected at least 1")
    known = SAMPLERS[sampler].options
    for key, value in options.items():
        if key not in known:
            raise UsageError(f"sampler {sampler} has no option {key!r}: expected {', '.join(known)}")
        default, low, high, _ = known[key]
        number = int if isinstance(default, int) else (int, float)
        if not isinstance(value, number) or not low <= value <= high:
            whole = "a whole number" if number is int else "a number"
            raise UsageError(f"sampler {sampler}: {key} is {value!r}, expected {whole} from {low:g} to {high:g}")
    if bridge is not None and bridge.whole_steps != SAMPLERS[sampler].whole_steps:
        fitting = ", ".join(other for other, row in SAMPLERS.items() if row.whole_steps == bridge.whole_steps)
        raise UsageError(f"sampler {sampler}: not defined for a teacher of kind {bridge.kind}: expected {fitting}")
    return {key: options.get(key, option.default) for key, option in known.items()}


def _at(f: Callable[[Tensor], tuple[Tensor, ...]], t: float) -> list[float]:
    """Return a bridge's float64 quantities at one time."""
    return [float(v) for v in f(torch.tensor([t], dtype=torch.float64))]
