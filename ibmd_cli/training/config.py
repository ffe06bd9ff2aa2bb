"""Settings of a distillation, and the presets of known teachers. No torch here.

A value comes from the first of: flag, environment (`IBMD_STEPS` for `--steps`), `--config FILE` (TOML or JSON), the
teacher's preset (`presets.toml`), the default of `DistillConfig`, which is the paper's (Table 7) where it names one.
"""

import os
import tomllib
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ibmd_cli import settings
from ibmd_cli.errors import UsageError
from ibmd_cli.settings import Layers, Record, setting, to_json

AUTO = "auto"
"""Of `micro_batch`."""
CONTENTS = "contents of the file"
"""Origin of a preset that a teacher's file tells itself."""

(_teacher, _data, _student, _training, _memory, _folder, _research) = (
    partial(setting, panel=panel)
    for panel in ("Teacher", "Data", "Student", "Training", "Memory and speed", "Run folder", "Research")
)


@dataclass(frozen=True)
class DistillConfig(Record):
    """What a distillation is made with."""

    # fmt: off
    teacher: str = _teacher("builtin:outline2emoji",
        "builtin:NAME, hub:ALIAS, hf://OWNER/REPO, a model folder, or a published checkpoint", metavar="REF",
        also=("model", "checkpoint"))
    preset: str = _teacher("", "The published teacher that the file of --teacher is", metavar="ALIAS", also=("alias",))
    data: tuple[str, ...] = _data((),
        "Folder of source images (repeatable), builtin:NAME, dataset:NAME or hf://datasets/OWNER/NAME; preset: the "
        "teacher's own data, fetched", metavar="DATA", also=("input", "sources", "dataset", "images"),
        shown="the teacher's, if known")
    degrade: str = _data("", "Make sources of clean images, e.g. jpeg-10; none: they are sources")
    layout: str = _data("", "Files are pairs with the source left (ab) or right (ba), or normals",
        choices=("", "ab", "ba", "normals"))
    fit: str = _data("", "What becomes of images that are not square: padded, stretched or cropped",
        choices=("", "pad", "stretch", "crop"), shown="pad, as ibmd sample does; crop for photos that are degraded")
    labels: str = _data("", "CSV file of PATH,CLASS for teachers with classes", metavar="FILE", shown="folders' names")
    masks: str = _data("", "File of free-form masks (.npz)", metavar="FILE")
    workers: int = _data(-1, "Processes that read images ahead; 0: none", metavar="N", at_least=-1,
        shown="by the cores", changeable=True, also=("num-workers",))
    nfe: int = _student(1, "Network calls of the student per image", at_least=1, also=("calls", "n", "num-steps"))
    timesteps: tuple[float, ...] = _student((), "Times of these calls, from T down, e.g. 1,0.4", metavar="T,...",
        shown="evenly spaced")
    init: str = _student("", "Student to start from", metavar="REF", shown="the teacher")
    noise: bool = _student(True, "Give the student noise, to draw varied results")
    noise_channels: int = _student(3, "Channels of z", at_least=1, flags=())
    steps: int = _training(3000, "Student updates, K", at_least=1, at_most=10**9,
        also=("epochs", "epoch", "iterations", "iters", "max-steps", "updates"))
    bridge_steps: int = _training(5, "Bridge-model updates for each of them, L", at_least=1)
    batch_size: int = _training(256, "Images per update", at_least=1, also=("batch", "bs", "b"))
    lr: float = _training(5e-5, "Learning rate of the student", above=0, also=("learning-rate", "rate"))
    bridge_lr: float = _training(5e-5, "Learning rate of the bridge model", above=0)
    lr_warmup: int = _training(0, "Student updates of linear warm-up", at_least=0, flags=())
    lr_decay: str = _training("none", "Decay of both rates over the run", choices=("none", "linear", "cosine"),
        flags=())
    betas: tuple[float, float] = _training((0.9, 0.999), "Betas of Adam, both networks", at_least=0, below=1, flags=())
    clip: float = _training(0.0, "Largest gradient norm of the student; 0: none", at_least=0, flags=())
    flip: bool = _training(True, "Mirror sources at random", flags=())
    ema: float = _training(0.99, "Decay of the student's average", at_least=0, below=1, also=("ema-decay",))
    precision: str = _training("fp32", "fp32, bf16 or fp16", choices=("fp32", "bf16", "fp16"),
        also=("dtype", "mixed-precision", "fp16", "bf16"))
    seed: int = _training(0, "Seed of all randomness", at_least=0)
    micro_batch: int | str = _memory(0, "Images at a time in each process; 0: all; auto: as many as memory holds",
        metavar="N", at_least=0, choices=(AUTO,), changeable=True, also=("gradient-accumulation", "accumulate"))
    memory: float = _memory(0.0, "Memory that auto may use", metavar="GIB", at_least=0, shown="most of the free",
        changeable=True)
    checkpointing: bool = _memory(False, "Recompute activations, to save memory", changeable=True,
        also=("gradient-checkpointing",))
    compile: bool = _memory(False, "Compile the networks first (torch.compile)", changeable=True)
    fsdp: bool = _memory(False, "Split the networks over the processes", changeable=True)
    checkpoint_every: int = _folder(100, "Student updates between checkpoints", at_least=1, changeable=True)
    preview_every: int = _folder(100, "Student updates between previews", at_least=1, changeable=True)
    keep: int = _folder(2, "Checkpoints to keep", at_least=1, changeable=True)
    track: str = _folder("", "Send the log to tensorboard or wandb, too", choices=("", "tensorboard", "wandb"),
        changeable=True)
    head_channels: int = _research(0, "Channels per attention head", at_least=0, shown="as the family")
    attention_order: str = _research("", "Order of a checkpoint's attention: new or legacy",
        choices=("", "new", "legacy"), shown="as the family")
    # The paper has no warm-up, new images for each update, independent uniform times, one z per pixel whose weights
    # start at 0, and the teacher's own weighting: the defaults. Other values differ from it.
    bridge_warmup: int = _research(0, "Bridge-model updates before all others", at_least=0)
    reuse: int = _research(1, "Bridge-model updates that share images", at_least=1)
    noise_grid: int = _research(0, "Side of z, enlarged to the image; 0: its size", at_least=0)
    noise_init: float = _research(0.0, "Deviation of the first weights for z", at_least=0)
    t_power: float = _research(1.0, "t = T - (T - t_min) u^t_power; 1: uniform", above=0)
    t_even: bool = _research(False, "Spread the times of a batch evenly")
    weight_power: float = _research(2.0, "Weight of time t: c_out(t) to minus this", at_least=0)
    recompute: bool = _research(True, "Run the student twice, to save memory", changeable=True)
    # fmt: on

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        super().__post_init__()
        from ibmd_cli.images.find import named_data  # imports Pillow

        object.__setattr__(self, "data", tuple(map(named_data, self.data)))
        if self.timesteps and len(self.timesteps) != self.nfe:
            raise UsageError(
                f"--timesteps: {len(self.timesteps)} times, but --nfe {self.nfe}: expected one for each call"
            )
        for wrong, other in (
            (self.compile, "--compile; leave one of them out"),
            (self.precision == "fp16", "--precision fp16; use bf16"),
            (self.micro_batch == AUTO, "--micro-batch auto; give a number"),
        ):
            if self.fsdp and wrong:
                raise UsageError(f"--fsdp does not go with {other}")
        if self.masks and not self.degrade.startswith("inpaint-freeform"):
            raise UsageError(
                f"--masks {self.masks}: only free-form masks come from a file: --degrade inpaint-freeform…"
            )

    @classmethod
    def layered(cls, layers: Layers) -> Layers:
        """Return the layers with the preset of the teacher, which a published checkpoint tells itself.

        Raises:
            UsageError: --data preset, for a teacher that has no data of its own.
        """
        given = ChainMap(*(dict(values) for _, values in layers))
        teacher, alias = given.get("teacher", cls.teacher), given.get("preset")
        if not alias and os.path.exists(teacher):
            from ibmd_cli.models.teachers import recognise_file  # imports PyTorch

            if alias := recognise_file(teacher):
                layers = [*layers, (CONTENTS, {"preset": alias})]
        preset = _preset(f"hub:{alias}" if alias else teacher, given.get("nfe"))
        if given.get("data") in ("preset", ["preset"], ("preset",)):
            if "data" not in preset:
                raise UsageError(f"--data preset: {teacher} has no data of its own: give a folder of images")
            layers = [("preset", {"data": preset["data"]}), *layers]
        return [*layers, ("preset", preset)]


def _preset(teacher: str, nfe: Any) -> dict[str, Any]:
    """Return the preset of a teacher, with what it has for students of `nfe` network calls."""
    preset = load_presets().get(teacher, {})
    by_nfe = preset.pop("by_nfe", {})
    return preset | by_nfe.get(str(nfe or preset.get("nfe", DistillConfig.nfe)), {})


def load_presets() -> dict[str, dict[str, Any]]:
    """Return the settings that belong to each known teacher (`presets.toml`)."""
    return tomllib.loads((Path(__file__).parent / "presets.toml").read_text(encoding="utf-8"))


def changed_settings(config: DistillConfig, saved: Mapping[str, Any]) -> list[str]:
    """Tell which settings that matter differ from those of a saved run, e.g. `lr: 0.0001 there, 0.0002 here`.

    A setting that the saved run does not know yet had its default there.
    """
    here, default = to_json(config), to_json(DistillConfig())
    return [
        f"{one.name}: {saved.get(one.name, default[one.name])} there, {here[one.name]} here"
        for one in settings.settings(DistillConfig)
        if not one.changeable and saved.get(one.name, default[one.name]) != here[one.name]
    ]
