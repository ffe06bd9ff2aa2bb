"""Train an embedded teacher: bridge matching on the emoji of `make_data.py`.

The loss is the one that trains the bridge model during distillation, on the coupling of the data; the step is the
one of every network in this package. Run the same command again to continue.

    python examples/emoji/train_teacher.py outline2emoji --data build/emoji --out build/outline2emoji
    python examples/emoji/train_teacher.py emoji-sr4x --data build/emoji --out build/emoji-sr4x
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from teaching import train

from ibmd_cli.data.degradations import degrade
from ibmd_cli.method.bridges import Bridge, I2SBBridge, VPBridge
from ibmd_cli.method.distillation import Setup, Sources, bridge_loss
from ibmd_cli.method.noise import stream
from ibmd_cli.metrics.scores import energy_score
from ibmd_cli.models.samplers import sample_teacher
from ibmd_cli.networks.predictor import Preconditioning, Predictor
from ibmd_cli.networks.unet import UNetConfig


@dataclass(frozen=True)
class Task:
    """What a teacher is.

    Attributes:
        about: in one line.
        conditional: whether the network sees x_T.
        network: its shape.
        bridge: the process q.
        preconditioning: its kind; the moments of "ddbm" are measured on the data.
        degradation: makes sources of targets; None for sources of their own (outlines).
        source_scale: side of a target in units of its source's.
        t_power: times in training are T − (T − t_min) u^t_power.
        sampling: how the teacher is sampled.
    """

    about: str
    conditional: bool
    network: UNetConfig
    bridge: Bridge
    preconditioning: str
    sampling: dict[str, object]
    degradation: str | None = None
    source_scale: int = 1
    t_power: float = 1.0


OUTLINE = UNetConfig(
    in_channels=6,
    model_channels=48,
    channel_mult=(1, 2, 2.667),
    num_res_blocks=1,
    attention=(2, 4),
    head_channels=32,
    dropout=0.1,
    norm_groups=16,
    patch_size=2,
)
TASKS = {
    # Large flat regions average the noise over hundreds of pixels. By the coefficients, their colour is decided within
    # the last hundredths before T with beta_d = 2 of the published models, and over t of about 0.6 to 0.95 with 8.
    # One seed each, 1,000 steps, validation energy score at 20 NFE: 2.36 with 2, 2.28 with 8.
    "outline2emoji": Task(
        "line drawing → coloured emoji", True, OUTLINE, VPBridge(beta_d=8.0), "ddbm", t_power=1.5,
        sampling={"sampler": "dbim", "eta": 1.0, "nfe": 100},
    ),
    # The published super-resolution bridge, on an emoji of 8×8 pixels.
    "emoji-sr4x": Task(
        "emoji of 8×8 pixels → 32×32", False,
        replace(OUTLINE, in_channels=3, channel_mult=(1, 2, 2), head_channels=16),
        I2SBBridge(beta_max=0.3), "i2sb", degradation="sr4x-pool", source_scale=4,
        sampling={"sampler": "i2sb", "nfe": 100},
    ),
}  # fmt: skip


class Pairs:
    """Pairs in memory as uint8, given out as float batches in [-1, 1] with random mirroring."""

    def __init__(self, file: Path, task: Task) -> None:
        arrays = np.load(file)
        self.degradation = task.degradation
        self.x_T = torch.from_numpy(arrays["x_T"])[:, None].expand(-1, 3, -1, -1)
        self.x_0 = torch.from_numpy(arrays["x_0"]).permute(0, 3, 1, 2)

    def __getitem__(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Targets and sources."""
        x_0 = self.x_0[rows].float() / 127.5 - 1
        return x_0, self.x_T[rows].float() / 127.5 - 1 if self.degradation is None else degrade(x_0, self.degradation)

    def moments(self) -> tuple[float, float, float]:
        """E x_0², E x_T², E x_0 x_T over all pixels."""
        x_0, x_T = self[::8]
        return float(x_0.square().mean()), float(x_T.square().mean()), float((x_0 * x_T).mean())

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.x_0), (size,), generator=rng)
        mirror = torch.rand(size, 1, 1, 1, generator=rng) < 0.5
        x_0, x_T = self[rows]
        return torch.where(mirror, x_0.flip(3), x_0), torch.where(mirror, x_T.flip(3), x_T)


@torch.no_grad()
def validate(predictor: Predictor, task: Task, setup: Setup, pairs: Pairs) -> dict[str, float]:
    """Weighted loss and energy score (2 samples, 20 NFE) on held-out pairs."""
    x_0, x_T = pairs[:]
    losses = [float(bridge_loss(predictor, setup, x_0, Sources(x_T), stream(0, "val", i))) for i in range(4)]
    sampler = str(task.sampling["sampler"])
    draws = [sample_teacher(predictor, x_T, sampler=sampler, nfe=20, noise=stream(0, "es", i)) for i in range(2)]
    mean = predictor(x_T, torch.full((len(x_T),), predictor.bridge.T), x_T)
    return {
        "val_loss": sum(losses) / len(losses),
        "val_mse_T": float((mean - x_0).square().mean()),
        "val_energy_score": float(energy_score(torch.stack(draws), x_0).mean()),
        "val_std": float(torch.stack(draws).std(0).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, default=Path("build/emoji"))
    parser.add_argument("--out", type=Path, help="default: build/TASK")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=500, help="steps between validations and checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task, out = TASKS[args.task], args.out or Path("build") / args.task
    pairs, val = (Pairs(args.data / f"{split}.npz", task) for split in ("train", "val"))
    torch.manual_seed(args.seed)
    moments = pairs.moments() if task.preconditioning == "ddbm" else ()
    preconditioning = Preconditioning(task.preconditioning, *moments)
    teacher = Predictor(task.network, task.bridge, preconditioning, task.conditional)
    teacher.to(memory_format=torch.channels_last)
    setup = Setup(teacher.bridge, teacher.weight, timesteps=(teacher.bridge.T,), t_power=task.t_power)

    def draw(rng: torch.Generator) -> tuple[Tensor, Sources]:
        x_0, x_T = pairs.batch(args.batch_size, rng)
        return x_0, Sources(x_T)

    train(
        teacher,
        setup,
        draw,
        lambda average: validate(average, task, setup, val),
        out,
        steps=args.steps,
        lr=args.lr,
        seed=args.seed,
        every=args.every,
        about={
            "settings": {"lr": args.lr, "batch_size": args.batch_size, "seed": args.seed},
            "task": args.task,
            "preconditioning": vars(teacher.preconditioning),
        },
    )


if __name__ == "__main__":
    main()
