"""Times uniform in ℓ = log(b_t/c_t), the clock that all bridges share, in place of uniform in their own t.

Given x_T, x_t tells of x_0 what x_0 + σ ε does, with σ = c_t/b_t. A range of σ covers the noise at which single pixels
are decided (small σ) and that at which regions of n pixels get their colour (σ up to about √n); times uniform in t jump
over most of the latter, which lies close to T.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ibmd_cli.method.bridges import Bridge


@dataclass(frozen=True)
class LogTimes:
    """A density of times and a grid of times, both uniform in ℓ between two noise levels σ = c_t/b_t.

    Attributes:
        sigma_min: σ of the time nearest to the target; the bridge's own least one if that is larger.
        sigma_max: σ of the time nearest to T; that of T if it is smaller.
        at_T: share of draws that are exactly T, where a one-step student is called.
    """

    sigma_min: float = 0.02
    sigma_max: float = 200.0
    at_T: float = 0.125

    def __post_init__(self) -> None:
        """Refuse an empty range."""
        if not (0 < self.sigma_min < self.sigma_max and 0 <= self.at_T < 1):
            raise ValueError(
                f"σ from {self.sigma_min:g} to {self.sigma_max:g}, {self.at_T:g} at T: expected a rising range and a "
                "share below 1"
            )

    def time(self, bridge: Bridge, u: Tensor) -> Tensor:
        """Map `u` in [0, 1), (B,), to times, as `Bridge.time` does: u = 0 is T, u → 1 is the time of `sigma_min`."""
        low, high = self._range(bridge)
        v = (u.double() - self.at_T) / (1 - self.at_T)
        t = bridge.time_at(low + (high - low) * v.clamp(min=0))
        t = torch.where(v < 0, torch.full_like(t, bridge.T), t)
        return t.float() if t.is_floating_point() else t

    def grid(self, bridge: Bridge, n: int) -> Tensor:
        """Return `n` times that fall from `sigma_max` to `sigma_min`, float64, or whole numbers where steps are."""
        return bridge.time_at(torch.linspace(*self._range(bridge), n, dtype=torch.float64))

    def _range(self, bridge: Bridge) -> tuple[float, float]:
        """Return the least and the largest ℓ."""
        at_T, at_min = bridge.ell(torch.tensor([bridge.T, bridge.t_min], dtype=torch.float64)).tolist()
        return max(-math.log(self.sigma_max), at_T), min(-math.log(self.sigma_min), at_min)
