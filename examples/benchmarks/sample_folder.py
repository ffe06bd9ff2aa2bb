"""A folder of drawings through `ibmd sample`, against the network alone on the same drawings in memory.

    python examples/benchmarks/sample_folder.py --count 500 --threads 2

The two alternate, so that a busy machine is unfair to neither. Loading the model is measured by itself and taken off:
what remains is decoding, fitting, the network, encoding and writing. Peak memory shows whether it grows with the count.
"""

import argparse
import contextlib
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from ibmd_cli.decoding import read_picture
from ibmd_cli.jobs import SampleConfig
from ibmd_cli.models import load_model
from ibmd_cli.mosaics import embedded_sources
from ibmd_cli.reporting import Reporter
from ibmd_cli.sampling import sample
from ibmd_cli.translating import Translator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="drawings")
    parser.add_argument("--pixels", type=int, default=256, help="height and width of a drawing")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seconds: dict[str, list[float]] = {"loading": [], "network": [], "folder": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "drawings")
        folder.mkdir()
        sources = embedded_sources()
        for i in range(args.count):
            pixels = sources[i % len(sources)].permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(pixels).resize((args.pixels, args.pixels)).save(folder / f"{i:05d}.png")
        for number in range(args.rounds):
            began = time.perf_counter()
            model = load_model("builtin:outline2emoji", "student")
            seconds["loading"].append(time.perf_counter() - began)
            translator = Translator(model)
            pieces = [translator.prepare(read_picture(file), file.name) for file in sorted(folder.iterdir())]
            began = time.perf_counter()
            for _ in translator.run(pieces):
                pass
            seconds["network"].append(time.perf_counter() - began)
            config = SampleConfig(inputs=(str(folder),), output=str(Path(place, f"out{number}")))
            began = time.perf_counter()
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                assert sample(config, Reporter(quiet=True)) == 0
            seconds["folder"].append(time.perf_counter() - began)
    loading, network, whole = (statistics.median(times) for times in seconds.values())
    alone, here = args.count / network, args.count / (whole - loading)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{args.count} drawings, {args.pixels} pixels a side, {args.threads} thread(s), median of {args.rounds} rounds"
    )
    print(f"network alone  {alone:7.1f} images/s")
    print(f"ibmd sample    {here:7.1f} images/s  {here / alone:.2f} of it (after {loading:.2f} s of loading)")
    print(f"peak memory    {peak:7.0f} MiB")


if __name__ == "__main__":
    main()
