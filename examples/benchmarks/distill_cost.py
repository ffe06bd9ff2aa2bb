"""Memory and time of a distillation: Algorithm 1 written down plainly against ours, one way of saving at a time.

    python examples/benchmarks/distill_cost.py                      # the embedded teacher's network, 32×32 pixels
    python examples/benchmarks/distill_cost.py --case adm           # the published shape, 64 base channels, 64×64
    python examples/benchmarks/distill_cost.py --case adm --device cuda

Each row is a process of its own, which makes whole iterations: L updates of the bridge model and one of the student,
with optimiser and average. Rows take turns, so that a busy machine is unfair to none of them. "all" is what
`ibmd distill` does; "all but" leaves one way out.

memory      the system's peak (VmHWM; on a GPU that of PyTorch's allocator) above what the process held when the
            weights and the average were there: graphs, gradients, Adam's moments
wall        seconds of an iteration, the fastest round
processor   seconds of processor time of the same: other programs disturb it less
faults      pages that the system had to map anew in an iteration
gradient    the largest difference from the plain form in the first gradient of the bridge model and of the student,
            relative to the largest value in it

Ways that were tried or thought through, and are not rows:
    weights of teacher and bridge model shared until the latter's first update      nothing: the peak comes after it
    Adam's moments in bf16      not offered: torch's AdamW refuses moments of another dtype than the weights', and in
                                8 bits 1 · 0.999 is 1, so the second moment would never fall
    images of L updates in one larger batch, weights reordered once     2 % at most: all reordering of weights and their
                                gradients takes a seventh of the convolutions' time at batch 8, eight times less at 64
    convolutions channels-first     5 % (backward) to 9 % (forward) slower: at batch 64 oneDNN's 3×3 convolutions run at
                                50 to 60 Gflop/s a core either way (float32), gradients of weights at 40 to 50
"""

import argparse
import contextlib
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Way:
    """How an iteration is computed.

    Attributes:
        plain_network: channels-first, of PyTorch's layers (`straightforward.Plain`), rather than ours.
        keep_all: the layers keep each result between norm and convolution, rather than `layers.activate`.
        single_graph: the student's loss is one graph with gradients of all three networks.
        recompute: the student is run twice rather than keep its graph.
        loops: Adam and average go from tensor to tensor.
        keep_freed: the C library keeps all freed memory for the next tensors, rather than give large blocks back.
        micro_batches: parts of a batch.
        checkpointing: blocks of the networks are computed again.
        reuse: bridge-model updates that share images.
        precision: "fp32" or "bf16".
    """

    plain_network: bool = False
    keep_all: bool = False
    single_graph: bool = False
    recompute: bool = False
    loops: bool = False
    keep_freed: bool = False
    micro_batches: int = 1
    checkpointing: bool = False
    reuse: int = 1
    precision: str = "fp32"


ALL = Way()
PLAIN = Way(plain_network=True, single_graph=True, loops=True)
SIDES = {"emoji": 32, "adm": 64}
"""Height and width of an image."""
WAYS = {
    "plain": PLAIN,
    "plain, memory kept": replace(PLAIN, keep_freed=True),
    "plain, our network": replace(PLAIN, plain_network=False, keep_all=True),
    "plain, leaf form": replace(PLAIN, single_graph=False, loops=False),
    "all": ALL,
    "all, memory kept": replace(ALL, keep_freed=True),
    "all but lean layers": replace(ALL, keep_all=True),
    "all but our network": replace(ALL, plain_network=True),
    "all but leaf form": replace(ALL, single_graph=True, loops=True),
    "all, student run twice": replace(ALL, recompute=True),
    "all, checkpointing": replace(ALL, checkpointing=True),
    "all, 4 micro-batches": replace(ALL, micro_batches=4),
    "all, 4 mb., run twice": replace(ALL, micro_batches=4, recompute=True),
    "all, images used twice": replace(ALL, reuse=2),
    "all, images used L times": replace(ALL, reuse=1000),
    "all, bf16": replace(ALL, precision="bf16"),
    "all, bf16, images used L t.": replace(ALL, precision="bf16", reuse=1000),
}


def held(device: str) -> int:
    """Return the memory of this process now, in bytes, once what was freed has been given back."""
    import torch

    if device == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmRSS:") + 1]) * 1024


def networks(case: str) -> tuple[Any, Any, Any]:
    """Return teacher, bridge model and student of a case, not at their starting point."""
    import copy

    import torch

    from ibmd_cli.method.bridges import VPBridge
    from ibmd_cli.method.noise import stream
    from ibmd_cli.models.folder import load_model
    from ibmd_cli.networks.predictor import Preconditioning, Predictor
    from ibmd_cli.networks.unet import UNetConfig

    if case == "emoji":
        teacher = load_model("builtin:outline2emoji", "teacher").predictor
    else:
        config = UNetConfig(6, model_channels=64, channel_mult=(1, 2, 3, 4), num_res_blocks=3, attention=(2, 4, 8))
        teacher = Predictor(config, VPBridge(), Preconditioning(), True).to(memory_format=torch.channels_last).eval()
        for p in teacher.parameters():
            if not p.any():  # else nothing flows through the blocks
                torch.nn.init.normal_(p, std=0.02, generator=stream(0, "zeros"))
    bridge_model = copy.deepcopy(teacher)
    with torch.no_grad():  # move it away from the teacher: at the start their terms cancel
        for p in bridge_model.parameters():
            p.mul_(1 + 0.02 * torch.randn(p.shape, generator=stream(0, "noise")))
    return teacher, bridge_model, teacher.widen(3)


def measure(way: Way, case: str, batch: int, bridge_steps: int, device: str, threads: int) -> dict[str, Any]:
    """Make an iteration with one bridge-model update, to warm up, and a timed one with L, in one way."""
    import copy

    import torch
    from accelerate import Accelerator
    from straightforward import Plain
    from straightforward import ibmd as plainly

    from ibmd_cli.devices import forget_peak, peak_memory
    from ibmd_cli.method.distillation import Iterations, Setup, Sources, generate, ibmd
    from ibmd_cli.method.noise import Streams, randn
    from ibmd_cli.training.optimise import Player, Schedule
    from ibmd_cli.training.shared_images import SharedImages

    torch.set_num_threads(threads)
    if way.keep_freed:  # by glibc's mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1)
        ctypes.CDLL(None).mallopt(-4, 0)
        ctypes.CDLL(None).mallopt(-1, -1)
    torch.manual_seed(0)
    models = networks(case)
    setup = Setup(models[0].bridge, models[0].weight, (models[0].bridge.T,), noise_shape=(3, 4, 4))
    players = [model.to(device).requires_grad_(True) for model in models]
    for model in players:
        model.backbone.gradient_checkpointing = way.checkpointing
    if way.plain_network:
        players = [Plain(model).to(device) for model in players]
    del models, model
    gradients: dict[str, list[float]] = {}

    def sources(rng: Streams) -> Sources:
        return Sources(randn((batch // way.micro_batches, 3, SIDES[case], SIDES[case]), rng).clamp(-1, 1).to(device))

    def seen(name: str, step: int) -> None:
        if step == 0 and name in ungraded:
            model = players[("teacher", "bridge_model", "student").index(name)]
            gradients[name] = torch.cat([p.grad.flatten()[::97] for p in model.parameters()]).tolist()

    ungraded = {"bridge_model", "student"}
    if way.single_graph:
        average = copy.deepcopy(players[2])
        kind: dict[str, bool] = {"foreach": False} if way.loops else {"fused": True}
        optimizers = [torch.optim.Adam(model.parameters(), 1e-4, **kind) for model in players[1:]]

        def run(bridge_steps: int) -> None:
            plainly(
                *players, average, setup, sources, *optimizers,
                batch_size=batch, steps=1, bridge_steps=bridge_steps, seen=seen,
            )  # fmt: skip
    else:
        players[0].requires_grad_(False)
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no" if way.precision == "fp32" else "bf16")
        parts = {"micro_batches": way.micro_batches, "micro_batch": batch // way.micro_batches}
        teacher = accelerator.prepare_model(players[0], evaluation_mode=True)
        phi = Player("bridge_model", players[1], accelerator, Schedule(1e-4), steps=1, seed=0, **parts)
        theta = Player("student", players[2], accelerator, Schedule(1e-4), steps=1, seed=0, ema=0.99, **parts)

        def update(player: Player) -> Callable[..., float]:
            def watched(step: int, compute: Callable[..., torch.Tensor]) -> float:
                def then_look(rng: Streams, backward: Callable[[torch.Tensor], None]) -> torch.Tensor:
                    loss = compute(rng, backward)
                    seen(player.name, step)  # with micro-batches, the last one's is complete
                    return loss

                return player.update(step, then_look)

            return watched

        def run(bridge_steps: int) -> None:
            iterations = Iterations(1, bridge_steps)
            images = SharedImages(partial(generate, theta.model, setup, sources), phi, iterations, way.reuse)

            def update_bridge(step: int, compute: Callable[..., torch.Tensor]) -> float:
                images.begin(step, 0)
                return update(phi)(step, compute)

            steps = ibmd(
                teacher, phi.model, theta.model, setup, sources, update_bridge, update(theta), iterations,
                images=images if way.reuse > 1 else None, recompute=way.recompute,
            )  # fmt: skip
            list(steps)

    forget_peak(torch.device(device))
    base = held(device)
    with mock.patch("ibmd_cli.networks.unet.activate", keep_all) if way.keep_all else contextlib.nullcontext():
        run(1)
        ungraded.clear()
        faults, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, (time.perf_counter(), time.process_time())
        run(bridge_steps)
        if device == "cuda":
            torch.cuda.synchronize()
    return {
        "wall": time.perf_counter() - began[0],
        "processor": time.process_time() - began[1],
        "memory": peak_memory(torch.device(device)) - base,
        "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
        "gradients": gradients,
    }


def keep_all(x: Any, norm: Any, conv: Any, scale: Any = None, shift: Any = None, resample: str = "") -> Any:
    """`layers.activate` of layers, each of which keeps what its gradient needs."""
    import torch
    import torch.nn.functional as F

    from ibmd_cli.networks.layers import resampled

    y = norm(x)
    y = y if scale is None else torch.addcmul(shift, y, 1 + scale)
    return conv(resampled(F.silu(y), resample))


def difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """Return the largest difference of a gradient relative to the largest value in it."""
    errors = []
    for name, values in one.items():
        largest = max(map(abs, values))
        errors += [abs(a - b) / largest for a, b in zip(values, other[name], strict=True)]
    return max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=SIDES, default="emoji")
    parser.add_argument("--batch-size", type=int, help="default: 64 for emoji, 8 for adm")
    parser.add_argument("--bridge-steps", type=int, default=5, help="L")
    parser.add_argument("--rows", nargs="+", choices=WAYS, default=list(WAYS), metavar="ROW")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    batch = args.batch_size or {"emoji": 64, "adm": 8}[args.case]
    if args.child:
        way = WAYS[args.child]
        print(json.dumps(measure(way, args.case, batch, args.bridge_steps, args.device, args.threads)))
        return
    print(f"{args.case}, batch {batch}, L = {args.bridge_steps}, {args.device}, {args.threads} thread(s)")
    print(f"{'row':27} {'memory':>9} {'ratio':>6} {'wall':>8} {'ratio':>6} {'processor':>9} {'ratio':>6}", end=" ")
    print(f"{'faults':>9} {'gradient':>9}", flush=True)
    results: dict[str, list[dict[str, Any]]] = {row: [] for row in ("plain", *args.rows)}
    for number in range(args.rounds):
        for row, rounds in results.items():
            command = [sys.executable, *sys.argv, "--child", row]
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rounds.append(json.loads(child.stdout.splitlines()[-1]))
            if number == args.rounds - 1:
                print(line(row, rounds, results["plain"]), flush=True)


def line(row: str, rounds: list[dict[str, Any]], plain: list[dict[str, Any]]) -> str:
    """Write a row of the table."""
    needed, reference = (statistics.median(r["memory"] for r in each) for each in (rounds, plain))
    text = f"{row:27} {needed / 2**20:5.0f} MiB {needed / reference:6.2f} "
    for clock, width in (("wall", 8), ("processor", 9)):
        fastest, reference = (min(r[clock] for r in each) for each in (rounds, plain))
        text += f"{fastest:{width}.2f} {fastest / reference:6.2f} "
    error = difference(plain[0]["gradients"], rounds[0]["gradients"])
    return text + f"{min(r['faults'] for r in rounds):9} {error:9.0e}"


if __name__ == "__main__":
    main()
