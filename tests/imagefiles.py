"""Small images and what becomes of their files, for the tests of this folder."""

import io

import numpy as np
import pytest
from PIL import Image

from ibmd_cli.errors import IbmdError
from ibmd_cli.images.decode import decode

FORMATS = ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF"]


def quarters() -> Image.Image:
    """Four flat quarters of different colours and sizes, which no format distorts much and no turn leaves alone."""
    image = Image.new("RGB", (48, 32), (250, 250, 250))
    image.paste((200, 40, 40), (0, 0, 32, 16))
    image.paste((40, 160, 40), (32, 0, 48, 16))
    image.paste((30, 30, 200), (0, 16, 32, 32))
    return image


def file_of(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rgb_of(content: bytes, **options) -> np.ndarray:
    image = decode(io.BytesIO(content), "test", **options).rgb
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def refusal(content: bytes, **options) -> str:
    with pytest.raises(IbmdError) as caught:
        decode(io.BytesIO(content), "some.png", **options)
    message = str(caught.value)
    assert message.startswith("some.png: ")
    assert "\n" not in message
    return message
