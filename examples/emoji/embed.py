"""Put a trained teacher, or a student distilled from it, into the package (`ibmd_cli/assets/outline2emoji`).

python examples/emoji/embed.py teacher build/teacher/state.pt
python examples/emoji/embed.py student runs/outline2emoji/student
python examples/emoji/embed.py data build/outline2emoji/assets
"""

import argparse
import shutil
from pathlib import Path

import torch

from ibmd_cli import __version__
from ibmd_cli.bridges import VPBridge
from ibmd_cli.models import FORMAT_VERSION, Teacher, assets, load_model, save_model
from ibmd_cli.networks import make_predictor

CARD = """\
---
license: cc-by-sa-4.0
pipeline_tag: image-to-image
tags: [diffusion-bridge, line-art, emoji]
---
# outline2emoji, the embedded teacher of ibmd

A conditional VP bridge that colours 32×32 line drawings, trained on OpenMoji 17.0.0 (CC BY-SA 4.0, see
LICENSE.md beside this folder) by `examples/emoji/train_teacher.py`. Sample it with
`ibmd sample --teacher builtin:outline2emoji --nfe 100`.
"""


def teacher_from(state: Path) -> Teacher:
    """Build the teacher's model from the averaged weights in a training state."""
    from train_teacher import NETWORK

    content = torch.load(state, weights_only=True)
    config = {
        "format": "ibmd-teacher",
        "format_version": FORMAT_VERSION,
        "ibmd_version": __version__,
        "name": "outline2emoji",
        "task": "line drawing → coloured emoji",
        "network": {**vars(NETWORK)},
        "bridge": VPBridge(beta_d=content["settings"]["beta_d"]).to_dict(),
        "preconditioning": content["settings"]["preconditioning"],
        "conditional": True,
        "noise_channels": 0,
        "image": {"size": 32, "channels": 3, "range": [-1, 1]},
        "classes": None,
        "mask": None,
        "sampling": {"sampler": "dbim", "eta": 1.0, "nfe": 100},
        "licence": "CC-BY-SA-4.0",
        "training": {**content["settings"], "steps": content["step"]},
    }
    model = Teacher(make_predictor(config).eval(), config)
    weights = content["player"]["average"]
    prefix = "module."
    model.predictor.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["teacher", "student", "data"])
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, default=assets() / "outline2emoji")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "teacher":
        save_model(teacher_from(args.source), args.out / "teacher", dtype="fp16", card=CARD)
    elif args.what == "student":
        card = (args.source / "README.md").read_text()
        save_model(load_model(str(args.source), "student"), args.out / "student", dtype="fp16", card=card)
    else:
        names = {"ATTRIBUTION.md": "LICENSE.md"}
        for file in args.source.iterdir():
            if not file.name.startswith("val-"):
                shutil.copy(file, args.out / names.get(file.name, file.name))


if __name__ == "__main__":
    main()
