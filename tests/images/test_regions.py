"""Regions between lines: closed over gaps, the same when turned or scaled, whatever is drawn."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ibmd_cli.images.regions import find_regions


def drawing(side: int = 256, gap: float = 0, width: int = 4) -> np.ndarray:
    """A house in a frame of paper: wall, roof, door, two windows; each contour with a gap of so many pixels."""
    image = Image.new("L", (side, side), 255)
    draw, s = ImageDraw.Draw(image), side / 256
    wall, door = (60, 110, 200, 220), (118, 160, 148, 220)
    windows = ((75, 130, 105, 155), (160, 130, 190, 155))
    for box in (wall, door, *windows):
        draw.rectangle([v * s for v in box], outline=0, width=max(1, round(width * s)))
    draw.line([v * s for v in (60, 110, 130, 40, 200, 110)], fill=0, width=max(1, round(width * s)), joint="curve")
    ink = 1 - np.asarray(image) / 255
    half = round(gap * s / 2)
    for x, y in ((60, 190), (118, 185), (75, 140), (190, 140), (95, 75)):
        row, column = round(y * s), round(x * s)
        if half:
            ink[row - half : row + half, column - 8 : column + 9] = 0
    return ink


PLACES = ((10, 10), (180, 80), (80, 130), (200, 133), (142, 90), (142, 175))
"""A row and a column in the paper, wall, roof, door, left and right window."""


def at_places(labels: np.ndarray) -> list[int]:
    s = len(labels) / 256
    return [labels[round(y * s), round(x * s)] for y, x in PLACES]


@pytest.mark.parametrize("side", [128, 256, 512])
@pytest.mark.parametrize("gap", [0, 2, 4, 8])
def test_parts_stay_apart_through_gaps(side: int, gap: int):
    labels = find_regions(drawing(side, gap))
    assert len(set(at_places(labels))) == len(PLACES)
    assert labels.max() + 1 <= 2 * len(PLACES)


def test_closed_parts_are_one_region_each():
    labels = find_regions(drawing())
    assert labels.max() + 1 == len(PLACES)


def test_every_pixel_belongs_to_a_region_numbered_from_zero():
    labels = find_regions(drawing())
    assert labels.dtype == np.int32
    assert np.array_equal(np.unique(labels), np.arange(labels.max() + 1))
    assert labels[0, 0] == 0


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Share of pixels that agree when each region of `one` is matched with that of `other` it overlaps most."""
    table = np.zeros((one.max() + 1, other.max() + 1), int)
    np.add.at(table, (one.ravel(), other.ravel()), 1)
    return table.max(1).sum() / one.size


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("gap", [0, 6])
def test_the_same_when_turned(turns: int, gap: int):
    ink = drawing(256, gap)
    turned = np.rot90(find_regions(np.rot90(ink, turns)), -turns)
    assert min(agreement(find_regions(ink), turned), agreement(turned, find_regions(ink))) > 0.98


@pytest.mark.parametrize("gap", [0, 6])
def test_the_same_when_scaled(gap: int):
    small, large = find_regions(drawing(256, gap)), find_regions(drawing(512, gap))
    assert agreement(small, large[::2, ::2]) > 0.95


@pytest.mark.parametrize("level", [0, 1])
def test_a_sheet_of_one_kind_is_one_region(level: int):
    assert not find_regions(np.full((7, 9), level, float)).any()


def test_a_thin_part_is_not_cut_off():
    ink = np.ones((200, 400))
    ink[60:140, 40:140] = 0
    ink[94:106, 140:380] = 0  # a tail as long as the body, an eighth as wide
    labels = find_regions(ink)
    assert len(set(labels[100, 150:370])) == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (3, 2)])
def test_tiny_drawings(shape: tuple[int, int]):
    ink = np.zeros(shape)
    ink.flat[0] = 1
    assert find_regions(ink).shape == shape
