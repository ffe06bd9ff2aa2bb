"""Source images for training: batches of what `--data` names, degraded as they are drawn if they are clean."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibmd_cli.data.datasets import Embedded, Form, Records, open_files, open_records, parse_hf_data
from ibmd_cli.data.degradations import check_name, degrade, draw_masks, fill_hole
from ibmd_cli.data.download import data_folder, data_sets
from ibmd_cli.data.loading import ATTEMPTS, Batch, Loader, Reader, read_all
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError, nearest
from ibmd_cli.method.distillation import Sources
from ibmd_cli.method.noise import Streams, stream, uniform
from ibmd_cli.reporting import Reporter

LARGEST_BROKEN_SHARE = 0.01
FEW = 1000
"""While fewer images have been seen, the share of broken ones is of this many, or of all if there are fewer."""
IN_MEMORY = 1 << 30
"""Sets of at most so many bytes of pixels are read at once and kept."""


class SourceImages:
    """Images of one size, of which batches of sources are drawn.

    A small set is read at once and kept in memory as bytes. Of a larger one, images are read as they are drawn, ahead
    of time by worker processes (`expect`). Batches are the same either way.

    Clean images are kept clean and degraded as they are drawn, with a new mask and new noise each time; only edges,
    which take long, are found once. An image that cannot be read is named, and the next one takes its place.

    Args:
        references: see `records.open_records`; or `dataset:NAME`, see `fetching`.
        teacher: its `config.json`: image size, `source_scale` (true low-resolution sources are fitted to that part of
            the size, and enlarged by repetition of pixels), `mask`, `degradation`, and `classes`.
        reporter: told of images that cannot be read, and of a degradation that is not the teacher's.
        degradation: key of `degradations.DEGRADATIONS`; "" if the images are sources already.
        masks: file of the free-form masks, see `degradations.read_masks`.
        layout: key of `records.LAYOUTS`.
        labels: CSV file of classes; "": see `records.open_records`.
        workers: processes that read large sets ahead, and threads that read small ones.

    Attributes:
        inputs: reference → what was found, to tell whether it has changed.

    Raises:
        UsageError: the degradation is unknown, or does not go with the teacher, its image size or the images.
        NotAvailable: a folder or the file of masks is absent, a folder holds no image, or see `degrade`.
        IbmdError: more than 1 % of the images cannot be read (so may `take` and `batch`).
    """

    def __init__(
        self,
        references: Sequence[str],
        teacher: Mapping[str, Any],
        reporter: Reporter,
        degradation: str = "",
        masks: str = "",
        *,
        layout: str = "",
        labels: str = "",
        workers: int = 0,
    ) -> None:
        check_sources(references, teacher, degradation, reporter, layout, labels)
        self.size = int(teacher["image"]["size"])
        self.degradation, self.masks, self.reporter = degradation, masks, reporter
        self.fill = (teacher.get("mask") or {}).get("fill")
        self._degrade(torch.zeros(1, 3, self.size, self.size), stream(0))  # refuses what cannot be, before the work

        form = Form(self.size, layout, degradation, 1 if degradation else teacher["image"].get("source_scale", 1))
        records = [_open(reference, form, teacher.get("classes"), labels) for reference in references]
        self.inputs = {part.name: f"{len(part)} images, sha256 {part.digest}" for part in records}
        classes = [n for part in records for n in part.labels]
        self.labels = torch.tensor(classes) if classes else None
        self.reader = Reader(records)
        self.pixels = torch.empty(0)
        self.loader: Loader | None = None
        self.seen, self.broken = torch.zeros(len(self), dtype=torch.bool), dict[int, str]()
        if isinstance(records[0], Embedded) and len(records) == 1:
            self.pixels = records[0].pixels
        elif degradation == "edges" or 3 * self.size**2 * len(self) <= IN_MEMORY:
            threads = 1 if degradation == "edges" else max(1, workers)  # the network for edges has threads of its own
            batch = self._checked(read_all(self.reader, self.size, threads, reporter))
            self.pixels = batch.pixels
            if self.labels is not None:
                self.labels = self.labels[batch.rows]
        else:
            self.loader = Loader(self.reader, workers, torch.cuda.is_available(), reporter)

    def __len__(self) -> int:
        return len(self.reader)

    def take(self, rows: Sequence[int], rng: Streams, device: torch.device | str = "cpu") -> Sources:
        """Return sources by their numbers, float32 (len(rows), 3, H, W).

        They are in [-1, 1], except where a degradation goes beyond or noise fills a hole.
        """
        x, label = self._images(rows, device)
        return self._degrade(x, rng)._replace(label=label)

    def batch(self, size: int, rng: Streams, flip: bool, device: torch.device | str = "cpu") -> Sources:
        """Draw sources at random as `take` returns them, mirrored at random (before they are degraded) if `flip`."""
        rows = self._draw(size, rng)
        mirrored = uniform(size, rng)[:, None, None, None].to(device) < (0.5 if flip else 0.0)
        x, label = self._images(rows, device)
        return self._degrade(torch.where(mirrored, x.flip(3), x), rng)._replace(label=label)

    def expect(self, size: int, streams: Iterable[Streams]) -> None:
        """Have images read ahead for the coming calls of `batch`.

        Args:
            size: of the batches.
            streams: copies of the random streams that `batch` will be called with, in the order of the calls.
        """
        if self.loader:
            self.loader.expect(self._draw(size, rng) for rng in streams)

    def close(self) -> None:
        """End what reads ahead."""
        if self.loader:
            self.loader.close()

    def _draw(self, size: int, rng: Streams) -> list[int]:
        return (uniform(size, rng) * len(self)).long().tolist()

    def _images(self, rows: Sequence[int], device: torch.device | str) -> tuple[Tensor, Tensor | None]:
        """Return pixels in [-1, 1] and classes."""
        rows = list(rows)
        if self.loader:
            batch = self._checked(self.loader.take(rows))
            rows, pixels = batch.rows, batch.pixels
        else:
            pixels = self.pixels[rows]
        label = None if self.labels is None else self.labels[rows].to(device)
        return pixels.to(device, non_blocking=True).float() / 127.5 - 1, label

    def _checked(self, batch: Batch) -> Batch:
        """Name the images that cannot be read; refuse too many of them."""
        self.seen[batch.asked] = True
        for row, error in batch.broken.items():
            if row not in self.broken:
                self.reporter.warn(f"{error}; skipped")
        self.broken |= batch.broken
        seen = int(self.seen.sum())
        if len(self.broken) > LARGEST_BROKEN_SHARE * max(seen, min(len(self), FEW)):
            raise IbmdError(
                f"--data: {len(self.broken)} of {seen} images cannot be read, more than {LARGEST_BROKEN_SHARE:.0%}: "
                f"mend or remove them (the first: {next(iter(self.broken.values()))})"
            )
        if len(batch.rows) < len(batch.asked):
            why = list(batch.broken.values())[-1]
            raise IbmdError(f"--data: {ATTEMPTS} images in a row cannot be read ({why}): is the disk still there?")
        return batch

    def _degrade(self, x: Tensor, rng: Streams) -> Sources:
        if self.degradation in ("", "edges"):
            return Sources(x)
        if self.fill is None:
            return Sources(degrade(x, self.degradation))
        mask = draw_masks(self.degradation, len(x), self.size, rng, self.masks).to(x.device)
        return Sources(fill_hole(x, mask, self.fill, rng), mask=mask)


def check_sources(
    references: Sequence[str],
    teacher: Mapping[str, Any],
    degradation: str,
    reporter: Reporter,
    layout: str = "",
    labels: str = "",
) -> None:
    """Refuse data that are not there, and settings that do not go with the teacher or the data.

    Arguments and errors are those of `SourceImages`.
    """
    if not references:
        raise NotAvailable("no source images: give a folder of them with --data")
    for reference in references:
        _check_reference(reference, degradation)
    name, own = teacher.get("name", "the teacher"), teacher.get("degradation") or ""
    inpaints, masked = bool(teacher.get("mask")), degradation.startswith("inpaint-")
    if degradation:
        check_name(degradation)
        if layout:
            raise UsageError(
                f"--degrade {degradation}: --layout {layout} has sources already: --degrade none keeps them"
            )
    if labels and not teacher.get("classes"):
        raise UsageError(f"--labels {labels}: {name} has no classes: leave it out")
    if inpaints and not masked:
        given = f"--degrade {degradation}" if degradation else "no --degrade"
        raise UsageError(f"{given}: {name} fills holes: give clean images and --degrade {own or 'inpaint-center'}")
    if masked and not inpaints:
        raise UsageError(f"--degrade {degradation}: {name} does not fill holes" + (f": expected {own}" if own else ""))
    if degradation and own and degradation != own:
        reporter.warn(f"--degrade {degradation}: {name} was trained with {own}")


def _check_reference(reference: str, degradation: str) -> None:
    kind, _, name = reference.partition(":")
    if kind == "dataset" and name not in data_sets():
        raise NotAvailable(f"no data set {reference}: {nearest(name, data_sets())}")
    if kind == "hf":
        parse_hf_data(reference)
    elif kind not in ("builtin", "dataset") and not Path(reference).exists():
        raise NotAvailable(f"--data {reference}: no such folder")
    has_sources = kind == "builtin" or (kind == "dataset" and data_sets()[name]["layout"])
    if degradation and has_sources:
        raise UsageError(f"--degrade {degradation}: --data {reference} are sources already: --degrade none keeps them")


def _open(reference: str, form: Form, classes: int | None, labels: str) -> Records:
    if not reference.startswith("dataset:"):
        return open_records(reference, form, classes, labels)
    name = reference.removeprefix("dataset:")
    own = Form(form.size, data_sets()[name]["layout"], form.degradation, form.scale)
    return open_files(reference, data_folder(name), own, classes, labels)
