"""Tensors and sizes come back as they went."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ibmd_cli.images.fit import fit, to_image, to_tensor, to_uint8, unfit

SIDES = st.integers(1, 70) | st.sampled_from([1, 37, 1000])
MODES = ["pad", "stretch", "crop"]


def test_every_value_comes_back():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
    image = Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
    x = to_tensor(image)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(to_uint8(x), values)
    assert torch.equal(to_uint8(image), values)
    assert to_image(x).tobytes() == image.tobytes()


def test_quantising_clamps_and_rounds():
    x = torch.tensor([-3.0, -1, -1 + 0.9 / 127.5, 0.999, 1, 7]).reshape(1, 1, 1, 6)
    assert to_uint8(x).flatten().tolist() == [0, 0, 1, 255, 255, 255]


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, st.sampled_from([8, 32]), st.sampled_from(MODES), st.integers(0, 255))
def test_every_size_fits_and_comes_back(width, height, side, mode, grey):
    flat = Image.new("RGB", (width, height), (grey, 0, 255 - grey))
    x, geometry = fit(flat, side, mode)
    assert x.shape == (3, side, side)
    assert to_uint8(x).flatten(1).unique(dim=1).shape[1] == 1  # flat paper, flat padding
    back = unfit(to_image(x), geometry)
    assert back.size == flat.size
    left, upper, right, lower = geometry.seen
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height
    assert back.crop(geometry.seen).tobytes() == flat.crop(geometry.seen).tobytes()
    if mode != "crop":
        assert geometry.seen == (0, 0, width, height)


@pytest.mark.parametrize("mode", MODES)
def test_the_size_of_the_model_is_left_alone(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    x, geometry = fit(Image.fromarray(pixels), 32, mode)
    assert torch.equal(to_uint8(x).permute(1, 2, 0), torch.from_numpy(pixels))
    assert unfit(to_image(x), geometry).tobytes() == pixels.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (4001, 37), (37, 4001)])
@pytest.mark.parametrize("mode", MODES)
def test_extreme_sizes(size, mode):
    x, geometry = fit(Image.new("RGB", size, "teal"), 32, mode)
    assert unfit(to_image(x), geometry).size == size


def test_padding_keeps_proportions_and_paper():
    drawing = Image.new("RGB", (60, 40), (240, 235, 220))
    drawing.paste("black", (0, 19, 60, 22))  # a line that touches the border
    x, geometry = fit(drawing, 30, "pad")
    assert geometry.place == (0, 5, 30, 25)
    padding = torch.cat([to_uint8(x)[:, :5], to_uint8(x)[:, 25:]], 1)
    assert padding.flatten(1).unique(dim=1).flatten().tolist() == [240, 235, 220]


def test_crop_shows_the_middle():
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    x, geometry = fit(wide, 10, "crop")
    assert to_uint8(x)[2, 1:-1, 1:-1].min() == 255
    back = np.asarray(unfit(to_image(x), geometry))
    assert (back[:, :30] == 255).all()
    assert (back[:, 60:] == 255).all()
    assert (back[:, 35:55, 2] == 255).all()


def test_lines_survive_reduction():
    drawing = Image.new("RGB", (600, 400), "white")
    drawing.paste("black", (290, 0, 310, 400))  # 1/30 of the width: one pixel of 32
    x, _ = fit(drawing, 32, "pad")
    ink = (1 - x[:, 8:24]).sum(dim=2) / 2
    assert ((ink - 32 / 30).abs() < 0.05).all()  # in every row
    assert x.max() == 1  # and the paper white, without overshoot
