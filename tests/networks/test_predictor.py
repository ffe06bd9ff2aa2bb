"""Networks: parity with the published code, published names, widening, checkpointing, JSON."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from parity.rule import families, manifests, outputs, weight
from parity.teachers import FAMILIES, error, inputs, network_config, published
from torch import nn

from ibmd_cli.method.bridges import DBIMBridge, I2SBBridge, VEBridge, VPBridge, expand_to
from ibmd_cli.method.distillation import Setup, Sources, bridge_loss, draw_time
from ibmd_cli.method.log_times import LogTimes
from ibmd_cli.method.noise import stream
from ibmd_cli.networks.predictor import Preconditioning, Predictor, make_predictor
from ibmd_cli.networks.unet import AttentionBlock, UNet, UNetConfig, sinusoid


@pytest.fixture(scope="module")
def models():
    """Return the published predictor of a family."""
    return published


def small(bridge=None, conditional=True, noise_channels=0, preconditioning=None, seed=0, **changes):
    """Return a small predictor of which no weight is zero."""
    settings = {
        "in_channels": 3 * (1 + conditional) + noise_channels,
        "model_channels": 16,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention": (2,),
        "head_channels": 16,
        "norm_groups": 8,
    }
    config = UNetConfig(**settings | changes)
    bridge = bridge or VPBridge()
    model = Predictor(config, bridge, preconditioning or Preconditioning(), conditional, noise_channels)
    for name, p in model.named_parameters():
        p.data = weight(name, tuple(p.shape), seed)
    return model.to(memory_format=torch.channels_last).eval()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- parity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_prediction_equals_the_published_one(models, family):
    model, info, out = models(family), families()[family], outputs(family)
    x_t, x_T, y, _ = inputs(family)
    for i, t in enumerate(info.get("x0hat_steps") or info["x0hat_times"]):
        # TOLERANCES.md: the reference's float32 c_out near 0.
        bound = 5e-5 if family == "ddbm_vp" and t <= 1e-3 else 1e-5
        assert error(model(x_t, torch.full((2,), t), x_T, label=y), out["x0hat"][i]) < bound, t
    t = torch.tensor(info.get("x0hat_mixed_steps") or info["x0hat_mixed_times"])
    assert error(model(x_t, t, x_T, label=y), out["x0hat_mixed"]) < 2e-5  # c_noise has two bits of the processor's


@pytest.mark.parametrize("family", FAMILIES)
def test_raw_network_output_equals_the_published_one(models, family):
    model, info = models(family), families()[family]
    reference = outputs(family)["raw"]
    x_t, x_T, y, _ = inputs(family)
    for i, t in enumerate(info.get("x0hat_steps") or info["x0hat_times"]):
        t = torch.full((2,), t)
        c_in = model.preconditioning(model.bridge, t)[1].float()[:, None, None, None]
        x = torch.cat([c_in * x_t, x_T], 1) if model.conditional else c_in * x_t
        assert error(model.backbone(x, model.bridge.c_noise(t), y), reference[i]) < 2e-5  # of c_noise's two bits


@pytest.mark.parametrize("family", FAMILIES)
def test_preconditioning_and_weight_equal_the_published_ones(models, family):
    model, out = models(family), outputs(family)
    t = out["coef.n"] if "coef.n" in out else out["coef.t"]
    coefficients = model.preconditioning(model.bridge, t)
    assert all(c.dtype == torch.float64 and c.shape == t.shape for c in coefficients)
    for key, value in zip(("c_skip", "c_in", "c_out"), coefficients, strict=True):
        # TOLERANCES.md: DDBM's float32 c_in cancels at t = 79.999 of VE.
        bound = 2e-4 if (family, key) == ("ddbm_ve", "c_in") else 1e-5
        assert error(value, out[f"coef.{key}"].double()) < bound, key
    torch.testing.assert_close(model.bridge.c_noise(t), out["coef.c_noise"], rtol=2.4e-7, atol=0)  # two bits
    # TOLERANCES.md: DDBM's float32 λ cancels near both ends; I2SB has float32 tables, DBIM float64.
    bound = {"ddbm": 1e-3, "i2sb": 1e-6, "dbim": 1e-9}[family[:4]]
    assert (model.weight(t) / out["coef.lambda"].double() - 1).abs().max() < bound
    assert model.weight(t).dtype == torch.float64
    torch.testing.assert_close(model.weight(t, 1.0) ** 2, model.weight(t), rtol=1e-12, atol=0)
    assert (model.weight(t, 0.0) == 1).all()


VP_GOLDEN = [  # teachers.md §3.1: t, c_skip, c_in, c_out; 8 decimals
    (1e-4, 0.99996996, 1.99997996, 0.00316381),
    (1e-3, 0.99969698, 1.99979784, 0.01004845),
    (0.05, 0.97794034, 1.98526131, 0.08570258),
    (0.3, 0.72760661, 1.81668711, 0.29931492),
    (0.5, 0.49740811, 1.67346748, 0.40206110),
    (0.7, 0.30756205, 1.61325639, 0.46222703),
    (0.9, 0.13097244, 1.73891771, 0.49429459),
    (0.99, 0.01736373, 1.96024474, 0.49992153),
    (0.999, 0.00180769, 1.99581959, 0.49999918),
    (0.9999, 0.00018153, 1.99957980, 0.49999999),
    (1.0, 0, 2, 0.5),
]


def test_ddbm_preconditioning_golden_table():
    t = torch.tensor([row[0] for row in VP_GOLDEN], dtype=torch.float64)
    got = torch.stack(Preconditioning()(VPBridge(), t)).T
    expected = torch.tensor([row[1:] for row in VP_GOLDEN], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=5.1e-9)  # half a unit of the last decimal


@pytest.mark.parametrize("bridge", [VPBridge(), VEBridge(), I2SBBridge(), DBIMBridge()], ids=lambda b: b.kind)
def test_ddbm_preconditioning_is_the_best_linear_predictor(bridge):
    """c_skip x_t is the regression of x_0 on x_t, c_out² what it leaves, 1/c_in² the second moment of x_t."""
    m0, mT, m0T = 0.31, 0.7, -0.2
    t = bridge.time(torch.linspace(0.001, 0.999, 9))
    c_skip, c_in, c_out = Preconditioning("ddbm", m0, mT, m0T)(bridge, t)
    a, b, c = bridge.coefficients(t)
    second = torch.tensor([[mT, m0T], [m0T, m0]], dtype=torch.float64)
    v = torch.stack([a, b], 1)
    moment = torch.einsum("ti,ij,tj->t", v, second, v) + c**2
    cross = v @ second[1]
    torch.testing.assert_close(c_in, moment**-0.5, rtol=1e-12, atol=0)
    torch.testing.assert_close(c_skip, cross / moment, rtol=1e-12, atol=0)
    # m0 − cross²/moment cancels near t = 0, hence the absolute bound.
    torch.testing.assert_close(c_out**2, m0 - cross**2 / moment, rtol=1e-9, atol=1e-12)


def test_i2sb_preconditioning_predicts_the_scaled_noise():
    bridge = I2SBBridge(beta_max=0.3)
    n = torch.tensor([0, 250, 999])
    c_skip, c_in, c_out = Preconditioning("i2sb")(bridge, n)
    assert (c_skip == 1).all()
    assert (c_in == 1).all()
    assert c_out.tolist() == pytest.approx([-0.01, -0.17314609, -0.37553595], abs=5.1e-9)  # teachers.md §3.2


MOMENTS = {"m0": 0.31, "mT": 0.7, "m0T": 0.2}
FORMS = [
    (VPBridge(), True, Preconditioning("ddbm", **MOMENTS)),
    (VEBridge(T=20.0), True, Preconditioning("ddbm", **MOMENTS)),
    (I2SBBridge(), False, Preconditioning("ddbm", **MOMENTS)),
    (I2SBBridge(), False, Preconditioning("i2sb")),
    (VPBridge(beta_d=8.0), True, Preconditioning("x0", **MOMENTS, time="log", max_weight=50.0)),
    (VEBridge(), True, Preconditioning("residual", **MOMENTS, max_weight=3.0)),
]


@pytest.mark.parametrize("log_times", [None, LogTimes()], ids=["own-times", "log-times"])
@pytest.mark.parametrize(("bridge", "conditional", "form"), FORMS, ids=lambda v: getattr(v, "kind", None))
def test_loss_of_an_untrained_teacher_is_that_of_its_linear_guess(bridge, conditional, form, log_times):
    """F = 0 at the start, so bridge matching on Gaussian pairs costs a closed form of second moments: 1 for DDBM's."""
    network = small(bridge, conditional).backbone.config
    model = Predictor(network, bridge, form, conditional)  # fresh: its last convolution is zero
    setup = Setup(bridge, model.weight, (bridge.T,), log_times=log_times)
    m0, mT, m0T = MOMENTS.values()
    u, v = randn(2, 400, 3, 8, 8)
    x_T = mT**0.5 * u
    x_0 = m0T / mT * x_T + (m0 - m0T**2 / mT) ** 0.5 * v
    with torch.no_grad():
        loss = bridge_loss(model, setup, x_0, Sources(x_T), stream(0)).item()
        t, eps = draw_time(setup, x_0, stream(0))
        x_t = bridge.sample(x_0, x_T, t, eps)
        spread = (expand_to(model.weight(t), x_0) * (model(x_t, t, x_T) - x_0) ** 2).mean((1, 2, 3)).std().item() / 20
    a, b, c = bridge.coefficients(t)
    if form.kind == "ddbm":
        exact = torch.ones(400)
    elif form.kind == "i2sb":
        exact = (a**2 * mT + (b - 1) ** 2 * m0 + 2 * a * (b - 1) * m0T + c**2) / bridge.alpha_rho(t)[1] ** 2
    else:
        ddbm = Preconditioning("ddbm", **MOMENTS)(bridge, t)[2]
        weight = 1 / ddbm.square().clamp(min=1 / form.max_weight)
        exact = weight * (m0 if form.kind == "x0" else m0 + mT - 2 * m0T)
    assert loss == pytest.approx(exact.mean().item(), abs=4 * spread)  # four standard errors
    assert 4 * spread < 0.3 * loss


def test_log_time_embedding():
    bridge, form = VPBridge(beta_d=8.0), Preconditioning(time="log")
    t = bridge.time_at(torch.tensor([-5.0, 0.0, 3.0], dtype=torch.float64))
    assert form.c_noise(bridge, t).tolist() == pytest.approx([1250, 0, -750], abs=0.1)
    ends = form.c_noise(bridge, torch.tensor([bridge.T, 0.0]))
    assert ends.dtype == torch.float32
    assert ends.tolist() == [2000, -2000]
    ve = VEBridge()  # at small t it is DDBM's own number
    t = torch.tensor([0.01, 0.1, 1.0])
    torch.testing.assert_close(form.c_noise(ve, t), ve.c_noise(t), rtol=1e-4, atol=0.1)


@pytest.mark.parametrize("settings", [{"kind": "edm"}, {"time": "sqrt"}])
def test_unknown_form_is_refused(settings):
    with pytest.raises(ValueError, match="expected ddbm or i2sb or x0 or residual|expected own or log"):
        Preconditioning(**settings)


def test_what_came_later_is_not_written_at_its_default():
    settings = small().to_dict()
    assert settings["preconditioning"].keys() == {"kind", "m0", "mT", "m0T"}
    assert "middle_attention" not in settings["network"]


def test_purely_convolutional_network_takes_any_size():
    model = small(attention=(), middle_attention=False, patch_size=4, channel_mult=(1, 1))
    assert not any(isinstance(m, AttentionBlock) for m in model.modules())
    assert model.backbone.size_multiple == 8
    for H, W in [(8, 8), (40, 16)]:
        x = randn(1, 3, H, W)
        assert model(x, torch.ones(1), x).shape == (1, 3, H, W)


def test_sinusoid_golden_values():
    # teachers.md §3.4, 5 or 6 decimals.
    e = sinusoid(torch.tensor([499.54953]), 256)[0]
    assert e.shape == (256,)
    assert e[[0, 1, 128, 129]].tolist() == pytest.approx([-0.99934, 0.99605, -0.03629, -0.08877], abs=6e-6)
    e = sinusoid(torch.tensor([-173.2868]), 192)[0]
    assert e[[0, 95, 96]].tolist() == pytest.approx([-0.877962, 0.999818, 0.478731], abs=6e-6)
    assert sinusoid(torch.tensor([1.0], dtype=torch.float64), 32).dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_attention_order_is_noticed(models, family):
    right = models(family)
    order = right.backbone.config.attention_order
    wrong = published(family, attention_order={"new": "legacy", "legacy": "new"}[order])
    x_t, x_T, y, _ = inputs(family)
    info = families()[family]
    # The earliest times hide the network behind a small c_out.
    t = torch.full((2,), (info.get("x0hat_steps") or info["x0hat_times"])[2])
    reference = outputs(family)["x0hat"][2]
    assert error(right(x_t, t, x_T, label=y), reference) < 1e-5
    assert error(wrong(x_t, t, x_T, label=y), reference) > 1e-3


@pytest.mark.parametrize("order", ["new", "legacy"])
def test_attention_order_is_a_permutation_of_channels(order):
    """Against attention written out, head by head."""
    C, heads, d = 32, 2, 16
    config = UNetConfig(in_channels=3, head_channels=d, attention_order=order, norm_groups=8)
    block = AttentionBlock(C, config)
    for name, p in block.named_parameters():
        p.data = weight(name, tuple(p.shape), 5)
    x = randn(2, C, 3, 4)
    qkv = block.qkv(block.norm(x).flatten(2))  # (B, 3C, L)
    parts = []
    for h in range(heads):
        starts = {"new": [h * d + i * C for i in range(3)], "legacy": [3 * h * d + i * d for i in range(3)]}
        q, k, v = (qkv[:, s : s + d] for s in starts[order])
        attention = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(d), dim=-1)
        parts.append(v @ attention.transpose(1, 2))
    expected = x + block.proj_out(torch.cat(parts, 1)).reshape(x.shape)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-5)  # float32, values up to 4


def test_class_labels(models):
    model = models("dbim_inpaint")
    x_t, x_T, y, _ = inputs("dbim_inpaint")
    t = torch.full((2,), 0.5)
    reference = outputs("dbim_inpaint")["x0hat"][2]
    assert error(model(x_t, t, x_T, label=y), reference) < 1e-5
    assert error(model(x_t, t, x_T, label=y.flip(0)), reference) > 1e-3
    with pytest.raises(ValueError, match="a network of 1000 classes, but label is None"):
        model(x_t, t, x_T)
    with pytest.raises(ValueError, match="a network of no classes"):
        small()(x_t, t, x_T, label=y)


# --- names and shapes --------------------------------------------------------------------------------------


def squeezed(shape):
    """Attention weights are published as (a, b, 1) or (a, b, 1, 1)."""
    shape = list(shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    return shape


def assert_same_layout(network, manifest):
    names = {name.removeprefix("diffusion_model."): shape for name, shape in manifest.items()}
    state = network.state_dict()
    assert list(state) == list(names)
    # I2SB's EMA is a list in this order.
    assert [name for name, _ in network.named_parameters()] == list(names)
    for name, shape in names.items():
        mine = list(state[name].shape)
        if ".qkv.weight" in name or ".proj_out.weight" in name:
            mine, shape = squeezed(mine), squeezed(shape)
        assert mine == shape, name


@pytest.mark.parametrize("family", FAMILIES)
def test_small_names_shapes_and_order(family):
    with torch.device("meta"):
        network = UNet(network_config(family))
    assert_same_layout(network, manifests()[family])


E2H = {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3, "attention": (2, 4, 8)}
IMAGENET = {}  # the defaults of UNetConfig are the 256-pixel network of ADM
FULL = {  # teachers.md §1.5, §2.1: settings, number of parameters
    "ddbm_e2h64_vp_original": ({"in_channels": 6, **E2H}, 295_136_451),
    "dbim_e2h64_vp_adapted": ({"in_channels": 6, **E2H}, 295_136_451),
    "ddbm_diode256_vp_original": ({"in_channels": 6}, 552_814_083),
    "dbim_diode256_vp_adapted": ({"in_channels": 6}, 552_814_083),
    "dbim_imagenet256_inpaint_center": (
        {"in_channels": 6, "num_classes": 1000, "attention_order": "legacy"},
        553_838_083,
    ),
    "i2sb_imagenet256_uncond_net": ({"in_channels": 3, "attention_order": "legacy"}, 552_807_171),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_names_shapes_and_order(name):
    settings, parameters = FULL[name]
    with torch.device("meta"):
        network = UNet(UNetConfig(**settings))
    assert_same_layout(network, manifests()[name])
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert not list(network.buffers())


def test_fresh_network_predicts_c_skip_x_t():
    """ADM's zero initialisation: every residual branch and the head start at 0."""
    torch.manual_seed(0)
    model = make_predictor(small().to_dict())
    x_t, x_T = randn(2, 2, 3, 8, 8)
    t = torch.tensor([0.3, 0.8])
    c_skip = model.preconditioning(model.bridge, t)[0].float()[:, None, None, None]
    assert torch.equal(model(x_t, t, x_T), c_skip * x_t)
    zero = {n.rpartition(".")[0] for n, p in model.backbone.named_parameters() if p.ndim > 1 and not p.any()}
    ends = ("out_layers.3", "proj_out")
    assert zero == {n for n, _ in model.backbone.named_modules() if n.endswith(ends)} | {"out.2"}


# --- gradient checkpointing, dropout, dtypes ---------------------------------------------------------------


def gradients(model, frozen, checkpointing):
    model.backbone.gradient_checkpointing = checkpointing
    for p in model.parameters():
        p.grad = None
        p.requires_grad_(not frozen)
    x_t, x_T = randn(2, 2, 3, 16, 16, seed=3).unbind()
    x_t.requires_grad_()
    model(x_t, torch.tensor([0.3, 1.0]), x_T, label=torch.tensor([1, 4])).square().mean().backward()
    return x_t.grad, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("order", ["new", "legacy"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing_changes_no_gradient(order, dropout):
    model = small(attention_order=order, num_classes=5, dropout=dropout).train()
    torch.manual_seed(7)
    x_plain, p_plain = gradients(model, False, False)
    torch.manual_seed(7)
    x_checked, p_checked = gradients(model, False, True)
    # The same operations in the same order; sums over uses of a tensor may be associated differently.
    torch.testing.assert_close(x_checked, x_plain, rtol=1e-5, atol=1e-7)
    assert len(p_plain) > 50
    for one, other in zip(p_checked, p_plain, strict=True):
        assert (other != 0).any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_flows_through_a_frozen_network(checkpointing):
    model = small(num_classes=5)
    x_free, _ = gradients(model, False, False)
    x_frozen, p_frozen = gradients(model, True, checkpointing)
    assert all(g is None for g in p_frozen)
    assert (x_frozen != 0).any()
    torch.testing.assert_close(x_frozen, x_free, rtol=1e-5, atol=1e-7)  # as above


def test_checkpointing_recomputes_only_under_grad(monkeypatch):
    model, calls = small(num_classes=None), []

    def counted(module, *args, **kwargs):
        calls.append(kwargs)
        return module(*args)

    monkeypatch.setattr("ibmd_cli.networks.unet.checkpoint", counted)
    x, t = randn(1, 3, 8, 8), torch.ones(1)
    model(x, t, x)
    assert not calls
    model.backbone.gradient_checkpointing = True
    with torch.no_grad():
        model(x, t, x)
    assert not calls
    model(x, t, x)
    # one middle block, and the input blocks but the first, a single convolution
    blocks = len(model.backbone.input_blocks) + len(model.backbone.output_blocks)
    assert calls == [{"use_reentrant": False}] * blocks


def test_dropout_acts_in_training_mode_alone():
    model, reference = small(dropout=0.5), small(dropout=0.0)
    x, t = randn(2, 3, 8, 8), torch.ones(2)
    assert torch.equal(model(x, t, x), reference(x, t, x))
    model.train()
    reference.train()
    torch.manual_seed(0)
    one, other = model(x, t, x), model(x, t, x)
    assert not torch.equal(one, other)
    assert torch.equal(reference(x, t, x), reference(x, t, x))
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5] * 10  # one per residual block


def test_prediction_is_float32_under_autocast():
    model = small()
    x, t = randn(2, 3, 8, 8), torch.tensor([0.4, 1.0])
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x, t, x)
    assert y.dtype == torch.float32
    assert error(y, model(x, t, x)) < 5e-2  # bfloat16 has 8 bits: 4e-3 per operation, some ten deep


# --- inputs ------------------------------------------------------------------------------------------------


def test_unconditional_predictor_ignores_x_T():
    x_t, x_T = randn(2, 2, 3, 8, 8).unbind()
    t = torch.tensor([0.4, 0.9])
    free, bound = small(conditional=False), small(conditional=True)
    assert torch.equal(free(x_t, t, x_T), free(x_t, t, x_T + 1))
    assert not torch.equal(bound(x_t, t, x_T), bound(x_t, t, x_T + 1))


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_size_multiple(patch_size, levels):
    model = small(patch_size=patch_size, channel_mult=(1, 2, 2)[:levels], attention=())
    m = model.backbone.size_multiple
    assert m == patch_size * 2 ** (levels - 1)
    for H, W in ((m, m), (3 * m, m), (4 * m, 5 * m)):
        x = randn(1, 3, H, W)
        assert model(x, torch.ones(1), x).shape == x.shape
    if m > 1:
        x = randn(1, 3, 4 * m + m // 2, 4 * m)
        with pytest.raises(ValueError, match=f"multiples of {m}"):
            model(x, torch.ones(1), x)


def test_patches_are_channels():
    """A network with patches is one without them on space-to-depth images, with the same weights."""
    patched = small(patch_size=2).backbone
    plain = small(in_channels=24, out_channels=12).backbone
    plain.load_state_dict(patched.state_dict())
    x, c_noise = randn(2, 6, 16, 8), torch.tensor([-300.0, 0.0])
    expected = F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), c_noise), 2)
    torch.testing.assert_close(patched(x, c_noise), expected, rtol=0, atol=1e-5)  # memory formats may differ


@pytest.mark.parametrize("patch_size", [1, 2])
def test_batch_elements_are_independent(patch_size):
    """Also: memory format does not matter, and t may differ per image."""
    model = small(patch_size=patch_size)
    x_t, x_T = randn(2, 3, 3, 16, 8).unbind()
    t = torch.tensor([0.1, 0.6, 1.0])
    together = model(x_t, t, x_T)
    for i in range(3):
        alone = model(x_t[i : i + 1], t[i : i + 1], x_T[i : i + 1])
        assert error(together[i : i + 1], alone) < 1e-5  # another convolution kernel may be chosen
    other = model(*(v.contiguous(memory_format=torch.channels_last) for v in (x_t,)), t, x_T)
    assert torch.equal(together, other)


# --- the noise of a student --------------------------------------------------------------------------------

SHAPES = [(1, 8, 8), (1, 16, 16), (2, 32, 32), (5, 16, 40), (3, 48, 16), (8, 32, 32)]


def same_at_T(teacher, student, noise_channels, same):
    C = teacher.backbone.config.out_channels
    for B, H, W in SHAPES:
        x_T, z = randn(B, C, H, W), 3 * randn(B, noise_channels, H, W, seed=1)
        t = torch.full((B,), teacher.bridge.T)
        for form in (torch.contiguous_format, torch.channels_last):
            x = x_T.contiguous(memory_format=form)
            with torch.no_grad():
                expected = teacher(x, t, x)
                out = student(x, t, x, z)
            assert same(out, expected), (B, H, W, form)
            # Of z it is free to the last bit, whatever kernels are chosen: 0 · z = 0. Also with a graph.
            assert torch.equal(student(x, t, x, -z.contiguous(memory_format=form)), out), (B, H, W, form)


@pytest.mark.parametrize("noise_channels", [1, 3, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"conditional": True},
        {"conditional": False},
        {"conditional": True, "patch_size": 2},
        {"conditional": False, "patch_size": 2},
        {"conditional": False, "in_channels": 1, "out_channels": 1},
    ],
    ids=str,
)
def test_widened_student_is_its_teacher_bit_for_bit(settings, noise_channels):
    teacher = small(**settings)
    student = teacher.widen(noise_channels)
    assert student.noise_channels == noise_channels
    same_at_T(teacher, student, noise_channels, torch.equal)


@pytest.mark.parametrize("family", FAMILIES)
def test_widened_published_student_is_its_teacher_bit_for_bit(models, family):
    teacher = models(family)
    student = teacher.widen(3)
    _, x_T, y, _ = inputs(family)
    T = torch.full((2,), teacher.bridge.T)
    for seed in range(2):
        z = randn(*x_T.shape, seed=seed)
        assert torch.equal(student(x_T, T, x_T, z, y), teacher(x_T, T, x_T, label=y))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_widening_appends_zero_weights_that_can_learn(patch_size):
    teacher = small(patch_size=patch_size)
    student = teacher.widen(2)
    name = "backbone.input_blocks.0.0.weight"
    old, new = teacher.state_dict(), student.state_dict()
    assert list(old) == list(new)
    k = old[name].shape[1]
    assert new[name].shape[1] == k + 2 * patch_size**2
    assert torch.equal(new[name][:, :k], old[name])
    assert (new[name][:, k:] == 0).all()
    assert all(torch.equal(new[n], old[n]) for n in old if n != name)
    # A copy: training it leaves the teacher alone.
    assert all(new[n].data_ptr() != old[n].data_ptr() for n in old)
    x, z = randn(1, 3, 8, 8), randn(1, 2, 8, 8, seed=1)
    student(x, torch.ones(1), x, z).square().mean().backward()
    gradient = student.get_parameter(name).grad
    assert (gradient[:, k:] != 0).all()
    # Once they are not zero, z matters; x_t and x_T keep their places.
    with torch.no_grad():
        student.get_parameter(name)[:, k:] = 1e-2
    assert not torch.equal(student(x, torch.ones(1), x, z), student(x, torch.ones(1), x, -z))
    again = student.widen(1)
    assert again.noise_channels == 3
    padded = torch.cat([z, randn(1, 1, 8, 8)], 1)
    assert error(again(x, torch.ones(1), x, padded), student(x, torch.ones(1), x, z)) < 1e-5


def test_widening_with_weights_of_a_given_deviation():
    teacher, name = small(), "backbone.input_blocks.0.0.weight"
    zero, one, again = teacher.widen(64), teacher.widen(64, 0.1), teacher.widen(64, 0.1)
    other = teacher.widen(64, 0.1, torch.Generator().manual_seed(1))
    new = one.get_parameter(name)[:, 6:]
    # 9216 numbers: four standard errors are 3 % of the deviation, and 0.004 of the mean.
    assert new.std().item() == pytest.approx(0.1, rel=0.03)
    assert abs(new.mean().item()) < 0.004
    assert torch.equal(one.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))
    assert all(torch.equal(p, one.get_parameter(n)) for n, p in zero.named_parameters() if n != name)
    assert torch.equal(one.get_parameter(name)[:, :6], teacher.get_parameter(name))
    x, z = randn(1, 3, 8, 8), randn(1, 64, 8, 8, seed=1)
    assert not torch.equal(one(x, torch.ones(1), x, z), one(x, torch.ones(1), x, -z))
    assert torch.equal(one(x, torch.ones(1), x, 0 * z), zero(x, torch.ones(1), x, z))


def test_widening_keeps_mode_bridge_and_preconditioning():
    for training in (False, True):
        teacher = small(VEBridge(T=20.0), preconditioning=Preconditioning("ddbm", 0.3, 0.5, 0.1))
        teacher.train(training)
        student = teacher.widen(1)
        assert student.training is training
        assert student.bridge == teacher.bridge
        assert student.preconditioning == teacher.preconditioning
        assert student.conditional is teacher.conditional


def test_small_noise_is_repeated():
    student = small(noise_channels=2)
    x, t = randn(2, 3, 16, 24), torch.ones(2)
    z = randn(2, 2, 4, 6, seed=1)
    full = z.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(student(x, t, x, z), student(x, t, x, full))
    assert not torch.equal(student(x, t, x, z), student(x, t, x, -z))
    constant = randn(2, 2, 1, 1, seed=2)
    assert torch.equal(student(x, t, x, constant), student(x, t, x, constant.expand(2, 2, 16, 24)))


def test_student_without_its_noise_is_refused():
    student = small(noise_channels=2)
    x = randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match="needs noise z of 2 channels"):
        student(x, torch.ones(1), x)


# --- JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        small(),
        small(I2SBBridge(0.3), False, preconditioning=Preconditioning("i2sb"), attention_order="legacy"),
        small(I2SBBridge(noise_free=True), False, 1, Preconditioning("i2sb")),
        small(DBIMBridge(), num_classes=7, dropout=0.1),
        small(VEBridge(T=20.0), preconditioning=Preconditioning(m0=0.2, mT=0.5, m0T=0.1), patch_size=2),
        small(channel_mult=(1, 1.5), norm_groups=4),
        small(attention=(), middle_attention=False, preconditioning=Preconditioning("x0", time="log", max_weight=50.0)),
    ],
    ids=lambda m: m.bridge.kind,
)
def test_json_round_trip(model):
    config = json.loads(json.dumps(model.to_dict()))
    again = make_predictor(config).eval()
    assert again.to_dict() == model.to_dict()
    assert json.loads(json.dumps(again.to_dict())) == config
    assert again.backbone.config == model.backbone.config
    assert (again.bridge, again.preconditioning) == (model.bridge, model.preconditioning)
    again.load_state_dict(model.state_dict())
    x_t, x_T = randn(2, 2, 3, 8, 8).unbind()
    t = model.bridge.time(torch.tensor([0.0, 0.6]))
    z = randn(2, 1, 8, 8) if model.noise_channels else None
    label = torch.tensor([0, 6]) if model.backbone.config.num_classes else None
    assert torch.equal(again(x_t, t, x_T, z, label), model(x_t, t, x_T, z, label))


def test_made_predictor_is_channels_last():
    model = make_predictor(small().to_dict())
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
