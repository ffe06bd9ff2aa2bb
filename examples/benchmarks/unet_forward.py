"""Time of a forward pass: our U-Net against the published DBIM implementation, same weights, same CPU.

    git clone https://github.com/thu-ml/DiffusionBridge /tmp/DiffusionBridge
    python examples/benchmarks/unet_forward.py --reference /tmp/DiffusionBridge

Without --reference ours is timed alone. Rounds alternate, so that a busy machine is unfair to none of them; float32,
`torch.inference_mode`, the network of edges2handbags (64×64 pixels) and the same with 64 base channels. FLOPs are
those of convolutions, linear layers and attention, counted once: the two compute the same.

--variants also times ours without single measures: "NCHW" with images and weights channels-first, "own choice" with
PyTorch choosing between oneDNN and BLAS for each convolution (`networks.convolve`).
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ibmd_cli.networks.unet import UNet, UNetConfig

SIZE, TIME = 64, -173.2868  # pixels; c_noise at the middle of the bridge


def published(checkout: Path, config: UNetConfig) -> nn.Module:
    """Build the published network of the same shape."""
    sys.path.insert(0, str(checkout))
    return importlib.import_module("ddbm.unet").UNetModel(
        image_size=SIZE,
        in_channels=config.in_channels,
        model_channels=config.model_channels,
        out_channels=config.out_channels,
        num_res_blocks=config.num_res_blocks,
        attention_resolutions=config.attention,
        channel_mult=config.channel_mult,
        num_head_channels=config.head_channels,
        use_scale_shift_norm=True,
        resblock_updown=True,
        use_new_attention_order=True,
    )


def count(config: UNetConfig, batch: int) -> float:
    """Count the floating-point operations of one pass, in units of 10⁹, without computing it."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet(config)(torch.empty(batch, config.in_channels, SIZE, SIZE), torch.empty(batch))
    return counter.get_total_flops() / 1e9


def contestants(
    config: UNetConfig, x: Tensor, checkout: Path | None, variants: bool
) -> dict[str, Callable[[], Tensor]]:
    """Return forward passes by name, all of the same function; ours comes first."""
    ours = UNet(config).to(memory_format=torch.channels_last).eval()
    for p in ours.parameters():
        if not p.any():  # the output layers: with zeros all networks would agree
            nn.init.normal_(p, std=0.02)
    c_noise = torch.full((len(x),), TIME)
    x_last = x.contiguous(memory_format=torch.channels_last)
    passes: dict[str, Callable[[], Tensor]] = {"ours": lambda: ours(x_last, c_noise)}
    if variants:
        plain = UNet(config).eval()
        plain.load_state_dict(ours.state_dict())

        def own_choice() -> Tensor:
            with mock.patch("torch.backends.mkldnn.is_available", return_value=False):
                return ours(x_last, c_noise)

        passes |= {"ours, NCHW": lambda: plain(x, c_noise), "ours, own choice": own_choice}
    if checkout:
        reference = published(checkout, config).eval()
        reference.load_state_dict(ours.state_dict())
        passes["published"] = lambda: reference(x, c_noise)
    return passes


@torch.inference_mode()
def measure(passes: dict[str, Callable[[], Tensor]], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return seconds per round, and how far each output is from ours, relative to its largest value."""
    outputs = {name: run() for name, run in passes.items()}  # also warms up
    expected = outputs["ours"]
    errors = {name: ((y - expected).abs().max() / expected.abs().max()).item() for name, y in outputs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, run in passes.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="checkout of thu-ml/DiffusionBridge")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 192])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", action="store_true")
    args = parser.parse_args()
    if args.reference and not (args.reference / "ddbm" / "unet.py").is_file():
        parser.error(f"--reference: {args.reference} has no ddbm/unet.py; give a checkout of thu-ml/DiffusionBridge")
    torch.set_num_threads(args.threads)
    print(f"{args.threads} thread(s), {args.rounds} rounds; ratio: time in units of ours, by best and by median")
    print(f"channels batch {'network':17} {'best':>9} {'median':>9} {'GFLOP/s':>8} {'ratio':>13}  error")
    for channels in args.channels:
        config = UNetConfig(
            6, model_channels=channels, channel_mult=(1, 2, 3, 4), num_res_blocks=3, attention=(2, 4, 8)
        )
        for batch in args.batch_size:
            torch.manual_seed(0)
            x = torch.randn(batch, config.in_channels, SIZE, SIZE)
            seconds, errors = measure(contestants(config, x, args.reference, args.variants), args.rounds)
            best = {name: min(times) for name, times in seconds.items()}
            median = {name: statistics.median(times) for name, times in seconds.items()}
            gflop = count(config, batch)
            for name in seconds:
                print(
                    f"{channels:8} {batch:5} {name:17} {best[name] * 1e3:6.0f} ms {median[name] * 1e3:6.0f} ms "
                    f"{gflop / best[name]:8.0f} {best[name] / best['ours']:5.2f}× "
                    f"{median[name] / median['ours']:5.2f}× {errors[name]:6.0e}"
                )
            if max(errors.values()) > 1e-4:
                sys.exit("the networks do not agree to 1e-4")


if __name__ == "__main__":
    main()
