"""A folder of drawings through `ibmd sample`, against the network alone on the same drawings in memory.

    python examples/benchmarks/sample_folder.py --count 500 --threads 2

The two alternate, so that a busy machine is unfair to neither. Loading the model is measured by itself and taken off:
what remains is decoding, fitting, the network, encoding and writing. These go on beside the network, so `ibmd sample`
comes near to it only where a core is idle beside the network's (--threads: fewer than there are cores), and the disk
is (each picture waits until it is there). The CPU time tells what an image costs in all, on a busy machine, too. Peak
memory shows whether it grows with the count.
"""

import argparse
import contextlib
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from ibmd_cli.decoding import read_picture
from ibmd_cli.engines import load_engine
from ibmd_cli.heap import share_freed_memory
from ibmd_cli.jobs import SampleConfig
from ibmd_cli.mosaics import embedded_sources
from ibmd_cli.reporting import Reporter
from ibmd_cli.runners import is_exported, load_exported
from ibmd_cli.sampling import sample
from ibmd_cli.translating import Engine, Translator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="builtin:outline2emoji", help="or a file that ibmd export wrote")
    parser.add_argument("--count", type=int, default=500, help="drawings")
    parser.add_argument("--pixels", type=int, default=256, help="height and width of a drawing")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for ONNX Runtime
    share_freed_memory()  # as `ibmd sample` does: the network alone is to have it, too
    runs: dict[str, list[tuple[float, float]]] = {"loading": [], "network": [], "folder": []}

    @contextlib.contextmanager
    def measured(what: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        runs[what].append((time.perf_counter() - wall, time.process_time() - cpu))

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "drawings")
        folder.mkdir()
        sources = embedded_sources()
        for i in range(args.count):
            pixels = sources[i % len(sources)].permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).resize((args.pixels, args.pixels)).save(folder / f"{i:05d}.png")
        for number in range(args.rounds):
            with measured("loading"):
                engine: Engine
                if is_exported(args.student):
                    engine = load_exported(args.student)
                else:
                    engine = load_engine(args.student, None, device="cpu")
            translator = Translator(engine)
            pieces = [translator.prepare(read_picture(file), file.name) for file in sorted(folder.iterdir())]
            with measured("network"), translator.spread(args.count):
                for _ in translator.run(pieces):
                    pass
            output = str(Path(place, f"out{number}"))
            config = SampleConfig(inputs=(str(folder),), output=output, student=args.student)
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), measured("folder"):
                assert sample(config, Reporter(quiet=True)) == 0
    medians = [[statistics.median(column) for column in zip(*rows, strict=True)] for rows in runs.values()]
    (loading, loading_cpu), (network, network_cpu), (whole, whole_cpu) = medians
    alone, alone_cpu = network / args.count, network_cpu / args.count
    here, here_cpu = (whole - loading) / args.count, (whole_cpu - loading_cpu) / args.count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{args.count} drawings, {args.pixels} pixels a side, {args.threads} thread(s), median of {args.rounds} rounds"
    )
    print(f"network alone  {1 / alone:7.1f} images/s  {1000 * alone_cpu:6.2f} ms of CPU an image")
    print(f"ibmd sample    {1 / here:7.1f} images/s  {1000 * here_cpu:6.2f} ms of CPU an image  (loading taken off)")
    print(f"share          {alone / here:7.2f}")
    print(f"load average   {os.getloadavg()[0]:7.2f} on {os.cpu_count()} cores")
    print(f"peak memory    {peak:7.0f} MiB")


if __name__ == "__main__":
    main()
