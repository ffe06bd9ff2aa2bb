"""Layers: the same values and gradients as PyTorch's own, in less memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from ibmd_cli.networks.layers import Conv2d, GroupNorm, activate, attend, convolve, resampled


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_group_norm_computes_in_float32(dtype):
    norm = GroupNorm(2, 8)
    x = (1000 + randn(2, 8, 4, 4)).to(dtype)  # in half precision the variance would be lost
    assert norm(x).dtype == dtype
    assert torch.equal(norm(x), norm(x.float()).to(dtype))
    assert norm.eps == 1e-5


@pytest.mark.parametrize("grad", [False, True])
def test_attention_in_bfloat16(grad):
    q, k, v = (randn(2, 3, 16, 8, seed=i).bfloat16().requires_grad_(grad) for i in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        y = attend(q, k, v)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert y.dtype == torch.bfloat16
    if grad:  # computed in float32, rounded once
        assert torch.equal(y, exact.bfloat16())
        for one, other in zip(*(torch.autograd.grad(h.sum(), [q, k, v]) for h in (y, exact)), strict=True):
            torch.testing.assert_close(one, other, rtol=0.01, atol=1e-6)
    else:
        torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_convolve_is_conv2d_in_value_and_gradient(kernel_size, form):
    """It chooses the library, nothing else; batch 1 and few pixels are where PyTorch would choose another."""
    for batch in (1, 3):
        x, g = randn(batch, 16, 6, 4).contiguous(memory_format=form), randn(batch, 8, 6, 4, seed=1)
        leaves = [x, randn(8, 16, kernel_size, kernel_size, seed=2), randn(8, seed=3)]
        got, expected = [], []
        for results, function in ((got, convolve), (expected, F.conv2d)):
            own = [v.clone().requires_grad_() for v in leaves]
            y = function(*own, padding=kernel_size // 2)
            results += [y, *torch.autograd.grad(y, own, g)]
        assert got[0].is_contiguous(memory_format=form)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=5e-5)  # float32 sums of up to 144 terms
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(*leaves).dtype == torch.bfloat16


def chain(x, norm, conv, scale=None, shift=None, resample=""):
    """`activate` in PyTorch's layers."""
    y = norm(x)
    if scale is not None:
        y = y * (1 + scale) + shift
    return conv(resampled(F.silu(y), resample))


def layer(dtype=torch.float32):
    """Return the arguments of `activate` that learn: norm, conv, scale and shift."""
    torch.manual_seed(0)
    norm, conv = GroupNorm(4, 16).to(dtype), Conv2d(16, 24, 3).to(dtype)
    for i, p in enumerate(norm.parameters()):
        p.data += 0.3 * randn(*p.shape, seed=i).to(dtype)
    return norm, conv, [0.5 * randn(3, 16, 1, 1, seed=5 + i).to(dtype) for i in range(2)]


def value_and_gradients(function, x, film, resample, trained=True):
    norm, conv, factors = layer()
    conv.requires_grad_(trained)
    norm.requires_grad_(trained)
    leaves = [v.clone().requires_grad_() for v in (x, *(factors if film else ()))]
    y = function(leaves[0], norm, conv, *leaves[1:], resample=resample)
    y.backward(randn(*y.shape, seed=9).to(y.dtype))
    return [y, *(v.grad for v in leaves)], [p.grad for p in (*norm.parameters(), *conv.parameters())]


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("resample", ["", "down", "up"])
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("mean", [0.0, 20.0])
def test_activate_is_a_chain_of_layers(film, resample, form, mean):
    x = (mean + randn(3, 16, 8, 6)).contiguous(memory_format=form)
    expected, of_weights = value_and_gradients(chain, x, film, resample)
    got, got_of_weights = value_and_gradients(activate, x, film, resample)
    # Rounding of float32 in sums of up to 432 terms; a mean of 20 deviations takes 4 bits more.
    bound = 1e-5 if mean == 0 else 2e-4
    for one, other in zip(got + got_of_weights, expected + of_weights, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= bound * other.abs().max()
    frozen, none = value_and_gradients(activate, x, film, resample, trained=False)
    assert none == [None] * 4
    for one, other in zip(frozen, got, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert got[0].is_contiguous(memory_format=form)


@pytest.mark.parametrize("resample", ["", "down", "up"])
def test_activate_under_autocast(resample):
    x = randn(3, 16, 8, 6)
    expected, of_weights = value_and_gradients(chain, x, True, resample)

    def mixed(*arguments, **settings):
        with torch.autocast("cpu", torch.bfloat16):
            return activate(*arguments, **settings)

    got, got_of_weights = value_and_gradients(mixed, x, True, resample)
    assert got[0].dtype == torch.bfloat16
    assert all(v.dtype == torch.float32 for v in got[1:] + got_of_weights)
    for one, other in zip(got + got_of_weights, expected + of_weights, strict=True):
        assert (one - other).abs().max() <= 0.02 * other.abs().max()  # bfloat16 has 8 bits: 4e-3 each time


def test_activate_keeps_its_input_alone():
    x = randn(3, 16, 32, 32).requires_grad_()
    norm, conv, (scale, shift) = layer()
    kept = {}

    def pack(v):
        if not any(v is p for p in conv.parameters()):
            kept[v.untyped_storage()._cdata] = v.untyped_storage()
        return v

    sizes = []
    for function in (activate, chain):
        kept.clear()
        with saved_tensors_hooks(pack, lambda v: v):
            function(x, norm, conv, scale.requires_grad_(), shift.requires_grad_())
        sizes.append(sum(storage.nbytes() for storage in kept.values()) / x.nbytes)
    assert sizes[0] < 1.1
    assert sizes[1] > 4  # x, its norm, the input of SiLU, the input of the convolution


def test_activate_in_half_precision():
    norm, conv, (scale, shift) = layer(torch.bfloat16)
    x = randn(3, 16, 8, 6).bfloat16()
    y = activate(x, norm, conv, scale, shift)
    assert y.dtype == torch.bfloat16
    assert (y - chain(x, norm, conv, scale, shift)).abs().max() <= 0.03 * y.abs().max()
