"""Written files come back as they went, or are refused."""

import numpy as np
import pytest
from imagefiles import quarters, rgb_of
from PIL import Image

from ibmd_cli.errors import IbmdError
from ibmd_cli.images.encode import WRITABLE, encode


@pytest.mark.parametrize("suffix", WRITABLE)
def test_written_files_come_back(suffix):
    picture = quarters()
    error = np.abs(rgb_of(encode(picture, suffix)) - np.asarray(picture))
    exact = suffix in (".png", ".webp", ".tif", ".tiff", ".bmp")
    assert error.max() <= (0 if exact else 40)  # at edges
    assert error.mean() <= 2


def test_what_a_format_cannot_hold():
    with pytest.raises(IbmdError, match=r"use \.png"):
        encode(Image.new("RGB", (20_000, 1)), ".webp")
