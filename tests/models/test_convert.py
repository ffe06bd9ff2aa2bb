"""Published checkpoints: inference of the network, parity through the containers, refusals, and memory."""

import json
import pickle
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import checkpoints as published
from parity.rule import families, manifests, outputs, rule_weights
from parity.teachers import error, inputs
from safetensors.torch import load_file, save_file

from ibmd_cli.errors import IbmdError, NotAvailable
from ibmd_cli.files import sha256
from ibmd_cli.method.bridges import I2SBBridge
from ibmd_cli.models.convert import convert, infer_network, read_checkpoint, read_options
from ibmd_cli.models.folder import load_model
from ibmd_cli.networks.unet import UNet, UNetConfig

TINY = UNetConfig(6, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention=(2,), head_channels=32)
VE = {"family": "ddbm", "bridge": {"kind": "ve"}, "preconditioning": {"kind": "ddbm"}, "attention_order": "new"}
I2SB = {
    "family": "i2sb",
    "bridge": {"kind": "i2sb", "beta_max": 0.3, "noise_free": False},
    "preconditioning": {"kind": "i2sb"},
    "attention_order": "legacy",
    "head_channels": 32,
    "degradation": "jpeg-10",
    "sampling": {"sampler": "i2sb", "nfe": 999, "clip": False},
    "licence": "CC-BY-NC-SA-4.0",
    "image_size": 64,
}


def shapes_of(config: UNetConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(v.shape) for name, v in UNet(config).state_dict().items()}


def weights_of(config: UNetConfig = TINY) -> dict[str, torch.Tensor]:
    return published.drawn(shapes_of(config))


def tiny_i2sb(folder: Path, *, in_channels: int = 3, **changes) -> Path:
    """Write a small I2SB folder; returns it."""
    published.save(published.i2sb(weights_of(replace(TINY, in_channels=in_channels))), folder / "latest.pt")
    published.save_options(folder, **changes)
    return folder


def refusal(path: Path, **settings) -> str:
    """Return the message with which a conversion is refused, and check that nothing was left behind."""
    folder = path.parent / "refused"
    with pytest.raises(IbmdError) as caught:
        convert(read_checkpoint(path), folder, name="tiny", head_channels=32, **settings)
    assert not folder.exists()
    assert not list(path.parent.glob(".ibmd-*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------- parity

CONTAINERS = {  # name: family of the parity set, content, options, preset
    "ddbm": ("ddbm_vp", published.ddbm, None, None),
    "ddbm-adapted": ("ddbm_vp", lambda w: published.adapted(published.ddbm(w)), None, None),
    "ddbm-preset": (
        "ddbm_ve",
        published.ddbm,
        None,
        VE | {"head_channels": 32, "sampling": {"sampler": "ddbm", "nfe": 119}},
    ),
    "dbim": ("dbim_inpaint", published.dbim, None, None),
    "i2sb": ("i2sb_sde03", published.i2sb, {}, None),
    "i2sb-ot-ode": ("i2sb_otode10", published.i2sb, {"beta_max": 1.0, "ot_ode": True, "corrupt": "blur-uni"}, None),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_teacher_from_a_published_container_predicts_as_published(tmp_path: Path, case: str):
    family, container, options, preset = CONTAINERS[case]
    weights = rule_weights(family)
    file = published.save(container(weights), tmp_path / "latest.pt")
    if options is not None:
        published.save_options(tmp_path, **options)
    convert(read_checkpoint(file), tmp_path / "model", name=case, preset=preset, head_channels=32)
    file.unlink()
    teacher = load_model(str(tmp_path / "model"), "teacher")
    (tmp_path / "model" / "model.safetensors").unlink()
    state = teacher.predictor.backbone.state_dict()
    assert all(torch.equal(v, weights[name].reshape(v.shape)) for name, v in state.items())
    assert len(state) == len(weights)
    assert not any(m.training for m in teacher.predictor.modules())

    info = families()[family]
    t = torch.tensor(info.get("x0hat_mixed_steps") or info["x0hat_mixed_times"])
    x_t, x_T, label, _ = inputs(family)
    assert error(teacher.predict_x0(x_t, t, x_T, label), outputs(family)["x0hat_mixed"]) < 1e-5


# ----------------------------------------------------------------------------------------------------- inference

FULL_SIZE = {
    "ddbm_e2h64_vp_original": UNetConfig(6, 3, 192, (1, 2, 3, 4), 3, (2, 4, 8)),
    "dbim_e2h64_vp_adapted": UNetConfig(6, 3, 192, (1, 2, 3, 4), 3, (2, 4, 8)),
    "ddbm_diode256_vp_original": UNetConfig(6),
    "dbim_diode256_vp_adapted": UNetConfig(6),
    "dbim_imagenet256_inpaint_center": UNetConfig(6, attention_order="legacy", num_classes=1000),
    "i2sb_imagenet256_uncond_net": UNetConfig(3, attention_order="legacy"),
}


@pytest.mark.parametrize("manifest", FULL_SIZE)
def test_full_size_networks_are_inferred(manifest: str):
    shapes = {name.removeprefix(published.PREFIX): shape for name, shape in manifests()[manifest].items()}
    expected = FULL_SIZE[manifest]
    assert infer_network(shapes, attention_order=expected.attention_order, head_channels=64) == expected


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_network_is_inferred_from_its_shapes(data: st.DataObject):
    mult = data.draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=4))
    config = UNetConfig(
        in_channels=data.draw(st.sampled_from([3, 6])),
        model_channels=data.draw(st.sampled_from([32, 64])),
        channel_mult=tuple(mult),
        num_res_blocks=data.draw(st.integers(1, 3)),
        attention=tuple(2**i for i in range(len(mult)) if data.draw(st.booleans())),
        head_channels=32,
        attention_order=data.draw(st.sampled_from(["new", "legacy"])),
        num_classes=data.draw(st.sampled_from([None, 10])),
    )
    shapes = shapes_of(config)
    backwards = {name: shapes[name] for name in reversed(shapes)}  # order does not matter
    assert infer_network(backwards, attention_order=config.attention_order, head_channels=32) == config


def test_half_widths_are_inferred():
    config = UNetConfig(3, model_channels=64, channel_mult=(0.5, 1), num_res_blocks=1, attention=())
    assert infer_network(shapes_of(config), attention_order="new", head_channels=64) == config


def changed(**tensors) -> dict[str, list[int]]:
    shapes = shapes_of(TINY) | {name.replace("__", "."): shape for name, shape in tensors.items()}
    return {name: shape for name, shape in shapes.items() if shape is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"middle_block__0__in_layers__0__bias": None}, r"middle_block\.0\.in_layers\.0\.bias \(missing\)$"),
        ({"stray": [1], "stray2": [2]}, r": stray \(extra\), stray2 \(extra\)$"),
        ({"scalar": [], "input_blocks__9__1__proj_out__weight": []}, r"proj_out\.weight \(missing or misshapen"),
        ({"scalar": []}, r": scalar \(extra\)$"),
        ({"out__0__bias": [7]}, r"out\.0\.bias \(\[7\], expected \[32\]\)$"),
        ({f"stray{i}": [1] for i in range(8)}, r"stray4 \(extra\) and 3 more$"),
        ({"time_embed__0__weight": None}, r"time_embed\.0\.weight \(missing"),
        ({"time_embed__0__weight": [128]}, r"time_embed\.0\.weight \(missing or misshapen"),
        ({"time_embed__0__weight": [128, 0]}, r"time_embed\.0\.weight \(missing or misshapen"),
        ({"input_blocks__0__0__weight": [32, 4, 3, 3]}, "4 channels in, 3 out: expected"),
        ({"input_blocks__3__1__qkv__weight": None}, r": input_blocks\.3\.1\.qkv\.weight \(missing\)$"),
        ({"output_blocks__1__2__in_layers__0__bias": None}, r": output_blocks\.1\.2\.in_layers\.0\.bias \(missing\)$"),
        ({"input_blocks__1__0__out_layers__3__weight": [40, 40, 3, 3]}, "divisible"),
    ],
)
def test_networks_of_another_shape_are_refused(change: dict, message: str):
    with pytest.raises(IbmdError, match=message) as caught:
        infer_network(changed(**change), attention_order="new", head_channels=32)
    assert "not a network of DDBM, DBIM or I2SB" in str(caught.value)


def test_nothing_at_all_is_no_network():
    with pytest.raises(IbmdError, match="missing"):
        infer_network({}, attention_order="new", head_channels=64)


def test_what_shapes_do_not_show_must_be_possible():
    with pytest.raises(IbmdError, match="64 channels do not make heads of 48: give head_channels"):
        infer_network(shapes_of(TINY), attention_order="new", head_channels=48)
    with pytest.raises(IbmdError, match="attention_order 'old'"):
        infer_network(shapes_of(TINY), attention_order="old", head_channels=32)


# ---------------------------------------------------------------------------------------------------- conversion


def test_config_says_where_the_model_is_from(tmp_path: Path):
    folder = tiny_i2sb(tmp_path / "jpeg-10")
    convert(read_checkpoint(folder), tmp_path / "model", name="mine", preset=I2SB, source="hub:i2sb-jpeg-10")
    config = load_model(str(tmp_path / "model"), "teacher").config
    file = folder / "latest.pt"
    assert config["source"] == {
        "reference": "hub:i2sb-jpeg-10",
        "file": "latest.pt",
        "sha256": sha256(file),
        "bytes": file.stat().st_size,
    }
    assert {key: config[key] for key in ("name", "conditional", "classes", "mask", "degradation", "licence")} == {
        "name": "mine",
        "conditional": False,
        "classes": None,
        "mask": None,
        "degradation": "jpeg-10",
        "licence": "CC-BY-NC-SA-4.0",
    }
    assert config["image"] == {"size": 64, "channels": 3, "range": [-1, 1], "source_scale": 1}
    assert config["network"]["dropout"] == 0
    assert sha256(file) in (tmp_path / "model" / "README.md").read_text()


def test_options_say_what_the_preset_would(tmp_path: Path):
    of_options, of_preset = tmp_path / "options", tmp_path / "preset"
    folder = tiny_i2sb(tmp_path / "a", image_size=64)
    convert(read_checkpoint(folder), of_options, name="tiny", head_channels=32)
    (folder / "options.pkl").unlink()
    convert(read_checkpoint(folder), of_preset, name="tiny", preset=I2SB)
    one, other = (json.loads((f / "config.json").read_text()) for f in (of_options, of_preset))
    assert one | {"licence": "CC-BY-NC-SA-4.0"} == other


@pytest.mark.parametrize(
    ("corrupt", "mask", "scale"), [("inpaint-center", {"fill": "noise"}, 1), ("sr4x-pool", None, 4)]
)
def test_options_name_the_task(tmp_path: Path, corrupt: str, mask: dict | None, scale: int):
    folder = tiny_i2sb(tmp_path / "a", corrupt=corrupt, ot_ode=True, beta_max=1.0, clip_denoise=True)
    convert(read_checkpoint(folder / "latest.pt"), tmp_path / "model", name="tiny", head_channels=32)
    teacher = load_model(str(tmp_path / "model"))
    assert (teacher.config["mask"], teacher.config["image"]["source_scale"]) == (mask, scale)
    assert teacher.bridge == I2SBBridge(beta_max=1.0, noise_free=True)
    assert teacher.config["sampling"]["clip"] is True


def test_conditional_i2sb_loads_as_conditional(tmp_path: Path):
    folder = tiny_i2sb(tmp_path / "a", in_channels=6, cond_x1=True)
    convert(read_checkpoint(folder), tmp_path / "model", name="tiny", head_channels=32)
    assert load_model(str(tmp_path / "model")).predictor.conditional
    published.save_options(folder, cond_x1=False)
    assert "cond_x1 False, but it has 6 channels in" in refusal(folder)


@pytest.mark.parametrize("half", [False, True])
def test_safetensors_of_published_names_load(tmp_path: Path, half: bool):
    weights = {published.PREFIX + name: v.half() if half else v for name, v in weights_of().items()}
    save_file(weights, tmp_path / "net.safetensors")
    convert(read_checkpoint(tmp_path / "net.safetensors"), tmp_path / "model", name="tiny", head_channels=32)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert all(v.dtype == torch.float32 for v in tensors.values())
    assert all(torch.equal(tensors[name.replace(published.PREFIX, "backbone.")], v) for name, v in weights.items())


def test_published_tensors_neither_share_nor_require_gradients(tmp_path: Path):
    file = published.save(published.ddbm(weights_of()), tmp_path / "e2h_ema.pt")
    checkpoint = read_checkpoint(file)
    assert checkpoint.family == "ddbm"
    storages = {v.untyped_storage().data_ptr() for v in published.ddbm(weights_of()).values()}
    assert len(storages) == 2
    assert not any(v.requires_grad for v in checkpoint.tensors.values())


def test_preset_of_another_teacher_is_refused(tmp_path: Path):
    folder = tiny_i2sb(tmp_path / "a")
    noisy = {"kind": "i2sb", "beta_max": 1.0, "noise_free": False}
    still = {"kind": "i2sb", "beta_max": 0.3, "noise_free": True}
    assert "'beta_max': 0.3" in refusal(folder, preset=I2SB | {"bridge": noisy})
    assert "'beta_max': 1.0" in refusal(folder, preset=I2SB | {"bridge": noisy})
    assert "'noise_free': False}, the preset" in refusal(folder, preset=I2SB | {"bridge": still})
    assert "says jpeg-10, the preset jpeg-5" in refusal(folder, preset=I2SB | {"degradation": "jpeg-5"})
    assert "family i2sb, but the preset is for ddbm" in refusal(folder, preset=VE)
    (folder / "options.pkl").unlink()
    assert "without its options.pkl" in refusal(folder)


# ------------------------------------------------------------------------------------------------ bad containers


def test_ema_that_does_not_match_its_network_is_refused(tmp_path: Path):
    def message(change) -> str:
        content = published.i2sb(weights_of(replace(TINY, in_channels=3)))
        change(content)
        return refusal(published.save(content, tmp_path / "latest.pt"), preset=I2SB)

    def swap(content):
        shadow = content["ema"]["shadow_params"]
        shadow[0], shadow[1] = shadow[1], shadow[0]

    assert "expected one tensor for each of the" in message(lambda c: c["ema"]["shadow_params"].pop())
    assert "found none" in message(lambda c: c["ema"].pop("shadow_params"))
    assert "time_embed.0.weight ([128], expected [128, 32])" in message(swap)
    assert "found 'diffusion_model.time_embed.0.weight': int" in message(
        lambda c: c["ema"]["shadow_params"].__setitem__(0, 1)
    )
    assert "expected tensors by name" in message(lambda c: c.update(net=[1]))
    # A missing tensor of the network: both lists agree, the network does not.
    assert "(missing)" in message(lambda c: (c["net"].popitem(), c["ema"]["shadow_params"].pop()))


def bad_tensors(name: str) -> dict:
    weights = weights_of()
    key = "time_embed.0.weight"
    rows, columns = weights[key].shape
    bad = {
        "integers": torch.ones(rows, columns, dtype=torch.int64),
        "sparse": weights[key].to_sparse(),
        "transposed": torch.zeros(columns, rows).T,
        "expanded": torch.zeros(1).expand(rows, columns),
        "meta": torch.zeros(rows, columns, device="meta"),
    }
    return OrderedDict(weights | {key: bad[name]})


@pytest.mark.parametrize("name", ["integers", "sparse", "transposed", "expanded", "meta"])
def test_tensors_that_are_no_weights_are_refused(tmp_path: Path, name: str):
    file = tmp_path / "bad.pt"
    torch.save(bad_tensors(name), file)
    assert "'time_embed.0.weight': expected a contiguous tensor" in refusal(file)


def test_tensors_that_share_numbers_are_refused(tmp_path: Path):
    weights = weights_of()
    weights["time_embed.2.bias"] = weights["time_embed.0.bias"]
    assert "tensors overlap" in refusal(published.save(weights, tmp_path / "tied.pt"))


def test_other_contents_are_named(tmp_path: Path):
    wrapped = published.save({"state_dict": weights_of(), "epoch": 3}, tmp_path / "wrapped.pt")
    assert "found 'state_dict': dict, 'epoch': int" in refusal(wrapped)
    assert "found list" in refusal(published.save([1], tmp_path / "list.pt"))
    assert "expected tensors by name" in refusal(published.save({}, tmp_path / "none.pt"))


def test_damaged_files_are_refused(tmp_path: Path):
    good = published.save(published.ddbm(weights_of()), tmp_path / "good.pt")
    content = good.read_bytes()

    def message(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return refusal(tmp_path / name)

    assert "empty" in message("a.pt", b"")
    assert "damaged or incomplete" in message("a.pt", content[: len(content) // 2])
    assert "neither a torch file nor safetensors" in message("a.pt", b"<html>quota exceeded</html>")
    assert "cannot be read as safetensors" in message("a.safetensors", b"\xff" * 100)
    assert "cannot be read as a torch file" in message("a.pt", b"PK\x05\x06" + bytes(18))  # an empty archive
    assert "compressed" in refusal(published.recompressed(good, tmp_path / "small.pt"))


def test_paths_without_a_checkpoint_are_named(tmp_path: Path):
    with pytest.raises(NotAvailable, match="expected a file or folder"):
        read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(NotAvailable, match=r"expected latest\.pt and options\.pkl"):
        read_checkpoint(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_mutated_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int, count: int):
    """Bytes are changed where the structure is: the pickle at the start, the directory at the end."""
    folder = tmp_path_factory.getbasetemp() / "mutated"
    good, bad = folder / "good.pt", folder / "bad.pt"
    if not good.exists():
        published.save(OrderedDict((f"w{i}", torch.ones(3)) for i in range(4)), good)
    content = bytearray(good.read_bytes())
    rng = torch.Generator().manual_seed(seed)
    for where, value in torch.randint(0, 1 << 20, (count, 2), generator=rng).tolist():
        content[where % len(content)] = value % 256
    bad.write_bytes(content)
    try:
        tensors = read_checkpoint(bad).tensors
    except IbmdError:
        return
    assert sum(v.nbytes for v in tensors.values()) <= len(content)


# ------------------------------------------------------------------------------------------------- hostile files


def test_torch_files_run_nothing(tmp_path: Path):
    marker = tmp_path / "marker"
    files = published.evil_torch_files(tmp_path, weights_of(), marker)
    for file in files.values():
        message = refusal(file, preset=I2SB)
        assert "refused; nothing in it was run" in message
        assert not marker.exists()
    for name, file in files.items():  # and they are hostile indeed
        if name != "bare":
            torch.load(file, weights_only=False, map_location="cpu")
        else:
            pickle.loads(file.read_bytes())
        assert marker.exists(), name
        marker.rmdir()


def test_options_run_nothing(tmp_path: Path):
    marker = tmp_path / "marker"
    file = tmp_path / "options.pkl"
    published.save(published.i2sb(weights_of(replace(TINY, in_channels=3))), tmp_path / "latest.pt")
    for name, content in published.evil_options(marker).items():
        file.write_bytes(content)
        message = refusal(tmp_path / "latest.pt")
        assert "refused; nothing in it was run" in message
        assert not marker.exists(), name
        pickle.loads(content)  # and it is hostile indeed
        assert marker.exists(), name
        marker.rmdir()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_options_are_read(tmp_path: Path, protocol: int):
    assert read_options(published.save_options(tmp_path, protocol)) == {
        "beta_max": 0.3,
        "ot_ode": False,
        "cond_x1": False,
        "clip_denoise": False,
        "image_size": 256,
        "corrupt": "jpeg-10",
    }


def test_options_of_python_3_13_are_read(tmp_path: Path):
    (tmp_path / "options.pkl").write_bytes(published.options_of_python_3_13())
    assert read_options(tmp_path / "options.pkl")["beta_max"] == 0.3


@pytest.mark.parametrize(
    "change",
    [
        {"interval": 500},
        {"interval": 10**5000},
        {"t0": 1e-3},
        {"T": 2.0},
        {"add_x1_noise": True},
        {"beta_max": -1.0},
        {"beta_max": float("nan")},
        {"beta_max": "0.3"},
        {"beta_max": None},
        {"ot_ode": 1},
        {"ot_ode": Path("yes")},
        {"image_size": 0},
        {"image_size": True},
        {"corrupt": "a\nb"},
    ],
    ids=lambda change: "-".join(change),
)
def test_options_out_of_range_are_named(tmp_path: Path, change: dict):
    with pytest.raises(IbmdError, match=f"options.pkl: {next(iter(change))}"):
        read_options(published.save_options(tmp_path, **change))


def test_options_of_another_kind_are_refused(tmp_path: Path):
    file = tmp_path / "options.pkl"
    greedy = [b"\x80\x04Nr\xff\xff\xff\x0f.", b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"."]  # by gigabytes
    for content in [pickle.dumps({"beta_max": 0.3}), b"", b"text", pickle.dumps(OrderedDict()), *greedy]:
        file.write_bytes(content)
        with pytest.raises(IbmdError, match=r"not options of I2SB: refused"):
            read_options(file)
    with pytest.raises(IbmdError, match="bytes: expected at most"):
        read_options(published.save_options(tmp_path, note="x" * (1 << 17)))


# -------------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys, torch
from pathlib import Path
from ibmd_cli.models.convert import convert, read_checkpoint
from ibmd_cli.models.folder import load_model
torch.set_num_threads(1)
command, path, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])

def peak(name):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

before = peak("VmRSS")
if command == "convert":
    convert(read_checkpoint(path), path.parent / "model", name="big")
else:
    teacher = load_model(str(path.parent / "model"))
print(peak("VmHWM") - before)
if command == "predict":
    x = torch.zeros(1, 3, size, size)
    label = torch.zeros(1, dtype=torch.long) if teacher.config["classes"] else None
    assert teacher.predict_x0(x, torch.full((1,), teacher.bridge.T), x, label).isfinite().all()
    print(peak("VmHWM"))
"""


def measure(command: str, file: Path, size: int = 0) -> list[int]:
    """Run a command in a process of its own; returns the growth of its peak memory, and the peak, in bytes."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, command, str(file), str(size)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return [int(line) for line in run.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("container", ["ddbm", "i2sb"])
def test_converting_and_loading_copy_nothing(tmp_path: Path, container: str):
    config = UNetConfig(3 if container == "i2sb" else 6, 3, 192, (1, 2, 3), 2, (4,))
    weights = weights_of(config)
    size = sum(v.nbytes for v in weights.values())
    assert size >= 200e6
    file = published.save(getattr(published, container)(weights), tmp_path / "latest.pt")
    if container == "i2sb":
        published.save_options(tmp_path)
    del weights
    assert measure("convert", file)[0] < 1.3 * size
    assert measure("load", file)[0] < 1.3 * size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("manifest", "container", "size"),
    [
        ("ddbm_e2h64_vp_original", "ddbm", 64),
        ("ddbm_diode256_vp_original", "ddbm", 256),
        ("dbim_imagenet256_inpaint_center", "dbim", 256),
        ("i2sb_imagenet256_uncond_net", "i2sb", 256),
    ],
)
def test_full_size_teacher_loads_and_predicts_within_12_gb(tmp_path: Path, manifest: str, container: str, size: int):
    shapes = {name.removeprefix(published.PREFIX): shape for name, shape in manifests()[manifest].items()}
    weights = published.drawn(shapes)
    total = sum(v.nbytes for v in weights.values())
    file = published.save(getattr(published, container)(weights), tmp_path / "latest.pt")
    if container == "i2sb":
        published.save_options(tmp_path)
    del weights
    try:
        (converting,) = measure("convert", file)
        file.unlink()
        loading, peak = measure("predict", file, size)
    finally:
        for weight_file in tmp_path.rglob("*.*t*"):
            weight_file.unlink()
    print(f"{manifest}: {total:.3g} bytes; {converting / total:.2f}, {loading / total:.2f} of it; peak {peak:.3g}")
    assert converting < 1.3 * total
    assert loading < 1.3 * total
    assert peak < 12e9
