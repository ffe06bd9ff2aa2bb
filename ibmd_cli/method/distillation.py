"""Inverse Bridge Matching Distillation: Algorithm 1 of arXiv:2502.01362v2.

    min_θ max_φ  E λ(t) ( ‖x̂*_0(x_t, t, x_T) − x_0‖² − ‖x̂^φ_0(x_t, t, x_T) − x_0‖² )               (Eq. 10)
    x_0 = G_θ(x_T, z),   t ~ p(t),   x_t ~ q(x_t | x_0, x_T)

The first term pulls the student G_θ towards the teacher x̂*_0. The second, at the optimum of the bridge model x̂^φ_0
the variance of x_0 given x_t, keeps the student diverse. Only sources x_T are read, never a target. Unconditional
predictors ignore their x_T: nothing else changes. (The bridge model is the "fake score" of DMD.)
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ibmd_cli.method.bridges import Bridge, expand_to
from ibmd_cli.method.noise import Streams, common_integer, evenly_spaced, noise_like, randn, uniform
from ibmd_cli.method.times import LogTimes

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


class Step(NamedTuple):
    """What one student iteration k (from 0) reports. `student_loss` may be negative: it is a difference."""

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
    *,
    steps: int,
    bridge_steps: int,
    bridge_warmup: int = 0,
    start: int = 0,
    recompute: bool = True,
    reuse: int = 1,
) -> Iterator[Step]:
    """Run Algorithm 1 from student iteration `start` to `steps`, yielding after each.

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
        steps: K, student iterations.
        bridge_steps: L, bridge-model iterations before each of them.
        bridge_warmup: further bridge-model iterations before the first student iteration.
            Differs from the paper (0): the student's first steps then follow a bridge model that fits it.
        start: the student iteration to continue from.
        recompute: run the student a second time in place of keeping its graph (less memory, more time).
        reuse: bridge-model iterations that see the same images of the student, each with new times and noise.
            Differs from the paper (1): the student is run less often, for images that vary less.

    Yields:
        A `Step` after each student iteration; EMA, logs and checkpoints are the caller's business.

    Source: arXiv:2502.01362v2, Algorithm 1.
    """
    made: list[Pair] = []  # by the student, for the iterations of φ that share images; one for each micro-batch

    def phi(earlier: Iterator[Pair], rng: Streams, backward: Callable[[Tensor], None] = Tensor.backward) -> Tensor:
        pair = next(earlier, None)
        if pair is None:
            batch = sources(rng)
            with torch.no_grad():
                pair = Pair(batch, rollout(student, setup, batch, rng))
            if reuse > 1:
                made.append(pair)
        loss = bridge_loss(bridge_model, setup, pair.x_0, pair.batch, rng)
        backward(loss)
        return loss.detach()

    def theta(rng: Streams, backward: Callable[[Tensor], None] = Tensor.backward) -> Tensor:
        batch = sources(rng)
        return student_step(teacher, bridge_model, student, setup, batch, rng, backward, recompute)

    loss_phi = math.nan
    for k in range(start, steps):
        for l, fresh in bridge_iterations(k, bridge_steps, bridge_warmup, reuse):  # noqa: E741 (the paper's letter)
            if fresh:
                made.clear()
            loss_phi = update_bridge(l, partial(phi, iter(tuple(made))))
        loss_theta = update_student(k, theta)
        yield Step(k, loss_phi, loss_theta)


def bridge_iterations(k: int, bridge_steps: int, warmup: int = 0, reuse: int = 1) -> Iterator[tuple[int, bool]]:
    """Yield the numbers of the bridge-model iterations before student iteration `k`: see `ibmd`.

    Each comes with whether it has the student make images: those are shared within a student iteration alone.
    """
    first = warmup + k * bridge_steps if k else 0
    for l in range(first, warmup + (k + 1) * bridge_steps):  # noqa: E741
        yield l, (l - first) % reuse == 0


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
    """The student's loss, Eq. (10), in one graph. `student_step` computes the same gradient in less memory."""
    x_0 = rollout(student, setup, batch, rng)
    t, eps = draw_time(setup, x_0, rng)  # one draw for both terms
    star = weighted_error(teacher, setup, x_0, batch, t, eps)
    return star - weighted_error(bridge_model, setup, x_0, batch, t, eps)


def student_step(
    teacher: Denoiser,
    bridge_model: nn.Module,
    student: Denoiser,
    setup: Setup,
    batch: Sources,
    rng: Streams,
    backward: Callable[[Tensor], None] = Tensor.backward,
    recompute: bool = True,
) -> Tensor:
    """Add the gradient of `student_loss` to the student's parameters; return the loss, without a graph.

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
    """λ(t) ‖x̂_0(x_t, t, x_T) − x_0‖² at x_t ~ q(x_t | x_0, x_T), differentiable in x_0 through both places."""
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
    """Yield the student's x̃_0 after each of its N calls, as at inference.

    x̃_0 = G_θ(x_{t_n}, t_n, x_T, z), then x_{t_{n−1}} is drawn given x̃_0, and so on. Known pixels are kept from x_T.

    Source: arXiv:2502.01362v2, Sec. 3.5.
    """
    x_T = x_t = batch.x_T
    ones = torch.ones(len(x_T), device=x_T.device)
    for n, t_n in enumerate(setup.timesteps):
        x_0 = student(x_t, t_n * ones, x_T, draw_z(setup, x_T, rng), label=batch.label)
        if batch.mask is not None:
            x_0 = batch.mask * x_0 + (1 - batch.mask) * x_T
        yield x_0
        if n + 1 < len(setup.timesteps):
            t_next, eps = setup.timesteps[n + 1], noise_like(x_T, rng)
            if setup.transition == "posterior":
                x_t = setup.bridge.posterior(x_0, x_t, t_next * ones, t_n * ones, eps)
            else:
                x_t = setup.bridge.sample(x_0, x_T, t_next * ones, eps)


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
