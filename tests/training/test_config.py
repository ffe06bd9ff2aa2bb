"""Settings: precedence, origins, types, and the messages for values that cannot be meant."""

import json
from pathlib import Path

import pytest

from ibmd_cli.errors import UsageError
from ibmd_cli.models.published_teachers import published
from ibmd_cli.settings import resolve, to_json
from ibmd_cli.training.config import DistillConfig, changed_settings, load_presets


def test_precedence_and_origins(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text("steps = 7\nlr = 3e-4\nseed = 5\n")
    environ = {"IBMD_STEPS": "9", "IBMD_LR": "2e-4", "IBMD_BETAS": "0.1,0.2"}
    config, origins = resolve(DistillConfig, {"steps": 11, "ema": None}, environ, file)
    assert (config.steps, origins["steps"]) == (11, "flag")
    assert (config.lr, origins["lr"]) == (2e-4, "environment")
    assert (config.seed, origins["seed"]) == (5, f"config {file}")
    assert (config.noise_grid, origins["noise_grid"]) == (1, "preset")
    assert (config.ema, origins["ema"]) == ((0.99,), "default")
    assert config.betas == (0.1, 0.2)


def test_preset_belongs_to_its_teacher():
    config, origins = resolve(DistillConfig, {"teacher": "some/folder"}, {}, None)
    assert set(origins.values()) == {"flag", "default"}
    # Table 7 of the paper: batch 256, EMA 0.99, L = 5; uniform t and per-pixel z
    assert (config.batch_size, config.ema, config.bridge_steps) == (256, (0.99,), 5)
    assert (config.t_power, config.noise_grid, config.bridge_warmup) == (1.0, 0, 0)


DATA_SETS = {
    **{alias: "imagenet" for alias, row in published().items() if row["family"] != "ddbm"},
    **{"ddbm-edges2handbags": "edges2handbags", "ddbm-diode": "diode"},
}


def test_presets_are_valid_settings():
    for teacher, values in load_presets().items():
        kind, _, name = teacher.partition(":")
        given = {"teacher": teacher} | ({"data": ("new",)} if teacher == "new" else {})
        config, _ = resolve(DistillConfig, given, {}, None)
        assert set(values) - {"by_nfe"} <= set(DistillConfig.__annotations__)
        assert config.data == ((teacher,) if kind in ("builtin", "new") else (f"dataset:{DATA_SETS[name]}",)), teacher
        if kind == "hub":
            assert config.degrade in ("", published()[name]["degradation"])


def test_data_of_the_preset_by_name():
    config, origins = resolve(
        DistillConfig, {"teacher": "hub:ddbm-diode", "data": ("preset",)}, {"IBMD_DATA": "mine"}, None
    )
    assert (config.data, origins["data"]) == (("dataset:diode",), "preset")
    with pytest.raises(UsageError, match="--data preset: somewhere/mine has no data of its own"):
        resolve(DistillConfig, {"teacher": "somewhere/mine", "data": ("preset",)}, {}, None)


TABLE_7 = [  # teacher, N, L, learning rate, student updates, z
    ("i2sb-sr4x-bicubic", 1, 5, 5e-5, 3000, True),
    ("i2sb-sr4x-pool", 1, 5, 5e-5, 3000, True),
    ("i2sb-jpeg-5", 1, 5, 5e-5, 2000, True),
    ("i2sb-jpeg-10", 1, 5, 5e-5, 3000, True),
    ("i2sb-inpaint-center", 4, 5, 5e-5, 2000, False),
    ("ddbm-edges2handbags", 2, 5, 1e-5, 300, True),
    ("ddbm-edges2handbags", 1, 5, 1e-5, 14000, True),
    ("ddbm-diode", 2, 5, 1e-5, 500, True),
    ("ddbm-diode", 1, 5, 1e-5, 3700, True),
    ("dbim-imagenet-inpaint-center", 4, 1, 3e-6, 3000, True),
]


@pytest.mark.parametrize("row", TABLE_7)
def test_presets_are_the_rows_of_the_paper(row: tuple):
    """Table 7 of arXiv:2502.01362v2; the same for the teacher's own file with its alias as the preset."""
    alias, nfe, bridge_steps, lr, steps, noise = row
    flags = {} if nfe == resolve(DistillConfig, {"teacher": f"hub:{alias}"}, {}, None)[0].nfe else {"nfe": nfe}
    for teacher in ({"teacher": f"hub:{alias}"}, {"teacher": "files/x.pt", "preset": alias}):
        config, _ = resolve(DistillConfig, {**teacher, **flags}, {}, None)
        assert (config.nfe, config.bridge_steps, config.steps, config.noise) == (nfe, bridge_steps, steps, noise)
        assert (config.lr, config.bridge_lr, config.batch_size, config.ema) == (lr, lr, 256, (0.99,))
        assert (config.noise_channels, config.noise_grid, config.t_power, config.weight_power) == (3, 0, 1.0, 2.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"steps": 0}, "--steps 0: expected a whole number of at least 1 and at most 1e\\+09"),
        ({"lr": -1.0}, "--lr -1.0: expected a number above 0"),
        ({"lr": float("inf")}, "--lr inf: expected a number above 0"),
        ({"bridge_lr": "nan"}, "--bridge-lr nan: expected a number above 0"),
        ({"precision": "fp8"}, "--precision fp8: expected fp32, bf16 or fp16"),
        ({"ema": 1.0}, "--ema 1.0: expected numbers of at least 0 and below 1"),
        ({"micro_batch": "most"}, "--micro-batch most: expected a whole number of at least 0 or auto"),
    ],
)
def test_values_out_of_range(flags: dict, message: str):
    with pytest.raises(UsageError, match=message):
        resolve(DistillConfig, flags, {}, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 1", "no setting 'stepz'; did you mean 'steps'"),
        ("learning_rate = 1", "no setting 'learning_rate'; did you mean 'lr'"),
        ('steps = "many"', "steps = 'many': expected a whole number"),
        ("steps = 1.5", "steps = 1.5: expected a whole number"),
        ("steps = true", "steps = True: expected a whole number"),
        ("lr = inf", "lr = inf: expected a number above 0"),
        ("betas = [1]", "betas = .*: expected numbers"),
        ("steps = [", "cannot be read"),
    ],
)
def test_bad_config_file(tmp_path: Path, text: str, message: str):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        resolve(DistillConfig, {}, {}, file)


def test_json_round_trip(tmp_path: Path):
    config, _ = resolve(DistillConfig, {"steps": 3, "data": ("a", "b"), "noise": False}, {}, None)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(to_json(config)))
    assert resolve(DistillConfig, {}, {}, file)[0] == config


def test_differences_name_what_changed_but_not_what_may():
    config, _ = resolve(DistillConfig, {"lr": 1e-4, "keep": 3, "recompute": True}, {}, None)
    other, _ = resolve(DistillConfig, {"lr": 2e-4, "keep": 4, "recompute": False}, {}, None)
    assert changed_settings(config, to_json(other)) == ["lr: 0.0002 there, 0.0001 here"]
