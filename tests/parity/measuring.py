"""Reference outputs of the field's own measuring code, on weights and images that follow a rule.

    python tests/parity/measuring.py            computes them again, and prints how far from those that are stored
    python tests/parity/measuring.py --write    stores them: measuring.safetensors

That needs `pip install pytorch-fid==0.3.0 clean-fid==0.1.35 torch-fidelity==0.4.0 lpips==0.1.4 stlpips_pytorch==0.0.2`,
and torchvision in the build for the PyTorch that is installed (`pip install torch torchvision --index-url
https://download.pytorch.org/whl/cpu` gets two that fit), but none of the published weights.
Tests need the rule and the stored outputs alone. Names, shapes and order of parameters are those of the published code.
"""

import math
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = Path(__file__).parent / "measuring.safetensors"


def normal(name: str, *shape: int) -> Tensor:
    """Draw normal numbers that depend on `name` alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def rule(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return weights: name and shape → values, of such a size that activations neither grow nor vanish."""
    state = {}
    for name, shape in shapes.items():
        w = normal(name, *shape)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.long)
        elif name.endswith("running_var"):
            state[name] = 1 + 0.1 * w.abs()
        elif w.ndim > 1:
            state[name] = w * math.sqrt(2 / math.prod(shape[1:]))
        else:
            state[name] = 1 + 0.1 * w if name.endswith(("bn.weight", "bn1.weight", "bn2.weight")) else 0.1 * w
    return state


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a module's weights."""
    return {name: tuple(v.shape) for name, v in module.state_dict().items()}


def images(name: str, count: int, side: int) -> Tensor:
    """Return smooth images, uint8 (count, 3, side, side)."""
    x = torch.nn.functional.interpolate(normal(name, count, 3, 8, 8), (side, side), mode="bilinear")
    return ((0.6 * x + 0.1 * normal(name + "+", count, 3, side, side) + 1) * 127.5).clamp(0, 255).byte()


def features(name: str, count: int, dim: int) -> Tensor:
    """Return features (count, dim) with a covariance that is not a multiple of the identity."""
    mix = torch.eye(dim) + 0.5 * normal(name + " mix", dim, dim) / math.sqrt(dim)
    return (normal(name, count, dim) @ mix).relu() + 0.1 * normal(name + " shift", dim)


def outputs() -> dict[str, Tensor]:
    """Return what the published code computed."""
    return load_file(FILE)


# ------------------------------------------------------------------------------------- the published code's outputs


def _reference() -> dict[str, Tensor]:
    import tempfile

    import numpy as np

    out: dict[str, Tensor] = {}
    small, large = images("small", 2, 64), images("large", 2, 320)
    out |= _inception(small, large, tempfile.mkdtemp())
    out |= _lpips(images("a", 3, 64), images("b", 3, 64))
    import torchvision

    net: Any = torchvision.models.resnet50(weights=None)
    net.load_state_dict(rule(shapes_of(net)))
    net.eval()
    x = torch.nn.functional.interpolate(small.float() / 127.5 - 1, (224, 224), mode="bicubic")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        out["resnet50"] = net(((x + 1) / 2 - mean[:, None, None]) / std[:, None, None])

    from cleanfid.fid import frechet_distance, kernel_distance
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_isc import isc_features_to_metric

    a, b = features("A", 400, 32).numpy(), features("B", 500, 32).numpy()
    moments = (a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    values = [calculate_frechet_distance(*moments), frechet_distance(*moments)]
    values += [kernel_distance(a, b[:400], num_subsets=1), kernel_distance(a[:100], b[:100], num_subsets=1)]
    out["fid"], out["kid"] = torch.tensor(values[:2]).double(), torch.tensor(values[2:]).double()
    logits = 2 * normal("logits", 1000, 16)
    scores = [isc_features_to_metric(logits, splits=k, shuffle=False)["inception_score_mean"] for k in (1, 10)]
    out["is"] = torch.tensor(scores).double()
    return out


def _inception(small: Tensor, large: Tensor, folder: str) -> dict[str, Tensor]:
    import cleanfid.inception_pytorch
    import pytorch_fid.inception
    from cleanfid.resize import build_resizer
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # Built with the rule's weights in place of the download.
    state = {}
    for module in (pytorch_fid.inception, cleanfid.inception_pytorch):
        module.load_state_dict_from_url = lambda *_, **__: dict(state)  # type: ignore[attr-defined]
    blank = pytorch_fid.inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    shapes = {k: s for k, s in shapes_of(blank).items() if not k.startswith("AuxLogits")}
    state |= rule(shapes)
    file = f"{folder}/inception.pth"
    torch.save(state, file)
    published = pytorch_fid.inception.InceptionV3()
    clean = cleanfid.inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
    fidelity = FeatureExtractorInceptionV3("i", ["2048", "logits_unbiased"], feature_extractor_weights_path=file)
    resize = build_resizer("legacy_pytorch")
    out = {}
    with torch.no_grad():
        for name, x in (("small", small), ("large", large)):
            resized = torch.stack([torch.from_numpy(resize(i.permute(1, 2, 0).numpy())).permute(2, 0, 1) for i in x])
            out[f"cleanfid.{name}"] = clean.eval()(resized / 255)[0].flatten(1)
            out[f"pytorch_fid.{name}"] = published.eval()(x.float() / 255)[0].flatten(1)
            out[f"torch_fidelity.{name}"], out[f"torch_fidelity.logits.{name}"] = fidelity(x)
    return out


def _lpips(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    import lpips
    import stlpips_pytorch.stlpips

    out = {}
    a, b = a.float() / 127.5 - 1, b.float() / 127.5 - 1
    for kind, trunk in (("alex", "alexnet"), ("vgg", "vgg16")):
        net = lpips.LPIPS(net=kind, pnet_rand=True, verbose=False)
        own = net.net.state_dict()  # slice1.0.weight …: numbered through
        rules = rule({f"features.{k.split('.', 1)[1]}": tuple(v.shape) for k, v in own.items()})
        net.net.load_state_dict({k: rules[f"features.{k.split('.', 1)[1]}"] for k in own})
        with torch.no_grad():
            out[f"lpips.{trunk}"] = net(a, b).flatten()
            up = [torch.nn.functional.interpolate(x, (224, 224), mode="bilinear") for x in (a, b)]
            out[f"lpips.{trunk}.224"] = net(*up).flatten()
    net = stlpips_pytorch.stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    with torch.no_grad():
        out["stlpips"] = net(a, b).flatten()
        out["stlpips.32"] = net(a[..., :32, :32], b[..., :32, :32]).flatten()
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    computed = {k: v.contiguous() for k, v in _reference().items()}
    if "--write" in sys.argv:
        save_file(computed, FILE)
    else:
        for key, stored in outputs().items():  # bound: 1e-4, as in the tests
            print(f"{key:28} {(computed[key] - stored).abs().max() / max(1, stored.abs().max()):.1e}")
