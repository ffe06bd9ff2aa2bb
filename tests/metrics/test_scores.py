"""Scores against closed forms, loops, identities and the field's code; the feature network against its own package."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from parity.measuring import features, outputs
from parity.measuring import normal as named
from torch import Tensor

from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.errors import IbmdError, NotAvailable
from ibmd_cli.method.noise import stream
from ibmd_cli.metrics.distances import (
    frechet,
    frechet_terms,
    inception_score,
    kid_blocks,
    kid_floor,
    kid_terms,
    moments,
)
from ibmd_cli.metrics.features import EffLite0
from ibmd_cli.metrics.intervals import estimate, pseudo_values
from ibmd_cli.metrics.scores import diversity, energy_score, map_distance, mse, psnr, ssim
from ibmd_cli.metrics.weights import FILES


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=stream(seed, "test"))


def kid(samples: Tensor, truth: Tensor) -> float:
    return estimate(kid_terms(samples, truth)).value


# ---------------------------------------------------------------------------------------------------- energy score


@pytest.mark.parametrize("y", [0.0, 0.7, -2.0])
def test_energy_score_is_crps_in_one_dimension(y: float):
    samples = normal(4, 40_000, 1, 1, 1)
    found = energy_score(samples, torch.full((40_000, 1, 1, 1), y), pool=1).mean().item()
    Phi, phi = 0.5 * (1 + math.erf(y / 2**0.5)), math.exp(-(y**2) / 2) / (2 * math.pi) ** 0.5
    crps = y * (2 * Phi - 1) + 2 * phi - 1 / math.pi**0.5
    assert found == pytest.approx(crps, abs=0.012)  # 4 standard errors


def test_energy_score_closed_form_in_many_dimensions_with_pooling():
    # 4×4 means of unit normals are N(0, 1/16); with y = 0, E‖X‖ = s √2 Γ((D+1)/2)/Γ(D/2), E‖X − X'‖ = √2 E‖X‖.
    D, s = 12, 0.25
    mean_norm = s * 2**0.5 * math.exp(math.lgamma((D + 1) / 2) - math.lgamma(D / 2))
    samples = normal(4, 2000, 3, 8, 8)
    found = energy_score(samples, torch.zeros(2000, 3, 8, 8)).mean().item()
    assert found == pytest.approx(mean_norm * (1 - 0.5**0.5), abs=0.006)


def test_energy_score_is_unbiased_in_the_number_of_samples():
    truth = normal(4000, 1, 4, 4, seed=1)
    few, many = (energy_score(normal(m, 4000, 1, 4, 4, seed=m), truth, pool=1) for m in (2, 12))
    assert (few - many).mean().abs() < 4 * (few - many).std() / 4000**0.5


def test_energy_score_is_proper():
    N = 3000
    mean = normal(N, 1, 4, 4)
    truth, draws = mean + 0.5 * normal(N, 1, 4, 4, seed=1), 0.5 * normal(4, N, 1, 4, 4, seed=2)
    right = energy_score(mean + draws, truth, pool=1).mean()
    wrong = {
        "collapsed to the mean": mean[None],
        "too narrow": mean + 0.5 * draws,
        "too wide": mean + 2 * draws,
        "shifted": mean + 0.3 + draws,
        "blind to the source": mean.roll(1, 0) + draws,
    }
    for what, samples in wrong.items():
        assert energy_score(samples, truth, pool=1).mean() > right + 0.01, what


# --------------------------------------------------------------------------------------------------- other scores


def test_psnr():
    truth = torch.zeros(2, 3, 4, 4)
    samples = torch.stack([truth + 2 / 255, truth + 20 / 255])  # errors of 1 and 10 grey levels
    one, ten = 20 * math.log10(255), 20 * math.log10(25.5)
    assert psnr(samples, truth).tolist() == pytest.approx([(one + ten) / 2] * 2, abs=1e-3)
    assert psnr(truth[None], truth).tolist() == [100, 100]


def test_mse_is_on_pixels_from_minus_one_to_one():
    truth = torch.zeros(2, 3, 4, 4)
    assert mse(torch.stack([truth + 0.5, truth - 1]), truth).tolist() == pytest.approx([0.625] * 2)


def test_ssim_is_that_of_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    a, b = embedded_pairs().x_0[:4], embedded_pairs().x_T[:4]
    found = ssim((a.float() / 127.5 - 1)[None], b.float() / 127.5 - 1)
    for i in range(4):
        x, y = (v[i].permute(1, 2, 0).numpy() for v in (a, b))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
        assert found[i].item() == pytest.approx(
            skimage.structural_similarity(x, y, channel_axis=2, **options), abs=1e-6
        )
    truth = b.float() / 127.5 - 1
    assert ssim(truth[None], truth).tolist() == pytest.approx([1] * 4)


def test_diversity():
    assert diversity(normal(1, 5, 3, 4, 4)).tolist() == [0] * 5
    spread = torch.tensor([0.1, 0.3]).reshape(1, 2, 1, 1, 1)
    assert diversity(spread * normal(400, 2, 3, 8, 8)).tolist() == pytest.approx([0.1, 0.3], rel=0.02)


def test_map_distance():
    a, b = [normal(2, 8, 4, 4), normal(2, 5, 2, 2)], [normal(2, 8, 4, 4, seed=1), normal(2, 5, 2, 2, seed=1)]
    assert map_distance(a, a).abs().max() < 1e-10
    assert map_distance(a, [-v for v in a]).tolist() == pytest.approx([4, 4])
    assert torch.allclose(map_distance(a, b), map_distance([3 * v for v in a], b))  # only directions count
    by_hand = [
        sum(((p[i] / p[i].norm(dim=0) - q[i] / q[i].norm(dim=0)) ** 2).sum(0).mean() for p, q in zip(a, b, strict=True))
        for i in range(2)
    ]
    assert map_distance(a, b).tolist() == pytest.approx([float(v) / 2 for v in by_hand])


# ------------------------------------------------------------------------------------------------------------ kid


def test_kid_equals_the_double_loop():
    samples, truth = normal(2, 6, 5), normal(6, 5, seed=1)
    total = 0.0
    for x in samples.double():
        y = truth.double()
        for i in range(6):
            for j in range(6):
                if i != j:
                    pairs = (x[i], x[j], 1), (y[i], y[j], 1), (x[i], y[j], -1), (y[i], x[j], -1)
                    total += sum(sign * (float(u @ v) / 5 + 1) ** 3 for u, v, sign in pairs)
    assert kid(samples, truth) == pytest.approx(total / (2 * 30), rel=1e-9)


@pytest.mark.parametrize("rho", [0.0, 0.9], ids=["independent", "same drawings"])
def test_kid_is_unbiased_for_one_law(rho: float):
    """Zero in the mean for 20 images, even where sample and truth of one drawing are alike."""
    values = []
    for seed in range(300):
        truth = normal(20, 4, seed=seed)
        x = rho * truth + (1 - rho**2) ** 0.5 * normal(1, 20, 4, seed=1000 + seed)
        values.append(kid(x, truth))
    v = torch.tensor(values)
    assert v.mean().abs() < 3.5 * v.std() / 300**0.5


def test_kid_of_equal_sets_is_zero_and_grows_with_distance():
    truth = normal(50, 8)
    assert kid(truth[None], truth) == pytest.approx(0, abs=1e-12)
    shifted = [kid(truth[None] + shift, truth) for shift in (0.2, 0.5, 1.0)]
    assert 0 < shifted[0] < shifted[1] < shifted[2]


def test_kid_floor_is_zero_in_the_mean_and_shrinks_with_n():
    wide, narrow = (kid_floor(normal(n, 8), 500, stream(0)) for n in (60, 240))
    assert wide.low < 0 < wide.high
    assert abs(wide.value) < 0.1 * (wide.high - wide.low)
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(4, rel=0.4)
    odd = kid_floor(normal(9, 3), 500, stream(0))
    assert odd.low < 0 < odd.high


def test_kid_is_that_of_clean_fid():
    a, b = features("A", 400, 32), features("B", 500, 32)
    for n, reference in zip((400, 100), outputs()["kid"].tolist(), strict=True):
        terms = kid_terms(b[None, :n], a[:n], usual=True)
        assert estimate(terms).value == pytest.approx(reference, rel=1e-5)


def test_kid_of_many_images_is_the_mean_over_blocks(monkeypatch: pytest.MonkeyPatch):
    truth, samples = normal(2100, 4), normal(1, 2100, 4, seed=1) + 0.3
    whole = kid(samples, truth)
    blocks = kid_blocks(samples, truth, seed=0)
    assert blocks.shape == (2100,)
    _, low, high = estimate(blocks)
    assert low < whole < high
    assert blocks.mean().item() == pytest.approx(whole, rel=0.2)
    assert kid_blocks(samples[:, :200], truth[:200], seed=0).shape == (200, 200)


# ------------------------------------------------------------------------------------------------ Fréchet distance


def test_moments_are_those_of_numpy_and_need_no_array_of_all():
    import numpy as np

    x = features("A", 5000, 8) + 100  # far from 0: sums of squares would lose digits
    found = moments(batch for batch in x.split(700))
    assert found.images == 5000
    assert np.allclose(found.mean, x.double().numpy().mean(0), rtol=1e-12)
    assert np.allclose(found.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9)


def test_frechet_distance_is_that_of_pytorch_fid_and_clean_fid():
    a, b = moments([features("A", 400, 32)]), moments([features("B", 500, 32)])
    for reference in outputs()["fid"].tolist():
        assert frechet(a, b) == pytest.approx(reference, rel=1e-4)
        assert frechet(b, a) == pytest.approx(reference, rel=1e-4)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_normal_laws_in_closed_form():
    x = named("x", 300, 4)
    scale, shift = torch.tensor([1.0, 2.0, 0.5, 1.5]), torch.tensor([0.0, 1.0, 0.0, -2.0])
    a, b = moments([x]), moments([x * 3 + shift])  # covariance 9 Σ: distance ‖Δμ‖² + (3 − 1)² Tr Σ
    expected = (a.mean - b.mean).square().sum() + 4 * a.covariance.trace()
    assert frechet(a, b) == pytest.approx(float(expected), rel=1e-7)
    a, b = moments([x]), moments([x * scale])
    assert frechet(a, b) > 0


def test_terms_of_the_frechet_distance_are_its_derivative():
    x, y = features("A", 60, 5), features("B", 60, 5)
    a, b = moments([x]), moments([y])
    terms = frechet_terms(x, a, b, y)
    assert terms.mean().item() == pytest.approx(frechet(a, b), rel=1e-9)
    weights = torch.ones(60).double()

    def weighed(values: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        w, v = w / w.sum(), values.double()
        mean = w @ v
        return mean, (v - mean).T @ ((v - mean) * w[:, None])

    def distance(w: Tensor) -> float:
        laws = [moments([v])._replace(mean=m, covariance=c) for v in (x, y) for m, c in [weighed(v, w)]]
        return frechet(*laws)

    base, step = distance(weights), 1e-5
    for i in (0, 7, 59):
        nudged = weights.clone()
        nudged[i] += step
        slope = (distance(nudged) - base) / step * 60
        assert terms[i].item() - terms.mean().item() == pytest.approx(slope, abs=0.05 * terms.std().item())


def test_interval_of_the_frechet_distance_has_the_width_of_its_spread():
    values, widths = [], []
    for seed in range(60):
        x, y = normal(300, 4, seed=seed) * 1.3 + 0.5, normal(300, 4, seed=900 + seed)
        a, b = moments([x]), moments([y])
        value, low, high = estimate(frechet_terms(x, a, b, y))
        values.append(value)
        widths.append(high - low)
    spread = torch.tensor(values).std().item()
    assert 3.92 * spread == pytest.approx(sum(widths) / 60, rel=0.3)


def test_inception_score_is_that_of_torch_fidelity(monkeypatch: pytest.MonkeyPatch):
    logits = 2 * named("logits", 1000, 16)
    for splits, reference in zip((1, 10), outputs()["is"].tolist(), strict=True):
        monkeypatch.setattr("ibmd_cli.metrics.distances.IS_SPLIT", 1000 // splits)
        assert inception_score(logits) == pytest.approx(reference, rel=1e-6)


def test_one_image_more_is_no_split_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """Its inception score would be 1, and count as much as that of a whole split."""
    monkeypatch.setattr("ibmd_cli.metrics.distances.IS_SPLIT", 100)
    logits = 4 * normal(101, 16)
    assert inception_score(logits) == pytest.approx(inception_score(logits[:100]), rel=0.05)


# ------------------------------------------------------------------------------------------------------ intervals


def test_jackknife_of_a_set_distance_leaves_one_out_each_time():
    terms = kid_terms(normal(3, 7, 4), normal(7, 4, seed=1))
    found = pseudo_values(terms)
    whole = kid(normal(3, 7, 4), normal(7, 4, seed=1))
    assert found.mean().item() == pytest.approx(whole)
    for i in range(7):
        others = [k for k in range(7) if k != i]
        without = pseudo_values(terms[others][:, others]).mean().item()
        assert found[i].item() == pytest.approx(7 * whole - 6 * without)


@pytest.mark.parametrize(("n", "quantile"), [(5, 7.190), (7, 4.3027), (28, 2.2622), (301, 1.9840), (1_000_001, 1.9600)])
def test_intervals_have_the_quantiles_of_tables(n: int, quantile: float):
    """Student's t with (n − 1) / 3 degrees of freedom."""
    terms = normal(n).double()
    value, low, high = estimate(terms)
    assert (high - value) / (terms.std().item() / n**0.5) == pytest.approx(quantile, rel=1e-3)
    assert high - value == pytest.approx(value - low)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("form", [1, 2], ids=["mean", "set distance"])
def test_fewer_drawings_than_five_have_no_interval(n: int, form: int):
    assert estimate(normal(*[n] * form))[1:] == (None, None)


TRIALS = 800
KINDS = {  # terms of drawings by chance → their expectation
    "normal": (lambda u: torch.special.ndtri(u), 0.0),
    "exponential": (lambda u: -u.log(), 1.0),
    "lognormal": (lambda u: torch.special.ndtri(u).exp(), math.exp(0.5)),
    "chi-square": (lambda u: torch.special.ndtri(u).square(), 1.0),
}


@pytest.mark.parametrize("n", [5, 10, 20, 60])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("paired", [False, True], ids=["mean", "difference"])
def test_intervals_cover_what_they_estimate(kind: str, n: int, paired: bool):
    """95 % is aimed at; nine in ten at least, of few and of skewed terms too, less three standard errors of chance."""
    make, mean = KINDS[kind]
    u = torch.rand(2, TRIALS, n, generator=stream(7, kind, n), dtype=torch.float64)
    terms = make(u[0]) - (0.5 * make(u[1]) if paired else 0)
    expected = mean * (0.5 if paired else 1)
    hits = sum(low <= expected <= high for _, low, high in map(estimate, terms))
    assert hits / TRIALS >= 0.9 - 3 * (0.9 * 0.1 / TRIALS) ** 0.5


@pytest.mark.parametrize("n", [5, 10, 40])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.95])
def test_intervals_of_shares_cover_them(n: int, share: float):
    """Five images out of five do not show that it is all of them."""
    u = torch.rand(TRIALS, n, generator=stream(7, "share", n), dtype=torch.float64)
    hits = sum(low <= share <= high for _, low, high in (estimate((x < share).float(), (0, 1)) for x in u))
    assert hits / TRIALS >= 0.9
    value, low, high = estimate(torch.ones(n), (0, 1))
    assert low < value == 1.0 <= high


@pytest.mark.parametrize("n", [10, 30])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_intervals_of_set_distances_cover_them(n: int, shift: float):
    def pair(n: int, seed: int) -> tuple[Tensor, Tensor]:
        truth = normal(n, 4, seed=seed)
        return 0.6 * truth[None] + 0.8 * normal(1, n, 4, seed=5000 + seed) + shift, truth

    expected = sum(kid(*pair(1000, 100 + seed)) for seed in range(4)) / 4 if shift else 0.0
    found = [estimate(kid_terms(*pair(n, seed))) for seed in range(300)]
    assert sum(low <= expected <= high for _, low, high in found) / 300 >= 0.9


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_intervals_of_frechet_distances_cover_that_of_as_many_images(shift: float):
    found = []
    for seed in range(200):
        x, y = 1.2 * normal(60, 3, seed=seed) + shift, normal(60, 3, seed=900 + seed)
        found.append(estimate(frechet_terms(x, moments([x]), moments([y]), y)))
    expected = sum(value for value, _, _ in found) / 200
    assert sum(low <= expected <= high for _, low, high in found) / 200 >= 0.9


def test_a_floor_holds_what_one_halving_gives():
    """A random halving of the same images lies within its interval in 95 % of the cases."""
    hits = 0
    for seed in range(200):
        truth = normal(12, 3, seed=seed)
        _, low, high = kid_floor(truth, 200, stream(seed, "a"))
        hits += low <= kid_floor(truth, 1, stream(seed, "b")).value <= high
    assert hits / 200 >= 0.9


def test_distance_of_a_set_from_itself_is_not_negative():
    for seed in range(20):
        x = moments([normal(40, 16, seed=seed) * 100])
        assert frechet(x, x) >= 0
        assert frechet_terms(normal(40, 16, seed=seed) * 100, x, x).mean() >= -1e-9


def test_paired_difference_is_tighter_than_two_intervals():
    drawing = normal(100)  # how hard each drawing is
    a, b = drawing + 0.1 * normal(100, seed=1), drawing + 0.1 * normal(100, seed=2) + 0.1
    gap, alone = estimate(b - a), estimate(a)
    assert gap.low > 0
    assert gap.high - gap.low < 0.3 * (alone.high - alone.low)


# ------------------------------------------------------------------------------------------------------- features


@pytest.fixture(scope="module")
def network() -> EffLite0:
    return EffLite0()


@pytest.fixture(scope="module")
def targets() -> Tensor:
    return embedded_pairs().x_0[::4]


def blurred(x: Tensor, sigma: float) -> Tensor:
    taps = torch.exp(-(torch.arange(-6, 7).float() ** 2) / (2 * sigma**2))
    kernel = (taps / taps.sum())[None, None, None].expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, (6, 6, 6, 6), mode="replicate"), kernel, groups=3)
    return F.conv2d(x, kernel.transpose(2, 3), groups=3)


def test_features_are_those_of_the_package(network: EffLite0, targets: Tensor):
    x = F.interpolate(targets[:3].float() / 255, (128, 128), mode="bilinear", antialias=True)
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    seen = network(targets[:3])
    with torch.no_grad():
        assert torch.allclose(seen.logits, network.net(x), atol=1e-3)
    assert seen.pooled.shape == (3, 1280)
    assert [m.shape[-1] for m in seen.maps] == [64, 32, 16, 8, 4]
    alone = network(targets[1:2])
    assert torch.allclose(alone.pooled[0], seen.pooled[1], atol=1e-4)  # no batch statistics


def test_both_scores_grow_with_blur_and_with_noise(network: EffLite0, targets: Tensor):
    truth, clean = network(targets), targets.float() / 127.5 - 1
    degraded = {
        "blur": [blurred(clean, sigma) for sigma in (0.4, 0.8, 1.6)],
        "noise": [(clean + s * normal(*clean.shape)).clamp(-1, 1) for s in (0.05, 0.15, 0.4)],
    }
    for what, levels in degraded.items():
        scores = []
        for images in levels:
            seen = network(((images + 1) * 127.5).round().byte())
            distance = network.distance(seen.maps, truth.maps).mean().item()
            scores.append((kid(seen.pooled[None], truth.pooled), distance))
        for values in zip(*scores, strict=True):
            assert 0 < values[0] < values[1] < values[2], what


def test_missing_extra_names_the_cure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(NotAvailable, match=r"pip install 'ibmd-cli\[eval\]'"):
        EffLite0()


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FILES, "efflite0", FILES["efflite0"]._replace(digest="0" * 64))
    with pytest.raises(IbmdError, match=r"sha256 57934424…, expected 00000000…"):
        EffLite0()
