"""Layers of the U-Net that compute the same as PyTorch's own in less time or memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SCRATCH_BYTES = 32 << 20
"""oneDNN reorders weights into a scratch at each call, which seems to be mapped anew each time if it is larger than
this (the limit of glibc). In parts, 1536 → 768 channels at 8×8 took 7 ms in place of 18 on two cores."""


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0) -> Tensor:
    """Convolve with stride 1, in float32 on the CPU always by oneDNN.

    For 1×1 kernels on one thread, and for single small images, `F.conv2d` takes BLAS instead: MKL, which on AMD's
    processors is half as fast. So is `F.linear`, which always takes it.

    Args:
        x: (B, C, H, W).
        weight: (C_out, C, k, k).
        bias: (C_out,), or None.
        padding: zeros on each side.

    Returns:
        (B, C_out, H + 2 padding − k + 1, W + 2 padding − k + 1), channels-last if x or the weight is.
    """
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    # torch.compile and torch.export cannot trace mkldnn_convolution.
    if plain and not torch.compiler.is_compiling() and torch.backends.mkldnn.is_available():
        if weight.nbytes < SCRATCH_BYTES:
            return torch.mkldnn_convolution(x, weight, bias, (padding, padding), (1, 1), (1, 1), 1)
        weights = weight.chunk(1 + weight.nbytes // SCRATCH_BYTES)
        biases = [None] * len(weights) if bias is None else bias.chunk(len(weights))
        return torch.cat([convolve(x, w, b, padding) for w, b in zip(weights, biases, strict=True)], dim=1)
    return F.conv2d(x, weight, bias, padding=padding)


class Conv2d(nn.Conv2d):
    """Convolution by `convolve` whose output has the size of its input."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int) -> None:
        super().__init__(c_in, c_out, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, self.kernel_size[0] // 2)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32 whatever the input's dtype, as in the published networks."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def activate(
    x: Tensor,
    norm: Any,
    conv: Any,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    resample: str = "",
) -> Tensor:
    """Compute conv(resample(SiLU(norm(x) · (1 + scale) + shift))); for its gradient it keeps little more than x.

    A chain of PyTorch's layers keeps the result of each of them.

    Args:
        x: (B, C, H, W).
        norm: a `GroupNorm` of C channels.
        conv: a `Conv2d` from C channels.
        scale: (B, C, 1, 1), or None, as `shift`.
        shift: likewise.
        resample: "down" (means of 2×2), "up" (each pixel to 2×2), or "".

    Returns:
        (B, C_out, H, W), (B, C_out, H/2, W/2) or (B, C_out, 2H, 2W).
    """
    if torch.compiler.is_compiling():  # a compiler chooses itself what to keep
        y = norm(x) if scale is None or shift is None else torch.addcmul(shift, norm(x), 1 + scale)
        convolved: Tensor = conv(resampled(F.silu(y), resample))
        return convolved
    a, b = (v.float().view(1, -1, 1, 1).expand(len(x), -1, 1, 1) for v in (norm.weight, norm.bias))
    if scale is not None and shift is not None:
        a, b = a * (1 + scale), torch.addcmul(shift.float(), b, 1 + scale.float())
    padding = conv.kernel_size[0] // 2
    result: Tensor = _Activate.apply(  # type: ignore[no-untyped-call]
        x, a, b, conv.weight, conv.bias, norm.num_groups, norm.eps, padding, resample
    )
    return result


class _Activate(torch.autograd.Function):
    """conv(resample(SiLU(a x̂ + b))), x̂ = (x − μ)/σ with μ, σ of each group, a and b of each image and channel.

    With p = a x̂ + b and its gradient g, n values to a group and means over groups written ⟨·⟩:
        ∂a = Σ g x̂     ∂b = Σ g     ∂x = (a g − ⟨a g⟩ − x̂ ⟨a g x̂⟩)/σ       (sums over pixels)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        padding: int,
        resample: str,
    ) -> Tensor:
        B, C, H, W = x.shape
        y, mean, rstd = torch.native_group_norm(x.float(), None, None, B, C, H * W, groups, eps)
        y = F.silu(torch.addcmul(b, y, a, out=y), inplace=True)
        ctx.save_for_backward(x, a, b, weight, mean, rstd)
        ctx.padding, ctx.resample = padding, resample
        return convolve(resampled(y, resample).to(x.dtype), weight, bias, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, weight, mean, rstd = ctx.saved_tensors
        dtype, x = x.dtype, x.float()
        B, C, H, W = x.shape
        groups = mean.shape[1]

        def per_channel(v: Tensor) -> Tensor:
            return v.repeat_interleave(C // groups, 1)[..., None, None]

        mean, rstd = per_channel(mean), per_channel(rstd)
        slope = a * rstd
        p = torch.addcmul(b - mean * slope, x, slope)
        y = resampled(F.silu(p), ctx.resample)
        # Under autocast the convolution was one of g's dtype.
        g, g_weight, g_bias = torch.ops.aten.convolution_backward(
            g, y.to(g.dtype), weight.to(g.dtype), [len(weight)], [1, 1], [ctx.padding] * 2, [1, 1],
            False, [0, 0], 1, [True, *ctx.needs_input_grad[3:5]],
        )  # fmt: skip
        del y
        if ctx.resample == "down":
            g = F.interpolate(g, scale_factor=2.0, mode="nearest") / 4
        elif ctx.resample == "up":
            g = F.avg_pool2d(g, 2) * 4
        g = torch.ops.aten.silu_backward(g.float(), p)
        g_b = g.sum((2, 3), keepdim=True)
        g_a = (torch.mul(g, x, out=p).sum((2, 3), keepdim=True) - mean * g_b) * rstd

        def group_mean(v: Tensor) -> Tensor:
            return per_channel(v.reshape(B, groups, -1).sum(2) / (C // groups * H * W))

        of_x = -(rstd**2) * group_mean(a * g_a)
        constant = -mean * of_x - rstd * group_mean(a * g_b)
        g_x = torch.addcmul(constant, x, of_x, out=p).addcmul_(g, slope)
        g_weight, g_bias = (None if v is None else v.to(weight.dtype) for v in (g_weight, g_bias))
        return g_x.to(dtype), g_a, g_b, g_weight, g_bias, None, None, None, None


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend, (B, heads, pixels, width); to train in bfloat16 on the CPU in float32, up to ten times as fast."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v)


def resampled(x: Tensor, resample: str) -> Tensor:
    """Halve height and width by means of 2×2 ("down"), double them by repetition ("up"), or neither ("")."""
    if resample == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if resample == "up" else x
