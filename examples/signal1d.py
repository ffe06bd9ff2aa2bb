"""Distil a teacher of your own, for data that are not images: one-dimensional signals.

Any `nn.Module` x̂_0(x_t, t, x_T) with a bridge is a teacher. This one needs no training: signals are draws of a Gaussian
process, sources are their noisy averages over blocks, and then x̂_0 = E[x_0 | x_t, x_T] is known in closed form. So is
what the student must learn, p(x_0 | x_T): the script prints how far its mean and covariance are from it.

    python examples/signal1d.py
"""

import argparse
import copy

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ibmd_cli.method.bridges import VPBridge, expand_to
from ibmd_cli.method.distillation import Iterations, Setup, Sources, ibmd, translate
from ibmd_cli.method.noise import randn, stream
from ibmd_cli.models.samplers import sample_teacher
from ibmd_cli.training.optimise import Player, Schedule

LENGTH, BLOCK, SPREAD = 32, 8, 0.05


class Signals:
    """Signals (B, 1, 32): x_0 ~ N(0, K), smooth; x_T = A x_0 + noise, its averages over blocks of 8, repeated.

    Their deviation is 0.22, so that the samplers' clamp to [-1, 1] hardly ever acts.
    """

    def __init__(self) -> None:
        i = torch.arange(LENGTH, dtype=torch.float64)
        self.K = 0.05 * torch.exp(-0.5 * ((i[:, None] - i) / 3) ** 2) + 1e-4 * torch.eye(LENGTH, dtype=torch.float64)
        self.A = torch.block_diag(*[torch.full((BLOCK, BLOCK), 1 / BLOCK, dtype=torch.float64)] * (LENGTH // BLOCK))

    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Targets and sources."""
        x_0 = randn((count, 1, LENGTH), rng).double() @ torch.linalg.cholesky(self.K).mT
        return x_0.float(), (x_0 @ self.A.mT).float() + SPREAD * randn(x_0.shape, rng)

    def posterior(self, x_T: Tensor, precision: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x_0 given x_T and a further observation: its precision (B,), and that times itself."""
        eye = torch.eye(LENGTH, dtype=torch.float64)
        P = torch.linalg.inv(self.K) + self.A.mT @ self.A / SPREAD**2 + precision[:, None, None] * eye
        covariance = torch.linalg.inv(P)
        return (x_T.double() @ self.A / SPREAD**2 + pull.double()) @ covariance, covariance


class Teacher(nn.Module):
    """x̂_0(x_t, t, x_T) = E[x_0 | x_t, x_T], exactly."""

    def __init__(self, signals: Signals) -> None:
        super().__init__()
        self.signals, self.bridge = signals, VPBridge()

    def forward(self, x_t: Tensor, t: Tensor, x_T: Tensor, label: Tensor | None = None) -> Tensor:
        a_t, b_t, c_t = (c.clamp(min=1e-6) for c in self.bridge.coefficients(t))
        pull = expand_to(b_t / c_t**2, x_t.double()) * (x_t - expand_to(a_t, x_t.double()) * x_T)
        return self.signals.posterior(x_T, b_t**2 / c_t**2, pull)[0].to(x_t.dtype)


class Corrected(nn.Module):
    """The teacher plus a small network that starts at zero: the bridge model, and with noise z the student."""

    def __init__(self, teacher: Teacher, noise: bool, width: int = 256) -> None:
        super().__init__()
        self.teacher = teacher
        self.net = nn.Sequential(
            nn.Linear((3 if noise else 2) * LENGTH + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, LENGTH),
        )  # fmt: skip
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(
        self, x_t: Tensor, t: Tensor, x_T: Tensor, z: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        given = [x_t.flatten(1), x_T.flatten(1), t[:, None].to(x_t), *([] if z is None else [z.flatten(1)])]
        return self.teacher(x_t, t, x_T) + self.net(torch.cat(given, 1)).reshape(x_t.shape)


def report(name: str, draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Compare draws (m, 1, 32) for one source with p(x_0 | x_T)."""
    x = draws.flatten(1).double()
    bias = float((x.mean(0) - mean.flatten()).norm() / mean.norm())
    spread = float((x.T.cov() - covariance).norm() / covariance.norm())
    print(f"{name:24} mean differs by {bias:6.1%}   covariance by {spread:6.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="student updates")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    signals = Signals()
    teacher = Teacher(signals)
    bridge_model, student = Corrected(teacher, noise=False), Corrected(copy.deepcopy(teacher), noise=True)
    setup = Setup(teacher.bridge, lambda t: torch.ones_like(t), (teacher.bridge.T,), noise_shape=(1, LENGTH), t_power=2)

    accelerator, settings = Accelerator(cpu=True), {"seed": args.seed, "betas": (0.5, 0.99)}
    rate = Schedule(1e-3, decay="linear")
    phi = Player("bridge_model", bridge_model, accelerator, rate, steps=5 * args.steps, **settings)
    theta = Player("student", student, accelerator, rate, steps=args.steps, ema=0.99, **settings)
    steps = ibmd(
        teacher, phi.model, theta.model, setup,
        sources=lambda rng: Sources(signals.draw(256, rng)[1]),
        update_bridge=phi.update, update_student=theta.update, iterations=Iterations(args.steps, 5),
    )  # fmt: skip

    x_T = signals.draw(1, stream(args.seed, "test"))[1].expand(2000, -1, -1)
    zero = torch.zeros(1, dtype=torch.float64)
    mean, covariance = signals.posterior(x_T[:1], zero, torch.zeros(1))
    for nfe in (1, 5, 50):
        draws = sample_teacher(teacher, x_T, sampler="dbim", nfe=nfe, noise=stream(args.seed, nfe))
        report(f"teacher, {nfe} evaluations", draws, mean, covariance[0])
    for step in steps:
        if (step.k + 1) % max(1, args.steps // 4) == 0:
            with torch.no_grad():
                *_, draws = translate(theta.averaged(), setup, Sources(x_T), stream(args.seed, "z"))
            report(f"student, {step.k + 1} updates", draws, mean, covariance[0])


if __name__ == "__main__":
    main()
