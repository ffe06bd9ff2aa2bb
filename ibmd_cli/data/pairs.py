"""Test data for `ibmd eval`: sources with their targets, read when they are needed, in the order of their names.

Images are upright RGB: grey is repeated over the channels, and transparency laid on white (`decoding`). They must be
of the model's size, or are brought to it by `--fit crop`: by their shorter side, then the centre, as in training.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ibmd_cli.data.datasets import Files, Form, open_files
from ibmd_cli.data.degradations import degrade, evaluation_mask, fill_hole
from ibmd_cli.data.embedded import embedded_pairs, enlarge
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.images.decode import read_image, shown
from ibmd_cli.images.find import find_images
from ibmd_cli.images.fit import to_uint8
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


class Pairs(Protocol):
    """Pairs by number.

    Attributes:
        names: of the N pairs, in their order.
        digest: changes with the data, as far as names and sizes of files tell.
        classes: whether the true class of each image is known.
        degradation: that makes the sources of clean images, or "".
    """

    names: Sequence[str]
    digest: str
    classes: bool
    degradation: str

    def read(self, rows: Sequence[int]) -> Batch:
        """Read some of the pairs.

        Raises:
            IbmdError: an image cannot be read, or is of another size.
        """


def batches(count: int, batch_size: int) -> list[list[int]]:
    """Return the numbers 0 … count − 1 in batches of nearly equal size, at most `batch_size`."""
    return [rows.tolist() for rows in torch.arange(count).tensor_split(-(-count // batch_size))]


def floats(images: Tensor) -> Tensor:
    """Return uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


class EmbeddedPairs:
    """The test pairs of an embedded data set, which are in memory.

    Raises:
        NotAvailable: there is no such data set.
        IbmdError: they are of another size than the model's.
    """

    classes, degradation = False, ""

    def __init__(self, name: str, size: int) -> None:
        pairs = embedded_pairs(name)
        self.names: Sequence[str] = pairs.names
        self.x_T, self.x_0 = pairs.x_T, pairs.x_0
        self.digest = _digest([name, *self.names])
        if (side := self.x_0.shape[-1]) != size:
            raise IbmdError(f"--data builtin:{name}: images of {side}×{side}, but the model is for {size}×{size}")

    def read(self, rows: Sequence[int]) -> Batch:
        """Return some of the pairs."""
        x_T, truth = self.x_T[list(rows)], self.x_0[list(rows)]
        return Batch([self.names[i] for i in rows], Sources(floats(x_T)), truth)


class FolderPairs:
    """The images in source/ and target/ of a folder, with equal names.

    Args:
        folder: that holds the two.
        size: height and width that the model takes.
        scale: sources may be smaller by this, and are then enlarged by repetition of pixels.
        crop: bring images of other sizes to the model's.

    Raises:
        NotAvailable: one of the folders is absent.
        IbmdError: names that do not match.
    """

    classes, degradation = False, ""

    def __init__(self, folder: Path, size: int, scale: int, crop: bool) -> None:
        self.folder, self.size, self.scale, self.crop = folder, size, scale, crop
        files: dict[str, dict[str, Path]] = {}
        for side in ("source", "target"):
            if not (root := folder / side).is_dir():
                raise NotAvailable(f"--data {folder}: no folder {root}; expected source/ and target/ in it")
            files[side] = {file.relative_to(root).as_posix(): file for file in find_images(root)}
        both = files["source"].keys() & files["target"].keys()
        lone = [f"{side}/{shown(name)}" for side in files for name in sorted(files[side].keys() - both)]
        if lone:
            more = f" and {len(lone) - 5} more" if len(lone) > 5 else ""
            raise IbmdError(f"--data {folder}: no partner of equal name for {', '.join(lone[:5])}{more}")
        self.names: Sequence[str] = sorted(both)
        self.digest = _digest(f"{name} {files[side][name].stat().st_size}" for name in self.names for side in files)
        self.files = [(files["source"][name], files["target"][name]) for name in self.names]

    def read(self, rows: Sequence[int]) -> Batch:
        """Read some of the pairs."""
        with ThreadPoolExecutor(READERS) as readers:
            images = list(readers.map(self._read, rows))
        x_T, truth = (torch.stack(side) for side in zip(*images, strict=True))
        return Batch([self.names[i] for i in rows], Sources(floats(x_T)), truth)

    def _read(self, row: int) -> tuple[Tensor, Tensor]:
        source, target = self.files[row]
        return self._image(source, self.scale), self._image(target, 1)

    def _image(self, file: Path, scale: int) -> Tensor:
        image = read_image(file)
        small = (self.size // scale, self.size // scale)
        if image.size == small and scale > 1:
            return enlarge(to_uint8(image)[None], scale)[0]
        if image.size == (self.size, self.size):
            return to_uint8(image)
        if self.crop:
            return Form(self.size, scale=scale)(image, shown(file))
        width, height = image.size
        raise IbmdError(
            f"{shown(file)}: {width}×{height}, but the model is for {self.size}×{self.size}: "
            "--fit crop brings images to its size"
        )


class MadePairs:
    """Pairs that are made of single pictures: clean images that are degraded, or pairs in one file.

    Args:
        folder: of the pictures, searched recursively.
        config: of the model: size, classes, and what fills a hole.
        degradation: key of `degradations.DEGRADATIONS`; "" with the layout "ab".
        masks: file of the free-form masks; mask i belongs to image i, as in the published evaluations.
        labels: CSV file of classes; "": the folder that holds an image is its class.
        seed: of the noise that fills holes.

    Raises:
        UsageError: the classes cannot be told.
        NotAvailable: there are no images.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], degradation: str, masks: str, labels: str, seed: int
    ) -> None:
        self.degradation, self.masks, self.seed = degradation, masks, seed
        self.size = int(config["image"]["size"])
        self.fill = (config["mask"] or {}).get("fill")
        if self.fill and not degradation.startswith("inpaint-"):
            raise UsageError(f"{config['name']} fills holes: give clean images and --degrade inpaint-…")
        if degradation.startswith("inpaint-") and not self.fill:
            raise UsageError(f"--degrade {degradation}: {config['name']} does not fill holes")
        try:
            self._find(folder, config["classes"] or IMAGENET, labels)
            self.classes = True
        except UsageError:  # they are in no folders of classes
            if config["classes"] or labels:
                raise
            self._find(folder, None, "")
            self.classes = False
        self.digest = self.targets.digest
        paths = [Path(os.fsdecode(bytes(path))) for path in self.targets.paths]
        self.names: Sequence[str] = [path.relative_to(folder).as_posix() for path in paths]

    def _find(self, folder: Path, classes: int | None, labels: str) -> None:
        def files(form: Form) -> Files:
            return open_files(str(folder), folder, form, classes, labels)

        self.sources: Files | None = None
        if self.degradation == "edges":  # found as the sources are read
            self.sources, self.targets = files(Form(self.size, degradation="edges")), files(Form(self.size))
        elif self.degradation:
            self.targets = files(Form(self.size, degradation=self.degradation))
        else:
            self.sources, self.targets = files(Form(self.size, "ab")), files(Form(self.size, "ba"))

    def read(self, rows: Sequence[int]) -> Batch:
        """Read some of the pictures, and make their sources."""
        with ThreadPoolExecutor(READERS) as readers:
            truth = torch.stack(list(readers.map(self.targets.read, rows)))
            drawn = torch.stack(list(readers.map(self.sources.read, rows))) if self.sources else None
        names = [self.names[i] for i in rows]
        labels = torch.tensor([self.targets.labels[i] for i in rows]) if self.classes else None
        return Batch(names, self._sources(names, rows, floats(truth), drawn)._replace(label=labels), truth)

    def _sources(self, names: list[str], rows: Sequence[int], x_0: Tensor, drawn: Tensor | None) -> Sources:
        if drawn is not None:
            return Sources(floats(drawn))
        if self.fill is None:
            return Sources(degrade(x_0, self.degradation))
        mask = torch.stack([evaluation_mask(self.degradation, i, self.size, self.masks) for i in rows])
        noise = [stream(self.seed, "hole", name) for name in names]
        return Sources(fill_hole(x_0, mask, self.fill, noise), mask=mask)


def open_pairs(
    data: str, config: Mapping[str, Any], *, degrade: str, masks: str, labels: str, layout: str, crop: bool, seed: int
) -> Pairs:
    """Find the pairs that `--data` names, without reading them.

    Args:
        data: `builtin:NAME`; a folder with source/ and target/; with `degrade` a folder of clean images; with the
            layout "ab" a folder of pictures that have source and target side by side.
        config: of the model.
        degrade: key of `degradations.DEGRADATIONS`, or "".
        masks: file of the free-form masks.
        labels: CSV file of classes.
        layout: "ab" or "".
        crop: bring images of other sizes to the model's.
        seed: of the noise that fills holes.

    Raises:
        NotAvailable, UsageError, IbmdError: see the classes above.
    """
    size = int(config["image"]["size"])
    if degrade or layout:
        if data.startswith("builtin:"):
            raise UsageError(f"--data {data}: these are pairs already: leave out --degrade, or --degrade none")
        return MadePairs(Path(data), config, degrade, masks, labels, seed)
    if config["classes"] or config["mask"]:
        raise IbmdError(f"{config['name']}: needs classes or masks: give clean images and --degrade inpaint-…")
    if data.startswith("builtin:"):
        return EmbeddedPairs(data.removeprefix("builtin:"), size)
    return FolderPairs(Path(data), size, int(config["image"].get("source_scale", 1)), crop)


def _digest(parts: Sequence[str] | Iterator[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()
