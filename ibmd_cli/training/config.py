"""Settings of a distillation: their types, defaults and origins. No torch here.

A value comes from the first of: flag, environment (`IBMD_STEPS` for `--steps`), `--config FILE` (TOML or JSON), the
teacher's preset (`presets.toml`), the default of `DistillConfig`.
"""

import dataclasses
import difflib
import json
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ibmd_cli.errors import UsageError

AUTO = "auto"
"""Of `micro_batch`."""


@dataclass(frozen=True)
class DistillConfig:
    """What a distillation is made with. The defaults are the paper's (Table 7) where it names a value.

    Attributes:
        teacher: reference of the teacher.
        preset: alias of the published teacher that a checkpoint is like, where its contents cannot tell.
        head_channels: width of an attention head, where a checkpoint differs from its family; 0: as its family.
        attention_order: "new" or "legacy", likewise; "": as its family.
        data: folders of source images, `builtin:NAME`, `dataset:NAME` or `hf://datasets/OWNER/NAME`; "preset": the data
            of the teacher's preset.
        layout: what the files of `data` hold (`records.LAYOUTS`); "": sources.
        labels: CSV file of the images' classes; "": the folders tell them.
        workers: processes that read images ahead, and threads that read small sets at the start; 0: none; -1: as many
            as the cores allow.
        degrade: name of the degradation that makes sources of clean images (`degradations.DEGRADATIONS`); "" or "none"
            if `data` are sources already.
        masks: file of the published free-form masks, for `degrade` "inpaint-freeform1020" and "inpaint-freeform2030".
        nfe: N, network calls of the student per image.
        timesteps: T = t_N > … > t_1, at which it is called, in the teacher's own units; (): evenly spaced.
        init: reference of a student whose weights this one starts from; "": the teacher's, as in the paper.
        steps: K, student updates.
        bridge_steps: L, bridge-model updates per student update.
        bridge_warmup: bridge-model updates before the first student update. Differs from the paper (0).
        reuse: bridge-model updates in a row that see the same images of the student, with new times and noise each.
            Differs from the paper (1, the default): cheaper updates, of images that vary less.
        batch_size: images per update, over all processes and micro-batches.
        micro_batch: images at a time per process; 0: batch_size / processes; "auto": as many as memory holds.
        memory: GiB that "auto" may use in each process; 0: nine tenths of what is free.
        lr: learning rate of the student.
        bridge_lr: learning rate of the bridge model.
        lr_warmup: student updates of linear warm-up.
        lr_decay: "none", "linear" or "cosine", of both rates, over the run.
        betas: of Adam, both networks.
        clip: largest gradient norm of the student; 0 means none.
        ema: decay of the student's average.
        noise: whether the student takes noise z.
        noise_channels: channels of z.
        noise_grid: side of z, enlarged to the image by repetition; 0 means one number per pixel, as in the paper.
        noise_init: deviation of the new weights for z. Differs from the paper (0, the default): a small number breaks
            the symmetry between all z at once, which saves the first updates.
        t_power: t = T − (T − t_min) u^t_power; 1 is uniform, as in the paper; more draws t towards T.
        t_even: whether the u of a batch lie at equal distances, from a random start. Differs from the paper (False).
        weight_power: λ(t) = c_out(t)^−weight_power; 2 is the teacher's own weighting, 0 weighs all times alike.
        flip: mirror sources at random.
        recompute: run the student twice rather than keep its graph: less memory, more time.
        checkpointing: activation checkpointing inside the networks: less memory, more time.
        compile: compile the networks first (torch.compile).
        fsdp: split weights, gradients and moments over the processes: less memory in each.
        precision: "fp32", "bf16" or "fp16".
        seed: of all randomness.
        checkpoint_every: student updates between checkpoints.
        preview_every: student updates between preview grids.
        keep: checkpoints to keep.
        track: "tensorboard" or "wandb": where the log goes, too; "": nowhere else.
    """

    teacher: str = "builtin:outline2emoji"
    preset: str = ""
    head_channels: int = 0
    attention_order: str = ""
    data: tuple[str, ...] = ()
    layout: str = ""
    labels: str = ""
    workers: int = -1
    degrade: str = ""
    masks: str = ""
    nfe: int = 1
    timesteps: tuple[float, ...] = ()
    init: str = ""
    steps: int = 3000
    bridge_steps: int = 5
    bridge_warmup: int = 0
    reuse: int = 1
    batch_size: int = 256
    micro_batch: int | str = 0
    memory: float = 0.0
    lr: float = 5e-5
    bridge_lr: float = 5e-5
    lr_warmup: int = 0
    lr_decay: str = "none"
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 0.0
    ema: float = 0.99
    noise: bool = True
    noise_channels: int = 3
    noise_grid: int = 0
    noise_init: float = 0.0
    t_power: float = 1.0
    t_even: bool = False
    weight_power: float = 2.0
    flip: bool = True
    recompute: bool = True
    checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    precision: str = "fp32"
    seed: int = 0
    checkpoint_every: int = 100
    preview_every: int = 100
    keep: int = 2
    track: str = ""

    def __post_init__(self) -> None:
        for name, low in LEAST.items():
            if (value := getattr(self, name)) != AUTO and value < low:
                raise UsageError(f"{_flag(name)}: {getattr(self, name)} is too small: expected at least {low}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"{_flag(name)}: {getattr(self, name)!r} is not one of {', '.join(filter(None, choices))}"
                )
        for name in ("lr", "bridge_lr", "t_power"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{_flag(name)}: {getattr(self, name)} must be greater than 0")
        if self.timesteps and len(self.timesteps) != self.nfe:
            raise UsageError(
                f"--timesteps: {len(self.timesteps)} times, but --nfe {self.nfe}: expected one for each call"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas: {self.betas} must be at least 0 and less than 1")
        if not 0 <= self.ema < 1:
            raise UsageError(f"--ema: {self.ema} must be at least 0 and less than 1")
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


LEAST = {
    **dict.fromkeys(["nfe", "steps", "bridge_steps", "reuse", "batch_size", "noise_channels"], 1),
    **dict.fromkeys(["checkpoint_every", "preview_every", "keep"], 1),
    **dict.fromkeys(
        ["bridge_warmup", "micro_batch", "lr_warmup", "noise_grid", "noise_init", "weight_power", "clip", "seed"], 0
    ),
    "head_channels": 0,
    "workers": -1,
    "memory": 0,
}
CHOICES = {
    "attention_order": ("", "new", "legacy"),
    "layout": ("", "ab", "ba", "normals"),
    "lr_decay": ("none", "linear", "cosine"),
    "precision": ("fp32", "bf16", "fp16"),
    "track": ("", "tensorboard", "wandb"),
}
MAY_CHANGE = (
    *("micro_batch", "memory", "recompute", "checkpointing", "compile", "fsdp"),
    *("checkpoint_every", "preview_every", "keep", "track", "workers"),
)
"""Settings that a resumed run may have otherwise: they do not change what is learnt."""


def resolve(
    flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None
) -> tuple[DistillConfig, dict[str, str]]:
    """Settle every setting.

    Args:
        flags: values given on the command line; None means not given.
        environ: the environment.
        file: of `--config`, or None.

    Returns:
        The settings, and for each of them where it came from.

    Raises:
        UsageError: an unknown name, or a value of the wrong type or out of range.
    """
    hints = get_type_hints(DistillConfig)
    layers: list[tuple[str, Mapping[str, Any]]] = [("flag", {k: v for k, v in flags.items() if v is not None})]
    layers.append(("environment", {k: environ[_variable(k)] for k in hints if _variable(k) in environ}))
    if file is not None:
        layers.append((f"config {file}", _read(file)))

    def given(name: str) -> Any:
        return next((layer[name] for _, layer in layers if name in layer), None)

    teacher = f"hub:{given('preset')}" if given("preset") else given("teacher") or DistillConfig.teacher
    preset = _preset(teacher, given("nfe"))
    layers.append(("preset", preset))
    values: dict[str, Any] = {}
    origins = dict.fromkeys(hints, "default")
    for origin, layer in reversed(layers):
        for name, value in layer.items():
            if name not in hints:
                near = difflib.get_close_matches(name, hints, n=1)
                raise UsageError(f"{origin}: no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            values[name], origins[name] = _convert(name, value, hints[name], origin), origin
    if values.get("data") == ("preset",):
        if "data" not in preset:
            raise UsageError(f"--data preset: {teacher} has no data of its own: give a folder of images")
        values["data"], origins["data"] = tuple(preset["data"]), "preset"
    return DistillConfig(**values), origins


def _preset(teacher: str, nfe: Any) -> dict[str, Any]:
    """Return the preset of a teacher, with what it has for students of `nfe` network calls."""
    preset = load_presets().get(teacher, {})
    by_nfe = preset.pop("by_nfe", {})
    return preset | by_nfe.get(str(nfe or preset.get("nfe", DistillConfig.nfe)), {})


def load_presets() -> dict[str, dict[str, Any]]:
    """Return the settings that belong to each known teacher (`presets.toml`)."""
    return tomllib.loads((Path(__file__).parent / "presets.toml").read_text(encoding="utf-8"))


def to_json(config: DistillConfig) -> dict[str, Any]:
    """Return the settings as a JSON object."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def differences(config: DistillConfig, saved: Mapping[str, Any]) -> list[str]:
    """Tell which settings that matter differ from those of a saved run, e.g. `lr: 0.0001 there, 0.0002 here`."""
    return [
        f"{name}: {saved.get(name)} there, {value} here"
        for name, value in to_json(config).items()
        if name not in MAY_CHANGE and saved.get(name) != value
    ]


def _variable(name: str) -> str:
    return f"IBMD_{name.upper()}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {file}: cannot be read ({error})") from error
    return dict(content)


def _convert(name: str, value: Any, hint: Any, origin: str) -> Any:
    """Give `value`, perhaps text from the environment, the type of the field."""
    try:
        if get_origin(hint) is tuple:
            items = value.split(",") if isinstance(value, str) else list(value)
            kinds = [kind for kind in get_args(hint) if not isinstance(kind, types.EllipsisType)]
            if len(get_args(hint)) == len(kinds) != len(items):
                raise ValueError
            return tuple(kinds[min(i, len(kinds) - 1)](item) for i, item in enumerate(items))
        if hint is bool:
            words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
            return value if isinstance(value, bool) else words[str(value).lower()]
        if hint == int | str:
            return AUTO if value == AUTO else _convert(name, value, int, origin)
        if hint is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return hint(value)
    except (KeyError, TypeError, ValueError) as error:
        kind = getattr(hint, "__name__", str(hint))
        raise UsageError(f"{_flag(name)} ({origin}): {value!r} is not of type {kind}") from error
