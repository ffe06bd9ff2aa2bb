"""Train the embedded teacher: bridge matching on the outline → colour pairs of `make_data.py`.

The loss is the one that trains the bridge model during distillation, on the coupling of the data; the step is the
one of every network in this package. Run the same command again to continue.

    python examples/outline2emoji/train_teacher.py --data build/outline2emoji --out build/teacher
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ibmd_cli.bridges import VPBridge
from ibmd_cli.distillation import Setup, Sources, bridge_loss
from ibmd_cli.metrics import energy_score
from ibmd_cli.networks import Preconditioning, Predictor, UNetConfig
from ibmd_cli.noise import stream
from ibmd_cli.optimisation import Player, Schedule
from ibmd_cli.samplers import sample_dbim

NETWORK = UNetConfig(
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


class Pairs:
    """Pairs in memory as uint8, given out as float batches in [-1, 1] with random mirroring."""

    def __init__(self, file: Path) -> None:
        arrays = np.load(file)
        self.x_T = torch.from_numpy(arrays["x_T"])[:, None].expand(-1, 3, -1, -1)
        self.x_0 = torch.from_numpy(arrays["x_0"]).permute(0, 3, 1, 2)

    def moments(self) -> tuple[float, float, float]:
        """E x_0², E x_T², E x_0 x_T over all pixels."""
        x_0, x_T = (v.float() / 127.5 - 1 for v in (self.x_0[::8], self.x_T[::8]))
        return float(x_0.square().mean()), float(x_T.square().mean()), float((x_0 * x_T).mean())

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.x_0), (size,), generator=rng)
        mirror = torch.rand(size, 1, 1, 1, generator=rng) < 0.5
        x_0, x_T = (v[rows].float() / 127.5 - 1 for v in (self.x_0, self.x_T))
        return torch.where(mirror, x_0.flip(3), x_0), torch.where(mirror, x_T.flip(3), x_T)


@torch.no_grad()
def validate(predictor: Predictor, setup: Setup, pairs: Pairs) -> dict[str, float]:
    """Weighted loss and energy score (2 samples, 20 NFE) on held-out pairs."""
    x_0, x_T = (v.float() / 127.5 - 1 for v in (pairs.x_0, pairs.x_T))
    losses = [float(bridge_loss(predictor, setup, x_0, Sources(x_T), stream(0, "val", i))) for i in range(4)]
    draws = [sample_dbim(predictor, predictor.bridge, Sources(x_T), 20, stream(0, "es", i)) for i in range(2)]
    mean = predictor(x_T, torch.ones(len(x_T)), x_T)
    return {
        "val_loss": sum(losses) / len(losses),
        "val_mse_T": float((mean - x_0).square().mean()),
        "val_energy_score": float(energy_score(torch.stack(draws), x_0).mean()),
        "val_std": float(torch.stack(draws).std(0).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/outline2emoji"))
    parser.add_argument("--out", type=Path, default=Path("build/teacher"))
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=7e-4)
    # Large flat regions average the noise over hundreds of pixels. By the coefficients, their colour is decided within
    # the last hundredths before T with beta_d = 2 of the published models, and over t of about 0.6 to 0.95 with 8.
    # One seed each, 1,000 steps, validation energy score at 20 NFE: 2.36 with 2, 2.28 with 8.
    parser.add_argument("--beta-d", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=500, help="steps between validations and checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    train, val = Pairs(args.data / "train.npz"), Pairs(args.data / "val.npz")
    torch.manual_seed(args.seed)
    teacher = Predictor(NETWORK, VPBridge(beta_d=args.beta_d), Preconditioning("ddbm", *train.moments()), True)
    teacher.to(memory_format=torch.channels_last)
    setup = Setup(teacher.bridge, teacher.weight, timesteps=(teacher.bridge.T,), t_power=1.5)
    accelerator = Accelerator(cpu=True)
    player = Player(
        "teacher",
        teacher,
        accelerator,
        Schedule(args.lr, warmup=100, decay="cosine", floor=0.01),
        steps=args.steps,
        seed=args.seed,
        clip=1.0,
        ema=0.999,
        weight_decay=0.01,
    )
    start, file = 0, args.out / "state.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        player.load_state_dict(state["player"])
        start = state["step"]

    def compute(rng: torch.Generator, backward: Callable[[Tensor], None]) -> float:
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))  # dropout
        x_0, x_T = train.batch(args.batch_size, rng)
        loss = bridge_loss(teacher, setup, x_0, Sources(x_T), rng)
        backward(loss)
        return loss.item()

    began, smooth = time.monotonic(), 1.0
    for step in range(start, args.steps):
        smooth += 0.01 * (player.update(step, compute) - smooth)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            average = player.averaged()
            average.eval()
            scores = validate(average, setup, val)
            line = {"step": step + 1, "loss": smooth, **scores, "seconds": time.monotonic() - began}
            with (args.out / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            settings = {"beta_d": args.beta_d, "lr": args.lr, "batch_size": args.batch_size, "seed": args.seed}
            settings["preconditioning"] = vars(teacher.preconditioning)
            state = {"player": player.state_dict(), "step": step + 1, "settings": settings}
            torch.save(state, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)


if __name__ == "__main__":
    main()
