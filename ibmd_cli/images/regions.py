"""Regions between the lines of a drawing: a label map that does not leak through the gaps that people leave.

Paper is split where it narrows: each local maximum of the distance to ink makes a basin (watershed), and two basins
are joined over their widest passage, unless that is a gap. A passage is a gap if it is narrower than `WIDEST_GAP` of
the drawing's side and clearly narrower than what lies on both sides of it: so a gap in a line divides, a thin part of
a figure does not.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDEST_GAP = 0.04
"""Of the drawing's longer side: a wider passage joins what lies on both sides of it."""
NARROWING = 0.7
"""A passage is a gap only if it is narrower than this share of the narrower of the two parts that it joins."""
PERSISTENCE = 0.7
"""Pixels by which a part must be wider (in radius) than the passage to it; less is the raggedness of lines."""


def find_regions(ink: "NDArray[np.floating]") -> "NDArray[np.int32]":
    """Label the regions between lines.

    Time and memory are linear in the pixels, but for the watershed's queue; no loop in Python runs over pixels.

    Args:
        ink: (H, W) in [0, 1]: 0 paper, 1 ink.

    Returns:
        int32 (H, W): regions 0 … n − 1, numbered by where they come first. Each pixel of ink belongs to the nearest
        region. A drawing without paper is one region.
    """
    from scipy import ndimage
    from skimage.segmentation import watershed

    paper = ink < 0.5
    if not paper.any():
        return np.zeros(ink.shape, np.int32)
    radius = ndimage.distance_transform_edt(paper).astype(np.float32)
    if paper.all():
        return np.zeros(ink.shape, np.int32)
    peaks = (ndimage.maximum_filter(radius, 3) == radius) & paper
    basins = watershed(-radius, ndimage.label(peaks, np.ones((3, 3)))[0], mask=paper)
    width = np.zeros(basins.max() + 1, np.float32)
    np.maximum.at(width, basins, radius)
    joined = _join(width, *_passages(basins, radius), WIDEST_GAP / 2 * max(ink.shape))[basins]
    nearest = ndimage.distance_transform_edt(joined == 0, return_distances=False, return_indices=True)
    _, first, labels = np.unique(joined[tuple(nearest)], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first)).astype(np.int32)[labels].reshape(ink.shape)


def _passages(
    basins: "NDArray[np.int32]", radius: "NDArray[np.float32]"
) -> "tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]":
    """Return the widest passage between each two basins that touch: their numbers, and its radius, widest first."""
    ones, others, radii = [], [], []
    for a, b in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        touch = (basins[a] != basins[b]) & (basins[a] > 0) & (basins[b] > 0)
        one, other = basins[a][touch], basins[b][touch]
        ones.append(np.minimum(one, other))
        others.append(np.maximum(one, other))
        radii.append(np.minimum(radius[a][touch], radius[b][touch]))
    one, other, wide = np.concatenate(ones), np.concatenate(others), np.concatenate(radii)
    order = np.lexsort((other, one, -wide))
    one, other, wide = one[order], other[order], wide[order]
    _, first = np.unique(np.stack([one, other]), axis=1, return_index=True)
    first.sort()
    return one[first], other[first], wide[first]


def _join(
    width: "NDArray[np.float32]",
    one: "NDArray[np.int64]",
    other: "NDArray[np.int64]",
    passage: "NDArray[np.float32]",
    widest_gap: float,
) -> "NDArray[np.int64]":
    """Join basins over their passages (union-find); return the number of each basin's region, 0 for ink."""
    root, width = np.arange(len(width)), width.copy()

    def find(basin: int) -> int:
        while root[basin] != basin:
            root[basin] = basin = root[root[basin]]
        return basin

    for a, b, wide in zip(one.tolist(), other.tolist(), passage.tolist(), strict=True):
        a, b = sorted((find(a), find(b)), key=width.__getitem__)
        if a != b and (wide > widest_gap or wide > NARROWING * width[a] or width[a] - wide < PERSISTENCE):
            root[a] = b
    return np.array([find(basin) for basin in range(len(root))])
