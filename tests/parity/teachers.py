"""The small teachers of the parity sets and their inputs."""

from functools import cache

import torch
from parity.rule import families, image, noise, rule_weights
from torch import Tensor

from ibmd_cli.method.bridges import DBIMBridge, I2SBBridge, VEBridge, VPBridge
from ibmd_cli.networks.predictor import Preconditioning, Predictor
from ibmd_cli.networks.unet import UNetConfig

BRIDGES = {
    "ddbm_vp": VPBridge(),
    "ddbm_ve": VEBridge(),
    "dbim_vp": VPBridge(),
    "dbim_ve": VEBridge(),
    "dbim_inpaint": DBIMBridge(),
    "i2sb_sde03": I2SBBridge(beta_max=0.3),
    "i2sb_otode10": I2SBBridge(beta_max=1.0, noise_free=True),
    "i2sb_otode10_inpaint": I2SBBridge(beta_max=1.0, noise_free=True),
}
FAMILIES = list(BRIDGES)
SHAPE = (2, 3, 32, 32)


def network_config(family: str, **changes) -> UNetConfig:
    n = families()[family]["network"]
    settings = {
        "in_channels": n["in_channels"],
        "out_channels": n["out_channels"],
        "model_channels": n["model_channels"],
        "channel_mult": tuple(n["channel_mult"]),
        "num_res_blocks": n["num_res_blocks"],
        "attention": tuple(n["attention_downsample_factors"]),
        "head_channels": n["num_head_channels"],
        "attention_order": n["attention_order"],
        "num_classes": n["num_classes"],
    }
    return UNetConfig(**settings | changes)


@cache
def published(family: str, **changes) -> Predictor:
    """Return a predictor with the weights of the rule; it is shared: do not change it."""
    config = network_config(family, **changes)
    preconditioning = Preconditioning("ddbm" if family.endswith(("vp", "ve")) else "i2sb")
    model = Predictor(config, BRIDGES[family], preconditioning, conditional=config.in_channels == 6)
    shapes = {name: p.shape for name, p in model.backbone.state_dict().items()}
    state = {name: w.reshape(shapes[name]) for name, w in rule_weights(family).items()}
    model.backbone.load_state_dict(state)  # strict
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def inputs(family: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return x_t, x_T, label and mask (1 = hole)."""
    x_T, label, mask = image("x_1" if family.startswith("i2sb") else "x_T", SHAPE, 0), None, None
    if "inpaint" in family:
        mask = torch.zeros(2, 1, 32, 32)
        mask[..., 8:24, 8:24] = 1
        hole = noise("noise0", SHAPE, 0) if family.startswith("i2sb") else torch.zeros(SHAPE)
        x_T = image("x_0", SHAPE, 0) * (1 - mask) + hole * mask
    if "y" in families()[family]:
        label = torch.tensor(families()[family]["y"])
    return image("x_t", SHAPE, 0), x_T, label, mask


def error(value: Tensor, reference: Tensor) -> float:
    """The measure of the parity sets: max |error| / max(1, max |reference|)."""
    return ((value - reference).abs().max() / reference.abs().max().clamp(min=1)).item()
