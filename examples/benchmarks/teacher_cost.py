"""Time of a teacher's training: updates of `ibmd distill --teacher new` against what its network alone needs.

    python examples/benchmarks/teacher_cost.py                            # small, 64×64 pixels, batch 32
    python examples/benchmarks/teacher_cost.py --network tiny --rounds 20

"network" is one forward and one backward pass of a batch, without data, noise, loss, optimiser and averages. The two
take turns, round by round, so that a busy machine is unfair to neither; each line is the median of the rounds. "scores"
is the share of the time that held-out scores take where they are as close as the default lets them be.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ibmd_cli.data.sources import SourceImages
from ibmd_cli.method.noise import stream
from ibmd_cli.reporting import Reporter
from ibmd_cli.training.config import DistillConfig
from ibmd_cli.training.heldout import MOST, choose_held_out
from ibmd_cli.training.teacher import Teaching, describe_teacher, new_teacher


def write_pairs(folder: Path, count: int, side: int) -> None:
    """Write pairs of noise: what is in them costs no time."""
    for seed, name in enumerate(("source", "target")):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng([seed, i]).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="small")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder) / "pairs", 3 * MOST, args.size)
        config = DistillConfig(
            teacher="new", data=(str(Path(folder) / "pairs"),), network=args.network, size=args.size,
            batch_size=args.batch_size, ema=(0.99, 0.999), validation="34%",
        )  # fmt: skip
        quiet, device = Reporter(quiet=True), torch.device("cpu")
        draft = describe_teacher(config, "benchmark")
        data = SourceImages(config.data, draft, quiet, targets=True)
        held_out = choose_held_out(config, draft, data, quiet, device)
        teacher = new_teacher(config, draft, data, quiet)
        teaching = Teaching(config, Path(folder) / "run", teacher, data, held_out, Accelerator(cpu=True), quiet)
        player = teaching.player
        batch, x_0 = data.pairs(args.batch_size, stream(0), False)
        t = teacher.bridge.time(torch.rand(args.batch_size))

        def network() -> None:
            player.model(x_0, t, batch.x_T).mean().backward()
            player.optimizer.zero_grad(set_to_none=True)

        spent: dict[str, list[float]] = {"network": [], "update": []}
        for round_ in range(args.rounds + 1):
            for name, work in (("network", network), ("update", lambda k=round_: player.update(k, teaching.compute))):
                began = time.perf_counter()
                work()
                spent[name].append(time.perf_counter() - began)
        alone, update = (statistics.median(spent[name][1:]) for name in spent)  # the first of each takes longer
        (Path(folder) / "run").mkdir()
        began = time.perf_counter()
        teaching.score(1)
        score = time.perf_counter() - began
        parameters = sum(p.numel() for p in teacher.predictor.parameters())
        print(f"{args.network}, {parameters:,} parameters, {args.size}×{args.size}, batch {args.batch_size}")
        print(f"network  {alone:8.3f} s")
        print(f"update   {update:8.3f} s   {alone / update:.1%} of it is the network's")
        print(f"scores   {score / (score + teaching.spacing(1) * update):8.1%} of the time")
        print(f"1,000 images in {1000 * update / args.batch_size:.0f} s")


if __name__ == "__main__":
    main()
