"""Put a trained teacher, a student distilled from it, or their data into the package (`ibmd_cli/assets/NAME`).

python examples/emoji/embed.py emoji-sr4x teacher build/emoji-sr4x/state.pt
python examples/emoji/embed.py emoji-sr4x student runs/emoji-sr4x/student
python examples/emoji/embed.py emoji-sr4x data build/emoji
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from train_teacher import TASKS, Pairs

from ibmd_cli import __version__
from ibmd_cli.files import assets
from ibmd_cli.images.fit import to_uint8
from ibmd_cli.models.folder import FORMAT_VERSION, load_model, save_model
from ibmd_cli.models.model import TeacherModel
from ibmd_cli.networks.predictor import make_predictor

CARD = """\
---
license: cc-by-sa-4.0
pipeline_tag: image-to-image
tags: [diffusion-bridge, emoji]
---
# {name}, an embedded teacher of ibmd

{about}: {kind} bridge, trained on OpenMoji 17.0.0 (CC BY-SA 4.0, see LICENSE.md beside this folder) by
`examples/emoji/train_teacher.py`. Sample it with `ibmd sample --teacher builtin:{name} --nfe 100`.
"""


def teacher_from(state: Path) -> TeacherModel:
    """Build the teacher's model from the averaged weights in a training state."""
    content = torch.load(state, weights_only=True)
    name = content["task"]
    task = TASKS[name]
    config = {
        "format": "ibmd-teacher",
        "format_version": FORMAT_VERSION,
        "ibmd_version": __version__,
        "name": name,
        "task": task.about,
        "network": {**vars(task.network)},
        "bridge": task.bridge.to_dict(),
        "preconditioning": content["preconditioning"],
        "conditional": task.conditional,
        "noise_channels": 0,
        "image": {"size": 32, "channels": 3, "range": [-1, 1], "source_scale": task.source_scale},
        "classes": None,
        "mask": None,
        "degradation": task.degradation,
        "sampling": task.sampling,
        "licence": "CC-BY-SA-4.0",
        "training": {**content["settings"], "steps": content["step"]},
    }
    model = TeacherModel(make_predictor(config).eval(), config)
    weights = content["player"]["average"]
    prefix = "module."
    model.predictor.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return model


def embed_outlines(assets_of_data: Path, out: Path) -> None:
    """Copy the mosaics that `make_data.py` wrote."""
    names = {"ATTRIBUTION.md": "LICENSE.md"}
    for file in assets_of_data.iterdir():
        if not file.name.startswith("val-"):
            shutil.copy(file, out / names.get(file.name, file.name))


def embed_degraded(name: str, build: Path, out: Path) -> None:
    """Write mosaics of degraded emoji, at the size of the sources; targets and names are those of the outlines."""
    task = TASKS[name]
    index = json.loads((build / "assets" / "pairs.json").read_text())
    index["source_scale"] = scale = task.source_scale
    count = len(index["sources"]["names"]) * index["sources"]["variants"]
    for split, file, n in (("train", "sources", count), ("test", "test-sources", len(index["test"]["names"]))):
        x_T = to_uint8(Pairs(build / f"{split}.npz", task)[:n][1])
        mosaic(x_T[..., ::scale, ::scale], index["columns"]).save(out / f"{file}.png", optimize=True)
    shutil.copy(build / "assets" / "test-targets.png", out)
    shutil.copy(build / "assets" / "ATTRIBUTION.md", out / "LICENSE.md")
    (out / "pairs.json").write_text(json.dumps(index) + "\n")


def mosaic(tiles: Tensor, columns: int) -> Image.Image:
    """Arrange tiles, uint8 (N, 3, h, w), in rows of `columns`; the last row is filled with white."""
    missing = -len(tiles) % columns
    tiles = torch.cat([tiles, torch.full((missing, *tiles.shape[1:]), 255, dtype=torch.uint8)])
    rows = tiles.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)
    return Image.fromarray(np.ascontiguousarray(rows.flatten(2, 3).flatten(0, 1).numpy()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("what", choices=["teacher", "student", "data"])
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, help="default: the package's assets")
    args = parser.parse_args()
    out = args.out or assets() / args.task
    out.mkdir(parents=True, exist_ok=True)
    task = TASKS[args.task]
    if args.what == "teacher":
        kind = f"a {'' if task.conditional else 'un'}conditional {task.bridge.kind}"
        card = CARD.format(name=args.task, about=task.about, kind=kind)
        save_model(teacher_from(args.source), out / "teacher", dtype="fp16", card=card)
    elif args.what == "student":
        card = (args.source / "README.md").read_text()
        save_model(load_model(str(args.source), "student"), out / "student", dtype="fp16", card=card)
    elif task.degradation is None:
        embed_outlines(args.source / "assets", out)
    else:
        embed_degraded(args.task, args.source, out)


if __name__ == "__main__":
    main()
