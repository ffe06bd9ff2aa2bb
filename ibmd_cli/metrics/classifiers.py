"""Two classifiers of ImageNet that the field measures with: Inception-v3 of 2015 and ResNet-50, in published key names.

They are written here, and not taken from torchvision, because its builds need the PyTorch build that they were made
with, and a package that installs beside any PyTorch has to do without. Tests compare them with the published code.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------- Inception-v3 of 2015

_Conv = tuple[Any, ...]
_Branch = list[list[_Conv]]
"""Steps, one after the other; a step of several convolutions applies them side by side. (name, in, out, kernel)."""


class _ConvNorm(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int, padding: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, rectify."""
        return self.bn(self.conv(x)).relu()


class _Mixed(nn.Module):
    """A block of Inception: branches side by side, the last of which begins with a pooling.

    Args:
        branches: all but the pooling's.
        pool: "average", "max", or "reduce" (which halves the size, as the last convolution of every branch does).
        pooled: convolution after the pooling, unless that reduces.
    """

    def __init__(self, branches: list[_Branch], pool: str, pooled: _Conv | None = None) -> None:
        super().__init__()
        self.pool = pool
        self.branches = [[[conv[0] for conv in step] for step in branch] for branch in branches]
        for branch in branches:
            for step in branch:
                for name, c_in, c_out, kernel in step:
                    halves = pool == "reduce" and step is branch[-1]
                    padding = 0 if halves else [k // 2 for k in _pair(kernel)]
                    self.add_module(name, _ConvNorm(c_in, c_out, kernel, 2 if halves else 1, padding))
        if pooled:
            name, c_in, c_out, kernel = pooled
            self.add_module(name, _ConvNorm(c_in, c_out, kernel, 1, 0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all branches as channels."""
        outputs = []
        for branch in self.branches:
            h = x
            for step in branch:
                h = torch.cat([self.get_submodule(name)(h) for name in step], dim=1)
            outputs.append(h)
        if self.pool == "reduce":
            return torch.cat([*outputs, F.max_pool2d(x, 3, 2)], dim=1)
        # TensorFlow's average leaves the padding out
        h = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*outputs, self.get_submodule("branch_pool")(h)], dim=1)


def _pair(kernel: int | tuple[int, int]) -> tuple[int, int]:
    return kernel if isinstance(kernel, tuple) else (kernel, kernel)


def _chain(name: str, *channels: int, kernels: list[Any]) -> _Branch:
    """Return a branch of convolutions `name_1`, `name_2` and so on."""
    sizes = zip(pairwise(channels), kernels, strict=True)
    return [[(f"{name}_{i}", c_in, c_out, kernel)] for i, ((c_in, c_out), kernel) in enumerate(sizes, 1)]


def _mixed_5(c: int, pooled: int) -> _Mixed:
    return _Mixed(
        [
            [[("branch1x1", c, 64, 1)]],
            _chain("branch5x5", c, 48, 64, kernels=[1, 5]),
            _chain("branch3x3dbl", c, 64, 96, 96, kernels=[1, 3, 3]),
        ],
        "average",
        ("branch_pool", c, pooled, 1),
    )


def _mixed_6(c: int) -> _Mixed:
    wide, high, k = (1, 7), (7, 1), c
    return _Mixed(
        [
            [[("branch1x1", 768, 192, 1)]],
            _chain("branch7x7", 768, k, k, 192, kernels=[1, wide, high]),
            _chain("branch7x7dbl", 768, k, k, k, k, 192, kernels=[1, high, wide, high, wide]),
        ],
        "average",
        ("branch_pool", 768, 192, 1),
    )


def _mixed_7(c: int, pool: str) -> _Mixed:
    def split(name: str) -> list[_Conv]:
        return [(f"{name}a", 384, 384, (1, 3)), (f"{name}b", 384, 384, (3, 1))]

    return _Mixed(
        [
            [[("branch1x1", c, 320, 1)]],
            [[("branch3x3_1", c, 384, 1)], split("branch3x3_2")],
            [[("branch3x3dbl_1", c, 448, 1)], [("branch3x3dbl_2", 448, 384, 3)], split("branch3x3dbl_3")],
        ],
        pool,
        ("branch_pool", c, 192, 1),
    )


class InceptionV3(nn.Module):
    """The Inception-v3 of `inception-2015-12-05.tgz`, which FID, KID and IS are defined by.

    It differs from other ones in its average pooling, a max pooling in the last block, and 1008 classes.

    Source: Szegedy et al., arXiv:1512.00567; key names of github.com/mseitzer/pytorch-fid.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvNorm(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = _ConvNorm(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = _ConvNorm(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = _ConvNorm(64, 80, 1, 1, 0)
        self.Conv2d_4a_3x3 = _ConvNorm(80, 192, 3, 1, 0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_5(192, 32), _mixed_5(256, 64), _mixed_5(288, 64)
        self.Mixed_6a = _Mixed(
            [[[("branch3x3", 288, 384, 3)]], _chain("branch3x3dbl", 288, 64, 96, 96, kernels=[1, 3, 3])], "reduce"
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = _mixed_6(128), _mixed_6(160), _mixed_6(160)
        self.Mixed_6e = _mixed_6(192)
        self.Mixed_7a = _Mixed(
            [
                _chain("branch3x3", 768, 192, 320, kernels=[1, 3]),
                _chain("branch7x7x3", 768, 192, 192, 192, 192, kernels=[1, (1, 7), (7, 1), 3]),
            ],
            "reduce",
        )
        self.Mixed_7b, self.Mixed_7c = _mixed_7(1280, "average"), _mixed_7(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """Return pooled features (B, 2048) of images (B, 3, 299, 299) in [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


# ------------------------------------------------------------------------------------------------------ ResNet-50


class _Bottleneck(nn.Module):
    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        c_out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu()
        h = self.bn2(self.conv2(h)).relu()
        return (self.bn3(self.conv3(h)) + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet50(nn.Module):
    """ResNet-50 with the stride in the 3×3 convolutions, in torchvision's key names.

    Source: He et al., arXiv:1512.03385.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        c = 64
        for i, (width, depth) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
            blocks = []
            for k in range(depth):
                blocks.append(_Bottleneck(c, width, 2 if k == 0 and i > 1 else 1))
                c = 4 * width
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.fc = nn.Linear(c, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 1000)."""
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for i in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{i}")(x)
        return self.fc(x.mean((2, 3)))
