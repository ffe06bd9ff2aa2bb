"""Models: a predictor x̂_0 with its bridge, times and facts. A teacher samples; a student translates in N steps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibmd_cli.errors import UsageError
from ibmd_cli.files import sha256
from ibmd_cli.method.bridges import Bridge
from ibmd_cli.method.distillation import Setup, Sources, translate
from ibmd_cli.method.noise import Streams
from ibmd_cli.models.samplers import network_calls, sample_teacher
from ibmd_cli.networks.predictor import Predictor

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Model:
    """A predictor with what `config.json` says of it.

    Attributes:
        predictor: x̂_0 (teacher) or G_θ (student), in eval mode, float32.
        config: the content of `config.json`.
        weights: the file that the weights were loaded from, if any.
    """

    predictor: Predictor
    config: dict[str, Any]
    weights: Path | None = None

    @property
    def source_scale(self) -> int:
        """Side of a result in units of its source's: 4 for 4× super-resolution, whose sources come enlarged."""
        return int(self.config["image"].get("source_scale", 1))

    @property
    def image_size(self) -> int:
        """Height and width of the images that the model was trained on."""
        return int(self.config["image"]["size"])

    @property
    def name(self) -> str:
        """Short name, for tables and messages."""
        return str(self.config["name"])

    def digest(self) -> str:
        """Return the SHA-256 of the file that the weights were loaded from.

        Raises:
            ValueError: they were not loaded from a file.
        """
        if self.weights is None:
            raise ValueError(f"{self.name}: its weights come from no file")
        return sha256(self.weights)

    def to(self, device: torch.device | str) -> "Model":
        """Move the weights to `device` and return the model."""
        self.predictor.to(device)
        return self


class TeacherModel(Model):
    """A diffusion bridge, sampled in many steps."""

    kind: ClassVar[str] = "teacher"

    @property
    def bridge(self) -> Bridge:
        """The process q; `teacher.bridge.coefficients(t)` gives a_t, b_t, c_t."""
        return self.predictor.bridge

    @torch.no_grad()
    def predict_x0(self, x_t: Tensor, t: Tensor, x_T: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict the target, x̂_0(x_t, t, x_T).

        Args:
            x_t: states (B, C, H, W).
            t: times (B,) in the teacher's own units: reals for VP, VE and DBIM, integer steps for I2SB.
            x_T: sources (B, C, H, W); not read by an unconditional teacher.
            label: class indices (B,), for a class-conditional teacher.

        Returns:
            (B, C, H, W), not clamped.

        Raises:
            ValueError: a time is not one of the bridge's.
        """
        low, high = 0, self.bridge.T
        if bool(((t < low) | (t > high)).any()):
            raise ValueError(f"times {t.tolist()}: expected {low} … {high:g} for a bridge of kind {self.bridge.kind}")
        x_0: Tensor = self.predictor(x_t, t, x_T, label=label)
        return x_0

    def translate(
        self, batch: Sources, rng: Streams, nfe: int | None = None, sampler: str | None = None, **options: Any
    ) -> Tensor:
        """Translate sources (B, C, H, W) in [-1, 1]; returns the same shape, in [-1, 1].

        Args:
            batch: sources, with labels and mask where the teacher takes them.
            rng: random stream of all noise, or one for each image.
            nfe: network calls; None for what `config.json` says.
            sampler: see `samplers.SAMPLERS`; None for what `config.json` says, with its options.
            options: of the sampler.
        """
        sampler, nfe, options = self._sampling(nfe, sampler, options)
        x_0 = sample_teacher(
            self, batch.x_T, sampler=sampler, nfe=nfe, noise=rng, mask=batch.mask, label=batch.label, **options
        )
        return x_0.clamp(-1, 1)

    def network_calls(self, nfe: int | None = None, sampler: str | None = None, **options: Any) -> int:
        """Return how many network calls `translate` makes: Heun's come in groups, so it may not be `nfe`."""
        sampler, nfe, options = self._sampling(nfe, sampler, options)
        return network_calls(sampler, nfe, **options)

    def _sampling(self, nfe: int | None, sampler: str | None, options: dict[str, Any]) -> tuple[str, int, Any]:
        """Fill in what `config.json` says; its options are those of its own sampler."""
        settings = dict(self.config["sampling"])
        own, calls = settings.pop("sampler"), settings.pop("nfe")
        return sampler or own, nfe or calls, {**(settings if sampler in (None, own) else {}), **options}


class StudentModel(Model):
    """A distilled generator, G_θ(x_T, z)."""

    kind: ClassVar[str] = "student"

    @property
    def setup(self) -> Setup:
        """Times, noise and transition of inference."""
        return make_setup(self.predictor, self.config["sampling"])

    @property
    def nfe(self) -> int:
        """Network calls per image that it was distilled for."""
        return len(self.config["sampling"]["timesteps"])

    def setup_for(self, nfe: int) -> Setup:
        """Return the setup of inference with `nfe` network calls, at most those that it was distilled for.

        With fewer, it is called at times that it was trained at, evenly spaced among them, from T: of the calls
        0 … N − 1, those nearest to 0, N/nfe, 2N/nfe, ….

        Raises:
            UsageError: too few or too many calls.
        """
        if not 1 <= nfe <= self.nfe:
            raise UsageError(f"--nfe {nfe}: {self.name} was distilled for {self.nfe}: expected 1 … {self.nfe}")
        times = self.setup.timesteps
        return replace(self.setup, timesteps=tuple(times[round(k * self.nfe / nfe)] for k in range(nfe)))

    @torch.no_grad()
    def translate(self, batch: Sources, rng: Streams, nfe: int | None = None) -> Tensor:
        """Translate sources (B, C, H, W) in [-1, 1], in `nfe` calls (see `setup_for`); returns the same shape."""
        if not len(batch.x_T):
            return batch.x_T.clone()
        *_, x_0 = translate(self.predictor, self.setup_for(nfe or self.nfe), batch, rng)
        return x_0.clamp(-1, 1)


def student_times(bridge: Bridge, nfe: int, timesteps: Sequence[float] = ()) -> list[float]:
    """Return T = t_N > … > t_1, at which a student of `nfe` steps is called.

    Args:
        bridge: whose T and units they have.
        nfe: N.
        timesteps: these times, after a check; () for evenly spaced ones, without t_min.

    Raises:
        UsageError: times that do not fall from T, or that the bridge does not have.
    """
    if not timesteps:
        return bridge.time(torch.arange(nfe, dtype=torch.float64) / nfe).tolist()
    times, whole = list(timesteps), bridge.whole_steps
    falls = all(s < t for t, s in pairwise(times))
    if times[0] != bridge.T or times[-1] <= bridge.t_min or not falls or (whole and any(t % 1 for t in times)):
        raise UsageError(
            f"--timesteps {', '.join(f'{t:g}' for t in times)}: expected {'whole numbers' if whole else 'times'} that "
            f"fall from {bridge.T:g} and stay above {bridge.t_min:g}"
        )
    return times


def make_setup(
    predictor: Predictor,
    sampling: dict[str, Any],
    t_power: float = 1.0,
    t_even: bool = False,
    weight_power: float = 2.0,
) -> Setup:
    """Build a `Setup` from a predictor and the section `sampling` of a student's configuration."""
    noise = sampling["noise"]
    return Setup(
        bridge=predictor.bridge,
        weight=partial(predictor.weight, power=weight_power),
        timesteps=tuple(sampling["timesteps"]),
        noise_shape=(noise["channels"], noise["grid"], noise["grid"]) if noise["channels"] else None,
        t_power=t_power,
        t_even=t_even,
        rollout=sampling["rollout"],
        transition=sampling["transition"],
    )
