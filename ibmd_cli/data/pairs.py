"""Test data for `ibmd eval`: sources with their targets, read when they are needed, in the order of their names.

Images are upright RGB: grey is repeated over the channels, and transparency laid on white (`images.decode`).
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibmd_cli.data.datasets import SOURCE, TARGET, DataSet
from ibmd_cli.data.degradations import degrade, evaluation_mask, fill_hole
from ibmd_cli.data.preprocessing import Preprocessing
from ibmd_cli.data.references import check_holes, has_sources, open_data_set
from ibmd_cli.errors import UsageError
from ibmd_cli.method.distillation import Sources
from ibmd_cli.method.noise import stream

READERS = 4
"""Threads that read images."""
IMAGENET = 1000
"""Classes, if the model takes none, that folders are taken for."""


class Batch(NamedTuple):
    """Some pairs.

    Attributes:
        names: of the B pairs.
        sources: x_T with classes and masks where the model takes them.
        truth: targets, uint8 (B, 3, H, W).
    """

    names: list[str]
    sources: Sources
    truth: Tensor


def batches(count: int, batch_size: int) -> list[list[int]]:
    """Return the numbers 0 … count − 1 in batches of nearly equal size, at most `batch_size`."""
    return [rows.tolist() for rows in torch.arange(count).tensor_split(-(-count // batch_size))]


def floats(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class Pairs:
    """The pairs of a data set, by number.

    Args:
        data: with targets.
        size: height and width of the images.
        degradation: that makes the sources of targets, or "".
        fill: what fills the holes of "inpaint-…".
        masks: file of the free-form masks; mask i belongs to image i, as in the published evaluations.
        seed: of the noise that fills holes.

    Attributes:
        names: of the N pairs, in their order.
        digest: changes with the data, as far as names and sizes of files tell.
        classes: whether the true class of each image is known.
    """

    def __init__(self, data: DataSet, size: int, degradation: str, fill: str | None, masks: str, seed: int) -> None:
        self.data, self.size, self.degradation, self.fill = data, size, degradation, fill
        self.masks, self.seed = masks, seed
        self.names: Sequence[str] = [data.title(row) for row in range(len(data))]
        self.digest, self.classes = data.digest, bool(data.labels)

    def read(self, rows: Sequence[int]) -> Batch:
        """Read some of the pairs.

        Raises:
            IbmdError: an image cannot be read, or is of another size.
        """
        sides = (SOURCE, TARGET) if SOURCE in self.data.preprocess else (TARGET,)
        with ThreadPoolExecutor(READERS) as readers:
            images = torch.stack(list(readers.map(lambda row: self.data.read(row, *sides), rows)))
        drawn, truth = images[:, :-3], images[:, -3:]
        names = [self.names[i] for i in rows]
        labels = torch.tensor([self.data.labels[i] for i in rows]) if self.classes else None
        sources = Sources(floats(drawn)) if drawn.numel() else self._made(names, rows, floats(truth))
        return Batch(names, sources._replace(label=labels), truth)

    def _made(self, names: list[str], rows: Sequence[int], x_0: Tensor) -> Sources:
        if self.fill is None:
            return Sources(degrade(x_0, self.degradation))
        mask = torch.stack([evaluation_mask(self.degradation, i, self.size, self.masks) for i in rows])
        noise = [stream(self.seed, "hole", name) for name in names]
        return Sources(fill_hole(x_0, mask, self.fill, noise), mask=mask)


def open_pairs(
    data: str, config: Mapping[str, Any], *, degrade: str, masks: str, labels: str, layout: str, fit: str, seed: int
) -> Pairs:
    """Find the pairs that `--data` names, without reading them.

    Args:
        data: see `references.open_data_set`.
        config: of the model.
        degrade: key of `degradations.DEGRADATIONS`, or "".
        masks: file of the free-form masks.
        labels: CSV file of classes.
        layout: "ab" or "".
        fit: one of `preprocessing.FITS`, or "none": refuse pairs that are not of the model's size.
        seed: of the noise that fills holes.

    Raises:
        NotAvailable, UsageError, IbmdError: see `open_data_set`; or degradation and model do not go together.
    """
    size, classes = int(config["image"]["size"]), config["classes"]
    fill = (config["mask"] or {}).get("fill")
    if has_sources(data) and (degrade or layout):
        raise UsageError(f"--data {data}: these are pairs already: leave out --degrade, or --degrade none")
    check_holes(config, degrade)
    scale = 1 if degrade or layout else int(config["image"].get("source_scale", 1))
    how = Preprocessing(size, layout, degrade, scale, "published" if fit == "none" and (degrade or layout) else fit)
    find = partial(open_data_set, data, how, targets=True, held_out=True)
    guess = classes or (IMAGENET if degrade or layout else None)
    try:
        found = find(guess, labels)
    except UsageError:  # they are in no folders of classes
        if classes or labels or not guess:
            raise
        found = find(None, "")
    return Pairs(found, size, degrade, fill, masks, seed)
