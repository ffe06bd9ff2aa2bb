"""Model folders (teacher or student) and the references that name them.

A model folder holds `config.json` (what the model is), `model.safetensors` (its weights) and `README.md` (its card).
A reference is `builtin:NAME`, `hf://OWNER/REPO`, or the path of a model folder or of a run folder (its student).
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ibmd_cli import __version__, hub
from ibmd_cli.bridges import Bridge
from ibmd_cli.distillation import Setup, Sources, translate
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError, nearest
from ibmd_cli.files import atomic_folder
from ibmd_cli.networks import Predictor, make_predictor
from ibmd_cli.noise import Streams
from ibmd_cli.samplers import check_sampler, network_calls, sample_teacher

FORMAT_VERSION = 1
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Model:
    """A predictor with what `config.json` says of it.

    Attributes:
        predictor: x̂_0 (teacher) or G_θ (student), in eval mode, float32.
        config: the content of `config.json`.
        weights: the file that the weights were loaded from, if any.
    """

    predictor: Predictor
    config: dict[str, Any]
    weights: Path | None = None

    @property
    def source_scale(self) -> int:
        """Side of a result in units of its source's: 4 for 4× super-resolution, whose sources come enlarged."""
        return int(self.config["image"].get("source_scale", 1))

    @property
    def image_size(self) -> int:
        """Height and width of the images that the model was trained on."""
        return int(self.config["image"]["size"])

    @property
    def name(self) -> str:
        """Short name, for tables and messages."""
        return str(self.config["name"])

    def to(self, device: torch.device | str) -> "Model":
        """Move the weights to `device` and return the model."""
        self.predictor.to(device)
        return self


class Teacher(Model):
    """A diffusion bridge, sampled in many steps."""

    @property
    def bridge(self) -> Bridge:
        """The process q; `teacher.bridge.coefficients(t)` gives a_t, b_t, c_t."""
        return self.predictor.bridge

    @torch.no_grad()
    def predict_x0(self, x_t: Tensor, t: Tensor, x_T: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict the target, x̂_0(x_t, t, x_T).

        Args:
            x_t: states (B, C, H, W).
            t: times (B,) in the teacher's own units: reals for VP, VE and DBIM, integer steps for I2SB.
            x_T: sources (B, C, H, W); not read by an unconditional teacher.
            label: class indices (B,), for a class-conditional teacher.

        Returns:
            (B, C, H, W), not clamped.

        Raises:
            ValueError: a time is not one of the bridge's.
        """
        low, high = 0, self.bridge.T
        if bool(((t < low) | (t > high)).any()):
            raise ValueError(f"times {t.tolist()}: expected {low} … {high:g} for a bridge of kind {self.bridge.kind}")
        return self.predictor(x_t, t, x_T, label=label)

    def translate(
        self, batch: Sources, rng: Streams, nfe: int | None = None, sampler: str | None = None, **options: Any
    ) -> Tensor:
        """Translate sources (B, C, H, W) in [-1, 1]; returns the same shape, in [-1, 1].

        Args:
            batch: sources, with labels and mask where the teacher takes them.
            rng: random stream of all noise, or one for each image.
            nfe: network calls; None for what `config.json` says.
            sampler: see `samplers.SAMPLERS`; None for what `config.json` says, with its options.
            options: of the sampler.
        """
        sampler, nfe, options = self._sampling(nfe, sampler, options)
        x_0 = sample_teacher(
            self, batch.x_T, sampler=sampler, nfe=nfe, noise=rng, mask=batch.mask, label=batch.label, **options
        )
        return x_0.clamp(-1, 1)

    def network_calls(self, nfe: int | None = None, sampler: str | None = None, **options: Any) -> int:
        """Return how many network calls `translate` makes: Heun's come in groups, so it may not be `nfe`."""
        sampler, nfe, options = self._sampling(nfe, sampler, options)
        return network_calls(sampler, nfe, **options)

    def _sampling(self, nfe: int | None, sampler: str | None, options: dict[str, Any]) -> tuple[str, int, Any]:
        """Fill in what `config.json` says; its options are those of its own sampler."""
        settings = dict(self.config["sampling"])
        own, calls = settings.pop("sampler"), settings.pop("nfe")
        return sampler or own, nfe or calls, {**(settings if sampler in (None, own) else {}), **options}


class Student(Model):
    """A distilled generator, G_θ(x_T, z)."""

    @property
    def setup(self) -> Setup:
        """Times, noise and transition of inference."""
        return make_setup(self.predictor, self.config["sampling"])

    @property
    def nfe(self) -> int:
        """Network calls per image that it was distilled for."""
        return len(self.config["sampling"]["timesteps"])

    def setup_for(self, nfe: int) -> Setup:
        """Return the setup of inference with `nfe` network calls, at most those that it was distilled for.

        With fewer, it is called at times that it was trained at, evenly spaced among them, from T: of the calls
        0 … N − 1, those nearest to 0, N/nfe, 2N/nfe, ….

        Raises:
            UsageError: too few or too many calls.
        """
        if not 1 <= nfe <= self.nfe:
            raise UsageError(f"--nfe {nfe}: {self.name} was distilled for {self.nfe}: expected 1 … {self.nfe}")
        times = self.setup.timesteps
        return replace(self.setup, timesteps=tuple(times[round(k * self.nfe / nfe)] for k in range(nfe)))

    @torch.no_grad()
    def translate(self, batch: Sources, rng: Streams, nfe: int | None = None) -> Tensor:
        """Translate sources (B, C, H, W) in [-1, 1], in `nfe` calls (see `setup_for`); returns the same shape."""
        *_, x_0 = translate(self.predictor, self.setup_for(nfe or self.nfe), batch, rng)
        return x_0.clamp(-1, 1)


def student_times(bridge: Bridge, nfe: int, timesteps: Sequence[float] = ()) -> list[float]:
    """Return T = t_N > … > t_1, at which a student of `nfe` steps is called.

    Args:
        bridge: whose T and units they have.
        nfe: N.
        timesteps: these times, after a check; () for evenly spaced ones, without t_min.

    Raises:
        UsageError: times that do not fall from T, or that the bridge does not have.
    """
    if not timesteps:
        return bridge.time(torch.arange(nfe, dtype=torch.float64) / nfe).tolist()
    times, whole = list(timesteps), bridge.kind == "i2sb"
    falls = all(s < t for t, s in pairwise(times))
    if times[0] != bridge.T or times[-1] <= bridge.t_min or not falls or (whole and any(t % 1 for t in times)):
        raise UsageError(
            f"--timesteps {', '.join(f'{t:g}' for t in times)}: expected {'whole numbers' if whole else 'times'} that "
            f"fall from {bridge.T:g} and stay above {bridge.t_min:g}"
        )
    return times


def make_setup(
    predictor: Predictor,
    sampling: dict[str, Any],
    t_power: float = 1.0,
    t_even: bool = False,
    weight_power: float = 2.0,
) -> Setup:
    """Build a `Setup` from a predictor and the section `sampling` of a student's configuration."""
    noise = sampling["noise"]
    return Setup(
        bridge=predictor.bridge,
        weight=partial(predictor.weight, power=weight_power),
        timesteps=tuple(sampling["timesteps"]),
        noise_shape=(noise["channels"], noise["grid"], noise["grid"]) if noise["channels"] else None,
        t_power=t_power,
        t_even=t_even,
        rollout=sampling["rollout"],
        transition=sampling["transition"],
    )


# ---------------------------------------------------------------------------------------------------- folders


def save_model(model: Model, folder: Path, *, dtype: str = "fp32", card: str | None = None) -> None:
    """Write a model folder, whole or not at all; one that is there is replaced.

    Args:
        model: what to write.
        folder: where.
        dtype: of the weights on disk, a key of `DTYPES`.
        card: text of README.md.
    """
    save_folder(folder, model.config, _weights(model, dtype), card)


def save_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], card: str | None = None) -> None:
    """Write a model folder from its parts, as `save_model`. Tensors that are mapped from a file are not copied."""
    with atomic_folder(folder) as new:
        (new / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        _save_tensors(tensors, config, new / "model.safetensors")
        (new / "README.md").write_text(card or f"# {config['name']}\n\nLicence: {config['licence']}.\n")


def save_weights(model: Model, file: Path, dtype: str) -> None:
    """Write the weights as safetensors, with the configuration as metadata."""
    _save_tensors(_weights(model, dtype), model.config, file)


def _weights(model: Model, dtype: str) -> dict[str, Tensor]:
    return {key: v.detach().to("cpu", DTYPES[dtype]).contiguous() for key, v in model.predictor.state_dict().items()}


def _save_tensors(tensors: dict[str, Tensor], config: dict[str, Any], file: Path) -> None:
    try:
        # One key alone: several are written in an order that varies, and equal models shall have equal files.
        save_file(tensors, file, metadata={"ibmd": json.dumps(config, ensure_ascii=False)})
    except SafetensorError as error:
        raise IbmdError(f"{file}: cannot be written ({error}): is the disk full?") from error
    file.chmod(0o644)  # safetensors writes for the owner alone


def load_model(reference: str, kind: str | None = None) -> Teacher | Student:
    """Load the model that a reference names.

    Args:
        reference: see the module's docstring.
        kind: "teacher" or "student", if only one will do.

    Raises:
        NotAvailable: the reference names nothing.
        IbmdError: the folder is of a newer format, or its weights do not fit its configuration.
    """
    path = resolve(reference, kind)
    if path.is_file():
        config, file = read_metadata(path), path
    else:
        config, file = read_json(path / "config.json"), path / "model.safetensors"
    if config.get("format") not in ("ibmd-teacher", "ibmd-student"):
        raise IbmdError(f"{path}: not a model of ibmd: its format is {config.get('format')!r}")
    version = config.get("format_version")
    if not isinstance(version, int):
        raise IbmdError(f"{path}: config.json has format_version {version!r}, expected a number")
    if version > FORMAT_VERSION:
        raise IbmdError(
            f"{path}: format_version {version}, written by ibmd {config.get('ibmd_version', '?')}; "
            f"ibmd {__version__} reads up to {FORMAT_VERSION}. Upgrade: pip install -U ibmd-cli"
        )
    is_teacher = config["format"] == "ibmd-teacher"
    if kind is not None and (kind == "teacher") != is_teacher:
        other = "teacher" if is_teacher else "student"
        raise IbmdError(f"{reference}: a {other}, where a {kind} is needed. Name it with --{other}")
    try:
        with torch.device("meta"):  # no weights yet: they are in the file
            predictor = make_predictor(config)
        _check(config, predictor)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IbmdError(f"{path}: config.json does not describe a model ({type(error).__name__}: {error})") from error
    load_weights(predictor, file)
    return (Teacher if is_teacher else Student)(predictor.eval(), config, file)


def _check(config: dict[str, Any], predictor: Predictor) -> None:
    """Refuse a configuration that would compute something else than it says, or fail later.

    Raises:
        KeyError, TypeError, ValueError: what is wrong.
    """
    for key in ("name", "task", "licence", "sampling"):
        config[key]
    size, channels = int(config["image"]["size"]), int(config["image"]["channels"])
    if size < 1 or size % predictor.backbone.size_multiple:
        raise ValueError(f"image.size {size}: expected a multiple of {predictor.backbone.size_multiple}")
    network = predictor.backbone.config
    inputs = channels * (1 + predictor.conditional) + predictor.noise_channels
    if (network.in_channels, network.out_channels) != (inputs, channels):
        raise ValueError(
            f"network of {network.in_channels} channels in, {network.out_channels} out: "
            f"expected {inputs} and {channels}, by image, conditional and noise_channels"
        )
    predictor.bridge.coefficients(torch.tensor([predictor.bridge.T], device="cpu"))
    if config["format"] == "ibmd-teacher":
        settings = dict(config["sampling"])
        check_sampler(settings.pop("sampler"), predictor.bridge, settings.pop("nfe"), settings)


def load_weights(predictor: Predictor, file: Path) -> None:
    """Give memory to `predictor`, which is on the meta device, and fill it from a safetensors file.

    Raises:
        IbmdError: a tensor is missing, extra or misshapen, or the file cannot be read.
    """
    state = predictor.state_dict()
    try:
        with safe_open(file, framework="pt") as tensors:
            have = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        if wrong := misfits(have, {key: tuple(v.shape) for key, v in state.items()}):
            raise IbmdError(f"{file}: tensors do not fit config.json: {wrong}")
        for key, v in state.items():
            state[key] = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype)  # channels-last, as the network is
            # Opened anew for each: what was read through a mapping stays in memory until the file is closed.
            with safe_open(file, framework="pt") as tensors:
                state[key].copy_(tensors.get_tensor(key))
        predictor.load_state_dict(state, assign=True)
    except (OSError, SafetensorError) as error:
        raise IbmdError(f"{file}: cannot be read as safetensors ({error})") from error


def misfits(have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]]) -> str:
    """List the tensors that are missing, extra or misshapen: the first five, and how many more. "" if none is."""
    wrong = [f"{key} (missing)" for key in want if key not in have]
    wrong += [f"{key} (extra)" for key in have if key not in want]
    wrong += [
        f"{key} ({list(have[key])}, expected {list(shape)})"
        for key, shape in want.items()
        if have.get(key, shape) != shape
    ]
    return ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        IbmdError: the file is absent or is not one.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise IbmdError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise IbmdError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def read_metadata(file: Path) -> dict[str, Any]:
    """Return the configuration in a safetensors file that `save_weights` wrote; nothing in another one.

    Raises:
        IbmdError: the file cannot be read as safetensors.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            return dict(json.loads((tensors.metadata() or {}).get("ibmd", "{}")))
    except (OSError, SafetensorError) as error:
        raise IbmdError(f"{file}: cannot be read as safetensors ({error})") from error


def sha256(file: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------- references


def assets() -> Path:
    """Return the folder of the models and data that are embedded in the package."""
    return Path(str(resources.files("ibmd_cli"))) / "assets"


def builtin_names() -> Iterator[str]:
    """Yield the names of the embedded models."""
    yield from sorted(folder.name for folder in assets().iterdir() if (folder / "teacher").is_dir())


def list_builtin() -> list[dict[str, Any]]:
    """Return a row for each embedded teacher: what it is, its size, licence and data."""
    rows = []
    for name in builtin_names():
        folder = assets() / name / "teacher"
        config = read_json(folder / "config.json")
        with safe_open(folder / "model.safetensors", framework="pt") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118
        rows.append(
            {
                "teacher": f"builtin:{name}",
                "task": config["task"],
                "pixels": config["image"]["size"],
                "kind": f"{'conditional' if config['conditional'] else 'unconditional'} {config['bridge']['kind']}",
                "parameters": sum(math.prod(shape) for shape in shapes),
                "bytes": (folder / "model.safetensors").stat().st_size,
                "source": "embedded",
                "licence": config["licence"],
                "network": config["network"],
                "bridge": config["bridge"],
                "files": ["model.safetensors"],
                "paper_row": "",
                "dataset": "OpenMoji 17",
            }
        )
    return rows


def is_model(path: Path) -> bool:
    """Tell whether a path is a model folder of ibmd."""
    return (path / "config.json").is_file() and (path / "model.safetensors").is_file()


def resolve(reference: str, kind: str | None = None) -> Path:
    """Return the model folder (or safetensors file) that a reference names.

    Args:
        reference: `builtin:NAME`, `hf://OWNER/REPO[@REV][/FILE]`, a model folder, a run folder, or a file written by
            `ibmd export`.
        kind: "teacher" or "student": which of the two an embedded name means.

    Raises:
        NotAvailable: there is no such model; the message lists the nearest names.
    """
    known = [f"builtin:{name}" for name in builtin_names()]
    if reference in known:
        return assets() / reference.removeprefix("builtin:") / (kind or "student")
    if reference.startswith("hf://"):
        repo, revision, file = hub.parse_hf(reference)
        return hub.download(repo, file, revision=revision) if file else hub.snapshot(repo, revision)
    path = Path(reference)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    for folder in (path, path / "student"):
        if is_model(folder):
            return folder
    if path.exists():
        raise NotAvailable(
            f"{reference}: no model here: expected config.json and model.safetensors, or a run folder with student/"
        )
    raise NotAvailable(f"no {kind or 'model'} {reference!r}: {nearest(reference, known)}; or give the path of a folder")
