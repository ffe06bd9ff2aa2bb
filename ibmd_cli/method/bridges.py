"""Bridges: the known Gaussian processes q that join a target x_0 (t = 0) and a source x_T (t = T).

Without pinning, x_t = α_t x_0 + σ_t ε. With ρ_t = σ_t / α_t (so that SNR_t = 1/ρ_t²), pinning both ends gives

    q(x_t | x_0, x_T) = N(a_t x_T + b_t x_0, c_t² I)
    a_t = (α_t/α_T) ρ_t²/ρ_T²      b_t = α_t ρ̄_t²/ρ_T²      c_t = α_t ρ_t ρ̄_t/ρ_T      ρ̄_t² = ρ_T² − ρ_t²

so that a predictor which sees x_T works on x_0 with noise of c_t/b_t, whatever the bridge; ℓ_t = log(b_t/c_t) is the
clock that all of them share. For s < t, the posterior (the bridge is Markov, so x_T drops out)

    q(x_s | x_0, x_t) = N(α_s (1 − r) x_0 + (α_s/α_t) r x_t, α_s² ρ_s² (1 − r) I)      r = ρ_s²/ρ_t²

Times are in the units of the teacher: real numbers for VP, VE and DBIM, integer steps for I2SB. Coefficients are
computed in float64, because 1 − ρ_s²/ρ_t² cancels near the ends, and are cast once to the dtype of the images.

Sources: arXiv:2502.01362v2, Sec. 2 (IBMD); arXiv:2309.16948 (DDBM); arXiv:2405.15885 (DBIM);
arXiv:2302.05872 (I2SB). The two discrete schedules follow the published code, which differs from the papers in
its use of cumulative sums.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


def expand_to(v: Tensor, x: Tensor) -> Tensor:
    """Give `v` (B,) the shape (B, 1, …, 1), and the dtype and device of `x` (B, …), for broadcasting."""
    return v.to(x.dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1))


def float64_device(t: Tensor) -> torch.device:
    """Return where coefficients at times `t` are computed: on its device, or the CPU if that has no float64 (MPS)."""
    return torch.device("cpu") if t.device.type == "mps" else t.device


class Coefficients(NamedTuple):
    """x_t = a_t x_T + b_t x_0 + c_t ε; three float64 tensors (B,). `c_t` is a standard deviation."""

    a_t: Tensor
    b_t: Tensor
    c_t: Tensor


class Bridge(ABC):
    """A Gaussian bridge. Subclasses are small frozen dataclasses, so that they can be written to JSON.

    Attributes:
        kind: name in `config.json`.
        T: time of the source end, where sampling starts.
        t_min: time of the target end, where training and sampling stop (0 itself may be singular).
        whole_steps: whether its times are integer steps.
        noise_free: if true, q(x_t | x_0, x_T) and the posterior carry no noise (OT-ODE of I2SB, Sec. 3.3).
    """

    kind: ClassVar[str]
    whole_steps: ClassVar[bool] = False
    T: float
    t_min: float
    noise_free: bool = False

    @abstractmethod
    def alpha_rho(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return α_t and ρ_t = σ_t/α_t at times `t` (B,), as float64 (B,)."""

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        """Return a_t, b_t, c_t of q(x_t | x_0, x_T) at times `t` (B,)."""

    @abstractmethod
    def drift(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return f_t = d ln α_t/dt and g_t² = α_t² dρ_t²/dt at times `t` (B,), as float64 (B,).

        The process without pinning is dx = f_t x dt + g_t dw; both are per unit of `t`.
        """

    @abstractmethod
    def c_noise(self, t: Tensor) -> Tensor:
        """Return the number that stands for time `t` (B,) at the network's time embedding, float32 (B,)."""

    @abstractmethod
    def time_at(self, ell: Tensor) -> Tensor:
        """Return the times (B,) at which ℓ_t is `ell` (B,), or nearest to it: the inverse of `ell`.

        Float64, or whole numbers where steps are; −∞ is T.
        """

    def ell(self, t: Tensor) -> Tensor:
        """Return ℓ_t = log(b_t/c_t), the log signal-to-noise ratio of x_0 given x_T, at times `t` (B,), float64 (B,).

        It falls with t, to −∞ at T if x_T is reached exactly. A bridge without noise has none (+∞ everywhere).
        """
        _, b_t, c_t = self.coefficients(t)
        return (b_t / c_t).log()

    def time(self, u: Tensor) -> Tensor:
        """Map `u` in [0, 1), (B,), to times: u = 0 is T, u → 1 is t_min; uniform u is the teacher's own density."""
        return (self.T - (self.T - self.t_min) * u.double()).float()

    def sample(self, x_0: Tensor, x_T: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0, x_T), differentiable in `x_0`.

        Args:
            x_0: targets (B, C, H, W) in [-1, 1].
            x_T: sources, same shape.
            t: times (B,).
            eps: standard normal noise, same shape; not read by a noise-free bridge.

        Source: arXiv:2502.01362v2, Sec. 2.
        """
        a_t, b_t, c_t = (expand_to(c, x_0) for c in self.coefficients(t))
        return a_t * x_T + b_t * x_0 if self.noise_free else a_t * x_T + b_t * x_0 + c_t * eps

    def posterior(self, x_0: Tensor, x_t: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Draw x_s ~ q(x_s | x_0, x_t) for s < t, differentiable in `x_0` and `x_t`.

        Args:
            x_0: targets (B, C, H, W).
            x_t: the state at time `t`, same shape (x_T itself where t = T).
            s: times (B,), s < t.
            t: times (B,).
            eps: standard normal noise, same shape; not read by a noise-free bridge.

        Source: arXiv:2502.01362v2, App. B.1; arXiv:2302.05872, Eq. (4); η = 1 of arXiv:2405.15885.
        """
        alpha_s, rho_s = self.alpha_rho(s)
        alpha_t, rho_t = self.alpha_rho(t)
        r = rho_s**2 / rho_t**2
        mean = expand_to(alpha_s * (1 - r), x_0) * x_0 + expand_to(alpha_s / alpha_t * r, x_0) * x_t
        return mean if self.noise_free else mean + expand_to(alpha_s * rho_s * (1 - r).sqrt(), x_0) * eps

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, read back by `make_bridge`."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]


class _ContinuousBridge(Bridge):
    """VP and VE of DDBM: closed-form α_t, ρ_t and a time embedding of 1000 · ¼ ln t."""

    def coefficients(self, t: Tensor) -> Coefficients:
        alpha_t, rho_t = self.alpha_rho(t)
        alpha_T, rho_T = self.alpha_rho(torch.tensor([self.T], device=t.device))
        q = rho_t**2 / rho_T**2
        bar = (1 - q).clamp(min=0)
        return Coefficients(alpha_t / alpha_T * q, alpha_t * bar, alpha_t * rho_t * bar.sqrt())

    def c_noise(self, t: Tensor) -> Tensor:
        return 250.0 * torch.log(t.float() + 1e-44)

    def ell(self, t: Tensor) -> Tensor:
        rho_t, rho_T = self.alpha_rho(t)[1], self._rho_T(t.device)
        return 0.5 * (rho_t**-2 - rho_T**-2).clamp(min=0).log()  # b/c = ρ̄/(ρ ρ_T); b and c alone are 0 at T

    def time_at(self, ell: Tensor) -> Tensor:
        rho_T = self._rho_T(ell.device)
        return self._time_of(torch.rsqrt((2 * ell.to(rho_T)).exp() + rho_T**-2)).clamp(max=self.T)

    @abstractmethod
    def _time_of(self, rho: Tensor) -> Tensor:
        """Return the times at which ρ_t is `rho`, float64 (B,)."""

    def _rho_T(self, device: torch.device) -> Tensor:
        return self.alpha_rho(torch.tensor([self.T], device=device))[1]


@dataclass(frozen=True)
class VPBridge(_ContinuousBridge):
    """Variance preserving: B(t) = ½ beta_d t² + beta_min t, α_t = exp(−B/2), ρ_t² = exp(B) − 1.

    Source: arXiv:2309.16948, with the constants of the published checkpoints (beta_d = 2, not the usual 19.9).
    """

    kind: ClassVar[str] = "vp"
    beta_d: float = 2.0
    beta_min: float = 0.1
    T: float = 1.0
    t_min: float = 1e-4

    def alpha_rho(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(float64_device(t)).double()
        B_t = 0.5 * self.beta_d * t**2 + self.beta_min * t
        return torch.exp(-0.5 * B_t), torch.expm1(B_t).sqrt()

    def drift(self, t: Tensor) -> tuple[Tensor, Tensor]:
        beta_t = self.beta_min + self.beta_d * t.to(float64_device(t)).double()
        return -0.5 * beta_t, beta_t

    def _time_of(self, rho: Tensor) -> Tensor:
        B = torch.log1p(rho**2)
        return 2 * B / (self.beta_min + (self.beta_min**2 + 2 * self.beta_d * B).sqrt())


@dataclass(frozen=True)
class VEBridge(_ContinuousBridge):
    """Variance exploding: α_t = 1, ρ_t = t. Source: arXiv:2309.16948 (σ_max = 80, σ_min = 0.002)."""

    kind: ClassVar[str] = "ve"
    T: float = 80.0
    t_min: float = 0.002

    def alpha_rho(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(float64_device(t)).double()
        return torch.ones_like(t), t

    def drift(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(float64_device(t)).double()
        return torch.zeros_like(t), 2 * t

    def _time_of(self, rho: Tensor) -> Tensor:
        return rho


@dataclass(frozen=True)
class _Tables:
    """β_n, its two cumulative deviations (both sums include β_n) and the noise levels fed to the network."""

    betas: Tensor
    std_fwd: Tensor
    std_bwd: Tensor
    noise_levels: Tensor

    @staticmethod
    def make(beta_max: float, n_steps: int) -> "_Tables":
        # The lower end is the constant 1e-4, as published, whatever n_steps is; the peak of the mirrored ramp is
        # its middle, not beta_max / n_steps.
        # On the CPU even inside `with torch.device("meta")`.
        ends = 1e-4**0.5, (beta_max / n_steps) ** 0.5
        ramp = torch.linspace(*ends, n_steps, dtype=torch.float64, device="cpu") ** 2
        betas = torch.cat([ramp[: n_steps // 2], ramp[: n_steps // 2].flip(0)])
        return _Tables(
            betas=betas,
            std_fwd=betas.cumsum(0).sqrt(),
            std_bwd=betas.flip(0).cumsum(0).flip(0).sqrt(),
            noise_levels=torch.linspace(1e-4, 1.0, n_steps, dtype=torch.float32, device="cpu") * n_steps,
        )


@dataclass(frozen=True)
class _TabulatedBridge(Bridge):
    """What I2SB and DBIM share: the β table, α = 1 and ρ_t = std_fwd. Their a_t, b_t, c_t differ: see below."""

    beta_max: float = 1.0
    n_steps: int = 1000
    _tables: _Tables = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_tables", _Tables.make(self.beta_max, self.n_steps))

    @abstractmethod
    def index(self, t: Tensor) -> Tensor:
        """Return the row of the table that belongs to time `t`, int64 (B,)."""

    def _rows(self, t: Tensor) -> tuple[Tensor, Tensor]:
        n = self.index(t).cpu()
        return self._tables.std_fwd[n].to(float64_device(t)), self._tables.std_bwd[n].to(float64_device(t))

    def alpha_rho(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rho_t = self._rows(t)[0]
        return torch.ones_like(rho_t), rho_t

    def drift(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # The table is per step, and one unit of DBIM's time is all of its steps (of I2SB's time, one).
        steps = (self.n_steps - 1) / self.T
        g2_t = steps * self._tables.betas[self.index(t).cpu()].to(float64_device(t))
        return torch.zeros_like(g2_t), g2_t

    def c_noise(self, t: Tensor) -> Tensor:
        return self._tables.noise_levels[self.index(t).cpu()].to(t.device)

    def time_at(self, ell: Tensor) -> Tensor:
        if self.noise_free:
            raise ValueError("a bridge without noise has no ℓ = log(b/c)")
        rows = torch.arange(self.n_steps)
        table = -self.ell(self._time_of(rows))  # which rises
        middles = (table[1:] + table[:-1]) / 2
        return self._time_of(torch.searchsorted(middles, -ell.double().cpu()).to(ell.device))

    @abstractmethod
    def _time_of(self, row: Tensor) -> Tensor:
        """Return the times that belong to rows of the table, int64 (B,)."""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key != "_tables"}


@dataclass(frozen=True)
class I2SBBridge(_TabulatedBridge):
    """I2SB: integer steps n = 0 … n_steps − 1, weights over D_n = std_fwd² + std_bwd² (= total + β_n).

    The ends are not exact: at n = 0 a noise of deviation 0.01 remains, at n = 999 x_n = 0.9993 x_T + 0.0007 x_0 + ….

    Source: arXiv:2302.05872, Eq. (11), as in the published code.
    """

    kind: ClassVar[str] = "i2sb"
    whole_steps: ClassVar[bool] = True
    beta_max: float = 0.3
    noise_free: bool = False

    @property
    def T(self) -> float:  # type: ignore[override]
        return self.n_steps - 1

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return 0

    def index(self, t: Tensor) -> Tensor:
        return t.long()

    def _time_of(self, row: Tensor) -> Tensor:
        return row

    def time(self, u: Tensor) -> Tensor:
        return (self.n_steps - 1) - (u.double() * self.n_steps).long().clamp(max=self.n_steps - 1)

    def coefficients(self, t: Tensor) -> Coefficients:
        fwd, bwd = self._rows(t)
        D = fwd**2 + bwd**2
        c_t = torch.zeros_like(fwd) if self.noise_free else fwd * bwd / D.sqrt()
        return Coefficients(fwd**2 / D, bwd**2 / D, c_t)


@dataclass(frozen=True)
class DBIMBridge(_TabulatedBridge):
    """DBIM's "i2sb_cond": the same β table over real times in [0, 1], weights over S = std_fwd[last]².

    So a_t + b_t = 1 + β/S, and at t = T the state still holds noise of deviation 0.01. Not the bridge of I2SB.

    Source: arXiv:2405.15885, as in the published code.
    """

    kind: ClassVar[str] = "dbim"
    T: float = 1.0
    t_min: float = 1e-4

    def index(self, t: Tensor) -> Tensor:
        # float32, round half to even: what the published code does decides ties such as 499.5.
        return torch.round((self.n_steps - 1) * t.float()).long()

    def _time_of(self, row: Tensor) -> Tensor:
        return row.double() / (self.n_steps - 1)

    def coefficients(self, t: Tensor) -> Coefficients:
        fwd, bwd = self._rows(t)
        S = float(self._tables.std_fwd[-1]) ** 2
        return Coefficients(fwd**2 / S, bwd**2 / S, fwd * bwd / math.sqrt(S))


BRIDGES: dict[str, type[Bridge]] = {cls.kind: cls for cls in (VPBridge, VEBridge, I2SBBridge, DBIMBridge)}


def make_bridge(config: dict[str, Any]) -> Bridge:
    """Build a bridge from its JSON form (`Bridge.to_dict`)."""
    settings = dict(config)
    kind = settings.pop("kind")
    wrong = {key: value for key, value in settings.items() if not isinstance(value, int | float)}
    if wrong:
        raise TypeError(f"bridge {kind}: expected numbers, found {wrong}")
    return BRIDGES[kind](**settings)
