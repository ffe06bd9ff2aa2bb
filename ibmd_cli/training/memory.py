"""The memory of a distillation: estimated from shapes, measured, and filled by `--micro-batch auto`.

What does not depend on the batch are the weights of the three networks and, of the two that learn, gradients, Adam's
two moments and the student's average, all in float32. The rest is activations, in proportion to the micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ibmd_cli.data.sources import SourceImages
from ibmd_cli.devices import forget_peak, free_memory, peak_memory
from ibmd_cli.errors import UsageError
from ibmd_cli.method.distillation import Setup, bridge_loss, rollout, student_gradient
from ibmd_cli.method.noise import BatchStreams
from ibmd_cli.networks.predictor import Predictor
from ibmd_cli.processes import this_process
from ibmd_cli.reporting import Reporter
from ibmd_cli.training.config import DistillConfig

SHARE_OF_FREE = 0.9
"""Of the free memory, that `--micro-batch auto` takes."""
GIB = 2**30


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a distillation takes in each process.

    Attributes:
        fixed: weights, gradients, Adam's moments and averages.
        per_image: activations, for each image of a micro-batch.
    """

    fixed: int
    per_image: int


def estimate_memory(
    predictor: Predictor,
    student: Predictor,
    side: int,
    *,
    calls: int,
    recompute: bool,
    checkpointing: bool,
    mixed: bool,
    alone: bool = True,
) -> MemoryNeed:
    """Estimate from shapes alone; on the meta device, so that networks of any size fit.

    Args:
        predictor: teacher and bridge model, on the meta device.
        student: likewise.
        side: height and width of an image.
        calls: of the student, whose graphs are alive at once.
        recompute: whether the student runs twice, and its graph is not alive together with a critic's.
        checkpointing: whether blocks are recomputed.
        mixed: whether activations are in 16 bits.
        alone: whether there is one process; several keep the gradients of both networks, to exchange them.
    """
    n, n_student = (sum(p.numel() for p in network.parameters()) for network in (predictor, student))
    # Weights of the teacher; weights and moments of the bridge model and the student, and the student's average.
    gradients = max(n, n_student) if alone else n + n_student
    fixed = 4 * (n + 3 * n + 3 * n_student + n_student + gradients)
    bridge_graph = _graph_bytes(predictor, side, True, checkpointing, mixed)
    critic_graph = _graph_bytes(predictor, side, False, checkpointing, mixed)
    student_graph = calls * _graph_bytes(student, side, True, checkpointing, mixed)
    step = max(student_graph, critic_graph) if recompute else student_graph + critic_graph
    copies = 2 * (n + n_student) if mixed else 0  # of the weights, in 16 bits
    return MemoryNeed(fixed + copies, max(bridge_graph, step))


def _graph_bytes(predictor: Predictor, side: int, trained: bool, checkpointing: bool, mixed: bool) -> int:
    """Count what a call of the U-Net keeps of one image for its backward pass."""
    network = predictor.backbone
    dtype = torch.bfloat16 if mixed else torch.float32
    network.to(dtype).requires_grad_(trained)
    z = predictor.noise_channels
    x = torch.zeros(1, network.config.in_channels - z, side, side, dtype=dtype, device="meta", requires_grad=True)
    extra = {"z": torch.zeros(1, z, side, side, dtype=dtype, device="meta")} if z else {}
    if network.config.num_classes is not None:
        extra["label"] = torch.zeros(1, dtype=torch.long, device="meta")
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # kept alive: else another one may get its address
    blocks: list[tuple[int, int]] = []  # bytes of the input and of the graph of each block

    def total() -> int:
        return sum(storage.nbytes() for storage in kept.values())

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return saved

    def enter(block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        blocks.append((arguments[0].nbytes, total()))

    def leave(block: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        size, before = blocks.pop()
        blocks.append((size, total() - before))

    parts = [*network.input_blocks[1:], network.middle_block, *network.output_blocks]
    hooks = [network.time_embed.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype),))]
    hooks += [part.register_forward_pre_hook(enter) for part in parts]
    hooks += [part.register_forward_hook(leave) for part in parts]
    with saved_tensors_hooks(pack, lambda saved: saved):
        network(x, torch.zeros(1, device="meta"), **extra)
    for hook in hooks:
        hook.remove()
    inputs, graphs = zip(*blocks, strict=True)
    return sum(inputs) + max(graphs) if checkpointing else total()


def fitting_micro_batch(
    config: DistillConfig,
    networks: tuple[Predictor, Predictor, Predictor],
    setup: Setup,
    sources: SourceImages,
    accelerator: Accelerator,
    reporter: Reporter,
) -> int:
    """Find the micro-batch of `--micro-batch auto`, the same in all processes; weights stay as they are.

    Args:
        config: the settings.
        networks: teacher, bridge model, student.
        setup: of the distillation.
        sources: images to try it with.
        accelerator: the device.
        reporter: told what was found.
    """
    share = config.batch_size // accelerator.num_processes
    teacher, bridge_model, student = networks
    device = accelerator.device
    sharers = 1 if device.type == "cuda" else this_process().local_count
    limit = config.memory * GIB or SHARE_OF_FREE * free_memory(device) / sharers
    learning = [*bridge_model.parameters(), *student.parameters()]
    gradients = sum(p.nbytes for p in learning)
    later = 2 * gradients + sum(p.nbytes for p in student.parameters())  # Adam's moments, the average
    forget_peak(device)
    start = peak_memory(device)

    def attempt(images: int) -> int:
        rng = BatchStreams(range(images), config.seed, "micro-batch")
        batch = sources.batch(images, rng, config.flip, device)
        with accelerator.autocast():
            with torch.no_grad():
                x_0 = rollout(student, setup, batch, rng)
            bridge_loss(bridge_model, setup, x_0, batch, rng).backward()
            student_gradient(teacher, bridge_model, student, setup, batch, rng, recompute=config.recompute)
        return peak_memory(device) - start + later

    found = largest_micro_batch(share, limit, gradients + later, attempt)
    for p in learning:
        p.grad = None
    torch.cuda.empty_cache()  # of an attempt that did not fit
    found = int(accelerator.gather(torch.tensor([found], device=device)).min())
    reporter.note(f"--micro-batch auto: {found} of {share} images at a time, in {limit / GIB:.3g} GiB")
    return found


def largest_micro_batch(share: int, limit: float, fixed: int, attempt: Callable[[int], int]) -> int:
    """Find the largest part of a batch that fits into memory, by trying ever larger ones.

    None is tried of which the one before tells that it will not fit: a CPU's system would end the process.

    Args:
        share: images of a batch in each process; the parts are its divisors.
        limit: bytes.
        fixed: bytes that do not grow with the part.
        attempt: makes a step with so many images and returns the bytes that it took, `fixed` included. It may raise
            `torch.OutOfMemoryError`.

    Raises:
        UsageError: not even one image fits.
    """
    best = needed = 0
    for images in (d for d in range(1, share + 1) if share % d == 0):
        if best and fixed + (needed - fixed) * images / best > limit:
            break
        try:
            needed = attempt(images)
        except torch.OutOfMemoryError:
            break
        if needed > limit:
            break
        best = images
    if not best:
        raise UsageError(
            f"--micro-batch auto: not even one image fits into {limit / GIB:.3g} GiB: --recompute, "
            "--checkpointing and --precision bf16 take less memory"
        )
    return best
