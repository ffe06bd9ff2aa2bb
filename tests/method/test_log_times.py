"""ℓ = log(b/c): its inverse, the density of times in it, the grid of times in it."""

import math

import pytest
import torch

from ibmd_cli.method.bridges import DBIMBridge, I2SBBridge, VEBridge, VPBridge
from ibmd_cli.method.distillation import Setup, draw_time
from ibmd_cli.method.log_times import LogTimes
from ibmd_cli.method.noise import stream

CONTINUOUS = [VPBridge(), VPBridge(beta_d=8.0), VPBridge(beta_d=0.0, beta_min=0.5), VEBridge(), VEBridge(T=2.0)]
TABLES = [I2SBBridge(beta_max=0.3), I2SBBridge(beta_max=1.0, n_steps=20), DBIMBridge()]


def label(bridge):
    return f"{bridge.kind}-{'-'.join(f'{v:g}' for v in bridge.to_dict().values() if not isinstance(v, str))}"


@pytest.mark.parametrize("bridge", [*CONTINUOUS, *TABLES], ids=label)
def test_ell_is_the_logarithm_of_b_over_c(bridge):
    t = bridge.time(torch.linspace(0.01, 0.99, 25, dtype=torch.float64))
    _, b, c = bridge.coefficients(t)
    torch.testing.assert_close(bridge.ell(t), (b / c).log(), rtol=1e-9, atol=1e-9)
    assert (bridge.ell(t.sort().values).diff() <= 0).all()


@pytest.mark.parametrize("bridge", CONTINUOUS, ids=label)
def test_time_at_inverts_ell(bridge):
    ell = torch.linspace(-9, 6, 61, dtype=torch.float64)
    t = bridge.time_at(ell)
    assert ((t > 0) & (t <= bridge.T)).all()
    # 1/ρ_t² − 1/ρ_T² cancels near T: e^−18 of it is left, of 16 digits and a half.
    torch.testing.assert_close(bridge.ell(t), ell, rtol=0, atol=1e-4)
    t = torch.linspace(bridge.t_min, bridge.T * 0.999, 41, dtype=torch.float64)
    torch.testing.assert_close(bridge.time_at(bridge.ell(t)), t, rtol=1e-9, atol=0)
    ends = torch.tensor([bridge.T, 0.0], dtype=torch.float64)
    assert bridge.ell(ends).tolist() == [-math.inf, math.inf]
    assert bridge.time_at(bridge.ell(ends)).tolist() == pytest.approx([bridge.T, 0.0], rel=1e-12)


@pytest.mark.parametrize("bridge", TABLES, ids=label)
def test_time_at_is_the_nearest_row_of_a_table(bridge):
    rows = torch.arange(bridge.n_steps)
    t = rows if bridge.kind == "i2sb" else rows / (bridge.n_steps - 1)
    table = bridge.ell(t)
    assert torch.equal(bridge.index(bridge.time_at(table)), rows)
    ell = torch.linspace(-12, 12, 97, dtype=torch.float64)
    nearest = (table[None] - ell[:, None]).abs().argmin(1)
    assert torch.equal(bridge.index(bridge.time_at(ell)), nearest)


def test_bridge_without_noise_has_no_ell():
    with pytest.raises(ValueError, match="a bridge without noise has no ℓ"):
        LogTimes().grid(I2SBBridge(noise_free=True), 3)


@pytest.mark.parametrize("wrong", [(0.0, 1.0, 0.1), (2.0, 1.0, 0.1), (0.1, 1.0, 1.0)])
def test_empty_range_is_refused(wrong):
    with pytest.raises(ValueError, match="expected a rising range"):
        LogTimes(*wrong)


@pytest.mark.parametrize("bridge", [VPBridge(beta_d=8.0), VEBridge()], ids=label)
def test_density_is_uniform_in_ell_with_its_share_at_T(bridge):
    times, n = LogTimes(0.1, 40.0, at_T=0.25), 40_000
    setup = Setup(bridge, torch.ones_like, (bridge.T,), log_times=times)
    t, _ = draw_time(setup, torch.zeros(n, 1), stream(0))
    assert t.dtype == torch.float32
    at_T = t == bridge.T
    # Four standard errors of a share of n.
    assert at_T.double().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / n))
    ell = bridge.ell(t[~at_T].double())
    low, high = -math.log(40.0), -math.log(0.1)
    assert ell.min() >= low - 1e-3
    assert ell.max() <= high + 1e-3
    counts = torch.histc(ell, 20, low, high)
    expected = (~at_T).sum() / 20
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_density_of_a_table_gives_each_row_its_width_in_ell():
    bridge, times, n = I2SBBridge(beta_max=0.3, n_steps=20), LogTimes(1e-3, 1e3, at_T=0.0), 40_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    t = times.time(bridge, u)
    assert t.dtype == torch.int64
    table = bridge.ell(torch.arange(20))
    middles = torch.cat([table[:1], (table[1:] + table[:-1]) / 2, table[-1:]])
    share = -middles.diff() / (table[0] - table[-1])
    torch.testing.assert_close(torch.bincount(t, minlength=20) / n, share, rtol=0, atol=2 / n, check_dtype=False)


@pytest.mark.parametrize("bridge", [*CONTINUOUS, *TABLES], ids=label)
def test_as_the_own_clock_u_runs_from_T_to_the_target(bridge):
    times = LogTimes(at_T=0.125)
    t = times.time(bridge, torch.linspace(0, 1 - 1e-12, 200, dtype=torch.float64))
    assert t[0] == bridge.T
    assert t.dtype == bridge.time(torch.zeros(1)).dtype
    assert (t.diff() <= 0).all()
    assert (t >= bridge.t_min).all()
    assert (t[:25] == bridge.T).all()


@pytest.mark.parametrize("bridge", CONTINUOUS, ids=label)
def test_grid_is_evenly_spaced_in_ell(bridge):
    t = LogTimes(0.05, 50.0).grid(bridge, 9)
    ell = bridge.ell(t)
    assert ell[0].item() == pytest.approx(-math.log(50.0), abs=1e-9)
    assert ell[-1].item() == pytest.approx(-math.log(0.05), abs=1e-9)
    torch.testing.assert_close(ell.diff(), ell.diff().mean().expand(8), rtol=1e-9, atol=0)
