"""Translate images of any size with a model: fit, degrade or fill, run the network, and come back.

Every image has noise of its own, a stream named by seed, name and variant; and on a CPU the network always takes the
same number of images at once. So a picture depends neither on its batch nor on the order of the images. The tiles of
an image (`fit="tile"`) all start from the same stream, so that a student whose z says "red" says it everywhere.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.images.decode import Picture
from ibmd_cli.images.fit import Geometry, arrange, enlarged, lay, lay_mask, scaled, to_array, to_image, unfit
from ibmd_cli.images.tiles import Tiles
from ibmd_cli.sampling.plan import Job

CPU_BATCH_PIXELS = 16 * 32 * 32
"""In the network at once: fills a core with small images; large ones go one by one. A single image costs as much as a
whole batch, so no more than that."""
FIT_MODES = ("pad", "stretch", "crop", "tile")


class Engine(Protocol):
    """What runs a model, in NumPy arrays: a `TorchEngine`, or an `ExportedStudent`.

    Attributes:
        config: the content of the model's `config.json`.
        name: short name, for messages.
        image_size: height and width of the images it was trained on.
        source_scale: side of a result in units of its source's: 4 for 4× super-resolution.
        nfe: network calls per image.
        device: "cpu", "cuda:0", ….
    """

    config: dict[str, Any]
    name: str
    image_size: int
    source_scale: int
    nfe: int
    device: str

    def digest(self) -> str:
        """Return the SHA-256 of the file with the weights."""

    def stream(self, seed: int, *place: int | str) -> Any:
        """Return the random stream of a place, see `noise.stream`."""

    def fill_hole(self, x_T: np.ndarray, mask: np.ndarray, rng: Sequence[Any]) -> np.ndarray:
        """Fill the holes of sources (B, 3, H, W), where the mask (B, 1, H, W) is 1, as the model expects them."""

    def translate(
        self, x_T: np.ndarray, rng: Sequence[Any], mask: np.ndarray | None = None, label: np.ndarray | None = None
    ) -> np.ndarray:
        """Translate sources, float32 (B, 3, H, W) in [-1, 1], with a random stream for each; returns the same shape.

        Raises:
            MemoryError: there is not enough for such a batch.
        """

    def spread(self) -> AbstractContextManager[int]:
        """Give each batch one thread of the CPU, within the block; returns how many batches then fill the CPU."""


TileBatch = list[tuple[Job, int]]
"""Tiles that go through the network together: jobs, and the numbers of their tiles."""


class Translator:
    """A model, and how images are translated with it.

    Args:
        engine: runs the model.
        seed: of all noise.
        fit: "pad", "stretch", "crop" or "tile", see `images.fit`.
        restore_size: give results the size of their images. Otherwise they have the model's; with "tile" that of their
            image, times the factor of a super-resolution model.
        batch_size: images in the network at once. On a CPU, the model's image size decides alone.
        degradation: images are clean, and degraded first: a key of `degradations.DEGRADATIONS`. Needs PyTorch.
        warn: told when memory does not suffice for the batch.

    Raises:
        UsageError: the model cannot be used in this way.

    A model for super-resolution (`source_scale` in the section `image` of its configuration) takes images as they are,
    in low resolution: they are fitted to its size divided by the factor, and enlarged by repetition of pixels.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        seed: int = 0,
        fit: str = "pad",
        restore_size: bool = False,
        batch_size: int = 16,
        degradation: str | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        if fit not in FIT_MODES:
            raise UsageError(f"fit {fit!r}: expected {', '.join(FIT_MODES)}")
        self.engine, self.seed, self.fit, self.restore_size, self.warn = engine, seed, fit, restore_size, warn
        self.degrade = None if degradation is None else _degradation(degradation)
        self.side = engine.image_size
        self.scale = 1 if degradation else engine.source_scale
        task = str(engine.config.get("task"))
        self.draws = degradation is None and any(word in task for word in ("drawing", "edges", "sketch"))
        self.classes = engine.config.get("classes")
        self.fill = (engine.config.get("mask") or {}).get("fill")
        self.fixed = engine.device == "cpu"
        self.size = max(1, CPU_BATCH_PIXELS // self.side**2) if self.fixed else batch_size
        self.workers = 1  # batches in the network at once, see `spread`
        self.advance: Callable[[int], None] = lambda tiles: None  # told of tiles that are done

    def prepare(self, picture: Picture, job: Job, mask: Image.Image | None = None, label: int | None = None) -> Job:
        """Fit an image for the model.

        Args:
            picture: upright sRGB.
            job: gets the canvas, and what `finish` needs; it is returned.
            mask: white = hole; in the image's size, or enlarged or reduced to it (nearest pixel).
            label: class.

        Raises:
            IbmdError: as `canvas`.
        """
        job.geometry = geometry = arrange(picture.rgb.size, self.side // self.scale, self.fit)
        if mask is not None:
            mask = mask.convert("1", dither=Image.Dither.NONE).resize(picture.rgb.size, Image.Resampling.NEAREST)
            job.hole = to_array(lay_mask(mask, geometry))
        job.alpha = picture.alpha
        if self.restore_size:
            job.original = None if mask is None else (picture.rgb, mask)
        elif picture.alpha is not None and self.fit != "tile":
            job.alpha = lay(picture.alpha, geometry)
        return self.canvas(to_array(lay(picture.rgb, geometry)), job, label)

    def canvas(self, x: np.ndarray, job: Job, label: int | None = None) -> Job:
        """Take an image that has the model's size already, or is larger and to be translated in tiles.

        Args:
            x: (3, H, W), uint8 or float32 in [-1, 1].
            job: gets it, and is returned; `job.hole` is to be there already.
            label: class.

        Raises:
            IbmdError: the model needs a hole or label and there is none, or the reverse; or x has another size.
        """
        name, model = job.name, self.engine.name
        if self.classes and (label is None or not 0 <= label < self.classes):
            raise IbmdError(f"{name}: {model} needs a class from 0 to {self.classes - 1} (--label), got {label}")
        if label is not None and not self.classes:
            raise IbmdError(f"{name}: {model} has no classes; leave --label out")
        if (job.hole is None) != (self.fill is None):
            rule = "fills holes: say where with --mask" if self.fill else "takes no --mask"
            raise IbmdError(f"{name}: {model} {rule}")
        side = self.side // self.scale
        height, width = x.shape[-2:]
        sized = min(height, width) >= side if self.fit == "tile" else height == width == side
        if x.shape != (3, height, width) or not sized:
            more = " or more" if self.fit == "tile" else ""
            raise IbmdError(f"{name}: shape {list(x.shape)}: {model} expects [3, {side}, {side}]{more}")
        job.x, job.tiles, job.label = x, Tiles(height, width, side, self.scale), label
        return job

    @contextmanager
    def spread(self, images: int) -> Iterator[None]:
        """Translate several batches at once within the block, where that is quicker for so many images.

        That is on a CPU, for images so small that all threads at one batch spend much of their time on waiting for each
        other. The pixels stay the same.
        """
        if self.fixed and self.size > 1 and images > self.size:
            with self.engine.spread() as self.workers:
                try:
                    yield
                finally:
                    self.workers = 1
        else:
            yield

    def run(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Translate prepared jobs, in batches across them, and yield each when it is complete, in order."""
        for group, x_0, seconds in self._translated(jobs):
            self.advance(len(group))
            for (job, i), tile in zip(group, x_0, strict=True):
                tiles = job.tiles
                if len(tiles) == 1:
                    job.x_0 = tile
                else:
                    job.x_0 = tiles.blank(3) if job.x_0 is None else job.x_0
                    tiles.add(job.x_0, i, tile)
                job.seconds += seconds / len(group)
                if i == len(tiles) - 1:
                    yield job

    def _translated(self, jobs: Iterable[Job]) -> Iterator[tuple[TileBatch, np.ndarray, float]]:
        """Yield batches of tiles with their translations and the seconds that took, in order."""
        tiles = ((job, i) for job in jobs for i in range(len(job.tiles)))
        groups = iter(lambda: list(islice(tiles, self.size)), [])
        if self.workers == 1:
            for group in groups:
                yield group, *self._network(group)
            return
        waiting: deque[tuple[TileBatch, Future[tuple[np.ndarray, float]]]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for group in groups:
                    waiting.append((group, pool.submit(self._network, group)))
                    if len(waiting) > self.workers:
                        group, done = waiting.popleft()
                        yield group, *done.result()
                for group, done in waiting:
                    yield group, *done.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def result_size(self, geometry: Geometry) -> tuple[int, int]:
        """Return (width, height) of the picture that `finish` gives."""
        if self.restore_size:
            return geometry.size
        width, height = geometry.size if self.fit == "tile" else geometry.canvas
        return self.scale * width, self.scale * height

    def finish(self, job: Job) -> Image.Image:
        """Return the translation of a complete job, RGB, or RGBA if its transparency was kept."""
        image = to_image(job.x_0)
        if self.restore_size:
            image = unfit(image, job.geometry)
            if job.original is not None:  # known pixels need not go through the model's size
                image = Image.composite(image, *job.original)
        elif self.fit == "tile":
            image = image.crop(enlarged(job.geometry.place, self.scale))
        if job.alpha is not None:
            image.putalpha(job.alpha.resize(image.size))
        return image

    def _network(self, group: TileBatch) -> tuple[np.ndarray, float]:
        """Translate tiles; returns (len(group), 3, side, side), and the seconds that it took.

        When memory does not suffice, from then on half as many at a time: the last bits may differ from those of a run
        that had the memory.
        """
        began = time.monotonic()
        while True:
            size = self.size  # another thread may lessen it
            try:
                parts = [self._batch(group[i : i + size], size) for i in range(0, len(group), size)]
                return np.concatenate(parts), time.monotonic() - began
            except MemoryError:
                if size == 1:
                    raise
            self.size = min(self.size, size // 2)
            images = f"image{'s' * (self.size > 1)}"
            self.warn(
                f"out of memory: from here on {self.size} {images} at a time (last bits may differ); "
                f"--batch-size {self.size} avoids it"
            )

    def _batch(self, group: TileBatch, size: int) -> np.ndarray:
        """Run the network on tiles. On a CPU always on `size` of them, the last one repeated if there are fewer.

        The kernels that PyTorch chooses depend on the size of the batch, and their last bits differ.
        """
        rows = [*group, *[group[-1]] * (size - len(group) if self.fixed else 0)]
        x_T = _enlarge(scaled(np.stack([job.tiles.cut(job.x, i) for job, i in rows])), self.scale)
        if self.degrade is not None:
            x_T = np.concatenate([self.degrade(x[None]) for x in x_T])  # one by one: the batch must not matter
        rng = [self.engine.stream(self.seed, job.name, job.variant) for job, _ in rows]
        known, mask, label = x_T, None, None
        if self.fill:
            holes = [job.tiles.cut(job.hole, i) for job, i in rows if job.hole is not None]
            mask = _enlarge(np.stack(holes).astype(np.float32), self.scale)
            x_T = self.engine.fill_hole(x_T, mask, rng)
        if self.classes:
            label = np.array([job.label for job, _ in rows])
        x_0 = self.engine.translate(x_T, rng, mask, label)
        if mask is not None:
            x_0 = np.where(mask > 0.5, x_0, known)
        return x_0[: len(group)]


def _enlarge(x: np.ndarray, scale: int) -> np.ndarray:
    """Enlarge images (B, C, h, w) by repetition of pixels."""
    return x if scale == 1 else x.repeat(scale, 2).repeat(scale, 3)


def _degradation(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a degradation of images (B, 3, H, W) in [-1, 1]."""
    import torch

    from ibmd_cli.data.degradations import check_name, degrade

    check_name(name)
    return lambda x: degrade(torch.from_numpy(x), name).numpy()
