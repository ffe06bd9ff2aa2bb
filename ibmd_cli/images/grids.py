"""Contact sheets: small pictures of sources and results side by side, because people look."""

import math
from collections.abc import Hashable, Mapping
from pathlib import PurePath
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ibmd_cli.images.decode import shown
from ibmd_cli.images.encode import encode

if TYPE_CHECKING:
    from torch import Tensor


def labelled_grid(rows: Mapping[str, "np.ndarray | Tensor"], side: int = 96, gap: int = 4) -> Image.Image:
    """Draw `rows`, label → images, uint8 (n, 3, H, W) of one shape, enlarged by repetition to about `side` pixels."""
    scale = max(1, side // next(iter(rows.values())).shape[-1])
    font = ImageFont.load_default(14)
    margin = 2 * gap + int(max(font.getlength(label) for label in rows))
    strips = []
    for images in rows.values():
        large = np.asarray(images).repeat(scale, -1).repeat(scale, -2)
        large = np.pad(large, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=255)
        strips.append(large.transpose(2, 0, 3, 1).reshape(large.shape[2], -1, 3))
    pixels = np.pad(np.concatenate(strips), ((gap, 0), (margin, 0), (0, 0)), constant_values=255)
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for i, label in enumerate(rows):
        draw.text((margin - gap, gap + (i + 0.5) * len(strips[i]) - gap / 2), label, "black", font, anchor="rm")
    return picture


CELL, GAP, CAPTION = 128, 6, 18  # pixels
LIMIT = 200  # sources on a sheet: those that come later are left out


class Sheet:
    """A sheet of sources, each followed by its results, that is to become the file `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: dict[Hashable, dict[int, Image.Image]] = {}
        self.names: dict[Hashable, str] = {}
        self.lock = Lock()

    def add(self, source: Hashable, name: str, variant: int, before: Image.Image, after: Image.Image) -> None:
        """Add a result, with its number from 1 on, to a source called `name`; threads may do so at the same time."""
        with self.lock:
            if source not in self.rows and len(self.rows) == LIMIT:
                return
            cells = self.rows.setdefault(source, {})
            self.names[source] = name
            cells.setdefault(0, thumbnail(before))
            cells[variant] = thumbnail(after)

    def encode(self) -> bytes:
        """Return the bytes of the sheet, sources in the order of their names."""
        across = max(len(cells) for cells in self.rows.values())
        width, height = across * CELL + (across + 1) * GAP, CELL + CAPTION + GAP
        columns = max(1, min(len(self.rows), round(math.sqrt(1.5 * len(self.rows) * height / width))))
        rows = math.ceil(len(self.rows) / columns)
        sheet = Image.new("RGB", (columns * width, rows * height + GAP), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
        for i, source in enumerate(sorted(self.rows, key=lambda row: self.names[row])):
            name, cells = self.names[source], self.rows[source]
            left, top = i % columns * width + GAP, i // columns * height + GAP
            draw.text((left, top + CELL + 1), _shortened(name, font, width - 2 * GAP), "black", font)
            for j, variant in enumerate(sorted(cells)):
                cell = cells[variant]
                place = (left + j * (CELL + GAP) + (CELL - cell.width) // 2, top + (CELL - cell.height) // 2)
                sheet.paste(cell, place, cell if cell.mode == "RGBA" else None)
        return encode(sheet, PurePath(self.name).suffix)


def thumbnail(image: Image.Image) -> Image.Image:
    """Scale to a cell: small images by repetition of pixels, so that they look as they are."""
    scale = CELL / max(image.size)
    size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BICUBIC)


def _shortened(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    text = shown(name)
    while font.getlength(text) > width and len(text) > 1:
        text = "…" + text[2:]
    return text
