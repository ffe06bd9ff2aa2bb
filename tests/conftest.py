"""Fixtures: a tiny teacher with random weights in our own model folder, and real drawings to feed it."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from ibmd_cli.data.embedded import embedded_sources
from ibmd_cli.method.noise import randn, stream
from ibmd_cli.models.folder import save_model
from ibmd_cli.models.model import TeacherModel
from ibmd_cli.networks.predictor import make_predictor

CACHES = Path(__file__).parent.parent / "build" / "test-caches"
os.environ |= {"IBMD_CACHE": str(CACHES / "ibmd"), "HF_HOME": str(CACHES / "huggingface")}  # never those of the user
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background, or under nohup, ignores them
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _threads():
    torch.set_num_threads(1)


@pytest.fixture
def tiny_config() -> dict:
    """A conditional VP teacher of 16×16 pixels and 60,000 parameters."""
    return {
        "format": "ibmd-teacher",
        "format_version": 1,
        "ibmd_version": "0.1.0",
        "name": "tiny",
        "task": "test",
        "network": {
            "in_channels": 6,
            "out_channels": 3,
            "model_channels": 16,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "attention": [2],
            "head_channels": 16,
            "norm_groups": 8,
        },
        "bridge": {"kind": "vp", "beta_d": 8.0},
        "preconditioning": {"kind": "ddbm", "m0": 0.7, "mT": 0.8, "m0T": 0.6},
        "conditional": True,
        "noise_channels": 0,
        "image": {"size": 16, "channels": 3, "range": [-1, 1]},
        "classes": None,
        "mask": None,
        "sampling": {"sampler": "dbim", "eta": 1.0, "nfe": 4},
        "licence": "MIT",
    }


@pytest.fixture
def tiny_teacher(tmp_path: Path, tiny_config: dict) -> Path:
    """The folder of that teacher, none of whose weights are zero."""
    predictor = make_predictor(tiny_config).eval()
    with torch.no_grad():
        for name, p in predictor.named_parameters():
            draw = randn(p.shape, stream(0, name))
            p.copy_(1 + 0.1 * draw if p.ndim == 1 and name.endswith("weight") else 0.1 * draw)
    folder = tmp_path / "tiny-teacher"
    save_model(TeacherModel(predictor, json.loads(json.dumps(tiny_config))), folder)
    return folder


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """A folder of eight real drawings, 32×32."""
    from PIL import Image

    folder = tmp_path / "drawings"
    folder.mkdir()
    for i, x_T in enumerate(embedded_sources()[:8]):
        Image.fromarray(x_T.permute(1, 2, 0).contiguous().numpy()).save(folder / f"drawing-{i}.png")
    return folder
