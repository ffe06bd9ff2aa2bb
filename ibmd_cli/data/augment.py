"""Augmentation: the same random change of a source and its target, so that few pairs go further."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ibmd_cli.method.noise import Streams, uniform


@dataclass(frozen=True)
class Augmentation:
    """Random changes; each image is changed in its own way, with a random stream of its own.

    Attributes:
        flip: mirror half of the images.
        shift: move them by up to this many pixels, down and sideways; border pixels are repeated.
        colour: range of the logarithm of the factors by which the light of red, green and blue is multiplied.
    """

    flip: bool = True
    shift: int = 0
    colour: float = 0.0

    def __call__(self, x: Tensor, rng: Streams) -> Tensor:
        """Change images (B, 3 · S, H, W) in [-1, 1] of S sides that belong together."""
        mirrored = (uniform(len(x), rng) < (0.5 if self.flip else 0.0)).to(x.device)
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        if self.shift:
            H, W = x.shape[2:]
            down, right = ((uniform(len(x), rng) * (2 * self.shift + 1)).long().tolist() for _ in "yx")
            wide = F.pad(x, (self.shift,) * 4, mode="replicate")
            x = torch.stack(
                [wide[n, :, i : i + H, j : j + W] for n, (i, j) in enumerate(zip(down, right, strict=True))]
            )
        if self.colour:
            logs = torch.stack([uniform(len(x), rng) for _ in "rgb"], dim=1)
            gain = (self.colour * (2 * logs - 1)).exp().to(x).repeat(1, x.shape[1] // 3)
            x = ((x + 1) * gain[:, :, None, None] - 1).clamp(max=1)
        return x
