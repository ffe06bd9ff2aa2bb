"""The training of a teacher from pairs, shared by the examples: bridge matching, that can be interrupted."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ibmd_cli.method.distillation import Setup, Sources, bridge_loss
from ibmd_cli.networks.predictor import Predictor
from ibmd_cli.training.optimise import Player, Schedule


def train(
    teacher: Predictor,
    setup: Setup,
    draw: Callable[[torch.Generator], tuple[Tensor, Sources]],
    validate: Callable[[Predictor], dict[str, float]],
    out: Path,
    *,
    steps: int,
    lr: float,
    seed: int,
    every: int,
    about: dict[str, Any],
) -> Predictor:
    """Train a teacher with the loss that trains the bridge model during distillation, on the coupling of the data.

    Args:
        teacher: trained in place.
        setup: bridge, weighting, times.
        draw: returns targets and sources, given a random stream.
        validate: scores of the averaged teacher, for the log.
        out: folder for `state.pt`, from which training continues if it is there, and `metrics.jsonl`.
        steps: updates in all.
        lr: peak of the learning rate.
        seed: of the run.
        every: updates between validations; at each the state is saved.
        about: saved with the state.

    Returns:
        The averaged teacher, in eval mode.
    """
    out.mkdir(parents=True, exist_ok=True)
    player = Player(
        "teacher",
        teacher,
        Accelerator(cpu=True),
        Schedule(lr, warmup=100, decay="cosine", floor=0.01),
        steps=steps,
        seed=seed,
        clip=1.0,
        ema=0.999,
        weight_decay=0.01,
    )
    start, file = 0, out / "state.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        player.load_state_dict(state["player"])
        start = state["step"]

    def compute(rng: torch.Generator, backward: Callable[[Tensor], None]) -> float:
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))  # dropout
        x_0, batch = draw(rng)
        loss = bridge_loss(teacher, setup, x_0, batch, rng)
        backward(loss)
        return loss.item()

    average: Any = player.averaged()
    began, smooth = time.monotonic(), 1.0
    for step in range(start, steps):
        smooth += 0.01 * (player.update(step, compute) - smooth)
        if (step + 1) % every == 0 or step + 1 == steps:
            average.eval()
            line = {"step": step + 1, "loss": smooth, **validate(average), "seconds": time.monotonic() - began}
            with (out / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            state = {"player": player.state_dict(), "step": step + 1, **about}
            torch.save(state, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)
    return average.eval()
