"""Inverse Bridge Matching Distillation: Algorithm 1 of arXiv:2502.01362v2.

    min_θ max_φ  E λ(t) ( ‖x̂*_0(x_t, t, x_T) − x_0‖² − ‖x̂^φ_0(x_t, t, x_T) − x_0‖² )               (Eq. 10)
    x_0 = G_θ(x_T, z),   t ~ p(t),   x_t ~ q(x_t | x_0, x_T)

The first term pulls the student G_θ towards the teacher x̂*_0. The second, at the optimum of the bridge model x̂^φ_0
the variance of x_0 given x_t, keeps the student diverse. Only sources x_T are read, never a target. Unconditional
predictors ignore their x_T: nothing else changes. (The bridge model is the "fake score" of DMD.)
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ibmd_cli.method.bridges import Bridge, expand_to
from ibmd_cli.method.log_times import LogTimes
from ibmd_cli.method.noise import Streams, common_integer, evenly_spaced, noise_like, randn, uniform

Denoiser = Callable[..., Tensor]
"""x̂_0(x_t, t, x_T[, z][, label]) → (B, C, H, W): a `Predictor`, or anything that computes one."""


class Sources(NamedTuple):
    """A batch of sources.

    Attributes:
        x_T: (B, C, H, W) in [-1, 1].
        label: class indices (B,), or None.
        mask: (B, 1, H, W), 1 = to be generated, 0 = kept from x_T; or None, everything is generated.
    """

    x_T: Tensor
    label: Tensor | None = None
    mask: Tensor | None = None


class Pair(NamedTuple):
    """Sources, and what the student made of them: x_0 (B, C, H, W), without a graph."""

    batch: Sources
    x_0: Tensor


@dataclass(frozen=True)
class Setup:
    """What Algorithm 1 takes as given.

    Attributes:
        bridge: the process q.
        weight: λ(t), times (B,) → positive weights (B,).
        timesteps: T = t_N > … > t_1, the times at which the student is called; (T,) for one step.
        noise_shape: shape of z for one image, (C_z, h, w), or None for a student without noise.
        t_power: t = T − (T − t_min) u^t_power with u ~ U[0, 1). 1 is the teacher's own density, as in the paper.
            Differs from the paper: larger values draw t towards T, where large flat regions get their colour.
        t_even: the u of a batch lie at equal distances, from a random start. Differs from the paper (False, independent
            u): the same density, and gradients that vary less.
        log_times: t is drawn uniformly in ℓ = log(b_t/c_t). Differs from the paper (None: uniformly in t).
        rollout: how an N-step student is trained. "chain" (App. B.1, I2SB): x_0 is the end of all N steps, and the
            gradient flows through all of them. "random-step" (App. B.2, DDBM): the steps down to a random t_n,
            and the gradient flows through the last call alone, as in DMD2.
        transition: how x_{t_n} is drawn between two calls: "posterior" q(x_s | x̃_0, x_t) (I2SB) or "marginal"
            q(x_s | x̃_0, x_T) (DDBM).
    """

    bridge: Bridge
    weight: Callable[[Tensor], Tensor]
    timesteps: tuple[float, ...]
    noise_shape: tuple[int, ...] | None = None
    t_power: float = 1.0
    t_even: bool = False
    log_times: LogTimes | None = None
    rollout: str = "random-step"
    transition: str = "marginal"


@dataclass(frozen=True)
class Iterations:
    """How often each player moves, and what was done before.

    Attributes:
        steps: K, student iterations.
        bridge_steps: L, bridge-model iterations before each of them.
        bridge_warmup: further bridge-model iterations before the first student iteration.
            Differs from the paper (0): the student's first steps then follow a bridge model that fits it.
        start: student iterations that are done already.
        bridge_start: bridge-model iterations that are done already, those before student iteration `start` included.
    """

    steps: int
    bridge_steps: int
    bridge_warmup: int = 0
    start: int = 0
    bridge_start: int = 0

    def of_student(self) -> range:
        """Return the numbers k of the student iterations to be made."""
        return range(self.start, self.steps)

    def of_bridge_model(self, k: int) -> range:
        """Return the numbers l of the bridge-model iterations to be made before student iteration k."""
        return range(max(self.first(k), self.bridge_start), self.first(k + 1))

    def first(self, k: int) -> int:
        """Return the number of the first bridge-model iteration before student iteration k."""
        return self.bridge_warmup + k * self.bridge_steps if k else 0

    def maker(self, l: int, k: int, reuse: int) -> int:  # noqa: E741
        """Return the number of the iteration whose images iteration l sees, if `reuse` in a row share theirs."""
        return l - (l - self.first(k)) % reuse


class Step(NamedTuple):
    """What student iteration k (from 0) reports.

    `bridge_loss` is that of the last bridge-model iteration before it, NaN if it was made before `Iterations.start`.
    `student_loss` may be negative: it is a difference.
    """

    k: int
    bridge_loss: float
    student_loss: float


def ibmd(
    teacher: Denoiser,
    bridge_model: nn.Module,
    student: nn.Module,
    setup: Setup,
    sources: Callable[[Streams], Sources],
    update_bridge: Callable[[int, Callable[..., Tensor]], float],
    update_student: Callable[[int, Callable[..., Tensor]], float],
    iterations: Iterations,
    *,
    images: Callable[[Streams], Pair] | None = None,
    recompute: bool = True,
) -> Iterator[Step]:
    """Run Algorithm 1, yielding after each student iteration.

    Args:
        teacher: x̂*_0, frozen.
        bridge_model: x̂^φ_0.
        student: G_θ(x_t, t, x_T, z, label).
        setup: bridge, weighting, times.
        sources: draws a batch of x_T with the given random stream.
        update_bridge: makes one optimiser step on φ. It is given the number of the step and a function that computes
            the loss and its gradient with a random stream, and may call it several times (gradient accumulation).
            The loss stays on its device: reading it would make the host wait.
        update_student: the same for θ.
        iterations: K, L, and where to begin.
        images: makes what φ learns from, with the given random stream; None for new images each time (`generate`).
        recompute: run the student a second time in place of keeping its graph (less memory, more time).

    Yields:
        A `Step` after each student iteration; EMA, logs and checkpoints are the caller's business.

    Source: arXiv:2502.01362v2, Algorithm 1.
    """
    images = images or partial(generate, student, setup, sources)

    def loss_of_bridge_model(rng: Streams, backward: Callable[[Tensor], None] = Tensor.backward) -> Tensor:
        batch, x_0 = images(rng)
        loss = bridge_loss(bridge_model, setup, x_0, batch, rng)
        backward(loss)
        return loss.detach()

    def loss_of_student(rng: Streams, backward: Callable[[Tensor], None] = Tensor.backward) -> Tensor:
        return student_gradient(teacher, bridge_model, student, setup, sources(rng), rng, backward, recompute)

    loss_phi = math.nan
    for k in iterations.of_student():
        for l in iterations.of_bridge_model(k):  # noqa: E741 (the paper's letter)
            loss_phi = update_bridge(l, loss_of_bridge_model)
        loss_theta = update_student(k, loss_of_student)
        yield Step(k, loss_phi, loss_theta)


def generate(student: Denoiser, setup: Setup, sources: Callable[[Streams], Sources], rng: Streams) -> Pair:
    """Draw sources x_T, and make x_0 = G_θ(x_T, z) of them, without a graph."""
    batch = sources(rng)
    with torch.no_grad():
        return Pair(batch, rollout(student, setup, batch, rng))


def bridge_loss(predictor: Denoiser, setup: Setup, x_0: Tensor, batch: Sources, rng: Streams) -> Tensor:
    """Bridge matching on a coupling (x_0, x_T): E λ(t) ‖x̂_0(x_t, t, x_T) − x_0‖², a mean over batch and pixels.

    On the student's coupling it trains the bridge model, on that of the data it trains a teacher.

    Source: arXiv:2502.01362v2, Eq. (7).
    """
    t, eps = draw_time(setup, x_0, rng)
    return weighted_error(predictor, setup, x_0, batch, t, eps)


def student_loss(
    teacher: Denoiser,
    bridge_model: Denoiser,
    student: Denoiser,
    setup: Setup,
    batch: Sources,
    rng: Streams,
) -> Tensor:
    """Return the student's loss, Eq. (10), in one graph: its definition. Training uses `student_gradient`."""
    x_0 = rollout(student, setup, batch, rng)
    t, eps = draw_time(setup, x_0, rng)  # one draw for both terms
    star = weighted_error(teacher, setup, x_0, batch, t, eps)
    return star - weighted_error(bridge_model, setup, x_0, batch, t, eps)


def student_gradient(
    teacher: Denoiser,
    bridge_model: nn.Module,
    student: Denoiser,
    setup: Setup,
    batch: Sources,
    rng: Streams,
    backward: Callable[[Tensor], None] = Tensor.backward,
    recompute: bool = True,
) -> Tensor:
    """Add the gradient of `student_loss` to the student's parameters, in less memory; return the loss, without a graph.

    The loss depends on θ through x_0 alone. So the two terms are differentiated one after the other down to a leaf
    copy of x_0, with φ frozen: one critic's graph is alive at a time, and no weight gradient of a critic is formed.
    Then ∂L/∂x_0 goes through the student, which is run again for it if `recompute` is set: it must be in eval mode, or
    have no dropout, and the teacher's parameters must not require gradients.
    """
    replay = copy.deepcopy(rng)
    with torch.set_grad_enabled(not recompute):
        x_0 = rollout(student, setup, batch, rng)
    leaf = x_0.detach().requires_grad_()
    t, eps = draw_time(setup, leaf, rng)  # one draw for both terms
    loss = torch.zeros((), device=leaf.device)
    with frozen(bridge_model):
        for sign, predictor in ((+1, teacher), (-1, bridge_model)):
            term = sign * weighted_error(predictor, setup, leaf, batch, t, eps)
            backward(term)
            loss = loss + term.detach()
    if recompute:
        x_0 = rollout(student, setup, batch, replay)
    torch.autograd.backward(x_0, leaf.grad)
    return loss


def weighted_error(predictor: Denoiser, setup: Setup, x_0: Tensor, batch: Sources, t: Tensor, eps: Tensor) -> Tensor:
    """λ(t) ‖x̂_0(x_t, t, x_T) − x_0‖² at x_t ~ q(x_t | x_0, x_T), differentiable in x_0, also through x_t."""
    x_t = setup.bridge.sample(x_0, batch.x_T, t, eps)  # never detached: Eq. (10) is differentiated through x_t
    error = (predictor(x_t, t, batch.x_T, label=batch.label) - x_0) ** 2
    if batch.mask is not None:
        error = batch.mask * error
    return (expand_to(setup.weight(t), error) * error).mean()


def rollout(student: Denoiser, setup: Setup, batch: Sources, rng: Streams) -> Tensor:
    """Generate x_0 as the student is trained: one step, or several over its own inference states.

    Source: arXiv:2502.01362v2, Sec. 3.5, App. B.1 and B.2.
    """
    last = len(setup.timesteps) - 1
    if setup.rollout == "random-step":
        last = common_integer(last + 1, rng)
    chain = translate(student, setup, batch, rng)
    for _ in range(last):
        with torch.set_grad_enabled(torch.is_grad_enabled() and setup.rollout == "chain"):
            next(chain)
    return next(chain)


def translate(student: Denoiser, setup: Setup, batch: Sources, rng: Streams) -> Iterator[Tensor]:
    """Yield the student's x̃_0 after each of its N calls, with noise of its own, as at inference; see `run_steps`."""
    ones = torch.ones(len(batch.x_T), device=batch.x_T.device)
    times = [t_n * ones for t_n in setup.timesteps]
    return run_steps(
        student, setup, batch, times, lambda: draw_z(setup, batch.x_T, rng), lambda: noise_like(batch.x_T, rng)
    )


def run_steps(
    student: Denoiser,
    setup: Setup,
    batch: Sources,
    times: Sequence[Tensor],
    z: Callable[[], Tensor | None],
    eps: Callable[[], Tensor],
) -> Iterator[Tensor]:
    """Yield the student's x̃_0 after each of its N calls.

    x̃_0 = G_θ(x_{t_n}, t_n, x_T, z), then x_{t_{n−1}} is drawn given x̃_0, and so on. Known pixels are kept from x_T.

    Args:
        student: G_θ.
        setup: the bridge, and how x_{t_{n−1}} is drawn.
        batch: x_T (B, C, H, W), with label and mask.
        times: t_N > … > t_1, each (B,), or (1,) for all images.
        z: gives the noise of the next call (B, C_z, h, w), or None.
        eps: gives the noise of the next step between two calls (B, C, H, W).

    Source: arXiv:2502.01362v2, Sec. 3.5.
    """
    x_T = x_t = batch.x_T
    for n, t in enumerate(times):
        x_0 = student(x_t, t, x_T, z(), label=batch.label)
        if batch.mask is not None:
            x_0 = batch.mask * x_0 + (1 - batch.mask) * x_T
        yield x_0
        if n + 1 < len(times) and setup.transition == "posterior":
            x_t = setup.bridge.posterior(x_0, x_t, times[n + 1], t, eps())
        elif n + 1 < len(times):
            x_t = setup.bridge.sample(x_0, x_T, times[n + 1], eps())


def draw_time(setup: Setup, x_0: Tensor, rng: Streams) -> tuple[Tensor, Tensor]:
    """Draw t ~ p(t) (B,) and the noise ε of x_t, shaped as `x_0`."""
    u = (evenly_spaced if setup.t_even else uniform)(len(x_0), rng)
    u = u**setup.t_power
    t = setup.log_times.time(setup.bridge, u) if setup.log_times else setup.bridge.time(u)
    return t.to(x_0.device), noise_like(x_0, rng)


def draw_z(setup: Setup, x_T: Tensor, rng: Streams) -> Tensor | None:
    """Draw the student's noise z ~ N(0, I), (B, C_z, h, w), or None."""
    if setup.noise_shape is None:
        return None
    return randn((len(x_T), *setup.noise_shape), rng).to(x_T)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Form no gradients of the parameters inside. Gradients still pass through the model to its inputs."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)
