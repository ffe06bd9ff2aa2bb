"""Files in the containers of the published checkpoints, and hostile ones that look like them.

The published files themselves are not at hand: these are written as the authors' code writes them.
"""

import math
import os
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path, PosixPath
from typing import Any
from unittest import mock

import torch
from torch import Tensor

PREFIX = "diffusion_model."


def save(content: Any, file: Path) -> Path:
    """Write a torch file as from a GPU: its storages are tagged with the device they were on."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with mock.patch.object(torch.serialization, "location_tag", return_value="cuda:0"):
        torch.save(content, file)
    return file


# ---------------------------------------------------------------------------------------------------- containers


def ddbm(weights: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """DDBM's EMA: views of two flat buffers (vectors, and all else) that require gradients; attention in 4-D."""
    state = OrderedDict(
        (name, w[..., None] if is_attention(name) and w.ndim == 3 else w) for name, w in weights.items()
    )
    for is_vector in (True, False):
        names = [name for name, w in state.items() if (w.ndim <= 1) == is_vector]
        sizes = [state[name].numel() for name in names]
        views = torch.cat([state[name].flatten() for name in names]).split(sizes)
        for name, view in zip(names, views, strict=True):
            state[name] = view.view(state[name].shape).detach().requires_grad_()
    return state


def adapted(state: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """DDBM's file as DBIM's script converts it: the same views, attention weights in 3-D."""
    return OrderedDict((name, w.squeeze(-1) if is_attention(name) else w) for name, w in state.items())


def dbim(weights: Mapping[str, Tensor]) -> OrderedDict[str, Tensor]:
    """DBIM's class-conditional file: parameters with storages of their own."""
    return OrderedDict((name, torch.nn.Parameter(w)) for name, w in weights.items())


def i2sb(weights: Mapping[str, Tensor], *, raw: Callable[[Tensor], Tensor] = torch.zeros_like) -> dict[str, Any]:
    """I2SB's latest.pt: the EMA as a list; `raw` makes the weights of `net`, which are not the ones to use."""
    net = OrderedDict((PREFIX + name, raw(w)) for name, w in weights.items())
    moments = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    return {
        "net": net,
        "ema": {
            "decay": 0.99,
            "num_updates": 3,
            "shadow_params": list(weights.values()),
            "collected_params": [raw(w) for w in weights.values()],
        },
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 5e-5, "betas": (0.9, 0.999), "params": [0]}]},
        "sched": {"step_size": 1000, "gamma": 0.99, "last_epoch": 3, "_last_lr": [5e-5]},
    }


def is_attention(name: str) -> bool:
    return name.endswith((".qkv.weight", ".proj_out.weight"))


def options(**changes: Any) -> dict[str, Any]:
    """The settings of I2SB's jpeg-10, as its training script keeps them."""
    return {
        "seed": 0, "name": "jpeg-10", "ckpt": None, "gpu": None, "n_gpu_per_node": 8, "master_address": "localhost",
        "image_size": 256, "corrupt": "jpeg-10", "t0": 1e-4, "T": 1.0, "interval": 1000, "beta_max": 0.3,
        "ot_ode": False, "clip_denoise": False, "cond_x1": False, "add_x1_noise": False, "batch_size": 256,
        "lr": 5e-5, "ema": 0.99, "dataset_dir": PosixPath("/dataset"), "log_dir": PosixPath(".log"), "device": "cuda:0",
        "distributed": True, "use_fp16": False, "ckpt_path": PosixPath("results/jpeg-10"), "load": None,
    } | changes  # fmt: skip


def save_options(folder: Path, protocol: int = 4, **changes: Any) -> Path:
    """Write options.pkl as I2SB does."""
    file = folder / "options.pkl"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_bytes(pickle.dumps(Namespace(**options(**changes)), protocol))
    return file


# ------------------------------------------------------------------------------------------------------- hostile


class Payload:
    """Creates `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def evil_torch_files(folder: Path, weights: Mapping[str, Tensor], marker: Path) -> dict[str, Path]:
    """Write torch files that create `marker` when they are unpickled as torch.load(weights_only=False) does."""
    payload = Payload(marker)
    content = i2sb(weights)
    files = {name: folder / f"{name}.pt" for name in ("entry", "optimizer", "nested", "reduced", "old", "bare")}
    save({**weights, "zzz": payload}, files["entry"])
    save({**content, "optimizer": payload}, files["optimizer"])
    save({**content, "ema": {**content["ema"], "collected_params": [payload]}}, files["nested"])
    save(payload, files["reduced"])
    torch.save({**weights, "zzz": payload}, files["old"], _use_new_zipfile_serialization=False)
    files["bare"].write_bytes(pickle.dumps(payload, 2))
    return files


def namespace_pickle(values: Mapping[str, bytes], module: str = "argparse", name: str = "Namespace") -> bytes:
    """A pickle of a namespace, put together by hand; `values` are opcodes that leave one object each."""
    items = b"".join(opcodes(key) + value for key, value in values.items())
    return b"\x80\x04" + named(module, name) + b")\x81}(" + items + b"ub."


def opcodes(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]  # without its head and its end


def named(module: str, name: str) -> bytes:
    return opcodes(module) + opcodes(name) + b"\x93"


def call(module: str, name: str, *args: bytes) -> bytes:
    return named(module, name) + b"(" + b"".join(args) + b"tR"


def evil_options(marker: Path) -> dict[str, bytes]:
    """Pickles of options that create `marker` when they are unpickled as pickle.load does."""
    path, shell = opcodes(str(marker)), opcodes(f"mkdir '{marker}'")
    posix_path = call("pathlib", "PosixPath", path)
    payloads = {
        "mkdir": call("posix", "mkdir", path),
        "system": call("posix", "system", shell),
        "dotted-path": call("pathlib", "PosixPath.mkdir", posix_path),
        "dotted-argparse": call("argparse", "_os.system", shell),
        "getattr": call("builtins", "getattr", posix_path, opcodes("mkdir")) + b")R",
    }
    good = {key: opcodes(value) for key, value in options().items() if not isinstance(value, PosixPath)}
    files = {key: namespace_pickle({**good, "load": payload}) for key, payload in payloads.items()}
    files["whole"] = b"\x80\x04" + payloads["system"] + b"."
    return files


def options_of_python_3_13() -> bytes:
    """Options with the module name of PosixPath that Python 3.13 writes."""
    values = {k: opcodes(v) for k, v in options().items() if not isinstance(v, PosixPath)}
    return namespace_pickle({**values, "log_dir": call("pathlib._local", "PosixPath", opcodes(".log"))})


def recompressed(file: Path, new: Path) -> Path:
    """Copy a torch file with its members deflated."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as out:
        for member in old.infolist():
            out.writestr(member.filename, old.read(member))
    return new


def drawn(shapes: Mapping[str, list[int]], seed: int = 0) -> dict[str, Tensor]:
    """Weights on the scale of the parity rule, drawn in one stream: much faster for the full-size networks."""
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        w = torch.empty(shape).normal_(generator=rng)
        is_gain = name.endswith(".weight") and len(shape) == 1
        weights[name] = w.div_(math.sqrt(math.prod(shape[1:]))) if len(shape) > 1 else w.mul_(0.1).add_(1.0 * is_gain)
    return weights
