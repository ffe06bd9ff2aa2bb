"""The predictor x̂_0 of a clean target: a network F with its preconditioning, and the weight λ(t) of its loss.

The preconditioning (arXiv:2206.00364, Eq. (7); arXiv:2309.16948, Eq. (12)) makes the predictor of the target:

    x̂_0(x_t, t[, x_T][, z][, y]) = c_skip(t) x_t + c_out(t) F(c_in(t) x_t ⊕ x_T ⊕ z, c_noise(t), y)

⊕ joins channels. x_T is given to conditional predictors only and is not scaled; z is the noise of a student.
Teacher, bridge model and student are all a `Predictor`; the student alone has noise channels.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibmd_cli.method.bridges import Bridge, expand_to, make_bridge
from ibmd_cli.method.noise import randn, stream
from ibmd_cli.networks.unet import UNet, UNetConfig

MOST_ELL = 8.0
"""|ℓ| beyond which the time embedding tells no difference; T, where it is infinite, is there."""
LATER = {"time": "own", "max_weight": 0.0, "middle_attention": True}
"""Settings that are not written at these defaults, so that a configuration from before them stays equal to itself."""


@dataclass(frozen=True)
class Preconditioning:
    """c_skip, c_in, c_out of DDBM from the second moments of the data, or of I2SB, which has none; and λ(t).

    With moments (DDBM, DBIM's VP models), for A_t = a² mT + b² m0 + 2ab m0T + c²:
        c_in = A^(−½)    c_skip = (b m0 + a m0T)/A    c_out² = (a² (m0 mT − m0T²) + c² m0)/A
    Without (I2SB, DBIM's inpainting model): c_in = c_skip = 1, c_out = −ρ_t, so that F predicts (x_t − x_0)/ρ_t.
    λ(t) = 1/c_out². F itself is x̂_0, or x̂_0 − x_T, with "x0" and "residual": c_in and λ are DDBM's, but c_out = 1.

    Attributes:
        kind: "ddbm", "i2sb", "x0" (which patches of 4 and more need: F would have to carry their noise) or "residual".
        m0: E x_0² (0.25 in the published models, which call its root sigma_data).
        mT: E x_T².
        m0T: E x_0 x_T.
        time: what the network is told of t: "own", the bridge's number, or "log", −250 ℓ_t (at small t DDBM's number).
        max_weight: bound of λ(t); 0: none.

    Source: arXiv:2309.16948, Eq. (12); arXiv:2302.05872, Eq. (12).
    """

    kind: str = "ddbm"
    m0: float = 0.25
    mT: float = 0.25
    m0T: float = 0.0
    time: str = "own"
    max_weight: float = 0.0

    def __post_init__(self) -> None:
        """Refuse an unknown kind."""
        for name, known in (("kind", ("ddbm", "i2sb", "x0", "residual")), ("time", ("own", "log"))):
            if getattr(self, name) not in known:
                raise ValueError(f"preconditioning.{name} {getattr(self, name)!r}: expected {' or '.join(known)}")

    def __call__(self, bridge: Bridge, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_skip (of x_T with "residual"), c_in, c_out at times `t` (B,), float64 (B,)."""
        c_skip, c_in, c_out = self._linear(bridge, t)
        if self.kind in ("x0", "residual"):
            return torch.full_like(c_in, self.kind == "residual"), c_in, torch.ones_like(c_in)
        return c_skip, c_in, c_out

    def weight(self, bridge: Bridge, t: Tensor, power: float) -> Tensor:
        """Return λ(t)^(power/2) at times `t` (B,), float64 (B,)."""
        c_out = self._linear(bridge, t)[2].abs()
        return (c_out.clamp(min=self.max_weight**-0.5) if self.max_weight else c_out) ** -power

    def c_noise(self, bridge: Bridge, t: Tensor) -> Tensor:
        """Return the number that stands for time `t` (B,) at the network's time embedding, float32 (B,)."""
        if self.time == "own":
            return bridge.c_noise(t)
        return -250.0 * bridge.ell(t).clamp(-MOST_ELL, MOST_ELL).float()

    def _linear(self, bridge: Bridge, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_skip, c_in, c_out of DDBM or I2SB: of the best linear guess, whose error c_out is."""
        if self.kind == "i2sb":
            rho_t = bridge.alpha_rho(t)[1]
            return torch.ones_like(rho_t), torch.ones_like(rho_t), -rho_t
        a, b, c = bridge.coefficients(t)
        A = a**2 * self.mT + b**2 * self.m0 + 2 * a * b * self.m0T + c**2
        c_out = ((a**2 * (self.m0 * self.mT - self.m0T**2) + c**2 * self.m0) / A).sqrt()
        return (b * self.m0 + a * self.m0T) / A, A.rsqrt(), c_out


class Predictor(nn.Module):
    """x̂_0(x_t, t[, x_T][, z][, y]): the predictor of the target that teacher, bridge model and student share.

    Args:
        config: shape of the network; its `in_channels` count x_t, x_T (if `conditional`) and z.
        bridge: the process q.
        preconditioning: c_skip, c_in, c_out.
        conditional: whether the network sees x_T.
        noise_channels: channels of z (0 for a teacher or bridge model).
    """

    def __init__(
        self,
        config: UNetConfig,
        bridge: Bridge,
        preconditioning: Preconditioning,
        conditional: bool,
        noise_channels: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = UNet(config)
        self.bridge = bridge
        self.preconditioning = preconditioning
        self.conditional = conditional
        self.noise_channels = noise_channels

    def forward(
        self, x_t: Tensor, t: Tensor, x_T: Tensor, z: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        """Predict the target.

        Args:
            x_t: states (B, C, H, W).
            t: times (B,), in the bridge's units.
            x_T: sources (B, C, H, W); not read by an unconditional predictor.
            z: noise (B, noise_channels, h, w), for a student with noise; enlarged to (H, W) by repetition.
            label: class indices (B,), for a class-conditional one.

        Returns:
            x̂_0 (B, C, H, W), in the dtype of `x_t`, not clamped.
        """
        c_skip, c_in, c_out = (expand_to(c, x_t) for c in self.preconditioning(self.bridge, t))
        # States may be float64, as DBIM's are; the network then computes in the dtype of its weights.
        dtype = next(self.backbone.parameters()).dtype if x_t.dtype == torch.float64 else x_t.dtype
        x = torch.cat([c_in * x_t, x_T], dim=1) if self.conditional else c_in * x_t
        if self.noise_channels:
            if z is None:
                raise ValueError(f"this student needs noise z of {self.noise_channels} channels")
            z = F.interpolate(z.to(dtype), x_t.shape[-2:], mode="nearest").contiguous(memory_format=torch.channels_last)
        else:
            z = None
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        output: Tensor = self.backbone(x, self.preconditioning.c_noise(self.bridge, t), label, z)
        F_t = output.to(x_t.dtype)
        return c_skip * (x_T if self.preconditioning.kind == "residual" else x_t) + c_out * F_t

    def weight(self, t: Tensor, power: float = 2.0) -> Tensor:
        """Return λ(t)^(power/2), c_out(t)^−power of DDBM or I2SB, float64 (B,); 2 is the teachers' own weighting."""
        return self.preconditioning.weight(self.bridge, t, power)

    def widen(self, noise_channels: int, init: float = 0.0, rng: torch.Generator | None = None) -> "Predictor":
        """Return a copy that also takes z.

        Args:
            noise_channels: channels of z.
            init: deviation of the new weights. 0, as in the paper: the copy computes what this predictor does, for
                any z.
            rng: random stream of the new weights.

        Source: arXiv:2502.01362v2, App. B.
        """
        settings = self.to_dict()
        settings["network"]["in_channels"] += noise_channels
        settings["noise_channels"] = self.noise_channels + noise_channels
        wide = make_predictor(settings)
        state = self.state_dict()
        name = "backbone.input_blocks.0.0.weight"
        c_out, _, *kernel = state[name].shape
        new = init * randn((c_out, noise_channels * self.backbone.config.patch_size**2, *kernel), rng or stream(0))
        state[name] = torch.cat([state[name], new.to(state[name])], dim=1)
        wide.load_state_dict(state)
        return wide.train(self.training)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, read back by `make_predictor`."""
        return {
            "network": _settings(self.backbone.config),
            "bridge": self.bridge.to_dict(),
            "preconditioning": _settings(self.preconditioning),
            "conditional": self.conditional,
            "noise_channels": self.noise_channels,
        }


def make_predictor(config: dict[str, Any]) -> Predictor:
    """Build a predictor (with fresh weights) from its JSON form (`Predictor.to_dict`)."""
    network: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["network"].items()}
    model = Predictor(
        UNetConfig(**network),
        make_bridge(config["bridge"]),
        Preconditioning(**config["preconditioning"]),
        conditional=config["conditional"],
        noise_channels=config["noise_channels"],
    )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _settings(record: UNetConfig | Preconditioning) -> dict[str, Any]:
    return {key: v for key, v in asdict(record).items() if key not in LATER or v != LATER[key]}
