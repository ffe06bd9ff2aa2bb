"""Settings: precedence, origins, types, and the messages for values that cannot be meant."""

import json
from pathlib import Path

import pytest

from ibmd_cli.config import DistillConfig, differences, load_presets, resolve, to_json
from ibmd_cli.errors import UsageError


def test_precedence_and_origins(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text("steps = 7\nlr = 3e-4\nseed = 5\n")
    environ = {"IBMD_STEPS": "9", "IBMD_LR": "2e-4", "IBMD_BETAS": "0.1,0.2"}
    config, origins = resolve({"steps": 11, "ema": None}, environ, file)
    assert (config.steps, origins["steps"]) == (11, "flag")
    assert (config.lr, origins["lr"]) == (2e-4, "environment")
    assert (config.seed, origins["seed"]) == (5, f"config {file}")
    assert (config.noise_grid, origins["noise_grid"]) == (1, "preset")
    assert (config.ema, origins["ema"]) == (0.99, "default")
    assert config.betas == (0.1, 0.2)


def test_preset_belongs_to_its_teacher():
    config, origins = resolve({"teacher": "some/folder"}, {}, None)
    assert set(origins.values()) == {"flag", "default"}
    # Table 7 of the paper: batch 256, EMA 0.99, L = 5; uniform t and per-pixel z
    assert (config.batch_size, config.ema, config.bridge_steps) == (256, 0.99, 5)
    assert (config.t_power, config.noise_grid, config.bridge_warmup) == (1.0, 0, 0)


def test_presets_are_valid_settings():
    for teacher, values in load_presets().items():
        assert resolve({"teacher": teacher}, {}, None)[0].data, teacher
        assert set(values) <= set(DistillConfig.__annotations__)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"steps": 0}, "--steps: 0 is too small"),
        ({"lr": -1.0}, "--lr: -1.0 must be greater than 0"),
        ({"precision": "fp8"}, "--precision: 'fp8' is not one of fp32, bf16, fp16"),
        ({"ema": 1.0}, "--ema: 1.0"),
    ],
)
def test_values_out_of_range(flags: dict, message: str):
    with pytest.raises(UsageError, match=message):
        resolve(flags, {}, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 1", "no setting 'stepz'; did you mean 'steps'"),
        ('steps = "many"', "--steps .*'many' is not of type int"),
        ("steps = 1.5", "is not of type int"),
        ("betas = [1]", "--betas"),
        ("steps = [", "cannot be read"),
    ],
)
def test_bad_config_file(tmp_path: Path, text: str, message: str):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        resolve({}, {}, file)


def test_json_round_trip(tmp_path: Path):
    config, _ = resolve({"steps": 3, "data": ("a", "b"), "noise": False}, {}, None)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(to_json(config)))
    assert resolve({}, {}, file)[0] == config


def test_differences_name_what_changed_but_not_what_may():
    config, _ = resolve({"lr": 1e-4, "keep": 3, "recompute": True}, {}, None)
    other, _ = resolve({"lr": 2e-4, "keep": 4, "recompute": False}, {}, None)
    assert differences(config, to_json(other)) == ["lr: 0.0002 there, 0.0001 here"]
