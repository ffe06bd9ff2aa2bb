"""Settings of a distillation, and the presets of known teachers. No torch here.

A value comes from the first of: flag, environment (`IBMD_STEPS` for `--steps`), `--config FILE` (TOML or JSON), the
teacher's preset (`presets.toml`), the default of `DistillConfig`, which is the paper's (Table 7) where it names one.
"""

import json
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

NEW = "new"
"""What `--teacher` is for a teacher that is trained first."""
AUTO = "auto"
"""Of `micro_batch`."""
CONTENTS = "contents of the file"
"""Origin of a preset that a teacher's file tells itself."""

(_teacher, _data, _new, _student, _training, _memory, _folder, _research) = (
    partial(setting, panel=panel)
    for panel in ("Teacher", "Data", "New teacher", "Student", "Training", "Memory and speed", "Run folder", "Research")
)


@dataclass(frozen=True)
class DistillConfig(Record):
    """What a distillation is made with."""

    # fmt: off
    teacher: str = _teacher("builtin:outline2emoji",
        "builtin:NAME, hub:ALIAS, hf://OWNER/REPO, a folder, a checkpoint, or new", metavar="REF",
        also=("model", "checkpoint"))
    preset: str = _teacher("", "The published teacher that the file of --teacher is", metavar="ALIAS", also=("alias",))
    data: tuple[str, ...] = _data((),
        "Folder of source images (repeatable), builtin:NAME, dataset:NAME or hf://datasets/OWNER/NAME; preset: the "
        "teacher's own data, fetched", metavar="DATA", also=("input", "sources", "dataset", "images"),
        shown="the teacher's, if known")
    degrade: str = _data("", "Make sources of targets, e.g. jpeg-10; none: do not")
    layout: str = _data("", "Pairs in a file: ab (source left), ba, or normals",
        choices=("", "ab", "ba", "normals"))
    fit: str = _data("", "Images that are not square: pad, stretch or crop",
        choices=("", "pad", "stretch", "crop"), shown="pad; crop for photos that are degraded")
    labels: str = _data("", "CSV file of PATH,CLASS", metavar="FILE", shown="folders' names")
    masks: str = _data("", "File of free-form masks (.npz)", metavar="FILE")
    workers: int = _data(-1, "Processes that read ahead", metavar="N", at_least=-1,
        shown="by the cores", changeable=True, also=("num-workers",))
    validation: str = _data("", "Held-out pairs: a share, e.g. 5%, or a folder", metavar="SHARE")
    size: int = _new(64, "Side of its images, in pixels", at_least=8)
    network: str = _new("small", "tiny, small, base, adm-64, adm-256")
    bridge: str = _new("vp", "vp, ve or i2sb", choices=("vp", "ve", "i2sb"))
    noise_scale: float = _new(0.0, "beta_d, T or beta_max", at_least=0, shown="8, 80, 0.3")
    prediction: str = _new("", "ddbm, i2sb, x0 or residual", choices=("", "ddbm", "i2sb", "x0", "residual"),
        shown="by the network")
    teacher_steps: int = _new(0, "Its updates", at_least=0, shown="by the number of pairs")
    teacher_time: str = _new("", "Most time for it, e.g. 30m", metavar="TIME", changeable=True)
    teacher_lr: float = _new(0.0, "Its learning rate", at_least=0, shown="7e-4; 1e-4 with --init", flags=())
    classes: int = _new(0, "Classes of its images, one for each folder; 0: none", at_least=0, flags=())
    times: str = _new("", "Times are uniform in log(b/c) (log) or in t (own)", choices=("", "log", "own"),
        shown="log for vp and ve", flags=())
    sigma: tuple[float, float] = _new((0.02, 200.0), "With times log: range of the noise c/b", above=0, flags=())
    at_T: float = _new(0.125, "With times log: share of draws that are T", at_least=0, below=1, flags=())
    stop_after: str = _new("", "teacher: without a student", choices=("", "teacher"), changeable=True)
    nfe: int = _student(1, "Network calls of the student per image", at_least=1, also=("calls", "n", "num-steps"))
    timesteps: tuple[float, ...] = _student((), "Times of calls, e.g. 1,0.4", metavar="T,...",
        shown="evenly spaced")
    init: str = _student("", "Student to start from", metavar="REF", shown="the teacher")
    noise: bool = _student(True, "Give the student noise, for varied results")
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
    flip: bool = _training(True, "Mirror images at random")
    shift: int = _training(0, "Move images by up to so many pixels", at_least=0)
    colour: float = _training(0.0, "Range of log gains of colours", at_least=0, also=("color",))
    ema: tuple[float, ...] = _training((0.99,), "Decays of averages; the best is kept", at_least=0, below=1,
        also=("ema-decay",))
    score_every: int = _training(0, "Updates between held-out scores", at_least=0, shown="5%")
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
    attention_order: str = _research("", "Attention: new or legacy",
        choices=("", "new", "legacy"), shown="as the family")
    # The paper has no warm-up, new images for each update, independent uniform times, one z per pixel whose weights
    # start at 0, and the teacher's own weighting: the defaults. Other values differ from it.
    bridge_warmup: int = _research(0, "Bridge-model updates before all others", at_least=0)
    reuse: int = _research(1, "Bridge-model updates that share images", at_least=1)
    noise_grid: int = _research(0, "Side of z; 0: that of the image", at_least=0)
    noise_init: float = _research(0.0, "Deviation of the first weights for z", at_least=0)
    t_power: float = _research(1.0, "t = T - (T - t_min) u^t_power", above=0)
    t_even: bool = _research(False, "Spread the times of a batch evenly")
    weight_power: float = _research(2.0, "Weight of t: c_out(t) to minus this", at_least=0)
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
        if self.trains_teacher and not self.data:
            raise UsageError("--teacher new: expected pairs to train it on: --data FOLDER with source/ and target/")
        if self.trains_teacher and self.preset:
            raise UsageError(f"--preset {self.preset}: is of a published teacher; --teacher new has no preset")
        if self.sigma[0] >= self.sigma[1]:
            raise UsageError(f"sigma {self.sigma[0]:g},{self.sigma[1]:g}: expected a rising range")
        if self.bridge != "i2sb" and self.prediction == "i2sb":
            raise UsageError("--prediction i2sb: is for --bridge i2sb: expected ddbm, x0 or residual")
        if self.fsdp and self.trains_teacher:
            raise UsageError("--fsdp does not go with --teacher new: train it first, with --stop-after teacher")
        if not self.ema:
            raise UsageError("--ema: expected at least one decay")
        if self.teacher_time:
            duration(self.teacher_time)
        _ = self.held_out_share  # refuses what is no share

    @property
    def trains_teacher(self) -> bool:
        """Whether a teacher is trained first."""
        return self.teacher == NEW

    @property
    def held_out_share(self) -> float | None:
        """Share of the pairs that is held out; None if `validation` is a folder.

        Raises:
            UsageError: it is neither.
        """
        text = self.validation or ("5%" if self.trains_teacher else "0")
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            if not os.path.isdir(text):
                raise UsageError(f"--validation {text}: expected a share, e.g. 5%, 0, or a folder of pairs") from None
            return None
        if not 0 <= share < 1:
            raise UsageError(f"--validation {text}: expected a share below 100%, e.g. 5%")
        return share

    @property
    def reads_targets(self) -> bool:
        """Whether targets of the data are read: for a teacher, or to score students."""
        return self.trains_teacher or self.held_out_share != 0

    @classmethod
    def layered(cls, layers: Layers) -> Layers:
        """Return the layers with the preset of the teacher, which a published checkpoint tells itself.

        Raises:
            UsageError: --data preset, for a teacher that has no data of its own.
        """
        given = ChainMap(*(dict(values) for _, values in layers))
        teacher, alias = given.get("teacher", cls.teacher), given.get("preset")
        if not alias and os.path.exists(teacher):
            from ibmd_cli.models.references import recognise_file  # imports PyTorch

            if alias := recognise_file(teacher):
                layers = [*layers, (CONTENTS, {"preset": alias})]
        kind = f"hub:{alias}" if alias else NEW if _was_new(teacher) else teacher
        preset = _preset(kind, given.get("nfe"))
        if given.get("data") in ("preset", ["preset"], ("preset",)):
            if "data" not in preset:
                raise UsageError(f"--data preset: {teacher} has no data of its own: give a folder of images")
            layers = [("preset", {"data": preset["data"]}), *layers]
        return [*layers, ("preset", preset)]


def _was_new(teacher: str) -> bool:
    """Tell whether a teacher is one that `--teacher new` trained: students of it have the same preset."""
    try:
        config = json.loads((Path(teacher) / "config.json").read_text(encoding="utf-8"))
        return bool(config["training"]["teacher"] == NEW)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _preset(teacher: str, nfe: Any) -> dict[str, Any]:
    """Return the preset of a teacher, with what it has for students of `nfe` network calls."""
    preset = load_presets().get(teacher, {})
    by_nfe = preset.pop("by_nfe", {})
    return preset | by_nfe.get(str(nfe or preset.get("nfe", DistillConfig.nfe)), {})


def load_presets() -> dict[str, dict[str, Any]]:
    """Return the settings that belong to each known teacher (`presets.toml`)."""
    return tomllib.loads((Path(__file__).parent / "presets.toml").read_text(encoding="utf-8"))


def duration(text: str) -> float:
    """Return the seconds of "90s", "30m", "2h" or "1.5h".

    Raises:
        UsageError: it is something else.
    """
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        seconds = float(text[:-1]) * units[text[-1:]]
        if not 0 < seconds < float("inf"):
            raise ValueError
    except (KeyError, ValueError):
        raise UsageError(f"--teacher-time {text}: expected a number with s, m or h, e.g. 30m") from None
    return seconds


def changed_settings(config: DistillConfig, saved: Mapping[str, Any]) -> list[str]:
    """Tell which settings that matter differ from those of a saved run, e.g. `lr: 0.0001 there, 0.0002 here`.

    A setting that the saved run does not know yet had its default there.
    """
    here, default = to_json(config), to_json(DistillConfig())
    found = []
    for one in settings.settings(DistillConfig):
        there = saved.get(one.name, default[one.name])
        there = [there] if one.several and not isinstance(there, list) else there  # `ema` was one number
        if not one.changeable and there != here[one.name]:
            found.append(f"{one.name}: {there} there, {here[one.name]} here")
    return found
