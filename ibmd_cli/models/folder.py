"""Model folders (teacher or student) and the references that name them.

A model folder holds `config.json` (what the model is), `model.safetensors` (its weights) and `README.md` (its card).
The keys of `config.json`, all checked when the folder is loaded:

    format, format_version       "ibmd-teacher" or "ibmd-student"; `FORMAT_VERSION`
    name, task, licence          in words, for tables and cards
    network                      of `UNetConfig`
    bridge                       `kind` and the fields of that class of `bridges`
    preconditioning              of `Preconditioning`
    conditional                  whether the network sees x_T
    noise_channels               of z: 0 for a teacher
    image                        `size`, `channels`, `range`, and `source_scale` of low-resolution sources
    classes, mask, degradation   number of classes; `fill` of holes; what makes sources of targets: each may be null
    times                        of `LogTimes`: the density of t for training and distillation; null: the bridge's own
    sampling                     of a teacher: `sampler`, `nfe` and options; of a student: `timesteps`, `noise`, …
    teacher, training            of a student: reference and digest; the settings that it was trained with

A reference is `builtin:NAME`, `hf://OWNER/REPO`, or the path of a model folder or of a run folder (its student).
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ibmd_cli import __version__, hub
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError, nearest
from ibmd_cli.files import assets, atomic_folder, read_json
from ibmd_cli.method.log_times import LogTimes
from ibmd_cli.models import FORMAT_VERSION
from ibmd_cli.models.model import PRECISIONS, Model, StudentModel, TeacherModel
from ibmd_cli.models.samplers import check_sampler
from ibmd_cli.networks.predictor import Predictor, make_predictor

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
        (new / "config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace"
        )
        _save_tensors(tensors, config, new / "model.safetensors")
        (new / "README.md").write_text(
            card or f"# {config['name']}\n\nLicence: {config['licence']}.\n",
            encoding="utf-8",
            errors="backslashreplace",
        )


def save_weights(model: Model, file: Path, dtype: str, readme: str = "") -> None:
    """Write the weights as safetensors, with the configuration as metadata, and in it a text for other readers."""
    _save_tensors(_weights(model, dtype), {**model.config, **({"readme": readme} if readme else {})}, file)


def _weights(model: Model, dtype: str) -> dict[str, Tensor]:
    return {
        key: v.detach().to("cpu", PRECISIONS[dtype]).contiguous() for key, v in model.predictor.state_dict().items()
    }


def _save_tensors(tensors: dict[str, Tensor], config: dict[str, Any], file: Path) -> None:
    try:
        # One key alone: several are written in an order that varies, and equal models shall have equal files.
        text = json.dumps(config, ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")
        save_file(tensors, file, metadata={"ibmd": text})
    except SafetensorError as error:
        raise IbmdError(f"{file}: cannot be written ({error}): is the disk full?") from error
    file.chmod(0o644)  # safetensors writes for the owner alone


M = TypeVar("M", TeacherModel, StudentModel)


def load_model(reference: str, kind: str | None = None) -> TeacherModel | StudentModel:
    """Load the model that a reference names, of either kind unless `kind` says "teacher" or "student".

    Raises:
        NotAvailable: the reference names nothing.
        IbmdError: the folder is of a newer format or of the other kind, or its weights do not fit its configuration.
    """
    path = find_model(reference, kind)
    if kind == "teacher" or (kind is None and read_config(path)["format"] == "ibmd-teacher"):
        return load_folder(path, reference, TeacherModel)
    return load_folder(path, reference, StudentModel)


def load_student(reference: str) -> StudentModel:
    """Load a student; errors as of `load_model`."""
    return load_folder(find_model(reference, "student"), reference, StudentModel)


def load_folder(path: Path, reference: str, kind: type[M]) -> M:
    """Load a model of a known kind from its folder, or safetensors file, that a reference named."""
    config, predictor = check_folder(path, reference, kind.kind)
    file = _weights_of(path)
    state = predictor.state_dict()
    for key, v in state.items():
        state[key] = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype)  # channels-last, as the network is
        # Opened anew for each: what was read through a mapping stays in memory until the file is closed.
        with open_weights(file) as tensors:
            state[key].copy_(tensors.get_tensor(key))
    predictor.load_state_dict(state, assign=True)
    return kind(predictor.eval(), config, file)


def check_folder(path: Path, reference: str, kind: str) -> tuple[dict[str, Any], Predictor]:
    """Return the configuration of a model folder and its predictor, on the meta device, after a check of the weights.

    Raises:
        IbmdError: the folder is of the other kind, does not describe a model, or holds the weights of another one.
    """
    config = read_config(path)
    if config["format"] != f"ibmd-{kind}":
        raise other_kind(reference, config, kind)
    try:
        with torch.device("meta"):  # no weights yet: they are in the file
            predictor = make_predictor(config)
        _check(config, predictor)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IbmdError(f"{path}: config.json does not describe a model ({type(error).__name__}: {error})") from error
    with open_weights(_weights_of(path)) as tensors:
        have = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    if wrong := misfits(have, {key: tuple(v.shape) for key, v in predictor.state_dict().items()}):
        raise IbmdError(f"{_weights_of(path)}: tensors do not fit config.json: {wrong}")
    return config, predictor


def _weights_of(path: Path) -> Path:
    return path if path.is_file() else path / "model.safetensors"


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        IbmdError: it cannot be read.
    """
    try:
        file.open("rb").close()  # safetensors says of a file that may not be read that there is none
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise IbmdError(f"{file}: cannot be read as safetensors ({reason})") from error


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of the model in a folder, or in a safetensors file that `ibmd export` wrote.

    Raises:
        IbmdError: it is no model of ibmd, or of a newer format.
    """
    config = read_file_config(path) if path.is_file() else read_json(path / "config.json")
    config.pop("readme", None)
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
    return config


def other_kind(reference: str, config: Mapping[str, Any], wanted: str) -> IbmdError:
    """Return the error for a model of the other kind than the wanted one, with what mends it."""
    if wanted == "student":
        return IbmdError(f"{reference}: a teacher, where a student is needed. Name it with --teacher")
    own = (config.get("teacher") or {}).get("reference")
    mend = f"Its own teacher is {own}: --teacher {own}" if own else "Name it with --student"
    return IbmdError(f"{reference}: a student, where a teacher is needed. {mend}")


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
    if config.get("times"):
        LogTimes(**config["times"])
    if config["format"] == "ibmd-teacher":
        settings = dict(config["sampling"])
        check_sampler(settings.pop("sampler"), settings.pop("nfe"), settings, predictor.bridge)


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


def read_file_config(file: Path) -> dict[str, Any]:
    """Return the configuration in a safetensors file that `save_weights` wrote; nothing in another one.

    Raises:
        IbmdError: the file cannot be read as safetensors.
    """
    with open_weights(file) as tensors:
        return dict(json.loads((tensors.metadata() or {}).get("ibmd", "{}")))


def builtin_names() -> Iterator[str]:
    """Yield the names of the embedded models."""
    yield from sorted(folder.name for folder in assets().iterdir() if (folder / "teacher").is_dir())


def list_builtin() -> list[dict[str, Any]]:
    """Return a row for each embedded teacher: what it is, its size, licence and data."""
    rows = []
    for name in builtin_names():
        folder = assets() / name / "teacher"
        config = read_json(folder / "config.json")
        with open_weights(folder / "model.safetensors") as tensors:
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


def refuse_models(references: Iterable[str]) -> None:
    """Refuse, as data, the folders of runs and models: the previews of a run are pictures, too.

    Raises:
        UsageError: one is named.
    """
    for reference in references:
        if reference and (is_run(Path(reference)) or is_model(Path(reference))):
            raise UsageError(f"--data {reference}: the folder of a run or a model: expected one of images")


def is_run(path: Path) -> bool:
    """Tell whether a path is the folder of a run of `ibmd distill`, with its student or without one yet."""
    config = path / "config.json"
    return is_model(path / "student") or (config.is_file() and not is_model(path) and "settings" in read_json(config))


def find_model(reference: str, kind: str | None = None, quiet: bool = False) -> Path:
    """Return the model folder (or safetensors file) that a reference names.

    Args:
        reference: `builtin:NAME`, `hf://OWNER/REPO[@REV][/FILE]`, a model folder, a run folder, or a file written by
            `ibmd export`.
        kind: "teacher" or "student": which of the two an embedded name means.
        quiet: show no progress of downloads.

    Raises:
        NotAvailable: there is no such model; the message lists the nearest names.
    """
    known = [f"builtin:{name}" for name in builtin_names()]
    if reference in known:
        return assets() / reference.removeprefix("builtin:") / (kind or "student")
    if reference.startswith("hf://"):
        repo, revision, file = hub.parse_hf(reference)
        return (
            hub.download(repo, file, revision=revision, quiet=quiet)
            if file
            else hub.snapshot(repo, revision, quiet=quiet)
        )
    path = Path(reference)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    for folder in (path, path / "student"):
        if is_model(folder):
            return folder
    if is_run(path):
        raise NotAvailable(f"{reference}: a run that has no student yet: its command, typed again, continues it")
    if path.exists():
        raise NotAvailable(
            f"{reference}: no model here: expected config.json and model.safetensors, or a run folder with student/"
        )
    raise NotAvailable(f"no {kind or 'model'} {reference!r}: {nearest(reference, known)}; or give the path of a folder")
