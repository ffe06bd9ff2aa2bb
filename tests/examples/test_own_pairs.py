"""Line art of coloured SVG pictures, as `examples/own_pairs/make_pairs.py` draws it."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "examples" / "own_pairs"))
from svg_lines import line_art, rasterise, wrap  # noqa: E402

SQUARE = '<rect x="20" y="20" width="60" height="60" fill="#e33"/>'


def ink(body: str, width: float = 4) -> np.ndarray:
    return 1 - np.asarray(rasterise(line_art(wrap(body, 100, 100), width), 100).convert("L")) / 255


def test_a_shape_becomes_its_contour():
    drawn = ink(SQUARE)
    assert drawn[50, 50] == 0
    assert drawn[20, 50] > 0.9
    assert abs(drawn.sum() - 4 * 60 * 4) < 30  # four sides, four wide


@pytest.mark.parametrize(
    "transformed",
    [
        '<g transform="scale(2)"><rect x="10" y="10" width="30" height="30" fill="#e33"/></g>',
        '<g transform="translate(20 20)"><g transform="matrix(.5 0 0 .5 0 0)"><rect width="120" height="120"/></g></g>',
        '<rect transform="rotate(90 50 50)" x="20" y="20" width="60" height="60" style="fill:#e33;stroke:none"/>',
    ],
)
def test_lines_are_as_wide_whatever_the_transform(transformed: str):
    assert np.abs(ink(transformed) - ink(SQUARE)).mean() < 1e-3


def test_what_is_in_front_hides_the_lines_behind():
    front = '<rect x="40" y="0" width="30" height="100" fill="#33e"/>'
    assert ink(SQUARE + front)[20, 55] == 0
    assert ink(front + SQUARE)[20, 55] > 0.9


@pytest.mark.parametrize(
    "invisible",
    [
        '<rect x="5" y="5" width="8" height="8" fill="#000" opacity=".3"/>',
        '<rect x="5" y="5" width="8" height="8" fill="none"/>',
        '<text x="5" y="10">word</text>',
    ],
)
def test_what_is_hardly_seen_gets_no_line(invisible: str):
    assert ink(SQUARE + invisible)[:18, :18].sum() == 0
