"""Held-out scores: their values in closed form, the same draws each time, and how often they may be taken."""

import pytest
import torch

from ibmd_cli.method.distillation import Sources
from ibmd_cli.method.noise import noise_like, randn, stream
from ibmd_cli.training.heldout import SHARE, HeldOut, best, spacing, verdict

N = 24


@pytest.fixture
def held_out() -> HeldOut:
    x_T = randn((N, 3, 8, 8), stream(0, "x_T"))
    return HeldOut(x_T + 0.5 * randn(x_T.shape, stream(0, "x_0")), Sources(x_T), seed=3, at_once=7)


def exact(batch, rng):
    """The true conditional law of these pairs."""
    return batch.x_T + 0.5 * noise_like(batch.x_T, rng)


def test_scores_of_models_that_are_known(held_out: HeldOut):
    mean = held_out.judge(held_out.draw(lambda batch, rng: batch.x_T))
    sampled = held_out.judge(held_out.draw(exact, samples=8))
    # 24 images of 192 numbers: variances to 2 √(2/4608), four standard errors.
    assert mean["mse"] == pytest.approx(0.25, rel=0.09)
    assert sampled["mse"] == pytest.approx(0.5, rel=0.09)
    assert mean["spread"] == 0
    assert sampled["spread"] == pytest.approx(0.5, rel=0.06)
    assert held_out.copying() == pytest.approx(mean["mse"])
    assert sampled["energy_score"] < mean["energy_score"]
    for score in (mean, sampled):
        assert score["energy_score_low"] < score["energy_score"] < score["energy_score_high"]


def test_same_draws_each_time_whatever_fits_into_memory(held_out: HeldOut):
    other = HeldOut(held_out.x_0, held_out.sources, seed=3, at_once=N)
    assert torch.equal(held_out.draw(exact), held_out.draw(exact))
    torch.testing.assert_close(other.draw(exact), held_out.draw(exact))
    assert not torch.equal(HeldOut(held_out.x_0, held_out.sources, seed=4).draw(exact), held_out.draw(exact))


def test_all_of_the_condition_is_handed_on(held_out: HeldOut):
    seen = []

    def translate(batch, rng):
        seen.append((batch.label.tolist(), batch.mask is None, len(rng)))
        return batch.x_T

    HeldOut(held_out.x_0[:3], Sources(held_out.sources.x_T[:3], torch.tensor([4, 5, 6])), 0, 2).draw(translate, 1)
    assert seen == [([4, 5], True, 2), ([6], True, 1)]


@pytest.mark.parametrize("calls", [1, 100, 5000])
@pytest.mark.parametrize("batch_size", [1, 16, 256])
@pytest.mark.parametrize("steps", [3, 400, 20_000])
def test_scoring_takes_its_share_of_the_time_at_most(calls: int, batch_size: int, steps: int):
    every = spacing(calls, batch_size, steps)
    assert every >= max(1, round(SHARE * steps))
    if 3 * batch_size * SHARE >= 1:
        # Calls of a scoring against those of the updates between two; whole numbers of calls: a third more at most.
        assert calls <= SHARE * 3 * batch_size * every


def lines(*scores: float | None, mse: float = 0.1) -> list[dict]:
    return [{"step": i, **({} if v is None else {"energy_score": v, "mse": mse})} for i, v in enumerate(scores)]


def test_best_is_the_first_of_the_least():
    assert best(lines(None, None)) is None
    assert best(lines(None, 3.0, 2.0, None, 2.0))["step"] == 2


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (lines(None, None), []),
        (lines(*[3.0] * 5, *[2.0] * 15, 2.01), []),
        (lines(*[3.0] * 5, *[2.0] * 15, 2.5), ["was least at step 5 (2.00), and is 2.50 at the end: over-trained"]),
        (lines(*[3.0] * 18, 2.5, 2.0), ["fell from 3.00 to 2.00 in the last 20% of the steps: not converged"]),
        (lines(3.0, *[2.0] * 9, mse=0.3), ["error on held-out pairs (0.3000) is above that of the sources"]),
    ],
)
def test_verdict(log: list[dict], said: list[str]):
    found = verdict(log, copying=0.2)
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))
