"""Augmentation: sides of a pair change together, each image in its own way, and only as much as is asked for."""

import pytest
import torch

from ibmd_cli.data.augment import Augmentation
from ibmd_cli.method.noise import BatchStreams, randn, stream


def images(n=40):
    x = randn((n, 3, 8, 8), stream(0)).clamp(-1, 1)
    return torch.cat([x, x], 1)


@pytest.mark.parametrize("change", [(True,), (False, 3), (False, 0, 0.3), (True, 2, 0.2)], ids=str)
def test_source_and_target_change_together(change: tuple):
    x, change = images(), Augmentation(*change)
    y = change(x, BatchStreams(range(40), 0, "a"))
    assert torch.equal(y[:, :3], y[:, 3:])
    changed = (y != x).flatten(1).any(1)
    assert changed.sum() > 10
    assert y.abs().max() <= 1
    parts = [change(x[rows], BatchStreams(rows, 0, "a", size=40)) for rows in (range(25), range(25, 40))]
    assert torch.equal(torch.cat(parts), y)  # whatever the micro-batch


def test_nothing_is_changed_unless_asked_for():
    x = images()
    assert torch.equal(Augmentation(False)(x, stream(1)), x)


def test_mirrors_half():
    x = images(400)
    y = Augmentation(True)(x, stream(2))
    mirrored = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(y, x, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(y, x, strict=True)])
    assert (mirrored ^ kept).all()
    assert 160 < mirrored.sum() < 240  # four standard deviations


def test_shifts_reach_each_distance_and_no_further():
    n = 600
    x = torch.arange(64.0).reshape(1, 1, 8, 8).expand(n, 3, 8, 8) / 64
    y = Augmentation(False, shift=2)(x, stream(3))
    middle = (y[:, 0, 4, 4] * 64 - 36).long()
    down, right = torch.div(middle + 4, 8, rounding_mode="floor"), (middle + 4) % 8 - 4
    assert set(down.tolist()) == set(right.tolist()) == {-2, -1, 0, 1, 2}
    assert torch.unique(torch.stack([down, right]), dim=1).shape[1] == 25


def test_colour_multiplies_light():
    x = torch.full((300, 3, 2, 2), -0.5)
    y = Augmentation(False, colour=0.2)(x, stream(4))
    gain = ((y + 1) / 0.5).log()
    assert gain.abs().max() <= 0.2 + 1e-5
    assert gain.std(0).min() > 0.1
    assert (gain[..., :1, :1] == gain).all()
