"""The theorems and the algorithm of the paper, on couplings whose x̂_0 is known in closed form.

    x_T ~ N(0, 1)      x_0 = s x_T + m + τ n,  n ~ N(0, 1)      (every pixel on its own)

Everything is float64, so that tolerances are those of the statement, not of the arithmetic.
"""

import copy
import dataclasses
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ibmd_cli.method.bridges import DBIMBridge, I2SBBridge, VEBridge, VPBridge, expand_to
from ibmd_cli.method.distillation import (
    Iterations,
    Pair,
    Setup,
    Sources,
    Step,
    bridge_loss,
    draw_time,
    draw_z,
    frozen,
    generate,
    ibmd,
    rollout,
    student_gradient,
    student_loss,
    translate,
    weighted_error,
)
from ibmd_cli.method.log_times import LogTimes
from ibmd_cli.method.noise import BatchStreams, noise_like, stream
from ibmd_cli.training.optimise import Player, Schedule

VP = VPBridge(beta_d=3.0, beta_min=0.2)
# Few steps, so that a table over them is a small and exact bridge model; betas large enough to matter.
I2SB = I2SBBridge(beta_max=1.0, n_steps=12)
DBIM = DBIMBridge(beta_max=1.0, n_steps=6)
STAR = (0.7, -0.2, 0.5)  # s, m, τ of the teacher's coupling


def weight(t):
    """λ(t), arbitrary but far from constant."""
    return 0.5 + torch.cos(t.double()) ** 2


class Coupling(nn.Module):
    """x_0 = s x_T + m + τ n with trainable s, m, ln τ. Called, it is the student G(x_T, z), whatever t."""

    def __init__(self, s, m, tau):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([s, m, math.log(tau)], dtype=torch.float64))

    @property
    def numbers(self):
        return self.theta[0], self.theta[1], self.theta[2].exp()

    def forward(self, x_t, t, x_T, z, label=None):
        s, m, tau = self.numbers
        return s * x_T + m + tau * z


class Optimum(nn.Module):
    """x̂_0 = E[x_0 | x_t, x_T] or E[x_0 | x_t] of a coupling in closed form."""

    def __init__(self, coupling, bridge, conditional):
        super().__init__()
        self.coupling, self.bridge, self.conditional = coupling, bridge, conditional

    def lines(self, t):
        """Return p, q, r (B,) of x̂_0 = p x_t + q x_T + r."""
        s, m, tau = self.coupling.numbers
        a, b, c = self.bridge.coefficients(t)
        if self.conditional:
            # x_0 | x_T ~ N(s x_T + m, τ²) is observed through x_t − a x_T = b x_0 + c ε.
            variance = b**2 * tau**2 + c**2
            p = b * tau**2 / torch.where(variance > 0, variance, 1.0)  # at T nothing is seen: b = c = 0
            return p, s - p * (a + b * s), m * (1 - p * b)
        # Jointly Gaussian: x_t = a x_T + b x_0 + c ε, Var x_0 = s² + τ², Cov(x_0, x_T) = s.
        v0 = s**2 + tau**2
        p = (a * s + b * v0) / (a**2 + 2 * a * b * s + b**2 * v0 + c**2)
        return p, 0 * p, m * (1 - p * b)

    def forward(self, x_t, t, x_T, label=None):
        p, q, r = (expand_to(v, x_t) for v in self.lines(t))
        return p * x_t + q * x_T + r


def gaussian_setup(bridge, **changes):
    settings = {"bridge": bridge, "weight": weight, "timesteps": (bridge.T,), "noise_shape": (1, 1, 1)}
    return Setup(**settings | changes)


def gaussian_sources(B):
    return lambda rng: Sources(torch.randn(B, 1, 1, 1, generator=rng, dtype=torch.float64))


def star(bridge, conditional):
    return Optimum(Coupling(*STAR), bridge, conditional).requires_grad_(False)


CASES = [(VP, True), (VP, False), (I2SB, False), (DBIM, True), (VEBridge(T=3.0), True)]
CASE_IDS = [f"{bridge.kind}-{'conditional' if c else 'unconditional'}" for bridge, c in CASES]


# --- the closed forms themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize(("bridge", "conditional"), CASES, ids=CASE_IDS)
def test_closed_form_is_the_conditional_mean(bridge, conditional):
    """Its residual is uncorrelated with what it sees, which for Gaussians makes it the conditional mean."""
    s, m, tau = STAR
    t = bridge.time(torch.linspace(0, 0.99, 12))
    a, b, c = bridge.coefficients(t)
    p, q, r = star(bridge, conditional).lines(t)
    # In the basis (1, x_T, n, ε), orthonormal:
    x_0 = torch.tensor([m, s, tau, 0], dtype=torch.float64).expand(12, 4)
    x_T = torch.tensor([0, 1.0, 0, 0], dtype=torch.float64).expand(12, 4)
    eps = torch.tensor([0, 0, 0, 1.0], dtype=torch.float64)
    one = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(12, 4)
    x_t = a[:, None] * x_T + b[:, None] * x_0 + c[:, None] * eps
    residual = x_0 - (p[:, None] * x_t + q[:, None] * x_T + r[:, None] * one)
    seen = [one, x_t, x_T] if conditional else [one, x_t]
    for v in seen:
        assert (residual * v).sum(1).abs().max() < 1e-12
    if not conditional:
        assert (q == 0).all()


# --- Theorem 3.4 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bridge", "conditional"), CASES, ids=CASE_IDS)
def test_theorem_3_4(bridge, conditional):
    """At φ's optimum, E[student loss] = E λ ‖x̂* − x̂^φ‖²."""
    B = 200_000
    student = Coupling(0.3, 0.4, 0.8)
    setup = gaussian_setup(bridge)
    teacher, phi = star(bridge, conditional), Optimum(student, bridge, conditional)
    batch = gaussian_sources(B)(stream(0, "x_T"))
    with torch.no_grad():
        loss = student_loss(teacher, phi, student, setup, batch, stream(0, "loss")).item()
        # The same draws again, sample by sample.
        rng = stream(0, "loss")
        x_0 = rollout(student, setup, batch, rng)
        t, eps = draw_time(setup, x_0, rng)
        x_t = bridge.sample(x_0, batch.x_T, t, eps)
        x_star, x_phi = teacher(x_t, t, batch.x_T), phi(x_t, t, batch.x_T)
        w = expand_to(weight(t), x_t)
        gap = w * (x_star - x_phi) ** 2
        difference = w * ((x_star - x_0) ** 2 - (x_phi - x_0) ** 2) - gap
        # … and E λ ‖x̂* − x̂^φ‖² without samples: both are p x_t + q x_T + r, in the basis (1, x_T, n, ε).
        s, m, tau = (v.item() for v in student.numbers)
        u = (torch.arange(24_000, dtype=torch.float64) + 0.5) / 24_000
        times = bridge.time(u)
        a, b, c = bridge.coefficients(times)
        p, q, r = (one - other for one, other in zip(teacher.lines(times), phi.lines(times), strict=True))
        parts = (p * b * m + r, p * (a + b * s) + q, p * b * tau, p * c)
        exact = (weight(times) * sum(v**2 for v in parts)).mean().item()
    error = difference.std().item() / math.sqrt(B)
    assert loss == pytest.approx((difference + gap).mean().item(), rel=1e-9)
    assert gap.mean().item() > 20 * error  # the test sees something: 5 % or better
    # Four standard errors: 6e-5 by chance, and the stream is seeded. The difference has expectation 0.
    assert abs(difference.mean().item()) < 4 * error
    assert abs(loss - exact) < 4 * (difference + gap).std().item() / math.sqrt(B)


@pytest.mark.parametrize(("bridge", "conditional"), CASES, ids=CASE_IDS)
def test_bridge_loss_is_least_at_the_optimum(bridge, conditional):
    """So that is what the bridge model learns: Eq. (7)."""
    setup = gaussian_setup(bridge)
    batch = gaussian_sources(100_000)(stream(1, "x_T"))
    student = Coupling(0.3, 0.4, 0.8)
    with torch.no_grad():
        x_0 = rollout(student, setup, batch, stream(1, "z"))

        def loss(numbers):
            predictor = Optimum(Coupling(*numbers), bridge, conditional)
            return bridge_loss(predictor, setup, x_0, batch, stream(1, "t"))  # one stream for all

        least = loss((0.3, 0.4, 0.8))
        # Sampling error of the minimiser is 1/√B = 0.003; the steps are 30 times that.
        for other in [(0.4, 0.4, 0.8), (0.2, 0.4, 0.8), (0.3, 0.5, 0.8), (0.3, 0.3, 0.8), (0.3, 0.4, 0.9)]:
            assert loss(other) > least


@pytest.mark.parametrize("log_times", [None, LogTimes(0.05, 20.0)], ids=["own-times", "log-times"])
@pytest.mark.parametrize(("bridge", "conditional"), CASES, ids=CASE_IDS)
def test_least_bridge_loss_is_the_variance_that_is_left(bridge, conditional, log_times):
    """On Gaussian pairs: E λ(t) Var(x_0 | x_t[, x_T]), which a trained teacher cannot go below."""
    B, setup = 100_000, gaussian_setup(bridge, log_times=log_times)
    batch = gaussian_sources(B)(stream(2, "x_T"))
    s, m, tau = STAR
    x_0 = s * batch.x_T + m + tau * noise_like(batch.x_T, stream(2, "n"))
    loss = bridge_loss(star(bridge, conditional), setup, x_0, batch, stream(2, "t")).item()
    t, _ = draw_time(setup, x_0, stream(2, "t"))
    a, b, c = bridge.coefficients(t)
    if conditional:
        left = tau**2 * c**2 / (b**2 * tau**2 + c**2).clamp(min=1e-300)
        left[c == 0] = tau**2  # T
    else:
        v0 = s**2 + tau**2
        left = v0 - (a * s + b * v0) ** 2 / (a**2 + 2 * a * b * s + b**2 * v0 + c**2)
    exact = weight(t) * left
    # An image's error is exact · χ²: four standard errors.
    assert loss == pytest.approx(exact.mean().item(), abs=4 * math.sqrt(2 * exact.square().mean().item() / B))


# --- gradients ---------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """A smooth nonlinear predictor or student of few parameters, which mixes channels, pixels and inputs."""

    def __init__(self, seed):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(7, generator=rng, dtype=torch.float64))
        self.calls = []

    def forward(self, x_t, t, x_T, z=None, label=None):
        self.calls.append((x_t, t, x_T, z, label))
        w = self.w
        h = w[0] * x_t + w[1] * x_T + w[2] * x_t.roll(1, 1) + w[3] * x_t.mean((1, 2, 3), keepdim=True)
        h = h + expand_to(torch.cos(t.double()), x_t) * w[4]
        if z is not None:
            h = h + w[5] * z
        if label is not None:
            h = h + w[6] * expand_to(label.double(), x_t)
        return 0.5 * x_t + torch.tanh(h)


class Nudged(nn.Module):
    """A student whose parameters are moved by `step`, but only where it is run with a graph.

    So finite differences leave alone what no gradient is meant to flow through.
    """

    def __init__(self, student, step):
        super().__init__()
        self.base, self.moved = student, copy.deepcopy(student)
        with torch.no_grad():
            self.moved.w += step

    def forward(self, *args, **kwargs):
        return (self.moved if torch.is_grad_enabled() else self.base)(*args, **kwargs)


SHAPE = (3, 2, 2, 2)


def toy_batch(mask=True, label=True):
    rng = stream(3, "batch")
    known = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64).expand(3, 1, 2, 2)
    x_T = torch.randn(SHAPE, generator=rng, dtype=torch.float64)
    return Sources(x_T, torch.tensor([0, 1, 2]) if label else None, known if mask else None)


def toy_setup(bridge=VP, timesteps=(1.0,), **changes):
    return gaussian_setup(bridge, timesteps=timesteps, noise_shape=(1, 2, 2), **changes)


def toys():
    teacher, phi, student = Toy(0), Toy(1), Toy(2)
    return teacher.requires_grad_(False), phi, student


def finite_differences(setup, batch, place, h=1e-6):
    teacher, phi, student = toys()
    gradient = []
    for step in h * torch.eye(7, dtype=torch.float64):
        values = [
            student_loss(teacher, phi, Nudged(student, sign * step), setup, batch, stream(5, *place)).item()
            for sign in (1, -1)
        ]
        gradient.append((values[0] - values[1]) / (2 * h))
    return torch.tensor(gradient, dtype=torch.float64)


def single_graph(setup, batch, place):
    teacher, phi, student = toys()
    loss = student_loss(teacher, phi, student, setup, batch, stream(5, *place))
    loss.backward()
    return loss.item(), student.w.grad


GRIDS = {
    "one-step": toy_setup(),
    "one-step-i2sb": toy_setup(I2SB, (11,)),
    "chain-posterior": toy_setup(I2SB, (11, 7, 3), rollout="chain", transition="posterior"),
    "chain-marginal": toy_setup(VP, (1.0, 0.6, 0.2), rollout="chain", transition="marginal"),
    "random-step-posterior": toy_setup(VP, (1.0, 0.6, 0.2), transition="posterior", t_power=2.0),
    "random-step-marginal": toy_setup(DBIM, (1.0, 0.6, 0.2)),
    "noise-free": dataclasses.replace(
        toy_setup(I2SBBridge(n_steps=12, noise_free=True), (11, 5), rollout="chain", transition="posterior"),
        noise_shape=None,
    ),
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", GRIDS)
def test_student_gradient_is_that_of_the_loss(name, masked):
    setup, batch = GRIDS[name], toy_batch(mask=masked, label=masked)
    for place in range(3):  # the random step differs
        expected = finite_differences(setup, batch, [place])
        assert (expected[:2].abs() > 1e-3).all()
        loss, gradient = single_graph(setup, batch, [place])
        # Central differences with h = 1e-6: errors of h² from curvature and of 1e-16/h from rounding, so 1e-9
        # for values of order 1.
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)
        for recompute in (False, True):
            teacher, phi, student = toys()
            value = student_gradient(teacher, phi, student, setup, batch, stream(5, place), recompute=recompute)
            assert value == pytest.approx(loss, rel=1e-12)
            torch.testing.assert_close(student.w.grad, gradient, rtol=1e-10, atol=1e-13)  # rounding alone


def test_random_step_visits_every_step():
    setup, batch, (_, _, student) = GRIDS["random-step-marginal"], toy_batch(), toys()
    counts = [0, 0, 0]
    for i in range(300):
        student.calls.clear()
        x_0 = rollout(student, setup, batch, stream(6, i))
        n = len(student.calls)
        assert [call[1][0].item() for call in student.calls] == pytest.approx(setup.timesteps[:n])
        assert x_0.grad_fn is not None
        # Earlier calls have no graph: the last one's state is a plain tensor.
        assert not student.calls[-1][0].requires_grad
        counts[n - 1] += 1
    assert min(counts) > 70  # 100 ± 8 each; four standard deviations


def test_chain_runs_all_steps_with_a_graph():
    setup, batch, (_, _, student) = GRIDS["chain-marginal"], toy_batch(), toys()
    for i in range(5):
        student.calls.clear()
        rollout(student, setup, batch, stream(6, i))
        assert len(student.calls) == 3
        assert [call[0].requires_grad for call in student.calls] == [False, True, True]
    student.calls.clear()
    with torch.no_grad():
        assert not rollout(student, setup, batch, stream(6)).requires_grad
    assert not any(call[0].requires_grad for call in student.calls)  # and no graph on the way


@dataclasses.dataclass(frozen=True)
class DetachedVP(VPBridge):
    """The silent mistake of reusing a teacher's q_sample, which detaches x_t."""

    def sample(self, x_0, x_T, t, eps):
        return super().sample(x_0, x_T, t, eps).detach()


def test_detached_x_t_would_be_noticed():
    """The gradient test above has the power to see it: same loss, another gradient by far more than 1e-6."""
    batch, setup = toy_batch(mask=False), GRIDS["one-step"]
    wrong = dataclasses.replace(setup, bridge=DetachedVP(VP.beta_d, VP.beta_min))
    loss, right = single_graph(setup, batch, [0])
    wrong_loss, gradient = single_graph(wrong, batch, [0])
    assert wrong_loss == loss
    assert (gradient - right).norm() > 0.1 * right.norm()


def test_student_gradient_uses_the_given_backward_and_adds_to_gradients():
    teacher, phi, student = toys()
    setup, batch = GRIDS["one-step"], toy_batch()
    _, gradient = single_graph(setup, batch, [0])
    terms = []

    def half(loss):
        terms.append(loss.item())
        (loss / 2).backward()

    loss = student_gradient(teacher, phi, student, setup, batch, stream(5, 0), half)
    assert len(terms) == 2
    assert terms[0] > 0 > terms[1]
    assert loss == pytest.approx(sum(terms))
    torch.testing.assert_close(student.w.grad, gradient / 2, rtol=1e-10, atol=1e-13)
    student_gradient(teacher, phi, student, setup, batch, stream(5, 0), half)  # accumulation over micro-batches
    torch.testing.assert_close(student.w.grad, gradient, rtol=1e-10, atol=1e-13)


def test_recompute_runs_the_student_twice_and_keeps_no_graph_meanwhile():
    for recompute, runs in ((False, 1), (True, 2)):
        teacher, phi, student = toys()
        seen = []
        student.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.requires_grad))
        student_gradient(teacher, phi, student, GRIDS["one-step"], toy_batch(), stream(5, 0), recompute=recompute)
        assert seen == [False, True][-runs:]
        assert len(student.calls) == runs
        if recompute:
            assert torch.equal(student.calls[0][3], student.calls[1][3])  # the same z


def test_both_terms_see_the_same_states():
    """The same x_0, x_t, t, ε serve both terms (method.md §2): with equal critics the loss is exactly 0."""
    teacher, _, student = toys()
    phi = copy.deepcopy(teacher).requires_grad_(True)
    for name, setup in GRIDS.items():
        assert student_loss(teacher, phi, student, setup, toy_batch(), stream(7, name)).item() == 0
        assert student_gradient(teacher, phi, student, setup, toy_batch(), stream(7, name)) == 0
        assert (student.w.grad.abs() < 1e-14).all()  # two opposite gradients, added
        (x_t, t, x_T, _, label), (x_t2, t2, x_T2, _, label2) = teacher.calls[-1], phi.calls[-1]
        assert torch.equal(x_t, x_t2)
        assert torch.equal(t, t2)
        assert torch.equal(x_T, x_T2)
        assert torch.equal(label, label2)


# --- who is touched by what --------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True])
def test_student_gradient_touches_the_student_alone(recompute):
    teacher, phi, student = toys()
    before = [copy.deepcopy(m.state_dict()) for m in (teacher, phi, student)]
    inside = []
    phi.register_forward_hook(lambda *_: inside.append(phi.w.requires_grad))
    student_gradient(teacher, phi, student, GRIDS["chain-marginal"], toy_batch(), stream(5), recompute=recompute)
    assert teacher.w.grad is None
    assert phi.w.grad is None
    assert (student.w.grad != 0).all()
    assert inside == [False]  # frozen while its graph is built …
    assert phi.w.requires_grad  # … and not afterwards
    for model, state in zip((teacher, phi, student), before, strict=True):
        assert torch.equal(model.w, state["w"])


def test_bridge_model_is_thawed_after_an_error_and_frozen_parts_stay_frozen():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    with pytest.raises(ZeroDivisionError), frozen(model):
        1 / any(p.requires_grad for p in model.parameters())  # none of them: 1/False
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def run(setup, steps=2, L=3, warmup=0, start=0, bridge_start=0, models=None, **settings):
    """Run `ibmd` on toys and return (models, log); updates record, and call the loss once."""
    teacher, phi, student = models or toys()
    log = []

    def update(name, model):
        def step(number, compute):
            loss = compute(stream(8, name, number))
            gradients = [None if p.w.grad is None else p.w.grad.clone() for p in (phi, student)]
            log.append((name, number, gradients))
            with torch.no_grad():
                model.w -= 0.05 * model.w.grad
            model.w.grad = None
            return loss

        return step

    yielded = list(
        ibmd(
            teacher,
            phi,
            student,
            setup,
            lambda rng: toy_sources(rng),
            update("phi", phi),
            update("theta", student),
            Iterations(steps, L, warmup, start, bridge_start),
            **settings,
        )
    )
    assert teacher.w.grad is None
    return (teacher, phi, student), log, yielded


def toy_sources(rng):
    return toy_batch()._replace(x_T=torch.randn(SHAPE, generator=rng, dtype=torch.float64))


@pytest.mark.parametrize("recompute", [False, True])
def test_neither_loss_touches_the_other_player(recompute):
    _, log, _ = run(GRIDS["chain-posterior"], recompute=recompute)
    for name, _, (of_phi, of_student) in log:
        mine, other = (of_phi, of_student) if name == "phi" else (of_student, of_phi)
        assert other is None
        assert (mine != 0).any()


# --- Algorithm 1 -------------------------------------------------------------------------------------------


def test_loop_makes_L_bridge_steps_before_each_student_gradient():
    _, log, yielded = run(GRIDS["one-step"], steps=3, L=4)
    expected = []
    for k in range(3):
        expected += [("phi", 4 * k + l) for l in range(4)] + [("theta", k)]  # noqa: E741
    assert [entry[:2] for entry in log] == expected
    assert [step.k for step in yielded] == [0, 1, 2]
    assert all(isinstance(step, Step) and step.bridge_loss > 0 for step in yielded)


def test_loop_hands_recompute_on():
    for recompute, calls in ((False, 2), (True, 3)):  # one for φ, one or two for θ
        (_, _, student), _, _ = run(GRIDS["one-step"], steps=1, L=1, recompute=recompute)
        assert len(student.calls) == calls


def test_bridge_warm_up_comes_once_and_first():
    expected = [("phi", l) for l in range(7)] + [("theta", 0)]  # noqa: E741
    expected += [("phi", 7), ("phi", 8), ("theta", 1), ("phi", 9), ("phi", 10), ("theta", 2)]
    _, log, _ = run(GRIDS["one-step"], steps=3, L=2, warmup=5)
    assert [entry[:2] for entry in log] == expected
    _, log, _ = run(GRIDS["one-step"], steps=3, L=2, warmup=5, start=1)
    assert [entry[:2] for entry in log] == expected[8:]


@pytest.mark.parametrize(
    ("iterations", "expected"),
    [
        (Iterations(2, 3), {0: [0, 1, 2], 1: [3, 4, 5]}),
        (Iterations(2, 3, 4), {0: [0, 1, 2, 3, 4, 5, 6], 1: [7, 8, 9]}),
        (Iterations(3, 3, 4, start=1), {1: [7, 8, 9], 2: [10, 11, 12]}),
        (Iterations(2, 3, 4, bridge_start=5), {0: [5, 6], 1: [7, 8, 9]}),
        (Iterations(2, 3, 4, start=1, bridge_start=9), {1: [9]}),
        (Iterations(2, 3, start=1, bridge_start=6), {1: []}),
    ],
)
def test_iterations_to_be_made(iterations, expected):
    """L before each student iteration, after the warm-up; none twice."""
    assert {k: list(iterations.of_bridge_model(k)) for k in iterations.of_student()} == expected


@pytest.mark.parametrize(
    ("iterations", "k", "reuse", "expected"),
    [
        (Iterations(2, 3), 1, 1, [3, 4, 5]),
        (Iterations(2, 3), 1, 2, [3, 3, 5]),
        (Iterations(1, 3, 2), 0, 4, [0, 0, 0, 0, 4]),
    ],
)
def test_iterations_that_share_images(iterations, k, reuse, expected):
    """Never across a student iteration."""
    assert [iterations.maker(l, k, reuse) for l in iterations.of_bridge_model(k)] == expected  # noqa: E741


def test_images_of_the_caller_are_what_the_bridge_model_learns_from():
    teacher, phi, student = toys()
    made = Pair(toy_sources(stream(1)), torch.ones(SHAPE, dtype=torch.float64))
    seen = []

    class Watched(VPBridge):
        def sample(self, x_0, x_T, t, eps):
            seen.append((x_0, x_T))
            return super().sample(x_0, x_T, t, eps)

    setup = dataclasses.replace(GRIDS["one-step"], bridge=Watched(VP.beta_d, VP.beta_min))
    run(setup, steps=1, L=2, images=lambda rng: made, models=(teacher, phi, student), recompute=False)
    assert [(x_0 is made.x_0, x_T is made.batch.x_T) for x_0, x_T in seen[:2]] == [(True, True)] * 2
    assert len(student.calls) == 1  # by its own iteration alone


def test_losses_are_not_read_by_the_host():
    """On a GPU each reading would make it wait: the players' updates get tensors."""

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    def update(number, compute):
        with NoReads():
            loss = compute(stream(8, number))
        assert isinstance(loss, torch.Tensor)
        assert not loss.requires_grad
        return loss.item()

    setup = GRIDS["chain-posterior"]  # in "random-step" the number of the step is read, which is drawn on the CPU
    list(ibmd(*toys(), setup, toy_sources, update, update, Iterations(2, 2)))


def test_loop_yields_what_the_updates_return():
    """It computes the two losses of Eq. (7) and (10), on fresh sources, each on its own stream."""
    setup = GRIDS["random-step-posterior"]
    teacher, phi, student = toys()
    expected = []
    for place in (("phi", 0), ("phi", 1)):
        rng = stream(8, *place)
        batch = toy_sources(rng)
        loss = bridge_loss(phi, setup, rollout(student, setup, batch, rng).detach(), batch, rng)
        (g,) = torch.autograd.grad(loss, phi.w)
        with torch.no_grad():
            phi.w -= 0.05 * g
    expected.append(loss.item())
    rng = stream(8, "theta", 0)
    batch = toy_sources(rng)
    loss = student_loss(teacher, phi, student, setup, batch, rng)
    (g,) = torch.autograd.grad(loss, student.w)
    (_, got_phi, got_student), _, yielded = run(setup, steps=1, L=2)
    assert yielded[0].bridge_loss == pytest.approx(expected[0], rel=1e-12)
    assert yielded[0].student_loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(got_phi.w, phi.w, rtol=1e-12, atol=0)
    torch.testing.assert_close(got_student.w, student.w - 0.05 * g, rtol=1e-10, atol=1e-13)


def test_losses_go_through_the_backward_of_the_update():
    """As Accelerate needs it (loss scaling, accumulation): one call for φ, one per term for θ."""
    teacher, phi, student = toys()
    calls = []

    def update(model):
        def step(number, compute):
            calls.append(0)

            def backward(loss):
                calls[-1] += 1
                loss.backward()

            return compute(stream(8, number), backward)

        return step

    players = (teacher, phi, student, GRIDS["one-step"], toy_sources, update(phi), update(student))
    list(ibmd(*players, Iterations(1, 2)))
    assert calls == [1, 1, 2]


@pytest.mark.parametrize("name", ["one-step", "random-step-marginal"])
def test_resumed_run_gives_the_same_numbers(name):
    setup = GRIDS[name]
    whole, _, steps = run(setup, steps=5)
    half, _, first = run(setup, steps=3)
    resumed, _, rest = run(setup, steps=5, start=3, models=half)
    assert first + rest == steps
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one.w, other.w)


@pytest.mark.parametrize("done", [1, 4, 5])  # of the warm-up's five and the first iteration's one
def test_run_resumed_between_bridge_iterations_gives_the_same_numbers(done):
    setup, settings = GRIDS["one-step"], {"steps": 2, "L": 1, "warmup": 5}
    whole, log, _ = run(setup, **settings)
    models, calls = toys(), []

    class Killed(Exception):
        pass

    def images(rng):
        if len(calls) == done:
            raise Killed
        calls.append(0)
        return generate(models[2], setup, toy_sources, rng)

    with pytest.raises(Killed):
        run(setup, models=models, images=images, **settings)
    _, rest, _ = run(setup, models=models, bridge_start=done, **settings)
    assert [entry[:2] for entry in rest] == [entry[:2] for entry in log[done:]]
    for one, other in zip(whole, models, strict=True):
        assert torch.equal(one.w, other.w)


class Table(nn.Module):
    """x̂_0 = p_n x_t + q_n x_T + r_n at row n of a tabulated bridge: the optimum of any Gaussian coupling."""

    def __init__(self, bridge, conditional, start):
        super().__init__()
        self.bridge, self.conditional = bridge, conditional
        n = torch.arange(bridge.n_steps)
        t = n if bridge.kind == "i2sb" else n / (bridge.n_steps - 1)
        self.rows = nn.Parameter(torch.stack(start.lines(t)).T.detach().clone())

    def forward(self, x_t, t, x_T, label=None):
        p, q, r = (expand_to(v, x_t) for v in self.rows[self.bridge.index(t)].T)
        return p * x_t + r + (q * x_T if self.conditional else 0)


class CallableAtTimes(nn.Module):
    """An N-step student: at every call time its own line in (x_t, x_T, z)."""

    def __init__(self, timesteps):
        super().__init__()
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32)
        start = [[0.0, 0.0, 0.0, math.log(0.3)]] * len(timesteps)
        self.rows = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x_t, t, x_T, z, label=None):
        n = (t[:, None] - self.timesteps).abs().argmin(1)
        p, q, r, ln_tau = (expand_to(v, x_t) for v in self.rows[n].T)
        return p * x_t + q * x_T + r + ln_tau.exp() * z


def measured(student, setup, pooled=False):
    """Return slope, offset and spread of x_0 against x_T in the coupling that the student samples.

    That of the last step, or, if `pooled`, of all steps together.
    """
    rng = stream(9, "measure")
    batch = gaussian_sources(100_000)(rng)
    with torch.no_grad():
        results = list(translate(student, setup, batch, rng))[0 if pooled else -1 :]
    x, y = batch.x_T.flatten().repeat(len(results)), torch.cat(results).flatten()
    s = ((x - x.mean()) * (y - y.mean())).mean() / x.var()
    m = y.mean() - s * x.mean()
    return s.item(), m.item(), (y - s * x - m).std().item()


def play(student, bridge_model, teacher, setup, steps, B=256, lr=0.04):
    """Algorithm 1 with the optimisers of production."""
    accelerator, L = Accelerator(cpu=True), 3

    def player(name, model, lr, steps, betas):
        schedule = Schedule(lr, decay="cosine", floor=0.01)
        return Player(name, model, accelerator, schedule, steps=steps, seed=11, betas=betas)

    theta = player("student", student, lr, steps, (0.9, 0.999))
    phi = player("bridge_model", bridge_model, 2 * lr, steps * L, (0.5, 0.99))
    sources = gaussian_sources(B)
    arguments = (teacher, phi.model, theta.model, setup, sources, phi.update, theta.update)
    return list(ibmd(*arguments, Iterations(steps, L)))


def table(bridge, conditional):
    return Table(bridge, conditional, star(bridge, conditional))


ONE_STEP = {  # setup's bridge, conditional, bridge model, student iterations
    "i2sb-unconditional": (I2SB, False, table, 400),
    "dbim-conditional": (DBIM, True, table, 500),
    "vp-conditional": (VP, True, lambda *_: Optimum(Coupling(*STAR), VP, True), 400),
    "vp-unconditional": (VP, False, lambda *_: Optimum(Coupling(*STAR), VP, False), 400),
}


@pytest.mark.parametrize("name", ONE_STEP)
def test_algorithm_recovers_slope_offset_and_spread(name):
    """The bridge model starts from the teacher, the student at a distance ten times the tolerance."""
    bridge, conditional, bridge_model, steps = ONE_STEP[name]
    student, setup = Coupling(0.0, 0.3, 0.2), gaussian_setup(bridge)
    teacher, phi = star(bridge, conditional), bridge_model(bridge, conditional)
    last = play(student, phi, teacher, setup, steps)[-1]
    assert last.k == steps - 1
    assert measured(student, setup) == pytest.approx(STAR, abs=0.03)
    assert abs(last.student_loss) < 0.05  # it is E λ ‖x̂* − x̂^φ‖², and noise
    assert [p.grad for p in teacher.parameters()] == [None]


def test_two_step_chain_recovers_the_coupling():
    """App. B.1: the end of the chain has the teacher's coupling."""
    setup = gaussian_setup(I2SB, timesteps=(11, 5), rollout="chain", transition="posterior")
    student = CallableAtTimes(setup.timesteps)
    play(student, table(I2SB, False), star(I2SB, False), setup, 400)
    assert measured(student, setup) == pytest.approx(STAR, abs=0.03)


def test_two_step_random_step_recovers_the_coupling():
    """App. B.2: the bridge model sees the couplings of all steps mixed, so their mixture is matched."""
    setup = gaussian_setup(DBIM, timesteps=(1.0, 0.5))
    student = CallableAtTimes(setup.timesteps)
    play(student, table(DBIM, True), star(DBIM, True), setup, 500)
    assert measured(student, setup, pooled=True) == pytest.approx(STAR, abs=0.03)


@pytest.mark.parametrize("name", ["vp-conditional", "i2sb-unconditional"])
def test_without_the_minus_term_the_spread_collapses(name):
    bridge, conditional, bridge_model, _ = ONE_STEP[name]
    setup, teacher, sources = gaussian_setup(bridge), star(bridge, conditional), gaussian_sources(256)
    student = Coupling(*STAR)
    player = Player("student", student, Accelerator(cpu=True), Schedule(0.03), steps=300, seed=11)

    def first_term(rng, backward):
        batch = sources(rng)
        x_0 = rollout(student, setup, batch, rng)
        loss = weighted_error(teacher, setup, x_0, batch, *draw_time(setup, x_0, rng))
        backward(loss)
        return loss.item()

    for k in range(300):
        player.update(k, first_term)
    assert measured(student, setup)[2] < 0.2 * STAR[2]
    # With it the solution is a fixed point: from the same start, as many steps.
    student = Coupling(*STAR)
    play(student, bridge_model(bridge, conditional), teacher, setup, 300)
    assert measured(student, setup) == pytest.approx(STAR, abs=0.03)


# --- generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("transition", ["posterior", "marginal"])
@pytest.mark.parametrize(("bridge", "timesteps"), [(I2SB, (11, 6, 2)), (VP, (1.0, 0.5, 0.2)), (VP, (1.0,))])
def test_translate_step_by_step(bridge, timesteps, transition, masked):
    """Sec. 3.5, written out with the same random numbers: z, ε, z, ε, z."""
    setup = toy_setup(bridge, timesteps, transition=transition)
    batch, (_, _, student), (_, _, again) = toy_batch(mask=masked), toys(), toys()
    x_T = batch.x_T
    with torch.no_grad():
        results = list(translate(student, setup, batch, stream(10)))
        rng, x_t = stream(10), x_T
        expected = []
        for n, t in enumerate(timesteps):
            z = torch.randn(3, 1, 2, 2, generator=rng).double()
            x_0 = again(x_t, torch.full((3,), float(t)), x_T, z, label=batch.label)
            if masked:
                x_0 = torch.where(batch.mask == 1, x_0, x_T)
            expected.append(x_0)
            if n + 1 < len(timesteps):
                eps, s = torch.randn(SHAPE, generator=rng).double(), torch.full((3,), timesteps[n + 1])
                if transition == "posterior":
                    x_t = bridge.posterior(x_0, x_t, s, torch.full((3,), t), eps)
                else:
                    x_t = bridge.sample(x_0, x_T, s, eps)
    assert len(results) == len(expected) == len(timesteps)
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    x_t, t, seen_x_T, z, label = student.calls[0]
    assert torch.equal(x_t, x_T)
    assert torch.equal(seen_x_T, x_T)
    assert t.tolist() == [timesteps[0]] * 3 == [bridge.T] * 3
    assert z.shape == (3, 1, 2, 2)
    assert z.dtype == x_T.dtype
    assert torch.equal(label, batch.label)


@pytest.mark.parametrize("name", GRIDS)
def test_known_pixels_are_kept(name):
    setup, batch, (_, _, student) = GRIDS[name], toy_batch(), toys()
    known = (batch.mask == 0).expand(SHAPE)
    assert known.any()
    with torch.no_grad():
        for x_0 in translate(student, setup, batch, stream(10)):
            assert torch.equal(x_0[known], batch.x_T[known])
            assert (x_0[~known] != batch.x_T[~known]).all()
        free = list(translate(student, setup, batch._replace(mask=None), stream(10)))
        assert (free[-1][known] != batch.x_T[known]).any()


def test_error_counts_unknown_pixels_alone():
    """As in the teachers' own training, the mean is over all pixels; the known ones contribute 0."""
    teacher, _, _ = toys()
    setup, batch = GRIDS["one-step"], toy_batch()
    x_0 = torch.randn(SHAPE, generator=stream(12), dtype=torch.float64)
    t, eps = draw_time(setup, x_0, stream(12, "t"))
    x_t = VP.sample(x_0, batch.x_T, t, eps)
    error = (teacher(x_t, t, batch.x_T, label=batch.label) - x_0) ** 2
    w = weight(t)
    by_hand = sum(w[i] * error[i][batch.mask[i].expand(2, 2, 2) == 1].sum() for i in range(3)) / x_0.numel()
    value = weighted_error(teacher, setup, x_0, batch, t, eps)
    assert value.item() == pytest.approx(by_hand.item(), rel=1e-12)
    whole = sum(w[i] * error[i].sum() for i in range(3)) / x_0.numel()
    value = weighted_error(teacher, setup, x_0, batch._replace(mask=None), t, eps)
    assert value.item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("bridge", [VP, I2SBBridge()], ids=lambda b: b.kind)
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_time_density(bridge, power):
    """(T − t)/(T − t_min) = u^power, so its distribution function is v^(1/power)."""
    setup = gaussian_setup(bridge, t_power=power)
    t, eps = draw_time(setup, torch.zeros(50_000, 1, 1, 1, dtype=torch.float64), stream(13))
    assert t.shape == (50_000,)
    assert eps.shape == (50_000, 1, 1, 1)
    assert eps.dtype == torch.float64
    v = (bridge.T - t.double()) / (bridge.T - bridge.t_min)
    levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    empirical = (v[:, None] <= levels).double().mean(0)
    # Kolmogorov: 2/√n = 0.009 is exceeded with probability 7e-4. One integer step of 1000 adds ≤ 0.0025.
    slack = 0.0025 if bridge.kind == "i2sb" else 0
    assert (empirical - levels ** (1 / power)).abs().max() < 0.009 + slack
    assert abs(eps.mean().item()) < 0.02  # four standard errors
    assert eps.std().item() == pytest.approx(1, abs=0.013)


def test_even_times_cover_the_batch_whatever_its_parts():
    """One u in each of the 8 equal parts of [0, 1), each uniform over many batches, the same in micro-batches."""
    setup = gaussian_setup(VP, t_even=True)
    images = torch.zeros(8, 1, 1, 1, dtype=torch.float64)
    firsts = []
    for batch in range(500):
        t, _ = draw_time(setup, images, BatchStreams(range(8), 0, batch))
        u = (VP.T - t) / (VP.T - VP.t_min)
        assert sorted((8 * u).floor().int().tolist()) == list(range(8))
        firsts.append(u[0].item())
        parts = [BatchStreams(range(k, k + 4), 0, batch, size=8) for k in (0, 4)]
        assert torch.equal(t, torch.cat([draw_time(setup, images[:4], part)[0] for part in parts]))
    levels = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    empirical = (torch.tensor(firsts, dtype=torch.float64)[:, None] <= levels).double().mean(0)
    assert (empirical - levels).abs().max() < 0.09  # Kolmogorov: 2/√500


def test_noise_is_drawn_on_the_cpu_with_the_dtype_of_the_images():
    setup = toy_setup()
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(SHAPE, dtype=dtype)
        z = draw_z(setup, x, stream(14))
        assert z.dtype == dtype
        assert torch.equal(z, torch.randn(3, 1, 2, 2, generator=stream(14)).to(dtype))
        assert torch.equal(noise_like(x, stream(14)), torch.randn(SHAPE, generator=stream(14)).to(dtype))
    assert draw_z(dataclasses.replace(setup, noise_shape=None), x, stream(14)) is None
