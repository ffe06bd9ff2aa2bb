"""Canvases larger than a model, in overlapping tiles that are blended without seams."""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

OVERLAP = 0.25  # least share of a tile that it has in common with the next


def starts(length: int, side: int) -> list[int]:
    """Return where tiles of `side` pixels begin along an axis of `length` ≥ `side` pixels, evenly spread."""
    between = max(1, math.floor(side * (1 - OVERLAP)))
    count = 1 + math.ceil((length - side) / between)
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]


def weights(places: Sequence[int], length: int, side: int) -> np.ndarray:
    """Return what each tile counts along an axis: (tiles, side), smooth, and of sum 1 at every pixel."""
    window = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    total = np.zeros(length)
    for place in places:
        total[place : place + side] += window
    return np.stack([window / total[place : place + side] for place in places]).astype(np.float32)


class Tiles:
    """Square tiles of a canvas (height, width ≥ side), row by row; results are `scale` times as large as the canvas."""

    def __init__(self, height: int, width: int, side: int, scale: int = 1) -> None:
        self.height, self.width, self.side, self.scale = height, width, side, scale
        self.tops, self.lefts = starts(height, side), starts(width, side)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def cut(self, x: np.ndarray, i: int) -> np.ndarray:
        """Return tile `i` of a canvas (C, height, width), a view."""
        top, left = self.tops[i // len(self.lefts)], self.lefts[i % len(self.lefts)]
        return x[:, top : top + self.side, left : left + self.side]

    def blank(self, channels: int) -> np.ndarray:
        """Return a result to which nothing was added: float32 (channels, scale · height, scale · width)."""
        return np.zeros((channels, self.scale * self.height, self.scale * self.width), np.float32)

    def add(self, result: np.ndarray, i: int, tile: np.ndarray) -> None:
        """Add translated tile `i`, (C, scale · side, scale · side), to a result; the sum of all is their blend."""
        row, column = divmod(i, len(self.lefts))
        top, left, side = self.scale * self.tops[row], self.scale * self.lefts[column], self.scale * self.side
        weight = self._rows[row][:, None] * self._columns[column]
        result[:, top : top + side, left : left + side] += weight * tile

    @cached_property
    def _rows(self) -> np.ndarray:
        return weights([self.scale * top for top in self.tops], self.scale * self.height, self.scale * self.side)

    @cached_property
    def _columns(self) -> np.ndarray:
        return weights([self.scale * left for left in self.lefts], self.scale * self.width, self.scale * self.side)
