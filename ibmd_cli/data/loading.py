"""Pixels of images by number, read ahead by worker processes in the order in which training will ask for them.

What is read ahead is a matter of speed alone: rows that were not foreseen are read when they are asked for. An image
that cannot be read gives way to the next one that can, so batches are the same whatever reads them.
"""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ibmd_cli.data.datasets import Records
from ibmd_cli.errors import IbmdError
from ibmd_cli.reporting import Reporter

ATTEMPTS = 100
"""This many images in a row that cannot be read: the disk is gone."""
BATCHES_AHEAD = 4
"""For each worker."""
MOST_WORKERS = 8


class Batch(NamedTuple):
    """Images as they were read.

    Attributes:
        asked: the rows that were asked for.
        rows: the rows that are here: others in place of those that cannot be read.
        pixels: uint8 (len(rows), 3, H, W).
        broken: row → why it cannot be read.
    """

    asked: list[int]
    rows: list[int]
    pixels: Tensor
    broken: dict[int, str]


class Reader(Dataset[Batch]):
    """Several `Records` as one, read batch by batch."""

    def __init__(self, records: Sequence[Records]) -> None:
        self.records = records
        self.ends = list(accumulate(len(part) for part in records))

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, row: int) -> Tensor:
        """Return the pixels of one image, uint8 (3, H, W), or raise the IbmdError of `Records.read`."""
        part = next(i for i, end in enumerate(self.ends) if row < end)
        return self.records[part].read(row - self.ends[part] + len(self.records[part]))

    def __getitem__(self, asked: list[int]) -> Batch:
        """Read a batch; it is shorter than asked if `ATTEMPTS` images in a row cannot be read."""
        rows, pixels, broken = list[int](), list[Tensor](), dict[int, str]()
        for row in asked:
            for attempt in range(ATTEMPTS):
                other = (row + attempt) % len(self)
                try:
                    pixels.append(self.read(other))
                except IbmdError as error:
                    broken[other] = str(error)
                else:
                    rows.append(other)
                    break
        return Batch(asked, rows, torch.stack(pixels) if pixels else torch.empty(0), broken)


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
        self.ahead: Iterator[Batch] = iter(())
        self.next: Batch | None = None
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

    def take(self, rows: list[int]) -> Batch:
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

    def _advance(self) -> Batch | None:
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


def read_all(reader: Reader, size: int, threads: int, reporter: Reporter) -> Batch:
    """Read all images, (3, size, size), of a small set, by threads."""
    count = len(reader)
    pixels, rows, broken = torch.empty(count, 3, size, size, dtype=torch.uint8), list[int](), dict[int, str]()
    with ThreadPoolExecutor(threads) as pool, reporter.progress("reading images", count, "image") as meter:
        for row, batch in enumerate(pool.map(lambda row: reader[[row]], range(count))):
            if batch.rows:
                pixels[row] = batch.pixels[0]
            rows += batch.rows
            broken |= batch.broken
            meter.advance()
    return Batch(list(range(count)), rows, pixels, broken)


def _prepare_worker(_: int) -> None:
    """Leave it to the training process to end the workers: it finishes its step when it is interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
