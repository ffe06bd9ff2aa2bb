"""The ADM U-Net F with the parameter names of the published checkpoints.

It has the skeleton of guided-diffusion (arXiv:2105.05233), which DDBM, DBIM and I2SB share.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ibmd_cli.networks.layers import Conv2d, GroupNorm, activate, attend, convolve, resampled


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net.

    Attributes:
        in_channels: image channels at the input: x_t, x_T (conditional) and z together.
        out_channels: image channels at the output.
        model_channels: width of the first level.
        channel_mult: width of each level, in units of `model_channels`.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        attention: downsampling factors (1 = full size) of the levels with self-attention.
        head_channels: width of an attention head.
        attention_order: layout of the qkv channels: "new" (q, k, v, then heads) or "legacy" (heads, then q, k, v).
            Shapes are the same in both; the wrong one computes garbage.
        num_classes: size of the label embedding, or None.
        dropout: probability, in training mode only.
        norm_groups: groups of each GroupNorm.
        patch_size: space-to-depth factor before the first and after the last convolution (1 in all published nets).
        middle_attention: self-attention between the two blocks of the lowest level, too. Without it and `attention`
            the network is purely convolutional.
    """

    in_channels: int
    out_channels: int = 3
    model_channels: int = 256
    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    num_res_blocks: int = 2
    attention: tuple[int, ...] = (8, 16, 32)
    head_channels: int = 64
    attention_order: str = "new"
    num_classes: int | None = None
    dropout: float = 0.0
    norm_groups: int = 32
    patch_size: int = 1
    middle_attention: bool = True

    def __post_init__(self) -> None:
        """Refuse an unknown order: it would compute garbage."""
        if self.attention_order not in ("new", "legacy"):
            raise ValueError(f"attention_order {self.attention_order!r}: expected new or legacy")


class ResBlock(nn.Module):
    """Residual block with scale-shift conditioning on the time embedding, and resampling inside (up, down)."""

    def __init__(self, c_in: int, c_out: int, c_emb: int, config: UNetConfig, resample: str = "") -> None:
        super().__init__()
        self.resample = resample
        groups = config.norm_groups
        # Index 1 of in_layers and 1, 2 of out_layers (SiLU, Dropout) hold no parameters: names as published.
        self.in_layers = nn.Sequential(GroupNorm(groups, c_in), nn.SiLU(), Conv2d(c_in, c_out, 3))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(c_emb, 2 * c_out))
        last = _zero(Conv2d(c_out, c_out, 3))
        self.out_layers = nn.Sequential(GroupNorm(groups, c_out), nn.SiLU(), nn.Dropout(config.dropout), last)
        self.skip_connection = nn.Identity() if c_in == c_out else Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, _, conv = self.in_layers
        h = activate(x, norm, conv, resample=self.resample)
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        norm, _, dropout, conv = self.out_layers
        if dropout.training and dropout.p:
            h = conv(dropout(F.silu(torch.addcmul(shift, norm(h), 1 + scale))))
        else:
            h = activate(h, norm, conv, scale, shift)
        skipped: Tensor = self.skip_connection(resampled(x, self.resample))
        return skipped + h


class AttentionBlock(nn.Module):
    """Self-attention over all pixels. qkv and proj_out are 1×1 convolutions, kept as (out, in, 1) weights."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = channels // config.head_channels
        self.order = config.attention_order
        self.norm = GroupNorm(config.norm_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        B, C, H, W = x.shape
        qkv = convolve(self.norm(x), self.qkv.weight[..., None], self.qkv.bias).permute(0, 2, 3, 1)  # (B, H, W, 3C)
        if self.order == "new":
            q, k, v = qkv.reshape(B, H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = qkv.reshape(B, H * W, self.heads, 3, C // self.heads).permute(3, 0, 2, 1, 4)
        h = attend(q, k, v).transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        return x + convolve(h, self.proj_out.weight[..., None], self.proj_out.bias)


class InputConv(Conv2d):
    """The first convolution. Noise z, its last input channels, is added by a convolution of its own.

    So the part without z is computed as in a network without z, to the bit: with one convolution over all channels,
    the library may choose another kernel for them.
    """

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        if z is None:
            return super().forward(x)
        of_x, of_z = self.weight.split([x.shape[1], z.shape[1]], dim=1)
        return convolve(x, of_x, self.bias, 1) + convolve(z, of_z, None, 1)


class _Block(nn.Sequential):
    """A row of residual and attention layers, which take the time embedding."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb)
        return x


class UNet(nn.Module):
    """The ADM U-Net F(x, c_noise, y). Parameter names, order and shapes are those of the published checkpoints.

    Source: arXiv:2105.05233; names from the checkpoints of DDBM, DBIM and I2SB.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        c_emb = 4 * config.model_channels
        self.time_embed = nn.Sequential(nn.Linear(config.model_channels, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        if config.num_classes is not None:
            self.label_emb = nn.Embedding(config.num_classes, c_emb)

        def block(c_in: int, c_out: int, attend: bool, up: bool = False) -> _Block:
            layers: list[nn.Module] = [ResBlock(c_in, c_out, c_emb, config)]
            layers += [AttentionBlock(c_out, config)] if attend else []
            layers += [ResBlock(c_out, c_out, c_emb, config, "up")] if up else []
            return _Block(*layers)

        widths = [int(m * config.model_channels) for m in config.channel_mult]
        cells = config.patch_size**2
        first = InputConv(config.in_channels * cells, widths[0], 3)
        self.input_blocks = nn.ModuleList([nn.Sequential(first)])
        skips, c = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(block(c, width, 2**level in config.attention))
                skips.append(c := width)
            if level < len(widths) - 1:
                self.input_blocks.append(_Block(ResBlock(c, c, c_emb, config, "down")))
                skips.append(c)
        middle = [AttentionBlock(c, config)] if config.middle_attention else []
        self.middle_block = _Block(ResBlock(c, c, c_emb, config), *middle, ResBlock(c, c, c_emb, config))
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                up = level > 0 and i == config.num_res_blocks
                self.output_blocks.append(block(c + skips.pop(), width, 2**level in config.attention, up))
                c = width
        head = _zero(Conv2d(c, config.out_channels * cells, 3))
        self.out = nn.Sequential(GroupNorm(config.norm_groups, c), nn.SiLU(), head)

    @property
    def size_multiple(self) -> int:
        """Height and width of an image must be a multiple of this."""
        return self.config.patch_size << (len(self.config.channel_mult) - 1)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """Compute F.

        Args:
            x: (B, in_channels, H, W) without the channels of z, H and W multiples of `size_multiple`.
            c_noise: (B,), the number that stands for time.
            label: class indices (B,) int64, if the network has classes.
            z: noise (B, C_z, H, W), if the network takes it.

        Returns:
            (B, out_channels, H, W).

        Raises:
            ValueError: H or W is no such multiple; or a label is missing, or too many.
        """
        if (label is None) != (self.config.num_classes is None):
            raise ValueError(f"a network of {self.config.num_classes or 'no'} classes, but label is {label}")
        patch, multiple = self.config.patch_size, self.size_multiple
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(f"images of {x.shape[2]}×{x.shape[3]}: height and width must be multiples of {multiple}")
        emb = self.time_embed(sinusoid(c_noise, self.config.model_channels))
        if label is not None:
            emb = emb + self.label_emb(label)
        if patch > 1:
            x, z = to_cells(x, patch), None if z is None else to_cells(z, patch)
        h = self.input_blocks[0].get_submodule("0")(x, z)
        skips = [h]
        for module in self.input_blocks[1:]:
            h = self._run(module, h, emb)
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for module in self.output_blocks:
            h = self._run(module, torch.cat([h, skips.pop()], dim=1), emb)
        norm, _, head = self.out
        h = activate(h, norm, head)
        return to_pixels(h, patch) if patch > 1 else h

    def _run(self, module: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # Non-reentrant: frozen parameters stay frozen, and gradients still reach h.
            h = checkpoint(module, h, emb, use_reentrant=False)
        else:
            h = module(h, emb)
        return h


def to_cells(x: Tensor, patch: int) -> Tensor:
    """Stack cells of `patch` × `patch` pixels of (B, C, H, W) as channels, as `F.pixel_unshuffle`, also if B is 0."""
    if not torch.compiler.is_compiling():
        return F.pixel_unshuffle(x, patch)
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // patch, patch, W // patch, patch).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(B, C * patch**2, H // patch, W // patch)


def to_pixels(x: Tensor, patch: int) -> Tensor:
    """Undo `to_cells`, as `F.pixel_shuffle`, also if B is 0."""
    if not torch.compiler.is_compiling():
        return F.pixel_shuffle(x, patch)
    B, C, H, W = x.shape
    x = x.reshape(B, C // patch**2, patch, patch, H, W).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(B, C // patch**2, H * patch, W * patch)


def sinusoid(c_noise: Tensor, channels: int) -> Tensor:
    """Embed numbers (B,) as [cos | sin] of geometric frequencies, float32 (B, channels). Source: ADM's code."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=c_noise.device) / half)
    angles = c_noise.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _zero(module: nn.Module) -> Any:
    for p in module.parameters():
        nn.init.zeros_(p)
    return module
