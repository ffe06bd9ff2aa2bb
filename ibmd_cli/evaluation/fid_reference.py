"""Reference statistics of the Fréchet distance: from a published npz file, or of a folder of images, kept in a cache.

What the cache holds is named by the hash of all images' content and by the network, so it is never out of date.
"""

import hashlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ibmd_cli.errors import IbmdError, NotAvailable
from ibmd_cli.files import atomic_file
from ibmd_cli.hub import cache_folder
from ibmd_cli.images.decode import read_image
from ibmd_cli.images.find import find_images, passed_over
from ibmd_cli.images.fit import to_uint8
from ibmd_cli.metrics.distances import Moments, moments
from ibmd_cli.metrics.features import Network
from ibmd_cli.reporting import Reporter


def read_reference(path: Path, network: Network, reporter: Reporter) -> Moments:
    """Return the moments of reference images.

    Args:
        path: folder of images; or an npz file, of which the first of these is used: `pool_3` (features), `mu` and
            `sigma`, `arr_0` (images, uint8 (N, H, W, 3)).
        network: that computes features.
        reporter: for progress.

    Raises:
        NotAvailable: nothing is there.
        IbmdError: it holds none of these.
    """
    if not path.exists():
        raise NotAvailable(f"--reference {path}: no such file or folder")
    found = _of_folder(path, network, reporter) if path.is_dir() else _of_file(path, network, reporter)
    if found.mean.ndim != 1 or found.covariance.shape != (len(found.mean),) * 2:
        raise IbmdError(f"--reference {path}: mu and sigma do not belong together")
    if not (found.mean.isfinite().all() and found.covariance.isfinite().all()):
        raise IbmdError(f"--reference {path}: its statistics are not finite")
    return found


def _of_file(path: Path, network: Network, reporter: Reporter) -> Moments:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "pool_3" in archive:
                return moments([torch.from_numpy(archive["pool_3"])])
            if {"mu", "sigma"} <= set(archive):
                mean, covariance = (torch.from_numpy(np.asarray(archive[key], np.float64)) for key in ("mu", "sigma"))
                return Moments(mean, covariance, 0)
            if "arr_0" not in archive:
                raise IbmdError(f"--reference {path}: holds {', '.join(archive)}: expected mu and sigma, or arr_0")
        count, images = _array(path)
        return _of_images(images, _hash([path]), network, reporter, count)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise IbmdError(f"--reference {path}: cannot be read ({error}): expected an npz file") from error


def _of_folder(path: Path, network: Network, reporter: Reporter) -> Moments:
    files = find_images(path, passed=(passed := Counter[str]()))
    told = passed_over(passed)
    if not files:
        raise NotAvailable(f"--reference {path}: no images in it{f'; {told}' if told else ''}")
    if told:
        reporter.warn(f"--reference {path}: {told}")

    def read() -> Iterator[Tensor]:
        for file in files:
            yield to_uint8(read_image(file))[None]

    return _of_images(read(), _hash(files), network, reporter, len(files))


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


def _of_images(images: Iterator[Tensor], digest: str, network: Network, reporter: Reporter, count: int) -> Moments:
    """Compute the moments of images, or read them from the cache."""
    place = hashlib.sha256(f"{digest} {network.weights} {network.about}".encode()).hexdigest()[:32]
    kept = cache_folder() / "references" / f"{place}.safetensors"
    if kept.is_file():
        with safe_open(kept, framework="pt") as file:
            return Moments(file.get_tensor("mean"), file.get_tensor("covariance"), int(file.metadata()["count"]))

    def features() -> Iterator[Tensor]:
        with reporter.progress("reference", count, "image") as meter:
            for group in _grouped(images, network.at_once):
                pooled = network(group).pooled
                assert pooled is not None
                meter.advance(len(group))
                yield pooled

    found = moments(features())
    with atomic_file(kept) as new:
        save_file({"mean": found.mean, "covariance": found.covariance}, new, {"count": str(found.images)})
    return found


def _grouped(images: Iterator[Tensor], most: int) -> Iterator[Tensor]:
    """Join successive images of one size, at most so many."""
    group: list[Tensor] = []
    for image in images:
        if group and (len(group) == most or image.shape != group[0].shape):
            yield torch.cat(group)
            group = []
        group.append(image)
    if group:
        yield torch.cat(group)


def _array(path: Path) -> tuple[int, Iterator[Tensor]]:
    """Return the number of the images `arr_0` of an npz file, and each of them: all may not fit into memory."""
    archive = zipfile.ZipFile(path)
    stream = archive.open("arr_0.npy")
    version: Any = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read(stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or by_column:
        raise IbmdError(f"--reference {path}: arr_0 is {dtype} {shape}: expected uint8 (N, H, W, 3)")

    def images() -> Iterator[Tensor]:
        with archive, stream:
            for _ in range(shape[0]):
                pixels = np.frombuffer(stream.read(shape[1] * shape[2] * 3), np.uint8).reshape(shape[1:])
                yield torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]

    return shape[0], images()
