"""Batches of `--data` for training: read, degraded as they are drawn if they are targets, and checked.

What is read ahead by worker processes is a matter of speed alone: rows that were not foreseen are read when they are
asked for. An image that cannot be read gives way to the next one that can, so batches are the same whatever reads them.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ibmd_cli.data.augment import Augmentation
from ibmd_cli.data.datasets import SOURCE, TARGET, DataSet, Embedded, Notes, tell_notes
from ibmd_cli.data.degradations import degrade, draw_masks, fill_hole, is_slow
from ibmd_cli.data.references import check_sources, describe, open_data, side_by_side
from ibmd_cli.errors import IbmdError
from ibmd_cli.method.distillation import Sources
from ibmd_cli.method.noise import Streams, stream, uniform
from ibmd_cli.processes import ignore_signals
from ibmd_cli.reporting import Reporter

LARGEST_BROKEN_SHARE = 0.01
FEW = 1000
"""While fewer images have been seen, the share of broken ones is of this many, or of all if there are fewer."""
IN_MEMORY = 1 << 30
"""Sets of at most so many bytes of pixels are read at once and kept."""
ATTEMPTS = 100
"""This many images in a row that cannot be read: the disk is gone."""
BATCHES_AHEAD = 4
"""For each worker."""
MOST_WORKERS = 8


class Loaded(NamedTuple):
    """Images as they were read.

    Attributes:
        asked: the rows that were asked for.
        rows: the rows that are here: others in place of those that cannot be read.
        pixels: uint8 (len(rows), 3 · S, H, W), of S sides.
        broken: row → why it cannot be read.
        notes: row → what is to be said of it.
    """

    asked: list[int]
    rows: list[int]
    pixels: Tensor
    broken: dict[int, str]
    notes: Notes


class Reader(Dataset[Loaded]):
    """Several data sets as one, read batch by batch.

    Args:
        parts: the data sets.
        sides: that are read of each item, see `DataSet.read`.
    """

    def __init__(self, parts: Sequence[DataSet], sides: Sequence[str] = ()) -> None:
        self.parts, self.sides = parts, sides
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, row: int) -> tuple[Tensor, Notes]:
        """Return the pixels of one item, and what is to be said of it, or raise the IbmdError of `DataSet.read`."""
        part, end = next((part, end) for part, end in zip(self.parts, self.ends, strict=True) if row < end)
        own = row - end + len(part)
        pixels = part.read(own, *self.sides, alike=True)
        return pixels, {row: part.notes[own]} if own in part.notes else {}

    def __getitem__(self, asked: list[int]) -> Loaded:
        """Read a batch; it is shorter than asked if `ATTEMPTS` images in a row cannot be read."""
        rows, pixels, broken, notes = list[int](), list[Tensor](), dict[int, str](), Notes()
        for row in asked:
            for attempt in range(ATTEMPTS):
                other = (row + attempt) % len(self)
                try:
                    read, said = self.read(other)
                except IbmdError as error:
                    broken[other] = str(error)
                else:
                    rows.append(other)
                    pixels.append(read)
                    notes |= said
                    break
        return Loaded(asked, rows, torch.stack(pixels) if pixels else torch.empty(0), broken, notes)


class Loader:
    """Batches of a `Reader`, some of them read ahead.

    Args:
        reader: what reads them.
        workers: processes that read ahead; 0: none, batches are read when they are asked for.
        pin: put what is read ahead into memory that a GPU reads from directly.
        reporter: told if the workers die.
    """

    def __init__(self, reader: Reader, workers: int, pin: bool, reporter: Reporter) -> None:
        self.reader, self.workers, self.pin, self.reporter = reader, workers, pin, reporter
        self.ahead: Iterator[Loaded] = iter(())
        self.next: Loaded | None = None
        self.unforeseen = 0

    def expect(self, batches: Iterable[list[int]]) -> None:
        """Begin to read batches ahead: `take` will be called for these rows, in this order."""
        if not self.workers:
            return
        loader = DataLoader(
            self.reader,
            batch_size=None,  # `batches` are whole ones
            sampler=batches,
            num_workers=self.workers,
            prefetch_factor=BATCHES_AHEAD,
            pin_memory=self.pin,
            worker_init_fn=_prepare_worker,
            multiprocessing_context="spawn",  # a fork of a process with threads and a GPU may hang
            generator=torch.Generator(),
        )
        self.ahead = iter(loader)

    def take(self, rows: list[int]) -> Loaded:
        """Return the images of these rows."""
        if self.next is None:
            self.next = self._advance()
        if self.next is not None and self.next.asked == rows:
            batch, self.next = self.next, None
            return batch
        self.unforeseen += 1
        return self.reader[rows]

    def close(self) -> None:
        """End the workers."""
        self.ahead, self.next = iter(()), None

    def _advance(self) -> Loaded | None:
        try:
            return next(self.ahead, None)
        except (RuntimeError, OSError) as error:
            self.ahead = iter(())
            said = next(iter(str(error).splitlines()), type(error).__name__)
            self.reporter.warn(
                f"the processes that read images ended ({said}); this one reads them now, which is slower: is memory "
                "or /dev/shm full? (--workers N sets their number)"
            )
            return None


def count_workers(asked: int, processes: int) -> int:
    """Return the number of workers: as asked, or (−1) what this machine's cores allow beside `processes` trainings."""
    if asked >= 0:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST_WORKERS, cores // processes - 1))


def read_all(reader: Reader, threads: int, reporter: Reporter) -> Loaded:
    """Read all items of a small set, by threads."""
    count = len(reader)
    pixels, rows, broken, notes = torch.empty(0, dtype=torch.uint8), list[int](), dict[int, str](), Notes()
    with ThreadPoolExecutor(threads) as pool, reporter.progress("reading images", count, "image") as meter:
        for row, batch in enumerate(pool.map(lambda row: reader[[row]], range(count))):
            if batch.rows:
                if not len(pixels):
                    pixels = torch.empty(count, *batch.pixels.shape[1:], dtype=torch.uint8)
                pixels[row] = batch.pixels[0]
            rows += batch.rows
            broken |= batch.broken
            notes |= batch.notes
            meter.advance()
    return Loaded(list(range(count)), rows, pixels, broken, notes)


def _prepare_worker(_: int) -> None:
    """Leave it to the training process to end the workers: it finishes its step when it is interrupted."""
    ignore_signals()


class SourceImages:
    """Images of one size, of which batches of sources, or of pairs, are drawn.

    A small set is read at once and kept in memory as bytes. Of a larger one, images are read as they are drawn, ahead
    of time by worker processes (`expect`). Batches are the same either way.

    Targets that sources are made of are degraded as they are drawn, with a new mask and new noise each time; by
    a slow degradation once, as they are read. An image that cannot be read is named, and the next one takes its place.

    Args:
        references: see `references.open_data_set`.
        teacher: its `config.json`: image size, `source_scale` (true low-resolution sources are fitted to that part of
            the size, and enlarged by repetition of pixels), `mask`, `degradation`, and `classes`.
        reporter: told of images that cannot be read, and of a degradation that is not the teacher's.
        degradation: key of `degradations.DEGRADATIONS`; "" if the images are sources already.
        masks: file of the free-form masks, see `degradations.read_masks`.
        layout: key of `preprocessing.LAYOUTS`.
        labels: CSV file of classes; "": see `references.open_data_set`.
        workers: processes that read large sets ahead, and threads that read small ones.
        fit: what becomes of images that are not square, see `preprocessing.Preprocessing`.
        targets: read targets, too, for `pairs`; else they are never opened, unless sources are made of them.

    Attributes:
        inputs: reference → what was found, to tell whether it has changed.
        rows: numbers of the images that `batch` and `pairs` draw from; all of them, unless some are held out.

    Raises:
        UsageError: the degradation is unknown, or does not go with the teacher, its image size or the images.
        NotAvailable: a folder or the file of masks is absent, a folder holds no image, or see `degrade`.
        IbmdError: more than 1 % of the images cannot be read (so may `take`, `batch` and `pairs`).
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
        fit: str = "published",
        targets: bool = False,
    ) -> None:
        check_sources(references, teacher, degradation, reporter, layout, labels)
        self.size = int(teacher["image"]["size"])
        self.degradation, self.masks, self.reporter, self.targets = degradation, masks, reporter, targets
        self.fill = (teacher.get("mask") or {}).get("fill")
        self._degrade(torch.zeros(1, 3, self.size, self.size), stream(0))  # refuses what cannot be, before the work

        self.parts = open_data(references, teacher, degradation, layout, labels, fit, targets)
        self.inputs = {part.name: f"{len(part)} images, sha256 {part.digest}" for part in self.parts}
        for hint in map(side_by_side, self.parts):
            if hint:
                reporter.warn(hint)
        classes = [n for part in self.parts for n in part.labels]
        self.labels = torch.tensor(classes) if classes else None
        both = targets and (not degradation or is_slow(degradation))
        self.reader = Reader(self.parts, (SOURCE, TARGET) if both else ())
        self.rows = torch.arange(len(self))
        self.pixels = torch.empty(0)
        self.loader: Loader | None = None
        self.seen, self.broken, self.notes = torch.zeros(len(self), dtype=torch.bool), dict[int, str](), Notes()
        self.told = dict[str, int]()
        if isinstance(self.parts[0], Embedded) and len(self.parts) == 1:
            self.pixels = self.parts[0].pixels[SOURCE]
        elif is_slow(degradation) or 3 * (1 + both) * self.size**2 * len(self) <= IN_MEMORY:
            threads = 1 if is_slow(degradation) else max(1, workers)  # a slow one has threads of its own
            batch = self._checked(read_all(self.reader, threads, reporter))
            self.pixels = batch.pixels
            if self.labels is not None:
                self.labels = self.labels[batch.rows]
        else:
            self.loader = Loader(self.reader, workers, torch.cuda.is_available(), reporter)

    def __len__(self) -> int:
        return len(self.reader)

    def describe(self) -> list[str]:
        """Say of each reference what was taken, and what is not used."""
        return describe(self.parts, self.degradation, self.targets)

    def take(self, rows: Sequence[int], rng: Streams, device: torch.device | str = "cpu") -> Sources:
        """Return sources by their numbers, float32 (len(rows), 3, H, W).

        They are in [-1, 1], except where a degradation goes beyond or noise fills a hole.
        """
        return self.take_pairs(rows, rng, device)[0]

    def take_pairs(
        self, rows: Sequence[int], rng: Streams, device: torch.device | str = "cpu"
    ) -> tuple[Sources, Tensor]:
        """Return sources by their numbers, and their targets as `pairs` returns them."""
        x, label = self._images(rows, device)
        return self._degrade(x[:, :3], rng)._replace(label=label), x[:, -3:]

    def batch(self, size: int, rng: Streams, flip: bool | Augmentation, device: torch.device | str = "cpu") -> Sources:
        """Draw sources at random as `take` returns them, mirrored at random (before they are degraded) if `flip`."""
        return self.pairs(size, rng, flip, device)[0]

    def pairs(
        self, size: int, rng: Streams, flip: bool | Augmentation, device: torch.device | str = "cpu"
    ) -> tuple[Sources, Tensor]:
        """Draw sources as `batch` does, and return them with their targets, float32 (size, 3, H, W) in [-1, 1].

        Without `targets`, the second is what the sources were made of: the sources themselves, unless degraded.
        """
        x, label = self._images(self._draw(size, rng), device)
        x = (flip if isinstance(flip, Augmentation) else Augmentation(flip))(x, rng)
        return self._degrade(x[:, :3], rng)._replace(label=label), x[:, -3:]

    def expect(self, size: int, streams: Iterable[Streams]) -> None:
        """Have images read ahead for the coming calls of `batch` or `pairs`.

        Args:
            size: of the batches.
            streams: copies of the random streams that they will be called with, in the order of the calls.
        """
        if self.loader:
            self.loader.expect(self._draw(size, rng) for rng in streams)

    def close(self) -> None:
        """End what reads ahead, and say of how many images each note is."""
        if self.loader:
            self.loader.close()
            tell_notes(self.notes, self.told, self.reporter)

    def _draw(self, size: int, rng: Streams) -> list[int]:
        return self.rows[(uniform(size, rng) * len(self.rows)).long()].tolist()

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

    def _checked(self, batch: Loaded) -> Loaded:
        """Name the images that cannot be read, and what is to be said of others; refuse too many broken ones."""
        self.notes |= batch.notes
        if {kind for notes in batch.notes.values() for kind, _ in notes} - set(self.told):
            self.told = tell_notes(self.notes, self.told, self.reporter)
        self.seen[batch.asked] = True
        new = [error for row, error in batch.broken.items() if row not in self.broken]
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
        for error in new:  # only now: a run that stops skips nothing
            self.reporter.warn(f"{error}; another image is taken for it: mend or remove it")
        return batch

    def _degrade(self, x: Tensor, rng: Streams) -> Sources:
        if not self.degradation or is_slow(self.degradation):
            return Sources(x)
        if self.fill is None:
            return Sources(degrade(x, self.degradation))
        mask = draw_masks(self.degradation, len(x), self.size, rng, self.masks).to(x.device)
        return Sources(fill_hole(x, mask, self.fill, rng), mask=mask)
