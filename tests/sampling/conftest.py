"""Fixtures: `ibmd sample` in this process, and a student that is fast."""

import io
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from ibmd_cli.cli import main
from ibmd_cli.method.noise import randn, stream
from ibmd_cli.models.folder import load_student, save_model
from ibmd_cli.models.model import StudentModel
from ibmd_cli.networks.predictor import make_predictor
from ibmd_cli.sampling import engine


class Result(NamedTuple):
    code: int
    stdout: bytes
    err: str

    @property
    def paths(self) -> list[str]:
        return self.stdout.decode().splitlines()

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.stdout.splitlines()]


_cached = cache(load_student)


@pytest.fixture(autouse=True)
def _one_model(monkeypatch):
    """Load the embedded model once: much of the time of these tests would be spent there."""

    def load(reference: str) -> StudentModel:
        return _cached(reference) if reference.startswith("builtin:") else load_student(reference)

    monkeypatch.setattr(engine, "load_student", load)


@pytest.fixture
def embedded() -> StudentModel:
    """The embedded student that `sample` uses."""
    return _cached("builtin:outline2emoji")


@pytest.fixture
def sample(monkeypatch, capfdbinary, tmp_path) -> Callable[..., Result]:
    """Run `ibmd sample` in `tmp_path`, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IBMD_DEBUG", raising=False)

    def run(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["ibmd", "sample", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfdbinary.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfdbinary.readouterr()
        assert b"\x1b" not in err
        assert b"Traceback" not in err
        return Result(end.value.code or 0, out, err.decode())

    return run


@pytest.fixture
def student(tmp_path, tiny_config) -> Path:
    """A student of 16×16 pixels whose random weights make much of z."""
    noise = {"channels": 3, "grid": 4}
    config = tiny_config | {
        "format": "ibmd-student",
        "network": tiny_config["network"] | {"in_channels": 9},
        "noise_channels": 3,
        "image": tiny_config["image"] | {"tiles": True},
        "sampling": {"timesteps": [1.0, 0.5], "noise": noise, "rollout": "chain", "transition": "marginal"},
    }
    predictor = make_predictor(config).eval()
    for name, p in predictor.named_parameters():
        p.data = 0.2 * randn(p.shape, stream(0, name))
    save_model(StudentModel(predictor, config), tmp_path / "student")
    return tmp_path / "student"
