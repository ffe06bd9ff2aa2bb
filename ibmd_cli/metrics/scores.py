"""Scores of translated images: energy score, PSNR, SSIM, diversity; and the table of all metrics.

A score is the mean of terms: a tensor (N,) with one term for each drawing, or (N, N) with one for each pair of
different drawings (a U-statistic). `intervals` tells how sure it is.

Images are (…, C, H, W) in [-1, 1]. Samples (m, N, C, H, W) are m independent draws for each of N drawings. `METRICS`
lists the scores; `features` has the networks that some of them need.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KID_IMAGES = 1000
"""Images of a block: the KID of more than twice as many is the mean over blocks, as the field's is over subsets."""
IS_SPLIT = 5000
"""Images of a split of the Inception Score."""


@dataclass(frozen=True)
class Metric:
    """A score: how it is shown, and what it needs.

    Attributes:
        label: heading of its column.
        direction: "low" or "high": what is better; "": neither.
        digits: after the decimal point.
        scale: what its values are multiplied by to be shown.
        unit: of what is shown.
        network: name of the network of `features` that it needs, or "".
        compares: what of samples and truth: "pixels", enlarged where a protocol asks for it; "draws", the samples of
            one source as they are; or "maps", "classes", "features" or "logits" of what `network` sees.
        function: of "pixels" and "draws": samples (m, N, C, H, W), truth (N, C, H, W) → (N,); that of "draws" has a
            third argument, the side of the pooling window.
        needs: fewest images.
        smallest: least height and width of an image.
        paired: whether each image has a score of its own.
        least: no value is lower.
        most: no value is higher.
        caution: why it compares with no published figure; "" if it may, by a protocol.
        text: what it is, for protocols.
    """

    label: str
    direction: str
    digits: int
    text: str
    scale: float = 1.0
    unit: str = ""
    network: str = ""
    compares: str = "pixels"
    function: Callable[..., Tensor] | None = None
    needs: int = 1
    smallest: int = 1
    paired: bool = True
    least: float = -math.inf
    most: float = math.inf
    caution: str = ""

    @property
    def ends(self) -> tuple[float, float] | None:
        """Return the range of a share of images; None for other scores."""
        return (self.least, self.most) if self.compares == "classes" else None


_OWN = "its network is not the one of published figures"
_RESIZED = "of unit-length features, weighed as people judged"
METRICS = {
    "energy_score": Metric(
        *("energy score", "low", 2, "E|X-y| - E|X-X'|/2 on {pool}×{pool}-pooled pixels in [-1, 1]"),
        compares="draws", function=lambda x, y, pool: energy_score(x, y, pool), caution="no published figure uses it",
    ),
    "kid_efflite0": Metric(
        *("kid_efflite0", "low", 1, "unbiased MMD², kernel (x·y/D + 1)³, pooled features; never of one source"),
        scale=1000, unit="×1000", network="efflite0", compares="features", needs=10, paired=False, caution=_OWN,
    ),
    "fd_efflite0": Metric(
        *("fd_efflite0", "low", 2, "Fréchet distance of the pooled features' means and covariances"),
        network="efflite0", compares="features", needs=1281, paired=False, least=0, caution=_OWN,
    ),
    "fid": Metric(
        *("FID", "low", 2, "Fréchet distance of the 2048 features' means and covariances"),
        network="inception", compares="features", needs=2049, paired=False, least=0,
    ),
    "kid": Metric(
        *("KID", "low", 2, "unbiased MMD², kernel (x·y/2048 + 1)³, of all images, or the mean over blocks of 1000"),
        scale=1000, unit="×1000", network="inception", compares="features", needs=10, paired=False,
    ),
    "is": Metric(
        *("IS", "high", 2, "exp of the mean KL of class probabilities, mean over splits of 5000 in order"),
        network="inception", compares="logits", needs=IS_SPLIT, paired=False, least=1,
    ),
    "efflite0_distance": Metric(
        *("efflite0_distance", "low", 3, "unit-length features after 5 blocks, mean squared difference, not weighed"),
        network="efflite0", compares="maps", least=0, caution=_OWN,
    ),
    "stlpips_alex": Metric(
        *("ST-LPIPS alex", "low", 3, f"squared differences {_RESIZED}; tolerant of shifts by a pixel"),
        network="stlpips", compares="maps", least=0, caution="it is not the LPIPS of published figures",
    ),
    "lpips_vgg": Metric(
        "LPIPS vgg", "low", 3, f"squared differences {_RESIZED}", network="lpips_vgg", compares="maps", least=0
    ),
    "lpips_alex": Metric(
        "LPIPS alex", "low", 3, f"squared differences {_RESIZED}", network="lpips_alex", compares="maps", least=0
    ),
    "psnr": Metric(
        *("PSNR", "high", 2, "dB, peak 255, mean over images and samples"),
        unit="dB", most=100, function=lambda x, y: psnr(x, y),
    ),
    "ssim": Metric(
        *("SSIM", "high", 3, "Gaussian window of 11 pixels, σ 1.5, no padding, mean over channels"),
        most=1, smallest=11, function=lambda x, y: ssim(x, y),
    ),
    "mse": Metric("MSE", "low", 4, "on pixels in [-1, 1]", least=0, function=lambda x, y: mse(x, y)),
    "efflite0_agreement": Metric(
        *("top-1 agreement", "high", 1, "share of images whose ImageNet class is that of their target; for photos"),
        scale=100, unit="%", network="efflite0", compares="classes", least=0, most=1, caution=_OWN,
    ),
    "resnet50_accuracy": Metric(
        *("ResNet-50 accuracy", "high", 1, "share of images whose class is the true one"),
        scale=100, unit="%", network="resnet50", compares="classes", least=0, most=1,
    ),
    "diversity": Metric(
        *("diversity", "", 3, "standard deviation over samples in [-1, 1], mean over pixels"),
        compares="draws", function=lambda x, y, pool: diversity(x), least=0, caution="no published figure uses it",
    ),
}  # fmt: skip
"""The scores, in the order of their columns."""
DEFAULT = ("energy_score", "kid_efflite0", "efflite0_distance", "stlpips_alex", "psnr", "ssim", "diversity")
"""What is measured if nothing else is asked for: what the extra `eval` holds the networks of."""


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


def mse(samples: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of pixels in [-1, 1], averaged over the samples (m, N, C, H, W); (N,)."""
    return (samples - truth).square().flatten(2).mean((0, 2))


def ssim(samples: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity, averaged over the samples, channels and all places where its window fits.

    The window is a Gaussian of 11 × 11 pixels with σ = 1.5; K_1 = 0.01, K_2 = 0.03.

    Args:
        samples: (m, N, C, H, W) in [-1, 1], of at least 11 × 11 pixels.
        truth: (N, C, H, W).

    Returns:
        (N,), at most 1, higher is better.

    Source: Wang et al., 2004, Sec. III-B and III-C.
    """
    return torch.stack([_ssim(x, truth) for x in samples]).mean(0)


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    c = x.shape[1]
    taps = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / (2 * 1.5**2))
    window = (taps / taps.sum()).expand(c, 1, 1, 11)

    def local(v: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(v, window, groups=c), window.transpose(2, 3), groups=c)

    x, y = (x.double() + 1) / 2, (y.double() + 1) / 2  # in [0, 1]; variances are small differences
    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    both = local(x * y) - mean_x * mean_y
    c_1, c_2 = 0.01**2, 0.03**2
    share = (2 * mean_x * mean_y + c_1) * (2 * both + c_2)
    return (share / ((mean_x**2 + mean_y**2 + c_1) * (var_x + var_y + c_2))).flatten(1).mean(1)


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
