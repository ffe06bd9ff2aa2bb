"""Pictures made of tiles: the embedded data sets, stored as mosaics named in `pairs.json`, and labelled grids.

Images are uint8 (N, 3, H, W), 0 … 255.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ibmd_cli.errors import NotAvailable, nearest
from ibmd_cli.files import assets


class EmbeddedPairs(NamedTuple):
    """Sources with their targets.

    Attributes:
        names: of the N pairs.
        x_T: sources, uint8 (N, 3, H, W).
        x_0: targets, same shape.
    """

    names: list[str]
    x_T: Tensor
    x_0: Tensor


def embedded_pairs(name: str = "outline2emoji") -> EmbeddedPairs:
    """Read the test pairs of an embedded data set.

    Raises:
        NotAvailable: there is no such data set.
    """
    folder, index = _index(name)
    names = index["test"]["names"]
    x_T = _tiles(folder / "test-sources.png", index, len(names), index.get("source_scale", 1))
    return EmbeddedPairs(names, x_T, _tiles(folder / "test-targets.png", index, len(names)))


def embedded_sources(name: str = "outline2emoji") -> Tensor:
    """Read the training sources of an embedded data set, in several poses each.

    Returns:
        x_T, uint8 (V · N, 3, H, W), all of pose 0 first. Grey sources share the memory of their three channels.

    Raises:
        NotAvailable: there is no such data set.
    """
    folder, index = _index(name)
    sources = index["sources"]
    count = len(sources["names"]) * sources["variants"]
    return _tiles(folder / "sources.png", index, count, index.get("source_scale", 1))


def _index(name: str) -> tuple[Path, dict[str, Any]]:
    file = assets() / name / "pairs.json"
    if not file.is_file():
        known = sorted(f"builtin:{f.parent.name}" for f in assets().glob("*/pairs.json"))
        raise NotAvailable(f"no data 'builtin:{name}': {nearest(f'builtin:{name}', known)}")
    return file.parent, json.loads(file.read_text(encoding="utf-8"))


def _tiles(file: Path, index: dict[str, Any], count: int, scale: int = 1) -> Tensor:
    """Cut a mosaic into its first `count` tiles, row by row, uint8 (count, 3, tile, tile).

    The tiles of low-resolution sources are stored smaller by `scale`, and enlarged by repetition of pixels.
    """
    tile, columns = index["tile"] // scale, index["columns"]
    with Image.open(file) as image:
        pixels = torch.from_numpy(np.array(image))
    rows = len(pixels) // tile
    tiles = pixels.reshape(rows, tile, columns, tile, -1).permute(0, 2, 4, 1, 3).flatten(0, 1)
    return enlarge(tiles[:count].expand(-1, 3, -1, -1), scale)


def enlarge(x: Tensor, scale: int) -> Tensor:
    """Enlarge images (N, C, h, w) by repetition of pixels to (N, C, scale·h, scale·w)."""
    return x if scale == 1 else x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
