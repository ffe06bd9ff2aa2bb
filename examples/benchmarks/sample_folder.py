"""A folder of drawings through `ibmd sample`, against the network alone on the same drawings in memory.

    python examples/benchmarks/sample_folder.py --count 500 --threads 1

The command runs as users run it. A run with one batch of drawings tells what it takes to start, and is taken off: what
remains is decoding, fitting, the network, encoding and writing. These go on beside the network, so `ibmd sample` comes
near to it only where a core is idle beside the network's (--threads: fewer than there are cores), and the disk is (each
picture waits until it is there). The three alternate, so that a busy machine is unfair to none. The CPU time tells what
an image costs in all, on a busy machine, too. Peak memory shows whether it grows with the count.
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

import torch
from PIL import Image

from ibmd_cli.decoding import read_picture
from ibmd_cli.engines import load_engine
from ibmd_cli.heap import share_freed_memory
from ibmd_cli.mosaics import embedded_sources
from ibmd_cli.runners import is_exported, load_exported
from ibmd_cli.translating import Translator

FEW = 8
"""Drawings of the run that tells what it takes to start."""


def command(folder: Path, output: Path, student: str) -> tuple[float, float]:
    """Run `ibmd sample` and return its time and its CPU time in seconds."""
    words = ["sample", "--input", folder, "--output", f"{output}/", "--student", student, "--quiet"]
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "ibmd_cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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
    share_freed_memory()  # as `ibmd sample` does: the network alone is to have it, too
    runs: dict[str, list[tuple[float, float]]] = {"start": [], "network": [], "folder": []}
    engine = load_exported(args.student) if is_exported(args.student) else load_engine(args.student, None, device="cpu")
    with tempfile.TemporaryDirectory() as place:
        few, folder = Path(place, "few"), Path(place, "drawings")
        sources = embedded_sources()
        for where, count in ((few, FEW), (folder, args.count)):
            where.mkdir()
            for i in range(count):
                pixels = sources[i % len(sources)].permute(1, 2, 0).contiguous().numpy()
                Image.fromarray(pixels).resize((args.pixels, args.pixels)).save(where / f"{i:05d}.png")
        for number in range(args.rounds):
            runs["start"].append(command(few, Path(place, f"few{number}"), args.student))
            translator = Translator(engine)
            pieces = [translator.prepare(read_picture(file), file.name) for file in sorted(folder.iterdir())]
            wall, cpu = time.perf_counter(), time.process_time()
            with translator.spread(args.count):
                for _ in translator.run(pieces):
                    pass
            runs["network"].append((time.perf_counter() - wall, time.process_time() - cpu))
            runs["folder"].append(command(folder, Path(place, f"out{number}"), args.student))
    medians = [[statistics.median(column) for column in zip(*rows, strict=True)] for rows in runs.values()]
    (start, start_cpu), (network, network_cpu), (whole, whole_cpu) = medians
    alone, alone_cpu = network / args.count, network_cpu / args.count
    here, here_cpu = ((a - b) / (args.count - FEW) for a, b in ((whole, start), (whole_cpu, start_cpu)))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(
        f"{args.count} drawings, {args.pixels} pixels a side, {args.threads} thread(s), median of {args.rounds} rounds"
    )
    print(f"network alone  {1 / alone:7.1f} images/s  {1000 * alone_cpu:6.2f} ms of CPU an image")
    print(f"ibmd sample    {1 / here:7.1f} images/s  {1000 * here_cpu:6.2f} ms of CPU an image")
    print(f"share          {alone / here:7.2f}")
    print(f"start          {start:7.2f} s, taken off")
    print(f"load average   {os.getloadavg()[0]:7.2f} on {os.cpu_count()} cores")
    print(f"peak memory    {peak:7.0f} MiB")


if __name__ == "__main__":
    main()
