"""Samplers: end points of the published code, laws that are known in closed form, calls, draws, bad input."""

import math
import re

import pytest
import torch
from parity.rule import families, noise, outputs
from parity.teachers import BRIDGES, SHAPE, error, inputs, published

from ibmd_cli.errors import UsageError
from ibmd_cli.method.bridges import DBIMBridge, I2SBBridge, VEBridge, VPBridge, expand_to
from ibmd_cli.method.noise import noise_draws, randn, stream
from ibmd_cli.models import samplers
from ibmd_cli.models.samplers import SAMPLERS, network_calls, sample_teacher

VP, VE, DBIM = VPBridge(), VEBridge(), DBIMBridge()
SDE, ODE = I2SBBridge(beta_max=0.3), I2SBBridge(beta_max=1.0, noise_free=True)

# --- parity with the published code ------------------------------------------------------------------------

END_POINTS = [
    (family, key) for family in BRIDGES for key in outputs(family) if key.startswith(("heun", "dbim_", "ddpm"))
]
KEPT = ("i2sb_otode10_inpaint", "ddpm_nfe10_clip1")


def settings(key):
    """Read the sampler's settings off the name of a stored end point."""
    number = {name: float(v) for name, v in re.findall(r"(churn|nfe|clip|order|eta|_n|_N)([\d.]*\d)", key)}
    if key.startswith("heun"):
        n, churn = int(number["_n"]), number["churn"]
        return {"sampler": "ddbm", "churn": churn, "nfe": 3 * n - 1 if churn else 2 * n - 1}
    if key.startswith("ddpm"):
        return {"sampler": "i2sb", "nfe": int(number["nfe"]), "clip": bool(number["clip"])}
    options = {"order": int(number["order"])} if "order" in key else {"eta": number["eta"]}
    return {"sampler": "dbim", "nfe": int(number["_N"]) + 1, **options}


def bound(family, key):
    """TOLERANCES.md of the parity sets: Heun divides rounding of the float32 network by c_t², at every step.

    5e-5 elsewhere: below 1e-5 with AVX, up to 1.6e-5 without, where the noise itself differs by 1.4e-6.
    """
    if not key.startswith("heun") or family == "dbim_inpaint":  # whose c_t is never below 0.01
        return 5e-5
    return {"ddbm_vp": 2e-4, "ddbm_ve": 1e-3, "dbim_vp": 5e-4, "dbim_ve": 5e-4}[family]


def test_every_end_point_is_there():
    assert len(END_POINTS) == 2 + 2 + 6 + 6 + 10 + 6 + 6 + 6


@pytest.mark.parametrize(
    ("family", "key"),
    [
        # Ten calls of the same network take a third of the time of all of these.
        pytest.param(*case, marks=[pytest.mark.slow] if "nfe10" in case[1] and case != KEPT else [])
        for case in END_POINTS
    ],
)
def test_end_point_equals_the_published_one(family, key, monkeypatch):
    _, x_T, label, mask = inputs(family)
    if mask is not None and family.startswith("i2sb"):
        x_T = (1 - mask) * x_T + mask  # white: the sampler fills the hole itself, with its first draw
    elif "masked" not in key:
        mask = None
    if family.startswith("dbim") and key.startswith("heun"):
        # DBIM computes this grid in float32, and 80 − 1e-4 is 79.99990845 there: a tenth nearer to T, where the drift
        # is steep. For VE that is seen in the end point (1e-2); DDBM's references are of the exact grid.
        monkeypatch.setattr(samplers, "_ddbm_times", lambda bridge, n, rho: families()[family]["heun_grid"])
    sample = sample_teacher(
        published(family), x_T, noise=lambda k: noise(f"noise{k}", SHAPE, 0), mask=mask, label=label, **settings(key)
    )
    assert sample.dtype == x_T.dtype
    assert error(sample, outputs(family)[key]) < bound(family, key)


@pytest.mark.parametrize("family", ["ddbm_vp", "ddbm_ve", "dbim_inpaint"])
def test_heun_grid_is_the_published_one(family):
    bridge = BRIDGES[family]
    times, grid = samplers._ddbm_times(bridge, 4, 7.0), families()[family]["heun_grid"]
    # Theirs is a seventh power in float32.
    assert times == pytest.approx(grid, rel=2e-6)
    published = samplers._ddbm_times(VP, 40, 7.0)  # teachers.md §5.1
    assert published[:3] == pytest.approx([0.9999, 0.87574244, 0.76504046], rel=1e-6)
    assert len(published) == 41


def called_at(teacher, x_T, **arguments):
    """Return the times at which a teacher is called."""
    times = []

    def spy(x_t, t, x_T, label=None):
        assert t.shape == (len(x_T),)
        times.append(t[0].item())
        return teacher(x_t, t, x_T, label=label)

    spy.bridge = teacher.bridge
    sample_teacher(spy, x_T, **arguments)
    return times


@pytest.mark.parametrize("n", [3, 4, 5])
def test_dbim_times_are_the_published_ones(n):
    for family in ("dbim_vp", "dbim_ve", "dbim_inpaint"):
        times = called_at(Gaussian(BRIDGES[family]), torch.zeros(1, 1), sampler="dbim", nfe=n + 1)
        assert times[0] == BRIDGES[family].T
        assert times[1:] == families()[family]["dbim_time_grid"][f"N{n}"][:-1]


@pytest.mark.parametrize("nfe", [1, 4, 10])
def test_i2sb_steps_are_the_published_ones(nfe):
    times = called_at(Gaussian(SDE), torch.zeros(1, 1), sampler="i2sb", nfe=nfe)
    assert times == families()["i2sb_sde03"]["sampler_steps"][f"nfe{nfe}"][:0:-1]


@pytest.mark.parametrize("nfe", [2, 3, 7, 100, 997, 998, 999])
def test_i2sb_steps_descend_from_the_last(nfe):
    times = called_at(Gaussian(SDE), torch.zeros(1, 1), sampler="i2sb", nfe=nfe)
    assert times[0] == 999
    assert len(times) == len(set(times)) == nfe
    assert times == sorted(times, reverse=True)
    assert times[-1] > 0


# --- laws --------------------------------------------------------------------------------------------------


class Gaussian:
    """The exact teacher of p(x_0 | x_T) = N(mean, deviation²), E[x_0 | x_t, x_T]; deviation 0: data of one point."""

    def __init__(self, bridge, mean=-0.2, deviation=0.1):
        self.bridge, self.mean, self.deviation = bridge, mean, deviation
        self.states = []  # (t, x_t) of all calls

    def __call__(self, x_t, t, x_T, label=None):
        self.states.append((t[0].item(), x_t))
        a, b, c = (expand_to(v, x_t.double()) for v in self.bridge.coefficients(t))
        gain = b * self.deviation**2 / (b**2 * self.deviation**2 + c**2).clamp(min=1e-30)
        return (self.mean + gain * (x_t - a * x_T - b * self.mean)).to(x_t.dtype)

    def moments(self, t, x_T):
        """Mean and deviation of q(x_t | x_T)."""
        a, b, c = (v.item() for v in self.bridge.coefficients(torch.tensor([t], dtype=torch.float64)))
        return a * x_T + b * self.mean, math.sqrt((b * self.deviation) ** 2 + c**2)

    def flow(self, x, s, t, x_T):
        """Where the probability-flow ODE takes x from time s to t: it keeps (x − mean)/deviation."""
        (mean_s, deviation_s), (mean_t, deviation_t) = self.moments(s, x_T), self.moments(t, x_T)
        return mean_t + deviation_t / deviation_s * (x - mean_s)


def x_T_like(*shape):
    return torch.linspace(-0.5, 0.5, math.prod(shape), dtype=torch.float64).reshape(shape)


@pytest.mark.parametrize("bridge", [VP, VEBridge(T=2.0)], ids=lambda b: b.kind)
def test_deterministic_dbim_converges_to_the_flow_and_higher_orders_faster(bridge):
    teacher, x_T, eps = Gaussian(bridge), x_T_like(3, 5), randn((3, 5), stream(0)).double()
    first = torch.tensor([bridge.T - 1e-3]).item()
    mean, deviation = teacher.moments(first, x_T)
    # The first state is drawn with x̂_0(x_T, T), the mean, and c_t alone.
    start = mean + bridge.coefficients(torch.tensor([first])).c_t * eps
    exact = teacher.flow(start, first, torch.tensor([bridge.t_min]).item(), x_T)

    def miss(nfe, **options):
        x_0 = sample_teacher(teacher, x_T, sampler="dbim", nfe=nfe, noise=[eps], **options)
        return (x_0 - exact).abs().max().item()

    coarse, fine = miss(40, eta=0.0), miss(400, eta=0.0)
    assert fine < 0.15 * coarse  # first order: ten times the steps, a tenth of the error
    # Higher orders have first-order steps at both ends: not powers of ten, but better.
    assert miss(400, order=2) < 0.4 * fine
    assert miss(400, order=3) < 0.5 * fine
    assert miss(2000, order=2) < 2e-4


@pytest.mark.parametrize("bridge", [VP, VEBridge(T=2.0), DBIM], ids=lambda b: b.kind)
def test_heun_without_churn_converges_to_the_flow(bridge):
    teacher, x_T = Gaussian(bridge), x_T_like(4, 2, 3)
    exact = teacher.flow(x_T, bridge.T - 1e-4, bridge.t_min, x_T)

    def miss(nfe):
        x_0 = sample_teacher(teacher, x_T, sampler="ddbm", nfe=nfe, churn=0.0)
        return (x_0 - exact).abs().max().item()

    # Slow, because its first step starts where the drift is steep.
    assert miss(99) < 0.03
    assert miss(1599) < 0.3 * miss(99)


@pytest.mark.parametrize(
    ("bridge", "arguments"),
    [
        (VP, {"sampler": "dbim", "nfe": 400}),
        (VEBridge(T=2.0), {"sampler": "dbim", "nfe": 400}),
        (DBIM, {"sampler": "dbim", "nfe": 400}),
        (VP, {"sampler": "dbim", "nfe": 400, "eta": 0.5}),
        (VP, {"sampler": "ddbm", "nfe": 299}),
        (VEBridge(T=2.0), {"sampler": "ddbm", "nfe": 299}),
        (DBIM, {"sampler": "ddbm", "nfe": 299}),
        (SDE, {"sampler": "i2sb", "nfe": 400}),
        (SDE, {"sampler": "i2sb", "nfe": 400, "clip": True}),
        (VP, {"sampler": "dbim", "nfe": 400, "log_grid": True}),
        (VEBridge(T=2.0), {"sampler": "dbim", "nfe": 400, "log_grid": True}),
        (VE, {"sampler": "dbim", "nfe": 400, "log_grid": True, "eta": 0.5}),
        (DBIM, {"sampler": "dbim", "nfe": 400, "log_grid": True}),
        (SDE, {"sampler": "i2sb", "nfe": 400, "log_grid": True}),
    ],
    ids=lambda v: v.kind if hasattr(v, "kind") else "-".join(map(str, v.values())),
)
def test_samples_have_the_law_of_the_data(bridge, arguments):
    x_T = torch.tensor([[-0.5], [0.4]]).expand(2, 4000)
    x_0 = sample_teacher(Gaussian(bridge), x_T, noise=stream(1), **arguments)
    # 4000 draws: three standard errors are 0.005 of the mean and 3 % of the deviation; steps are of first order and
    # take up to 3 % of the latter (10 % at 100 calls).
    assert (x_0.mean(1) + 0.2).abs().max() < 0.005
    assert (x_0.std(1) / 0.1 - 1).abs().max() < 0.06
    assert x_0[0].std() > 0


@pytest.mark.parametrize("nfe", [2, 5, 20, 100, 997, 999])
def test_i2sb_log_grid_has_distinct_steps(nfe):
    times = called_at(Gaussian(SDE), torch.zeros(1, 1), sampler="i2sb", nfe=nfe, log_grid=True)
    assert times[0] == 999
    assert len(set(times)) == nfe
    assert times == sorted(times, reverse=True)
    assert times[-1] > 0


def test_log_grid_times():
    times = called_at(
        Gaussian(VP), torch.zeros(1, 1), sampler="dbim", nfe=9, log_grid=True, sigma_min=0.1, sigma_max=10.0
    )
    ell = VP.ell(torch.tensor(times[1:], dtype=torch.float64))
    assert times[0] == VP.T
    # float32 times: 6e-8 of a distance from T of 0.01.
    expected = torch.linspace(-math.log(10), math.log(10), 8, dtype=torch.float64)
    torch.testing.assert_close(ell, expected, rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match=r"^sigma_min 3: expected less than sigma_max, 2$"):
        sample_teacher(
            Gaussian(VP), torch.zeros(1, 1), sampler="dbim", nfe=3, log_grid=True, sigma_min=3.0, sigma_max=2.0
        )


@pytest.mark.parametrize("nfe", [4, 20])
def test_i2sb_states_have_the_law_of_the_bridge(nfe):
    """For a data set of one point each state is a draw from q(x_t | x_0, x_T), whatever the steps: the SDE is exact."""
    teacher = Gaussian(SDE, mean=0.3, deviation=0.0)
    x_T = torch.full((1, 20000), -0.6)
    x_0 = sample_teacher(teacher, x_T, sampler="i2sb", nfe=nfe, noise=stream(2))
    rho_T = SDE.alpha_rho(torch.tensor([999]))[1]
    assert len(teacher.states) == nfe
    for n, x_n in teacher.states[1:]:
        rho = SDE.alpha_rho(torch.tensor([n]))[1]
        r = (rho / rho_T).item() ** 2
        deviation = rho.item() * math.sqrt(1 - r)
        # Four standard errors.
        assert x_n.mean().item() == pytest.approx(0.3 - 0.9 * r, abs=4 * deviation / math.sqrt(20000))
        assert x_n.std().item() == pytest.approx(deviation, rel=4 / math.sqrt(40000))
    # The last step adds no noise, but keeps a little of the state.
    kept = (SDE.alpha_rho(torch.tensor([0]))[1] / SDE.alpha_rho(torch.tensor([n]))[1]) ** 2
    torch.testing.assert_close(x_0, 0.3 + kept.float() * (x_n - 0.3), rtol=0, atol=1e-6)


def test_noise_free_i2sb_walks_straight():
    teacher, x_T = Gaussian(ODE, mean=0.3, deviation=0.0), x_T_like(2, 3).float()
    x_0 = sample_teacher(teacher, x_T, sampler="i2sb", nfe=7, noise=[])  # needs none
    r = (ODE.alpha_rho(torch.tensor([0]))[1] / ODE.alpha_rho(torch.tensor([999]))[1]).item() ** 2
    torch.testing.assert_close(x_0, 0.3 + r * (x_T - 0.3), rtol=0, atol=1e-6)


def test_one_dbim_call_is_the_conditional_mean():
    x_T = x_T_like(2, 3).float()
    for bridge in (VP, VE, DBIM):
        teacher = Gaussian(bridge, mean=0.25)
        expected = teacher(x_T, torch.ones(2) * bridge.T, x_T)
        assert torch.equal(sample_teacher(teacher, x_T, sampler="dbim", nfe=1, noise=[]), expected)


def test_guidance_scales_the_pull_towards_the_source():
    """Without it (w = 0) one deterministic interval follows the ODE of the unpinned process."""
    x_T, teacher = x_T_like(2, 3), Gaussian(VP)
    with_, half, without = (
        sample_teacher(teacher, x_T, sampler="ddbm", nfe=1, churn=0.0, guidance=w) for w in (1.0, 0.5, 0.0)
    )
    t = torch.tensor([1 - 1e-4], dtype=torch.float64)
    (a, b, c), (f, g2) = VP.coefficients(t), VP.drift(t)
    score = (a * x_T + b * teacher(x_T, t.expand(2), x_T) - x_T) / c**2
    torch.testing.assert_close(without, (x_T - t * (f * x_T - g2 * score / 2)).clamp(-1, 1))
    free = (without.abs() < 1) & (with_.abs() < 1)
    assert free.any()
    torch.testing.assert_close(half[free], (with_ + without)[free] / 2)


# --- calls, draws, shapes ----------------------------------------------------------------------------------

RUNS = [  # bridge, arguments, draws needed, calls made
    (VP, {"sampler": "ddbm", "nfe": 119}, 40, 119),
    (VP, {"sampler": "ddbm", "nfe": 118}, 40, 119),  # what the paper calls 118
    (VP, {"sampler": "ddbm", "nfe": 10}, 4, 11),
    (VP, {"sampler": "ddbm", "nfe": 1}, 1, 2),
    (VE, {"sampler": "ddbm", "nfe": 7, "churn": 0.0}, 0, 7),
    (DBIM, {"sampler": "ddbm", "nfe": 1, "churn": 0.0}, 0, 1),
    (VP, {"sampler": "dbim", "nfe": 1}, 0, 1),
    (VP, {"sampler": "dbim", "nfe": 2}, 1, 2),
    (VE, {"sampler": "dbim", "nfe": 6}, 5, 6),
    (VE, {"sampler": "dbim", "nfe": 6, "eta": 0.0}, 1, 6),
    (DBIM, {"sampler": "dbim", "nfe": 6, "order": 2}, 1, 6),
    (DBIM, {"sampler": "dbim", "nfe": 2, "order": 3}, 1, 2),
    (SDE, {"sampler": "i2sb", "nfe": 1}, 0, 1),
    (SDE, {"sampler": "i2sb", "nfe": 5}, 4, 5),
    (SDE, {"sampler": "i2sb", "nfe": 5, "mask": torch.ones(1, 1)}, 10, 5),
    (ODE, {"sampler": "i2sb", "nfe": 5}, 0, 5),
    (ODE, {"sampler": "i2sb", "nfe": 5, "mask": torch.ones(1, 1)}, 1, 5),
    (I2SBBridge(n_steps=16), {"sampler": "i2sb", "nfe": 15}, 14, 15),
]


@pytest.mark.parametrize(("bridge", "arguments", "needed", "calls"), RUNS)
def test_calls_and_draws(bridge, arguments, needed, calls):
    x_T = x_T_like(3, 4).float()
    eps = randn((needed, 3, 4), stream(3))
    teacher = Gaussian(bridge)
    asked = []

    def draw(k):
        asked.append(k)
        return eps[k]

    x_0 = sample_teacher(teacher, x_T, noise=draw, **arguments)
    assert asked == list(range(needed))
    counted = network_calls(**{key: v for key, v in arguments.items() if key != "mask"})
    assert len(teacher.states) == counted == calls
    # The other ways to say the same.
    assert torch.equal(sample_teacher(teacher, x_T, noise=eps, **arguments), x_0)
    assert torch.equal(sample_teacher(teacher, x_T, noise=[*eps, torch.zeros(0)], **arguments), x_0)  # one too many
    rng = stream(4)
    drawn = [randn(x_T.shape, rng) for _ in range(needed)]
    same = sample_teacher(teacher, x_T, noise=stream(4), **arguments)
    assert torch.equal(sample_teacher(teacher, x_T, noise=drawn, **arguments), same)
    if needed:
        teacher.states.clear()
        with pytest.raises(ValueError, match=f"^{needed - 1} tensors of noise are given, expected {needed}$"):
            sample_teacher(teacher, x_T, noise=eps[:-1], **arguments)
        assert not teacher.states  # said before any work
        wrong = torch.zeros(needed, 1, 4)
        with pytest.raises(ValueError, match=r"the shape \[1, 4\], expected \[3, 4\]"):
            sample_teacher(teacher, x_T, noise=wrong, **arguments)


def test_draws():
    x = torch.zeros(2, 3, dtype=torch.float64)
    assert torch.equal(torch.stack([*noise_draws(None, x, 2)]), torch.stack([*noise_draws(stream(0), x, 2)]))
    one, two = noise_draws([stream(1), stream(2)], x, 2)
    rng = stream(2)
    assert torch.equal(torch.stack([one[1], two[1]]).float(), torch.stack([randn((3,), rng), randn((3,), rng)]))
    assert one.dtype == torch.float64
    with pytest.raises(ValueError, match=r"the shape \[1, 3\], expected \[2, 3\]"):
        next(noise_draws([stream(1)], x, 1))  # one stream for two images
    assert list(noise_draws([], x, 0)) == []


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_of_an_image_does_not_depend_on_its_batch(sampler):
    teacher, x_T = Gaussian(SDE if sampler == "i2sb" else VP), x_T_like(3, 2, 4).float()

    def sample(rows):
        return sample_teacher(teacher, x_T[rows], sampler=sampler, nfe=8, noise=[stream(0, i) for i in rows])

    torch.testing.assert_close(sample([2, 0]), sample([0, 1, 2])[[2, 0]], rtol=0, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", [(2,), (2, 7), (2, 1, 5), (2, 3, 4, 4), (1, 2, 3, 2, 2)])
def test_any_shape(sampler, shape):
    teacher, x_T = Gaussian(SDE if sampler == "i2sb" else VP), x_T_like(*shape).float()
    x_0 = sample_teacher(teacher, x_T, sampler=sampler, nfe=5)
    assert x_0.shape == shape
    assert x_0.dtype == torch.float32
    flat = noise_draws(None, x_T, 5)
    flat = [eps.reshape(-1, 1) for eps in flat]
    same = sample_teacher(teacher, x_T.reshape(-1, 1), sampler=sampler, nfe=5, noise=flat)
    torch.testing.assert_close(x_0.reshape(-1, 1), same, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("sampler", "bridge", "time"),
    [("ddbm", VP, torch.float64), ("dbim", VP, torch.float32), ("i2sb", SDE, torch.int64)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_teacher_sees_the_dtype_of_its_sources(sampler, bridge, time, dtype):
    seen = set()

    class Teacher:
        def __init__(self):
            self.bridge = bridge

        def predict_x0(self, x_t, t, x_T, label=None):
            seen.add((x_t.dtype, x_T.dtype, t.dtype, t.shape, label, torch.is_grad_enabled()))
            return 0.1 * x_t

    x_T = x_T_like(2, 3).to(dtype)
    x_0 = sample_teacher(Teacher(), x_T, sampler=sampler, nfe=3, label="y")
    assert x_0.dtype == dtype
    assert seen == {(dtype, dtype, time, (2,), "y", False)}


# --- masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bridge", [SDE, ODE], ids=["sde", "ode"])
def test_i2sb_mask(bridge):
    teacher, x_T = Gaussian(bridge, deviation=0.0), x_T_like(2, 3, 4, 4).float()
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    mask[..., 1:3, 2:] = True
    hole = mask.expand_as(x_T)
    x_0 = sample_teacher(teacher, x_T, sampler="i2sb", nfe=6, mask=mask)
    other = sample_teacher(teacher, torch.where(hole, 9.0, x_T), sampler="i2sb", nfe=6, mask=mask)
    assert torch.equal(x_0, other)  # what fills the hole is not read
    eps = next(noise_draws(None, x_T, 1))
    assert torch.equal(teacher.states[0][1], torch.where(hole, eps, x_T))
    for n, x_n in teacher.states[1:6]:
        known = (x_n - x_T)[~hole]
        deviation = bridge.coefficients(torch.tensor([n])).c_t.item()
        # 72 draws: four standard errors are a third.
        assert known.square().mean().sqrt().item() == pytest.approx(deviation, rel=0.35)
    if bridge.noise_free:
        assert torch.equal(x_0[~hole], x_T[~hole])
    # The one point of the data, and what step 0 keeps of the state before (at most 1e-4/0.02 of up to 3).
    assert (x_0[hole] + 0.2).abs().max() < 0.02


@pytest.mark.parametrize("options", [{"eta": 0.0}, {"eta": 1.0}, {"order": 3}], ids=str)
def test_dbim_mask(options):
    x_T = x_T_like(2, 3, 4, 4).float()
    mask = torch.zeros(4, 4)
    mask[1:3, 2:] = 1
    hole = mask.bool().expand_as(x_T)
    teacher = Gaussian(VP)
    free = sample_teacher(teacher, x_T, sampler="dbim", nfe=8, **options)
    x_0 = sample_teacher(teacher, x_T, sampler="dbim", nfe=8, mask=mask, **options)
    assert torch.equal(x_0[hole], free[hole])  # pixels of this teacher are independent
    # Known pixels keep the noise of t_min alone, 0.003.
    assert (x_0 - x_T)[~hole].abs().max() < 0.02
    one = sample_teacher(teacher, x_T, sampler="dbim", nfe=1, mask=mask)
    assert torch.equal(one[~hole], x_T[~hole])


# --- clamps ------------------------------------------------------------------------------------------------


def test_clamps_are_the_published_ones():
    """DDBM and DBIM clamp x̂_0 and the result, I2SB neither: a clamp of x̂_0 shows in the hidden states."""
    x_T = torch.zeros(2, 3)
    for sampler in ("ddbm", "dbim"):
        far, edge = (
            sample_teacher(Gaussian(VP, mean, 0.0), x_T, sampler=sampler, nfe=9, noise=stream(0)) for mean in (5.0, 1.0)
        )
        assert torch.equal(far, edge)
        assert edge.max() <= 1
    far, clipped, edge = (
        sample_teacher(Gaussian(SDE, mean, 0.0), x_T, sampler="i2sb", nfe=9, noise=stream(0), clip=clip)
        for mean, clip in ((5.0, False), (5.0, True), (1.0, False))
    )
    assert torch.equal(clipped, edge)
    assert far.min() > 4.8


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bridge", "arguments", "message"),
    [
        (VP, {"sampler": "euler"}, "sampler 'euler': expected ddbm, dbim, i2sb"),
        (VP, {"sampler": "i2sb"}, "not defined for a teacher of kind vp: expected ddbm, dbim"),
        (DBIM, {"sampler": "i2sb"}, "not defined for a teacher of kind dbim: expected ddbm, dbim"),
        (SDE, {"sampler": "ddbm"}, "sampler ddbm: not defined for a teacher of kind i2sb: expected i2sb"),
        (SDE, {"sampler": "dbim"}, "not defined for a teacher of kind i2sb: expected i2sb"),
        (VP, {"sampler": "dbim", "churn": 0.3}, "sampler dbim has no option 'churn': expected eta, order"),
        (SDE, {"sampler": "i2sb", "eta": 1.0}, "sampler i2sb has no option 'eta': expected clip"),
        (VP, {"sampler": "dbim", "eta": 1.5}, "eta is 1.5, expected a number from 0 to 1"),
        (VP, {"sampler": "dbim", "eta": math.nan}, "eta is nan, expected a number from 0 to 1"),
        (VP, {"sampler": "dbim", "order": 4}, "order is 4, expected a whole number from 1 to 3"),
        (VP, {"sampler": "dbim", "order": 1.5}, "order is 1.5, expected a whole number from 1 to 3"),
        (VP, {"sampler": "ddbm", "churn": 1.0}, "churn is 1.0, expected a number from 0 to 0.999"),
        (VP, {"sampler": "ddbm", "guidance": "strong"}, "guidance is 'strong', expected a number"),
        (VP, {"sampler": "dbim", "nfe": 0}, "nfe 0: expected at least 1"),
        (SDE, {"sampler": "i2sb", "nfe": 1000}, "nfe 1000: expected 1 to 999 for this teacher of 1000 steps"),
        (VP, {"sampler": "ddbm", "mask": torch.ones(1)}, "sampler ddbm: takes no mask"),
    ],
)
def test_what_cannot_be_meant_is_refused(bridge, arguments, message):
    teacher = Gaussian(bridge)
    with pytest.raises(UsageError, match=re.escape(message)) as refused:
        sample_teacher(teacher, torch.zeros(1, 3), **{"nfe": 5, **arguments})
    assert "\n" not in str(refused.value)
    assert not teacher.states


def test_table_is_complete():
    for name, row in SAMPLERS.items():
        assert row.meaning
        assert row.whole_steps == (row.time == torch.int64)
        for option in row.options.values():
            assert option.low <= option.default <= option.high
            assert option.meaning
        assert network_calls(name, 5, **{key: option.default for key, option in row.options.items()}) == 5
