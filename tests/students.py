"""Students: tiny ones of every kind with random weights, and those that seem distilled from another teacher."""

import copy
from typing import Any

import torch

from ibmd_cli.method.noise import randn, stream
from ibmd_cli.models.model import StudentModel
from ibmd_cli.networks.predictor import make_predictor

I2SB = {"bridge": {"kind": "i2sb"}, "preconditioning": {"kind": "i2sb"}, "conditional": False}
STUDENTS = {
    "one step": {"timesteps": [1.0], "channels": 2, "grid": 4, "classes": 5, "fill": "zero", "patch": 2},
    "three steps": {"timesteps": [1.0, 0.6, 0.2], "channels": 2, "classes": 5},
    "posterior, known pixels": {**I2SB, "timesteps": [999, 400], "transition": "posterior", "fill": "noise"},
    "no noise between the steps": {
        **I2SB,
        "bridge": {"kind": "i2sb", "noise_free": True},
        "timesteps": [999, 500],
        "channels": 3,
    },
}


def of_teacher(student: StudentModel, **changes: Any) -> StudentModel:
    config = copy.deepcopy(student.config)
    config["teacher"]["reference"] = changes.pop("reference")
    config["training"] |= changes.pop("training", {})
    return StudentModel(student.predictor, {**config, **changes})


def make_student(config: dict, bridge=None, preconditioning=None, conditional=True, **options) -> StudentModel:
    """A tiny student with random weights, of what `STUDENTS` says."""
    config = copy.deepcopy(config)
    channels, grid = options.get("channels", 0), options.get("grid", 1)
    config |= {
        "format": "ibmd-student",
        "bridge": bridge or config["bridge"],
        "preconditioning": preconditioning or config["preconditioning"],
        "conditional": conditional,
        "noise_channels": channels,
        "classes": options.get("classes"),
        "mask": {"fill": options["fill"]} if "fill" in options else None,
        "teacher": {"reference": "tiny", "sha256": "0" * 64},
        "training": {},
        "sampling": {
            "timesteps": options["timesteps"],
            "noise": {"channels": channels, "grid": grid},
            "rollout": "chain",
            "transition": options.get("transition", "marginal"),
        },
    }
    config["network"]["in_channels"] = (6 if conditional else 3) + channels
    config["network"]["patch_size"] = options.get("patch", 1)
    config["network"]["num_classes"] = options.get("classes")
    predictor = make_predictor(config).eval()
    with torch.no_grad():
        for name, p in predictor.named_parameters():
            draw = randn(p.shape, stream(0, name))
            p.copy_(1 + 0.1 * draw if p.ndim == 1 and name.endswith("weight") else 0.1 * draw)
    return StudentModel(predictor, config)
