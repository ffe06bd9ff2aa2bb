"""Bridges: end points, published tables, the two textbook forms, Chapman–Kolmogorov."""

import dataclasses
import json
import math

import pytest
import torch
from parity.rule import families, image, noise, outputs
from parity.teachers import BRIDGES as PUBLISHED
from parity.teachers import FAMILIES, SHAPE, inputs

from ibmd_cli.method.bridges import BRIDGES, Bridge, DBIMBridge, I2SBBridge, VEBridge, VPBridge, expand_to, make_bridge

VP, VE, DBIM = VPBridge(), VEBridge(), DBIMBridge()
SDE, ODE = I2SBBridge(beta_max=0.3), I2SBBridge(beta_max=1.0, noise_free=True)
ALL = [VP, VE, SDE, ODE, I2SBBridge(beta_max=1.0), DBIM, VPBridge(beta_d=5.0, beta_min=0.3), VEBridge(T=20.0)]
EXACT = [VP, VE, VPBridge(beta_d=5.0, beta_min=0.3), VEBridge(T=20.0)]  # those whose ends and laws are exact


def label(bridge):
    return f"{bridge.kind}-{'-'.join(f'{v:g}' for v in bridge.to_dict().values() if not isinstance(v, str))}"


def times(bridge, n=33):
    """Times from t_min to T, ends included."""
    if bridge.kind == "i2sb":
        return torch.linspace(0, 999, n).round().long()
    return torch.linspace(bridge.t_min, bridge.T, n)


def both_ends(bridge):
    T, t_min = bridge.time(torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64))
    return t_min[None], T[None]


# --- end points --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bridge", EXACT, ids=label)
def test_source_end_is_x_T_without_noise(bridge):
    a, b, c = bridge.coefficients(torch.tensor([bridge.T]))
    assert (a.item(), b.item(), c.item()) == (1, 0, 0)  # exactly: SNR_T/SNR_T is 1 in floating point
    x_0, x_T, eps = torch.randn(3, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bridge.sample(x_0, x_T, torch.tensor([bridge.T]), eps), x_T)


@pytest.mark.parametrize("T", [0.3, 0.7, 80.0])
def test_source_end_survives_rounding(T):
    """T = 0.7 is below its float32 value's float64 neighbour: the variance must not turn negative."""
    a, b, c = VEBridge(T=T).coefficients(torch.tensor([T], dtype=torch.float64))
    assert a.item() == pytest.approx(1, rel=1e-6)  # float32
    assert b.item() == pytest.approx(0, abs=1e-6)
    assert c.item() == pytest.approx(0, abs=1e-3 * T)  # its root


@pytest.mark.parametrize("bridge", EXACT, ids=label)
def test_target_end_tends_to_x_0(bridge):
    t = torch.tensor([bridge.t_min])
    a, b, c = bridge.coefficients(t)
    rho = bridge.alpha_rho(t)[1]
    # What is missing at t_min is a multiple of ρ², at most 3e-5 there: a, 1 − b and 1 − c/ρ.
    assert 0 < a < rho**2
    assert 0 < 1 - b < rho**2
    assert 0 < 1 - c / rho < rho**2
    a, b, c = bridge.coefficients(times(bridge))
    assert (a.diff() > 0).all()
    assert (b.diff() < 0).all()
    assert (c[1:-1] > 0).all()


# teachers.md §3.2, §3.3: 8 printed decimals, so the bound is half a unit of the last.
I2SB_GOLDEN = {
    0.3: [
        # n, β_n, std_fwd, std_bwd, mu_x0, mu_x1, std_sb
        (0, 0.0001, 0.01000000, 0.37553595, 0.99929142, 0.00070858, 0.00999646),
        (250, 0.0001399953, 0.17314609, 0.33344816, 0.78763084, 0.21236916, 0.15366468),
        (499, 0.0001865025, 0.26554402, 0.26589496, 0.50066036, 0.49933964, 0.18789193),
        (500, 0.0001865025, 0.26589496, 0.26554402, 0.49933964, 0.50066036, 0.18789193),
        (999, 0.0001, 0.37553595, 0.01000000, 0.00070858, 0.99929142, 0.00999646),
    ],
    1.0: [
        (0, 0.0001, 0.01000000, 0.49691921, 0.99959519, 0.00040481, 0.00999798),
        (250, 0.0002375022, 0.20282145, 0.45390490, 0.83356730, 0.16643270, 0.18517579),
        (499, 0.0004326635, 0.35137494, 0.35199008, 0.50087456, 0.49912544, 0.24867680),
        (999, 0.0001, 0.49691921, 0.01000000, 0.00040481, 0.99959519, 0.00999798),
    ],
}
SUM_BETA = {0.3: 0.1410272509092465, 1.0: 0.2469286989507964}  # families.json, table_sums_float64
VP_GOLDEN = [  # teachers.md §3.1: t, α_t, ρ_t, a_t, b_t, c_t, c_noise (4 decimals)
    (1e-4, 0.99999500, 0.00316387, 0.00000866, 0.99999000, 0.00316384, -2302.5851),
    (1e-3, 0.99994950, 0.01005013, 0.00008735, 0.99989911, 0.01004937, -1726.9388),
    (0.05, 0.99625702, 0.08676517, 0.00648620, 0.99251481, 0.08627791, -748.9331),
    (0.3, 0.94176453, 0.35706701, 0.10384129, 0.88185332, 0.32540114, -300.9932),
    (0.5, 0.86070798, 0.59148864, 0.26042154, 0.71045782, 0.46253379, -173.2868),
    (0.7, 0.75578374, 0.86641359, 0.49065510, 0.47270037, 0.51786552, -89.1687),
    (0.9, 0.63762815, 1.20814035, 0.80487888, 0.17325343, 0.40155224, -26.3401),
    (0.99, 0.58301055, 1.39356756, 0.97917594, 0.01807517, 0.14305646, -2.5126),
    (0.999, 0.57755564, 1.41345919, 0.99790373, 0.00181527, 0.04576680, -0.2501),
    (0.9999, 0.57701039, 1.41546291, 0.99979023, 0.00018160, 0.01448951, -0.0250),
    (1.0, 0.57694981, 1.41568571, 1, 0, 0, 0),
]


@pytest.mark.parametrize("row", VP_GOLDEN, ids=lambda row: f"t={row[0]:g}")
def test_vp_golden_table(row):
    t = torch.tensor([row[0]], dtype=torch.float64)
    alpha, rho = VP.alpha_rho(t)
    values = [alpha, rho, *VP.coefficients(t)]
    assert [v.item() for v in values] == pytest.approx(row[1:6], abs=5.1e-9)
    # float32 logarithm times 250: 1e-6 relative to at most 2303.
    assert VP.c_noise(t).item() == pytest.approx(row[6], rel=1e-6, abs=5.1e-5)


@pytest.mark.parametrize(("beta_max", "row"), [(k, row) for k, rows in I2SB_GOLDEN.items() for row in rows])
def test_i2sb_golden_table(beta_max, row):
    bridge = I2SBBridge(beta_max=beta_max)
    n, beta, std_fwd, std_bwd, mu_x0, mu_x1, std_sb = row
    a, b, c = bridge.coefficients(torch.tensor([n]))
    alpha, rho = bridge.alpha_rho(torch.tensor([n]))
    assert alpha.item() == 1
    got = [v.item() for v in (rho, b, a, c)]
    assert got == pytest.approx([std_fwd, mu_x0, mu_x1, std_sb], abs=5.1e-9)
    assert bridge._tables.std_bwd[n].item() == pytest.approx(std_bwd, abs=5.1e-9)
    D = std_fwd**2 + std_bwd**2  # is Σβ + β_n, because both sums include β_n
    assert pytest.approx(SUM_BETA[beta_max], abs=1e-8) == D - beta


@pytest.mark.parametrize("beta_max", [0.3, 1.0])
def test_i2sb_tables_are_cumulative_sums_of_the_mirrored_ramp(beta_max):
    ramp = [(0.01 + i / 999 * (math.sqrt(beta_max / 1000) - 0.01)) ** 2 for i in range(500)]
    beta = ramp + ramp[::-1]
    n = torch.arange(1000)
    bridge = I2SBBridge(beta_max=beta_max)
    rho = bridge.alpha_rho(n)[1]
    assert math.fsum(beta) == pytest.approx(SUM_BETA[beta_max], rel=1e-8)  # the reference sums float32 β
    forward = [math.fsum(beta[: i + 1]) for i in range(1000)]
    backward = [math.fsum(beta[i:]) for i in range(1000)]
    total = math.fsum(beta)
    # 1000 float64 additions: 1e-13 relative.
    torch.testing.assert_close(rho**2, torch.tensor(forward, dtype=torch.float64), rtol=1e-12, atol=0)
    a, b, c = bridge.coefficients(n)
    D = torch.tensor([total + v for v in beta], dtype=torch.float64)
    torch.testing.assert_close(a * D, torch.tensor(forward, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(b * D, torch.tensor(backward, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(a + b, torch.ones(1000, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(c**2, a * b * D, rtol=1e-12, atol=0)
    # Mirror image: x_0 and x_T play the same part.
    torch.testing.assert_close(a, b.flip(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("n_steps", [12, 100, 1000])
def test_lower_end_of_beta_does_not_depend_on_the_number_of_steps(n_steps):
    """teachers.md §3.2: it is the constant 1e-4, and so the deviation that remains at the ends is 0.01."""
    bridge = I2SBBridge(n_steps=n_steps)
    fwd = bridge.alpha_rho(torch.arange(n_steps))[1]
    assert fwd[0].item() == pytest.approx(0.01, rel=1e-12)
    peak = (0.01 + (n_steps // 2 - 1) / (n_steps - 1) * (math.sqrt(0.3 / n_steps) - 0.01)) ** 2
    assert (fwd**2).diff().max().item() == pytest.approx(peak, rel=1e-9)


def test_dbim_golden_values_and_difference_from_i2sb():
    i2sb = I2SBBridge(beta_max=1.0)
    # teachers.md §3.3. t = 1 → row 999, t = 0 → row 0, row 499 at t = 499/999.
    golden = {
        1.0: (1, 0.00040498, 0.01),
        0.0: (0.00040498, 1, 0.01),
        499 / 999: (0.5, 0.50175218, 0.24889457),
    }
    for t, expected in golden.items():
        got = [v.item() for v in DBIM.coefficients(torch.tensor([t]))]
        assert got == pytest.approx(expected, abs=5.1e-9), t
    a, b, c = DBIM.coefficients(torch.tensor([499 / 999]))
    other = i2sb.coefficients(torch.tensor([499]))
    assert [v.item() for v in other] == pytest.approx([0.49912544, 0.50087456, 0.24867680], abs=5.1e-9)
    # Same β, other normalisation: 0.2 % in the middle, not rounding.
    assert (a - other.a_t).item() == pytest.approx(8.75e-4, rel=1e-3)
    n = torch.arange(1000)
    a, b, c = DBIM.coefficients(n / 999)
    S = SUM_BETA[1.0]
    beta = torch.cat([DBIM.alpha_rho(n / 999)[1][:1] ** 2, (DBIM.alpha_rho(n / 999)[1] ** 2).diff()])
    torch.testing.assert_close(a + b, 1 + beta / S, rtol=1e-8, atol=0)  # SUM_BETA is of float32 β: 1e-9
    D = S + beta
    torch.testing.assert_close(a * S / D, i2sb.coefficients(n).a_t, rtol=1e-8, atol=0)
    torch.testing.assert_close(c * (S / D).sqrt(), i2sb.coefficients(n).c_t, rtol=1e-8, atol=0)


def test_dbim_time_rounds_half_to_even_in_float32():
    assert DBIM.index(torch.tensor([0.5, 1e-4, 1.0, 0.0])).tolist() == [500, 0, 999, 0]  # 499.5 → 500 (even)
    even = torch.arange(0, 999, 2)
    t = (even + 0.5) / 999
    ties = 999 * t == even + 0.5  # most, in float32
    assert ties.sum() > 100
    assert torch.equal(DBIM.index(t[ties]), even[ties])
    n = torch.arange(1000)
    assert torch.equal(DBIM.index(n / 999), n)
    assert torch.equal(DBIM.index((n / 999).double()), n)


@pytest.mark.parametrize("bridge", [SDE, I2SBBridge(beta_max=1.0), DBIM], ids=label)
def test_noise_levels(bridge):
    rows = torch.tensor([0, 1, 2, 499, 500, 998, 999])
    t = rows if bridge.kind == "i2sb" else rows / 999
    levels = bridge.c_noise(t)
    golden = [0.1, 1.1009008, 2.1018018, 499.54953, 500.55045, 998.99915, 1000.0]  # teachers.md §3.4, float32
    assert levels.dtype == torch.float32
    assert levels.tolist() == pytest.approx(golden, rel=2.4e-7)  # two bits: torch.linspace rounds as the processor can


@pytest.mark.parametrize("bridge", [VP, VE], ids=label)
def test_continuous_c_noise_is_a_quarter_of_the_logarithm(bridge):
    t = times(bridge)
    expected = 250 * t.double().log()
    torch.testing.assert_close(bridge.c_noise(t), expected.float(), rtol=1e-6, atol=1e-4)  # float32 logarithm
    assert bridge.c_noise(t).dtype == torch.float32
    assert bridge.c_noise(torch.tensor([1.0])).item() == 0
    assert torch.isfinite(bridge.c_noise(torch.zeros(1)))  # the 1e-44 of the published code


# --- parity with the published code ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficients_equal_the_published_ones(family):
    out, bridge = outputs(family), PUBLISHED[family]
    t = out["coef.n"] if "coef.n" in out else out["coef.t"]
    # Relative to the largest value (c of VE goes up to 35). A float64 reference (DBIM) agrees to rounding;
    # DDBM works in float32 and cancels near T (5e-6 measured); I2SB stores float32 tables.
    bound = {"ddbm": 1e-5, "i2sb": 1e-7, "dbim": 1e-12}[family[:4]]
    for key, value in zip("abc", bridge.coefficients(t), strict=True):
        reference = out[f"coef.{key}"].double()
        assert (value - reference).abs().max() <= bound * max(1, reference.max()), key
    # The last two bits of logarithms and of torch.linspace depend on the processor.
    torch.testing.assert_close(bridge.c_noise(t), out["coef.c_noise"], rtol=2.4e-7, atol=0)
    for key, value in zip(("coef.alpha", "coef.rho"), bridge.alpha_rho(t), strict=True):
        if key in out:
            torch.testing.assert_close(value, out[key].double(), rtol=1e-9, atol=1e-12)
    if "coef.f" in out:
        per_unit = 999 if family == "dbim_inpaint" else 1  # DBIM's code multiplies its dt instead
        for key, value in zip(("coef.f", "coef.g2"), bridge.drift(t), strict=True):
            torch.testing.assert_close(value, per_unit * out[key].double(), rtol=1e-12, atol=1e-15)
    if "coef.std_fwd" in out:
        fwd, bwd = bridge._rows(t)
        noisy = dataclasses.replace(bridge, noise_free=False)
        values = {"std_fwd": fwd, "std_bwd": bwd, "betas": bridge.drift(t)[1], "std_sb": noisy.coefficients(t).c_t}
        for key, value in values.items():
            torch.testing.assert_close(value, out[f"coef.{key}"].double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_and_labels_equal_the_published_ones(family):
    bridge, info, out = PUBLISHED[family], families()[family], outputs(family)
    i2sb = family.startswith("i2sb")
    x_0, x_T = image("x_0", SHAPE, 0), inputs(family)[1]
    eps = noise("noise1" if i2sb else "noise0", SHAPE, 0)
    for i, t in enumerate(info.get("bridge_steps") or info["bridge_times"]):
        ts = torch.full((2,), t)
        x_t = bridge.sample(x_0, x_T, ts, eps)
        # float32 arithmetic on values up to 4, DDBM's float32 coefficients, and noise, whose last bits (1.4e-6) depend
        # on the processor.
        bound = 1e-5 + 2e-6 * bridge.coefficients(ts).c_t.max()
        torch.testing.assert_close(x_t, out["bridge"][i], rtol=0, atol=float(bound))
        if i2sb:
            target = (x_t - x_0) / expand_to(bridge.alpha_rho(ts)[1], x_t)
            bound = 1e-5 * max(1, out["label"][i].abs().max())
            torch.testing.assert_close(target, out["label"][i], rtol=0, atol=float(bound))


# --- the two textbook forms --------------------------------------------------------------------------------


@pytest.mark.parametrize("bridge", EXACT, ids=label)
def test_snr_form(bridge):
    """Sec. 2 of arXiv:2502.01362v2, from α_t and σ_t of the process re-derived here."""
    t = times(bridge).double()
    alpha, sigma = process(bridge, t)
    alpha_T, sigma_T = process(bridge, torch.tensor([bridge.T], dtype=torch.float64))
    snr = alpha**2 / sigma**2
    ratio = (alpha_T**2 / sigma_T**2) / snr
    a, b, c = bridge.coefficients(t)
    # float64; 1 − ratio cancels near T, to 1e-16 absolute, and its root to 1e-8.
    torch.testing.assert_close(a, alpha / alpha_T * ratio, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(b, alpha * (1 - ratio), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(c**2, sigma**2 * (1 - ratio), rtol=1e-10, atol=1e-12 * bridge.T**2)


@pytest.mark.parametrize("bridge", [*EXACT, DBIM], ids=label)
def test_rho_form(bridge):
    """DBIM's form (teachers.md §3.1): α, ρ and ρ̄; for the table ρ̄ is the backward sum itself."""
    t = times(bridge)
    T = torch.tensor([bridge.T])
    alpha, rho = bridge.alpha_rho(t)
    alpha_T, rho_T = bridge.alpha_rho(T)
    rho_bar = bridge._rows(t)[1] if bridge is DBIM else (rho_T**2 - rho**2).sqrt()
    a, b, c = bridge.coefficients(t)
    tolerance = {"rtol": 1e-10, "atol": 1e-7 * bridge.T}  # ρ̄ near T is a root of a cancellation: √1e-16
    torch.testing.assert_close(a, alpha / alpha_T * rho**2 / rho_T**2, **tolerance)
    torch.testing.assert_close(b, alpha * rho_bar**2 / rho_T**2, **tolerance)
    torch.testing.assert_close(c, alpha * rho * rho_bar / rho_T, **tolerance)


def process(bridge, t):
    """α_t, σ_t by their definitions: dx = −½β(t) x dt + √β(t) dw, or dx = √(2t) dw."""
    if bridge.kind == "ve":
        return torch.ones_like(t), t
    integral = 0.5 * bridge.beta_d * t**2 + bridge.beta_min * t
    return (-0.5 * integral).exp(), (-torch.expm1(-integral)).sqrt()


@pytest.mark.parametrize("bridge", EXACT, ids=label)
def test_drift_is_the_derivative_of_alpha_and_rho(bridge):
    t = times(bridge)[1:-1].double()
    (alpha, rho), (d_alpha, d_rho) = torch.func.jvp(bridge.alpha_rho, (t,), (torch.ones_like(t),))
    f, g2 = bridge.drift(t)
    torch.testing.assert_close(f, d_alpha / alpha, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(g2, alpha**2 * 2 * rho * d_rho, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bridge", [SDE, ODE, DBIM], ids=label)
def test_drift_of_a_table_is_its_increments_per_unit_of_time(bridge):
    n = torch.arange(1000)
    t = n if bridge.kind == "i2sb" else n / 999
    f, g2 = bridge.drift(t)
    dt = bridge.T / 999
    assert (f == 0).all()
    assert g2.dtype == torch.float64
    torch.testing.assert_close(g2[1:] * dt, bridge.alpha_rho(t)[1].square().diff(), rtol=1e-9, atol=0)


def test_vp_and_ve_are_one_bridge_in_other_units():
    """x_t/α_t of VP is VE's state at time ρ_t, between the ends x_0 and x_T/α_T."""
    t = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    alpha, rho = VP.alpha_rho(t)
    alpha_T, rho_T = VP.alpha_rho(torch.tensor([1.0]))
    ve = VEBridge(T=rho_T.item(), t_min=1e-4)
    # VE reads its T as float32: 6e-8 relative, seen in 1 − ρ²/ρ_T².
    a, b, c = VP.coefficients(t)
    a_ve, b_ve, c_ve = ve.coefficients(rho)
    torch.testing.assert_close(a / alpha, a_ve / alpha_T, rtol=1e-5, atol=0)
    torch.testing.assert_close(b / alpha, b_ve, rtol=1e-5, atol=0)
    torch.testing.assert_close(c / alpha, c_ve, rtol=1e-5, atol=0)
    # The posterior too: same draw from the same noise.
    rng = torch.Generator().manual_seed(1)
    x_0, x_t, eps = torch.randn(3, 24, 1, 1, 1, generator=rng, dtype=torch.float64)
    s, t = t[:-1], t[1:]
    (alpha_s, rho_s), (alpha_t, rho_t) = VP.alpha_rho(s), VP.alpha_rho(t)
    got = VP.posterior(x_0, x_t, s, t, eps) / expand_to(alpha_s, x_0)
    expected = ve.posterior(x_0, x_t / expand_to(alpha_t, x_0), rho_s, rho_t, eps)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# --- laws --------------------------------------------------------------------------------------------------


def affine(f, n_inputs, size):
    """Return the coefficients (size,) of an affine map at each of its inputs, by feeding it units."""
    zero = [torch.zeros(size, 1, 1, 1, dtype=torch.float64) for _ in range(n_inputs)]
    assert (f(*zero) == 0).all()
    columns = [[z + (i == j) for j, z in enumerate(zero)] for i in range(n_inputs)]
    return [f(*column).flatten() for column in columns]


def pairs(bridge, n=12):
    """All pairs s < t of a few times, t up to T."""
    grid = times(bridge, n)
    i, j = torch.triu_indices(n, n, 1)
    return grid[i], grid[j]


def chapman_kolmogorov(bridge):
    """Return (weights of x_T, of x_0, variance) of q(x_s|x_0,x_T), direct and through x_t."""
    s, t = pairs(bridge)
    a_s, b_s, e_s = affine(lambda x_T, x_0, eps: bridge.sample(x_0, x_T, s, eps), 3, len(s))
    a_t, b_t, e_t = affine(lambda x_T, x_0, eps: bridge.sample(x_0, x_T, t, eps), 3, len(s))
    p_0, p_t, e_p = affine(lambda x_0, x_t, eps: bridge.posterior(x_0, x_t, s, t, eps), 3, len(s))
    direct = torch.stack([a_s, b_s, e_s**2])
    mixture = torch.stack([p_t * a_t, p_0 + p_t * b_t, e_p**2 + p_t**2 * e_t**2])
    return direct, mixture


@pytest.mark.parametrize("bridge", EXACT, ids=label)
def test_chapman_kolmogorov_is_exact(bridge):
    direct, mixture = chapman_kolmogorov(bridge)
    # Variances go up to T²: relative to it, float64 rounding of 1 − r.
    torch.testing.assert_close(mixture, direct, rtol=1e-9, atol=1e-12 * bridge.T**2)


def test_chapman_kolmogorov_of_the_dbim_table():
    """Weights over S: x_T's is exact; x_0's and the variance miss β_t's share, r β_t/S, exactly."""
    direct, mixture = chapman_kolmogorov(DBIM)
    s, t = pairs(DBIM)
    rho_s, rho_t = DBIM.alpha_rho(s)[1], DBIM.alpha_rho(t)[1]
    fwd, bwd = DBIM._rows(t)
    beta_t = fwd**2 + bwd**2 - DBIM._tables.std_fwd[-1] ** 2
    fwd_s, bwd_s = DBIM._rows(s)
    beta_s = fwd_s**2 + bwd_s**2 - DBIM._tables.std_fwd[-1] ** 2
    S, r = DBIM._tables.std_fwd[-1] ** 2, rho_s**2 / rho_t**2
    missing = torch.stack([0 * r, (r * beta_t - beta_s) / S, rho_s**2 * (r * beta_t - beta_s) / S])
    torch.testing.assert_close(mixture, direct + missing, rtol=0, atol=1e-12)
    assert missing.abs().max() < 2e-3  # β_n/S: the 0.2 % by which the table is not a bridge


@pytest.mark.parametrize("bridge", [SDE, I2SBBridge(beta_max=1.0)], ids=label)
def test_chapman_kolmogorov_of_the_i2sb_table(bridge):
    """Weights over D_n = S + β_n: everything holds up to β/S, and a + b = 1 exactly."""
    direct, mixture = chapman_kolmogorov(bridge)
    S = SUM_BETA[bridge.beta_max]
    beta_max = 4.4e-4 if bridge.beta_max == 1.0 else 1.9e-4  # peak of β_n, teachers.md §3.2
    assert (mixture - direct).abs().max() < 2 * beta_max / S
    torch.testing.assert_close(mixture[0] + mixture[1], direct[0] + direct[1], rtol=0, atol=1e-12)


def test_chapman_kolmogorov_of_the_noise_free_bridge():
    direct, mixture = chapman_kolmogorov(ODE)
    assert (direct[2] == 0).all()
    assert (mixture[2] == 0).all()
    assert (mixture - direct).abs().max() < 2 * 4.4e-4 / SUM_BETA[1.0]  # as above


@pytest.mark.parametrize("bridge", [b for b in ALL if not b.noise_free], ids=label)
def test_posterior_is_bayes_rule_on_the_process(bridge):
    """q(x_s|x_0,x_t) ∝ q(x_t|x_s) q(x_s|x_0) with x_t = (α_t/α_s) x_s + noise, by precisions, not by r."""
    s, t = pairs(bridge)
    (alpha_s, rho_s), (alpha_t, rho_t) = bridge.alpha_rho(s), bridge.alpha_rho(t)
    step = alpha_t / alpha_s
    variance = alpha_t**2 * (rho_t**2 - rho_s**2)  # of x_t given x_s
    precision = step**2 / variance + 1 / (alpha_s * rho_s) ** 2
    expected = [alpha_s / (alpha_s * rho_s) ** 2 / precision, step / variance / precision, precision**-0.5]
    got = affine(lambda x_0, x_t, eps: bridge.posterior(x_0, x_t, s, t, eps), 3, len(s))
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bridge", ALL, ids=label)
def test_shapes_dtypes_and_gradient(bridge):
    rng = torch.Generator().manual_seed(3)
    t = bridge.time(torch.rand(5, generator=rng))
    coefficients = bridge.coefficients(t)
    assert all(c.dtype == torch.float64 and c.shape == (5,) for c in coefficients)
    assert all(v.dtype == torch.float64 and v.shape == (5,) for v in (*bridge.alpha_rho(t), *bridge.drift(t)))
    assert bridge.c_noise(t).shape == (5,)
    assert all((c >= 0).all() and torch.isfinite(c).all() for c in coefficients)
    x_0, x_T, eps = torch.randn(3, 5, 3, 2, 4, generator=rng)
    x_0.requires_grad_()
    x_t = bridge.sample(x_0, x_T, t, eps)
    assert x_t.dtype == torch.float32
    assert x_t.shape == x_0.shape
    (gradient,) = torch.autograd.grad(x_t.sum(), x_0)
    assert torch.equal(gradient, coefficients.b_t.float()[:, None, None, None].expand_as(x_0))
    # The posterior is differentiable in both of its arguments.
    T = bridge.time(torch.zeros(5))
    s = bridge.time(torch.linspace(0.3, 0.6, 5))
    leaf = x_T.clone().requires_grad_()
    gradients = torch.autograd.grad(bridge.posterior(x_0, leaf, s, T, eps).sum(), [x_0, leaf])
    assert all((g > 0).all() for g in gradients)
    assert bridge.sample(x_0.half(), x_T.half(), t, eps.half()).dtype == torch.float16


def test_noise_free_bridge_ignores_eps():
    rng = torch.Generator().manual_seed(4)
    x_0, x_T, eps = torch.randn(3, 2, 3, 4, 4, generator=rng)
    s, t = torch.tensor([10, 400]), torch.tensor([700, 999])
    nan = torch.full_like(eps, math.nan)
    noisy = I2SBBridge(beta_max=1.0)
    assert (ODE.coefficients(t).c_t == 0).all()
    for draw in (
        lambda bridge, e: bridge.sample(x_0, x_T, s, e),
        lambda bridge, e: bridge.posterior(x_0, x_T, s, t, e),
    ):
        assert torch.equal(draw(ODE, eps), draw(ODE, nan))  # not even read
        assert torch.equal(draw(ODE, nan), draw(noisy, torch.zeros_like(eps)))  # same means
        assert not torch.equal(draw(noisy, eps), draw(noisy, -eps))
    assert torch.equal(ODE.alpha_rho(t)[1], noisy.alpha_rho(t)[1])


# --- times, JSON -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bridge", ALL, ids=label)
def test_time_covers_the_range(bridge):
    u = torch.arange(4000, dtype=torch.float64) / 4000
    t = bridge.time(u)
    t_min, T = both_ends(bridge)
    assert t[0] == T == bridge.T
    assert t_min.item() == pytest.approx(bridge.t_min, rel=1e-6)
    assert t.max() <= bridge.T
    assert t.min() >= bridge.t_min
    assert (t.diff() <= 0).all()
    if bridge.kind == "i2sb":
        assert t.dtype == torch.int64
        assert torch.equal(t.bincount(), torch.full((1000,), 4))  # each step as likely as any other
    else:
        assert t.dtype == torch.float32
        steps = -t.double().diff()
        # Uniform; times are float32.
        step = torch.full_like(steps, (bridge.T - bridge.t_min) / 4000)
        torch.testing.assert_close(steps, step, rtol=1e-3, atol=0)


def test_i2sb_time_near_one():
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert SDE.time(almost_one).item() == 0
    assert SDE.time(torch.ones(1)).item() == 0  # a float32 u may round to 1


@pytest.mark.parametrize("bridge", [*ALL, I2SBBridge(n_steps=16), DBIMBridge(0.5, 50)], ids=label)
def test_json_round_trip(bridge):
    config = json.loads(json.dumps(bridge.to_dict()))
    again = make_bridge(config)
    assert again == bridge
    assert type(again) is type(bridge) is BRIDGES[config["kind"]]
    assert config == again.to_dict()
    t = bridge.time(torch.linspace(0, 0.999, 7))
    for one, other in zip(bridge.coefficients(t), again.coefficients(t), strict=True):
        assert torch.equal(one, other)


def test_json_form_is_plain_and_explicit():
    assert VP.to_dict() == {"kind": "vp", "beta_d": 2.0, "beta_min": 0.1, "T": 1.0, "t_min": 1e-4}
    assert VE.to_dict() == {"kind": "ve", "T": 80.0, "t_min": 0.002}
    assert ODE.to_dict() == {"kind": "i2sb", "beta_max": 1.0, "n_steps": 1000, "noise_free": True}
    assert DBIM.to_dict() == {"kind": "dbim", "beta_max": 1.0, "n_steps": 1000, "T": 1.0, "t_min": 1e-4}
    with pytest.raises(KeyError):
        make_bridge({"kind": "unknown"})
    with pytest.raises(TypeError):
        make_bridge({"kind": "ve", "beta_d": 2.0})


def test_bridges_are_immutable_and_abstract():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VP.T = 2.0
    with pytest.raises(TypeError):
        Bridge()


@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 3, 4, 5), (3, 7)])
def test_expand_to(shape):
    v = torch.arange(3, dtype=torch.float64) / 3
    x = torch.zeros(shape)
    out = expand_to(v, x)
    assert out.shape == (3, *[1] * (len(shape) - 1))
    assert out.dtype == torch.float32
    assert torch.equal(out.flatten(), v.float())
