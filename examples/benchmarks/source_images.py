"""Does reading images keep up with the training? Photos of ImageNet's size, from memory, read when drawn, read ahead.

    python examples/benchmarks/source_images.py --count 400 --workers 1

First the reading alone, then beside a network that trains on each batch (forward and backward of the embedded
teacher's, on one thread), in turns, so that a busy machine is unfair to none. "waited" is the share of the time in
which the network waited for a batch; sets that are read ahead need a core beside the network's. The CPU time of an
image, in this process, tells more on a busy machine.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

import ibmd_cli.data.sources
from ibmd_cli.data.embedded import embedded_pairs
from ibmd_cli.data.sources import SourceImages
from ibmd_cli.method.noise import stream
from ibmd_cli.models.references import load_teacher
from ibmd_cli.reporting import Reporter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="photos of 500×375 pixels")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load_teacher("builtin:emoji-sr4x")
    network = teacher.predictor
    images = args.batches * args.batch_size

    def train(x_T: torch.Tensor) -> None:
        t = torch.full((len(x_T),), 0.5)
        network(x_T, t, x_T).square().mean().backward()

    with tempfile.TemporaryDirectory() as place:
        targets = embedded_pairs("emoji-sr4x").x_0
        for i in range(args.count):
            photo = Image.fromarray(targets[i % len(targets)].permute(1, 2, 0).numpy())
            photo.resize((500, 375), Image.Resampling.BICUBIC).save(Path(place, f"{i:05d}.jpg"), quality=95)
        ways = {"memory": 0, "read when drawn": 0, f"{args.workers} worker(s) ahead": args.workers}
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        for number in range(args.rounds):
            for way, workers in ways.items():
                ibmd_cli.data.sources.IN_MEMORY = 1 << 30 if way == "memory" else 0
                for what, step in (("alone", None), ("beside", train)):
                    sources = SourceImages([place], teacher.config, Reporter(quiet=True), "sr4x-pool", workers=workers)
                    sources.expect(args.batch_size, (stream(i) for i in range(args.batches + 1)))
                    sources.batch(args.batch_size, stream(0), flip=True)  # the workers have started
                    seconds, waits, cpu = measure(sources, args.batches, args.batch_size, step)
                    found[way, what].append(images / seconds)
                    found[way, f"{what} CPU"].append(1000 * cpu / images)
                    found[way, f"{what} waited"].append(waits)
                    sources.close()
            print(f"round {number + 1} of {args.rounds}")
    print(f"\n{'':20} {'reading alone':>26} {'with training':>26} {'waited':>8}")
    for way in ways:
        median = {key: statistics.median(values) for (of, key), values in found.items() if of == way}
        columns = [f"{median[what]:.0f} /s, CPU {median[f'{what} CPU']:.1f} ms" for what in ("alone", "beside")]
        print(f"{way:20} {columns[0]:>26} {columns[1]:>26} {median['beside waited']:>8.1%}")


def measure(
    sources: SourceImages, batches: int, size: int, step: Callable[[torch.Tensor], None] | None
) -> tuple[float, float, float]:
    """Return the seconds for some batches, the share of them that was waited, and the CPU seconds of this process."""
    began, cpu, waits = time.perf_counter(), time.process_time(), 0.0
    for i in range(1, batches + 1):
        asked = time.perf_counter()
        batch = sources.batch(size, stream(i), flip=True)
        waits += time.perf_counter() - asked
        if step:
            step(batch.x_T)
    seconds = time.perf_counter() - began
    return seconds, waits / seconds, time.process_time() - cpu


if __name__ == "__main__":
    main()
