"""No float64 on a device that has none (MPS): whole training batches, followed tensor by tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.data.sources import SourceImages
from ibmd_cli.method import bridges
from ibmd_cli.method.bridges import make_bridge
from ibmd_cli.method.distillation import Sources, bridge_loss, rollout, student_gradient
from ibmd_cli.method.noise import BatchStreams
from ibmd_cli.models.model import make_setup, student_times
from ibmd_cli.networks.predictor import make_predictor
from ibmd_cli.reporting import Reporter

SIZE = 16
TABLES = {"vp": {"kind": "vp", "beta_d": 8.0}, "ve": {"kind": "ve"}, "i2sb": {"kind": "i2sb", "beta_max": 1.0}}


class NoFloat64(TorchDispatchMode):
    """Raises the TypeError of MPS where a float64 tensor would be on another device than the CPU.

    The other device is "meta", which computes nothing: what is copied from it to the CPU is one half everywhere.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and options.get("device") == torch.device("cpu"):
            return torch.full(args[0].shape, 0.5, dtype=options.get("dtype") or args[0].dtype)
        result = func(*args, **options)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64 and x.device.type != "cpu":
                raise TypeError(f"{func}: float64 on {x.device}")
        return result


def test_the_refusal_refuses():
    with NoFloat64(), pytest.raises(TypeError, match="float64 on meta"):
        torch.rand(3, dtype=torch.float64).to("meta")


@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize(
    ("degradation", "fill"),
    [(name, None) for name in ("", "jpeg-5", "sr4x-pool", "sr4x-bicubic", "blur-uni", "blur-gauss")]
    + [("inpaint-center", "noise"), ("inpaint-center", "zero")],
)
def test_batches_of_data(degradation: str, fill: str | None, targets: bool, tiny_config: dict, tmp_path: Path):
    _, x_T, x_0 = embedded_pairs()
    for i in range(4):
        for side, x in (("source", x_T), ("target", x_0)):
            file = tmp_path / "pairs" / side / str(i % 2) / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[i].permute(1, 2, 0).contiguous().numpy()).save(file)
    config = {**tiny_config, "mask": fill and {"fill": fill}, "classes": 2}
    sources = SourceImages([str(tmp_path / "pairs")], config, Reporter(quiet=True), degradation, targets=targets)
    rng = BatchStreams(range(4), 0, "test")
    with NoFloat64():
        batch, truth = sources.pairs(4, rng, True, "meta")
        preview = sources.take([0, 1], rng[:2], "meta")
    assert {x.device.type for x in (batch.x_T, truth, preview.x_T)} == {"meta"}


@pytest.mark.parametrize(("nfe", "options"), [(1, {}), (2, {"t_power": 2.0, "t_even": True, "weight_power": 1.0})])
@pytest.mark.parametrize("kind", TABLES)
def test_updates_of_both_networks(
    kind: str, options: dict, nfe: int, tiny_config: dict, monkeypatch: pytest.MonkeyPatch
):
    """On a pretended device, which is told to have no float64: this machine need not have one."""
    monkeypatch.setattr(bridges, "float64_device", lambda t: torch.device("cpu"))
    config = {**tiny_config, "bridge": TABLES[kind]}
    if kind == "i2sb":
        config |= {"preconditioning": {"kind": "i2sb"}, "conditional": False}
        config["network"] = {**config["network"], "in_channels": 3}
    chain = kind == "i2sb"
    sampling = {
        "timesteps": student_times(make_bridge(config["bridge"]), nfe, ()),
        "noise": {"channels": 0, "grid": SIZE},
        "rollout": "chain" if chain else "random-step",
        "transition": "posterior" if chain else "marginal",
    }
    with NoFloat64():
        with torch.device("meta"):
            teacher, bridge_model, student = (make_predictor(config) for _ in range(3))
        setup = make_setup(student, sampling, **options)
        batch, rng = Sources(torch.randn(4, 3, SIZE, SIZE, device="meta")), BatchStreams(range(4), 0, "test")
        with torch.no_grad():
            x_0 = rollout(student, setup, batch, rng)
        bridge_loss(bridge_model, setup, x_0, batch, rng).backward()
        student_gradient(teacher, bridge_model, student, setup, batch, rng)
        assert {p.grad.device.type for p in bridge_model.parameters() if p.grad is not None} == {"meta"}
