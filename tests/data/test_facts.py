"""What is said of pairs before a teacher is trained on them: each fact on real pairs that are spoilt in one way."""

import pytest
import torch

from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.data.facts import digests, shared_edges, warnings_of

DATA = ("outline2emoji", "emoji-sr4x")


@pytest.fixture(params=DATA)
def pairs(request):
    found = embedded_pairs(request.param)
    return found.x_T[:120], found.x_0[:120]


def test_good_pairs_need_no_word(pairs):
    assert list(warnings_of(*pairs, 5000)) == []


def test_too_few(pairs):
    (warning,) = warnings_of(*pairs, 299)
    assert warning.startswith("299 pairs for training")


def test_copies(pairs):
    x_T, x_0 = pairs
    x_T = torch.cat([x_0[:20] + (x_0[:20] < 254), x_T[20:]])  # a level more
    (warning,) = warnings_of(x_T, x_0, 5000)
    assert warning.startswith("20 of 120 pairs are a picture and its copy")


def test_wrong_order(pairs):
    x_T, x_0 = pairs
    (warning,) = warnings_of(x_T, x_0.roll(31, 0), 5000)
    assert "share no shapes" in warning


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -2), (-4, 3)])
def test_misaligned(pairs, right, down):
    x_T, x_0 = pairs
    (warning,) = warnings_of(x_T, x_0.roll((down, right), (2, 3)), 5000)
    assert warning.startswith(f"targets lie {right} pixels to the right of and {down} below their sources")


def test_flat_pictures_are_no_reason_to_fail():
    white = torch.full((20, 3, 16, 16), 255, dtype=torch.uint8)
    assert torch.isfinite(shared_edges(white, white)).all()
    assert len(list(warnings_of(white, white, 5000))) == 1


def test_equal_pictures_have_equal_digests(pairs):
    x_T, _ = pairs
    assert len(set(digests(torch.cat([x_T[:9], x_T[2:4]])))) == len({x.numpy().tobytes() for x in x_T[:9]})
