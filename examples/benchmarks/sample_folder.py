"""A folder of drawings through `ibmd sample`, against the network alone on the same drawings in memory.

    python examples/benchmarks/sample_folder.py --count 500 --threads 1

The command runs as users run it. Its clock starts when it says that the model is loaded, and stops when it says that
all is done: in between lie reading, fitting, the network, encoding and writing. These go on beside the network, so
`ibmd sample` comes near to it only where a core is idle beside the network's (--threads: fewer than there are cores),
and the disk is (each picture waits until it is there). The two alternate, so that a busy machine is unfair to neither.
The CPU time tells what an image costs in all, on a busy machine, too. Peak memory shows whether it grows with the
count.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from PIL import Image

from ibmd_cli.data.embedded import embedded_sources
from ibmd_cli.export.runner import is_exported, load_exported
from ibmd_cli.images.decode import read_picture
from ibmd_cli.sampling.engine import load_engine
from ibmd_cli.sampling.plan import Job
from ibmd_cli.sampling.translator import Translator


def command(folder: Path, output: Path, student: str) -> tuple[float, float, float]:
    """Run `ibmd sample`; returns its time and CPU time with the model loaded, and the time before, in seconds."""
    words = [sys.executable, "-m", "ibmd_cli", "sample", "--input", folder, "--output", f"{output}/"]
    words += ["--student", student]
    began = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        process = psutil.Process(run.pid)
        said = (line for line in run.stderr if " network call" in line or " done, " in line)
        moments = [(time.perf_counter(), sum(process.cpu_times()[:2])) for _ in said]
    if run.returncode:
        raise SystemExit(f"ibmd sample ended with exit code {run.returncode}")
    (loaded, loaded_cpu), (done, done_cpu) = moments
    return done - loaded, done_cpu - loaded_cpu, loaded - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="builtin:outline2emoji", help="or a file that ibmd export wrote")
    parser.add_argument("--count", type=int, default=500, help="drawings")
    parser.add_argument("--pixels", type=int, default=256, help="height and width of a drawing")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for ONNX Runtime, and the command
    alone, folder = [], []
    engine = load_exported(args.student) if is_exported(args.student) else load_engine(args.student, device="cpu")
    with tempfile.TemporaryDirectory() as place:
        drawings = Path(place, "drawings")
        drawings.mkdir()
        sources = embedded_sources()
        for i in range(args.count):
            pixels = sources[i % len(sources)].permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).resize((args.pixels, args.pixels)).save(drawings / f"{i:05d}.png")
        for number in range(args.rounds):
            translator = Translator(engine)
            pieces = [translator.prepare(read_picture(file), Job(file.name)) for file in sorted(drawings.iterdir())]
            wall, cpu = time.perf_counter(), time.process_time()
            with translator.spread(args.count):
                for _ in translator.run(pieces):
                    pass
            alone.append((time.perf_counter() - wall, time.process_time() - cpu))
            folder.append(command(drawings, Path(place, f"out{number}"), args.student))
    network, network_cpu = (statistics.median(column) for column in zip(*alone, strict=True))
    whole, whole_cpu, start = (statistics.median(column) for column in zip(*folder, strict=True))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    shares = sorted(a[0] / b[0] for a, b in zip(alone, folder, strict=True))
    print(
        f"{args.count} drawings, {args.pixels} pixels a side, {args.threads} thread(s), median of {args.rounds} rounds"
    )
    for name, wall, cpu in (("network alone", network, network_cpu), ("ibmd sample  ", whole, whole_cpu)):
        print(f"{name}  {args.count / wall:7.1f} images/s  {1000 * cpu / args.count:6.2f} ms of CPU an image")
    print(f"share          {statistics.median(shares):7.2f}  ({shares[0]:.2f} to {shares[-1]:.2f})")
    print(f"start          {start:7.2f} s, not counted")
    print(f"load average   {os.getloadavg()[0]:7.2f} on {os.cpu_count()} cores")
    print(f"peak memory    {peak:7.0f} MiB")


if __name__ == "__main__":
    main()
