"""Published checkpoints of DDBM, DBIM and I2SB: what is in a file, and its conversion to a model folder.

What a file is, its contents decide:

    DDBM    a torch file of name → EMA weight; attention weights (out, in, 1, 1), or (out, in, 1) as adapted by DBIM
    DBIM    the same of its class-conditional network, which alone has `label_emb`
    I2SB    `latest.pt`: {net: name → raw weight, ema: {shadow_params: [EMA weight, …]}}, with `options.pkl` beside it

Widths, depths and places of attention follow from names and shapes. The attention order, the width of a head and the
constants of the bridge do not: they are those of the family, of `options.pkl` or of a preset (`teachers.toml`).

Nothing in a file is run: torch files are read as tensors alone, `options.pkl` by an unpickler that knows two names.
"""

import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ibmd_cli import __version__
from ibmd_cli.errors import IbmdError, NotAvailable, UsageError
from ibmd_cli.files import sha256
from ibmd_cli.method.bridges import I2SBBridge, make_bridge
from ibmd_cli.models import FORMAT_VERSION
from ibmd_cli.models.folder import misfits, save_folder
from ibmd_cli.models.published_teachers import published
from ibmd_cli.networks.predictor import Preconditioning
from ibmd_cli.networks.unet import UNet, UNetConfig

PREFIX = "diffusion_model."
"""What I2SB puts before the published names."""

OPTIONS_GLOBALS = {("argparse", "Namespace"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}
"""The only names that an `options.pkl` may refer to; the last is the second, as Python 3.13 writes it."""

OPTIONS_BYTES = 1 << 16
"""Largest `options.pkl` that is read; the published ones are below 1 kB."""

OPTIONS_CONSTANTS = {"interval": 1000, "t0": 1e-4, "T": 1.0, "add_x1_noise": False}
"""Options of I2SB that all published checkpoints share, and that `I2SBBridge` has as constants."""


NO_NETWORK = "not a network of DDBM, DBIM or I2SB"


@dataclass(frozen=True)
class Checkpoint:
    """What a published checkpoint holds.

    Attributes:
        file: the file of the weights.
        family: whose teacher it is: "ddbm" (also as adapted by DBIM), "dbim" (class-conditional) or "i2sb".
        tensors: the EMA weights by their published names without prefix, mapped from the file.
        options: of an I2SB teacher, see `read_options`; None without an `options.pkl`.
    """

    file: Path
    family: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a published checkpoint; weights stay in the file until they are used.

    Args:
        path: a torch file, a safetensors file of published names, or I2SB's folder of `latest.pt` and `options.pkl`.

    Raises:
        NotAvailable: there is no such file or folder.
        IbmdError: it is no checkpoint, is damaged, or holds more than tensors.
    """
    file = path / "latest.pt" if path.is_dir() else path
    if not file.is_file():
        expected = "latest.pt and options.pkl (I2SB), or the name of the file" if path.is_dir() else "a file or folder"
        raise NotAvailable(f"{path}: no checkpoint here: expected {expected}")
    content = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    if isinstance(content, dict) and {"net", "ema"} <= content.keys():
        options = file.with_name("options.pkl")
        tensors = _i2sb_weights(content, file)
        return Checkpoint(file, "i2sb", tensors, read_options(options) if options.is_file() else None)
    tensors = {name.removeprefix(PREFIX): v for name, v in _named_tensors(content, file).items()}
    return Checkpoint(file, _family(tensors), tensors)


def _read_torch(file: Path) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            is_compressed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
        if not is_compressed:
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except zipfile.BadZipFile as error:
        raise IbmdError(f"{file}: {_what_is_no_zip(file)}") from error
    except pickle.UnpicklingError as error:
        raise IbmdError(f"{file}: holds more than tensors: refused; nothing in it was run") from error
    except Exception as error:  # whatever a hostile or broken file makes torch raise
        raise IbmdError(f"{file}: cannot be read as a torch file ({_first_line(error)})") from error
    raise IbmdError(f"{file}: compressed, which torch files never are: refused. Fetch it again")


def _what_is_no_zip(file: Path) -> str:
    with file.open("rb") as stream:
        start = stream.read(2)
    if not start:
        return "empty. Fetch it again"
    if start == b"PK":
        return "damaged or incomplete. Fetch it again"
    if start[:1] == b"\x80":
        return (
            "a pickle, or a torch file older than PyTorch 1.6: refused; nothing in it was run. If you trust it, load "
            "it with PyTorch and save it again with torch.save"
        )
    return "neither a torch file nor safetensors"


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise IbmdError(f"{file}: cannot be read as safetensors ({error})") from error


def _i2sb_weights(content: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """Name the EMA weights: a list, in the order of `net`. `net` itself and `collected_params` are the raw weights."""
    net = _named_tensors(content["net"], file)
    shadow = content["ema"].get("shadow_params") if isinstance(content["ema"], dict) else None
    if not isinstance(shadow, list) or len(shadow) != len(net):
        found = f"{len(shadow)} tensors" if isinstance(shadow, list) else "none"
        raise IbmdError(
            f"{file}: ema.shadow_params: expected one tensor for each of the {len(net)} in net, found {found}"
        )
    ema = _named_tensors(dict(zip(net, shadow, strict=True)), file)
    if wrong := misfits(_shapes(ema), _shapes(net)):
        raise IbmdError(f"{file}: ema.shadow_params does not match net: {wrong}")
    return {name.removeprefix(PREFIX): v for name, v in ema.items()}


def _named_tensors(content: Any, file: Path) -> dict[str, Tensor]:
    """Return `content` if it is name → tensor, each with numbers of its own in the file."""
    entries = content if isinstance(content, dict) else {}
    if not entries or not all(isinstance(name, str) and isinstance(v, Tensor) for name, v in entries.items()):
        found = ", ".join(f"{str(name)[:40]!r}: {type(v).__name__}" for name, v in list(entries.items())[:3])
        raise IbmdError(
            f"{file}: expected tensors by name, or I2SB's net and ema; found {found or type(content).__name__}"
        )
    for name, v in entries.items():
        plain = v.device.type == "cpu" and v.layout == torch.strided and v.is_floating_point() and v.is_contiguous()
        if not plain:
            raise IbmdError(f"{file}: {name[:80]!r}: expected a contiguous tensor of floating-point numbers")
    # So the tensors are no larger than the file, and can be written one by one.
    ranges = sorted((v.data_ptr(), v.data_ptr() + v.nbytes) for v in entries.values())
    if any(end > start for (_, end), (start, _) in pairwise(ranges)):
        raise IbmdError(f"{file}: tensors overlap: expected numbers of its own for each. Save clones of them")
    return {name: v.detach() for name, v in entries.items()}


def _family(tensors: Mapping[str, Tensor]) -> str:
    if "label_emb.weight" in tensors:
        return "dbim"
    first, last = tensors.get("input_blocks.0.0.weight"), tensors.get("out.2.bias")
    unconditional = first is not None and last is not None and first.shape[1:2] == last.shape
    return "i2sb" if unconditional else "ddbm"


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(v.shape) for name, v in tensors.items()}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


# --------------------------------------------------------------------------------------------------- options.pkl


def read_options(file: Path) -> dict[str, Any]:
    """Read the settings in I2SB's `options.pkl` without running anything in it.

    Returns:
        `beta_max` (float), `ot_ode`, `cond_x1`, `clip_denoise` (bool), `image_size` (int, pixels), `corrupt` (str).

    Raises:
        IbmdError: the file names anything but a namespace and paths, or a setting is absent or out of range.

    Source: arXiv:2302.05872, as in the published code.
    """
    values = _unpickle_namespace(file)

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = values.get(key, default)
        if type(value) is not kind or (isinstance(value, int) and value.bit_length() > 31):
            raise IbmdError(f"{file}: {key}: expected a {kind.__name__}, found a {type(value).__name__}")
        return value

    for key, constant in OPTIONS_CONSTANTS.items():
        if get(key, type(constant), constant) != constant:
            raise IbmdError(f"{file}: {key} is {values[key]!r}: expected {constant!r}, as in all published checkpoints")
    options = {
        "beta_max": get("beta_max", float),
        "ot_ode": get("ot_ode", bool),
        "cond_x1": get("cond_x1", bool, False),
        "clip_denoise": get("clip_denoise", bool, False),
        "image_size": get("image_size", int, 256),
        "corrupt": get("corrupt", str, ""),
    }
    if not 0 < options["beta_max"] <= 10:
        raise IbmdError(f"{file}: beta_max is {options['beta_max']}: expected a number above 0, up to 10")
    if not 1 <= options["image_size"] <= 1 << 14:
        raise IbmdError(f"{file}: image_size is {options['image_size']}: expected 1 to {1 << 14} pixels")
    if not options["corrupt"].isprintable() or len(options["corrupt"]) > 64:
        raise IbmdError(f"{file}: corrupt is {options['corrupt'][:64]!r}: expected the name of a degradation")
    return options


def _unpickle_namespace(file: Path) -> dict[str, Any]:
    class Inert:  # made anew for each file, so that a file cannot change it for the next one
        def __init__(self, *parts: Any) -> None:
            pass

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            # Exact names: "PosixPath.touch" would be looked up inside an admitted class.
            if (module, name) not in OPTIONS_GLOBALS:
                raise pickle.UnpicklingError(f"it names {module}.{name}")
            return Inert

    if file.stat().st_size > OPTIONS_BYTES:
        raise IbmdError(f"{file}: {file.stat().st_size} bytes: expected at most {OPTIONS_BYTES}: not options of I2SB")
    try:
        content = file.read_bytes()
        for opcode, _, _ in pickletools.genops(content):
            if opcode.name in ("BYTEARRAY8", "LONG_BINPUT"):  # of a few bytes, these can make gigabytes
                raise pickle.UnpicklingError(f"it has a {opcode.name}")
        return dict(vars(Unpickler(io.BytesIO(content)).load()))
    except Exception as error:  # whatever a hostile or broken file makes the unpickler raise
        raise IbmdError(
            f"{file}: not options of I2SB: refused; nothing in it was run ({_first_line(error)})"
        ) from error


# ------------------------------------------------------------------------------------------------------- network


def infer_network(shapes: Mapping[str, Sequence[int]], *, attention_order: str, head_channels: int = 64) -> UNetConfig:
    """Infer the network from the names and shapes of its published parameters.

    Args:
        shapes: by published name, without prefix; attention weights (out, in, 1) or (out, in, 1, 1).
        attention_order: "new" or "legacy"; shapes do not show it.
        head_channels: width of an attention head; shapes do not show it.

    Raises:
        IbmdError: the shapes are not those of such a network; the message lists what is missing, extra or misshapen.

    Source: arXiv:2105.05233 (ADM), as used by DDBM, DBIM and I2SB.
    """
    have = {name: _without_1x1(name, shape) for name, shape in shapes.items()}

    def size(name: str, axis: int) -> int:
        if len(have.get(name, ())) <= axis or not have[name][axis]:
            raise IbmdError(f"{NO_NETWORK}: {name} (missing or misshapen)")
        return have[name][axis]

    if attention_order not in ("new", "legacy") or head_channels < 1:
        raise UsageError(
            f"attention_order {attention_order!r}, head_channels {head_channels}: expected new or legacy, ≥ 1"
        )

    def rows(pattern: str) -> set[int]:
        return {int(match[1]) for name in have if (match := re.match(pattern, name))}

    # The way up has levels · (blocks + 1) blocks; that of each level but the full-size one ends with an up-block, a
    # second residual block behind the first. On the way down, level l starts at block l · (blocks + 1) + 1.
    levels = len(rows(r"output_blocks\.(\d{1,3})\.[12]\.in_layers\.")) + 1
    blocks = len(rows(r"output_blocks\.(\d{1,3})\.")) // levels - 1
    starts = [level * (blocks + 1) + 1 for level in range(levels)]
    attending = rows(r"input_blocks\.(\d{1,3})\.1\.")
    model_channels = size("time_embed.0.weight", 1)
    widths = [size(f"input_blocks.{start}.0.out_layers.3.weight", 0) for start in starts]
    in_channels, out_channels = size("input_blocks.0.0.weight", 1), size("out.2.weight", 0)
    if in_channels not in (out_channels, 2 * out_channels):
        raise IbmdError(
            f"{NO_NETWORK}: {in_channels} channels in, {out_channels} out: expected as many in as out (x_t), or twice "
            "as many (x_t and x_T)"
        )
    for name in have:
        if name.endswith(".proj_out.weight") and (width := size(name, 0)) % head_channels:
            raise IbmdError(f"{name}: {width} channels do not make heads of {head_channels}: give head_channels")
    config = UNetConfig(
        in_channels=in_channels,
        out_channels=out_channels,
        model_channels=model_channels,
        channel_mult=tuple(w // model_channels if w % model_channels == 0 else w / model_channels for w in widths),
        num_res_blocks=blocks,
        attention=tuple(2**i for i, start in enumerate(starts) if attending & {*range(start, start + blocks)}),
        head_channels=head_channels,
        attention_order=attention_order,
        num_classes=size("label_emb.weight", 0) if "label_emb.weight" in have else None,
    )
    try:
        with torch.device("meta"):
            want = _shapes(UNet(config).state_dict())
    except ValueError as error:
        raise IbmdError(f"{NO_NETWORK}: {_first_line(error)}") from error
    if wrong := misfits(have, want):
        raise IbmdError(f"{NO_NETWORK}: {wrong}")
    return config


def _without_1x1(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape in our layout: DDBM keeps attention weights as (out, in, 1, 1), we as (out, in, 1)."""
    is_4d = name.endswith((".qkv.weight", ".proj_out.weight")) and len(shape) == 4 and shape[3] == 1
    return tuple(shape[:3] if is_4d else shape)


# ----------------------------------------------------------------------------------------------------- conversion


def convert(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    name: str,
    preset: Mapping[str, Any] | None = None,
    head_channels: int | None = None,
    attention_order: str | None = None,
    source: str | None = None,
) -> None:
    """Write the model folder of a published checkpoint, whole or not at all; one that is there is replaced.

    Args:
        checkpoint: what to convert.
        folder: where.
        name: of the model.
        preset: row of `catalogue.published`, for what the checkpoint does not say; None for what its family shares.
        head_channels: width of an attention head, if it is not the family's 64 (or less in a narrower network).
        attention_order: "new" or "legacy", if it is not the family's.
        source: reference under which the checkpoint was found; None for its path.

    Raises:
        IbmdError: see `infer_network`; or the preset is for another checkpoint, or is needed.
    """
    file = checkpoint.file
    config = describe_checkpoint(checkpoint, preset, head_channels, attention_order)
    config["name"] = name
    config["source"] = {
        "reference": source or str(file),
        "file": file.name,
        "sha256": sha256(file),
        "bytes": file.stat().st_size,
    }
    tensors = {
        f"backbone.{key}": v.reshape(_without_1x1(key, v.shape)).float() for key, v in checkpoint.tensors.items()
    }
    save_folder(folder, config, tensors, _card(config))


def describe_checkpoint(
    checkpoint: Checkpoint, preset: Mapping[str, Any] | None, head_channels: int | None, attention_order: str | None
) -> dict[str, Any]:
    """Return the `config.json` of a checkpoint, but for its name and source; arguments and errors as of `convert`."""
    try:
        return _describe(checkpoint, preset, head_channels, attention_order)
    except IbmdError as error:
        raise type(error)(f"{checkpoint.file}: {error}") from error


def _describe(
    checkpoint: Checkpoint, preset: Mapping[str, Any] | None, head_channels: int | None, attention_order: str | None
) -> dict[str, Any]:
    family, options = checkpoint.family, checkpoint.options
    facts = dict(preset) if preset else {**_shared(family), **(_from_options(options) if options else {})}
    if facts["family"] != family:
        raise IbmdError(f"holds a teacher of family {family}, but the preset is for {facts['family']}")
    if "bridge" not in facts:
        raise IbmdError("an I2SB teacher without its options.pkl: put it beside the weights, or name a preset")
    shapes = _shapes(checkpoint.tensors)
    # A head is not wider than the network: one of 32 channels has heads of 32, where its family has 64.
    widest = min([facts["head_channels"], *shapes.get("time_embed.0.weight", ())[1:]])
    network = infer_network(
        shapes,
        attention_order=attention_order or facts["attention_order"],
        head_channels=head_channels or widest,
    )
    conditional = network.in_channels == 2 * network.out_channels
    bridge = make_bridge(facts["bridge"])
    if options:
        for key, value in {
            "bridge": bridge.to_dict(),
            "degradation": facts.get("degradation", options["corrupt"]),
        }.items():
            if (own := _from_options(options)[key]) != value:
                raise IbmdError(f"{key}: its options.pkl says {own}, the preset {value}: it is for another checkpoint")
        if options["cond_x1"] != conditional:
            raise IbmdError(
                f"its options.pkl says cond_x1 {options['cond_x1']}, but it has {network.in_channels} channels in"
            )
    return {
        "format": "ibmd-teacher",
        "format_version": FORMAT_VERSION,
        "ibmd_version": __version__,
        "name": "",
        "task": facts.get("task") or f"as trained with {family.upper()}",
        "network": asdict(network),
        "bridge": bridge.to_dict(),
        "preconditioning": asdict(Preconditioning(**facts["preconditioning"])),
        "conditional": conditional,
        "noise_channels": 0,
        "image": {
            # Without a word of it: ADM's networks end at 8×8.
            "size": facts.get("image_size") or 8 * 2 ** (len(network.channel_mult) - 1),
            "channels": network.out_channels,
            "range": [-1, 1],
            "source_scale": facts.get("source_scale", 1),
        },
        "classes": network.num_classes,
        "mask": facts.get("mask"),
        "degradation": facts.get("degradation", ""),
        "sampling": dict(facts["sampling"]),
        "licence": facts.get("licence", "not stated"),
    }


def _shared(family: str) -> dict[str, Any]:
    """Return what all published teachers of a family share; not the bridge of I2SB, of which there are two."""
    row = next(row for row in published().values() if row["family"] == family)
    keys = ["family", "attention_order", "head_channels", "preconditioning", "sampling"]
    return {key: row[key] for key in keys + (["bridge"] if family != "i2sb" else [])}


def _from_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what I2SB's options say, under the keys of a preset."""
    corrupt = options["corrupt"]
    return {
        "bridge": I2SBBridge(beta_max=options["beta_max"], noise_free=options["ot_ode"]).to_dict(),
        "degradation": corrupt,
        "image_size": options["image_size"],
        "mask": {"fill": "noise"} if corrupt.startswith("inpaint-") else None,
        "source_scale": 4 if corrupt.startswith("sr4x-") else 1,
        "sampling": {"sampler": "i2sb", "nfe": 999, "clip": options["clip_denoise"]},
    }


def _card(config: Mapping[str, Any]) -> str:
    source = config["source"]
    return (
        f"# {config['name']}\n\nTask: {config['task']}.\n\nConverted by ibmd {__version__} from {source['reference']} "
        f"(`{source['file']}`, SHA-256 `{source['sha256']}`).\n\nLicence: {config['licence']}.\n"
    )
