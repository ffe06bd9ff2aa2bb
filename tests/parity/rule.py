"""Weights and inputs of the parity sets, computed by a rule, and the stored outputs. See README.md."""

import gzip
import json
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
TWIN = {  # the same network on the same inputs: what the first lacks is stored with the second
    "dbim_vp": "ddbm_vp",
    "dbim_ve": "ddbm_ve",
    "i2sb_otode10": "i2sb_sde03",
    "i2sb_otode10_inpaint": "i2sb_otode10",
}


def normal(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw standard normal float32 numbers of `shape` that depend on `name` and `seed` alone."""
    rng = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.randn(tuple(shape), generator=rng, dtype=torch.float32)


def weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return a parameter; `name` is its key as published, without the prefix "diffusion_model."."""
    w = normal(name, shape, seed)
    if w.ndim >= 2:
        return w / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * w if name.endswith(".weight") else 0.1 * w  # every 1-D ".weight" is a GroupNorm gain


def image(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return an input image: "x_0", "x_T", "x_t", "x_1"."""
    return (0.5 * normal("input:" + name, shape, seed)).clamp(-1, 1)


def noise(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return noise: "noise0", "noise1", …."""
    return normal("input:" + name, shape, seed)


@cache
def manifests() -> dict[str, dict[str, list[int]]]:
    """Return parameter names and shapes, in published order, of each small and each full-size network."""
    return json.loads(gzip.decompress((HERE / "manifests.json.gz").read_bytes()))


@cache
def families() -> dict[str, dict[str, Any]]:
    """Return, for each family, its network, schedule, inputs and times."""
    return json.loads((HERE / "families.json").read_text())


@cache
def outputs(family: str) -> dict[str, Tensor]:
    """Return what the published code computed for `family`. Stacked tensors: dim 0 is the time or step."""
    shared = outputs(TWIN[family]) if family in TWIN else {}
    shared = {key: v for key, v in shared.items() if key in ("raw", "x0hat", "x0hat_mixed")}
    return shared | load_file(HERE / f"{family}.safetensors")


def rule_weights(manifest: str) -> dict[str, Tensor]:
    """Return the state dict of a small network, in published names, shapes and order."""
    return {name: weight(name, tuple(shape), 0) for name, shape in manifests()[manifest].items()}
