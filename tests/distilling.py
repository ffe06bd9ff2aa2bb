"""What the tests of runs share: `ibmd distill` on a tiny teacher, in this process, and what came of it."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from typer.testing import CliRunner

from ibmd_cli.cli import app
from ibmd_cli.training.optimise import Player

SMALL = ["--steps", "4", "--bridge-steps", "2", "--batch-size", "4", "--checkpoint-every", "2", "--preview-every", "2"]


def distill(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["distill", "--device", "cpu", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def interrupt(
    monkeypatch: Any, arguments: list[object], step: int, number: int = signal.SIGTERM, player: str = "student"
) -> Any:
    """Train, and get a signal in update `step` of a player in this process."""
    left, real = iter([False] * (step - 1) + [True]), Player.update

    def update(self: Player, number_of_step: int, compute: Callable[..., float]) -> float:
        loss = real(self, number_of_step, compute)
        if self.name == player and next(left, False):
            os.kill(os.getpid(), number)
            time.sleep(0.05)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Player, "update", update)
        result = distill(*arguments)
        assert result.exit_code == 130
        return result


def poison(monkeypatch: Any, wanted: Callable[[str, int], bool]) -> None:
    """Make the gradient not finite in the steps of the players that are wanted."""
    real = Player.update

    def update(self: Player, step: int, compute: Callable[..., float]) -> float:
        factor = torch.nan if wanted(self.name, step) else 1.0
        return real(self, step, lambda rng, backward: compute(rng, lambda loss: backward(factor * loss)))

    monkeypatch.setattr(Player, "update", update)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load((run / "student" / "model.safetensors").read_bytes())  # load_file's would change with the file


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def log(run: Path, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: v for key, v in line.items() if key not in without} for line in lines]


FILE_EVENTS = ("open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir")


def train(arguments: list[object], out: Path, operation: int) -> None:
    """Run `ibmd distill` in this process, and be killed as file operation number `operation` in `out` begins."""
    torch.set_num_threads(1)
    left = operation

    def count(event: str, details: tuple[object, ...]) -> None:
        nonlocal left
        # A relative path is one that `shutil.rmtree` removes.
        if event in FILE_EVENTS and (str(details[0]).startswith(str(out)) or not str(details[0]).startswith("/")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    distill(*arguments, "--out", out)
