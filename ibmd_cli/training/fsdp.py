"""Networks split over processes (FSDP): each holds a part of every weight, gradient and moment.

The weights of a block are gathered when it runs and dropped after it. Accelerate splits networks over GPUs alone; what
it calls there, PyTorch's `fully_shard`, is called here, so that CPU processes do the same.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from ibmd_cli.networks.predictor import Predictor
from ibmd_cli.networks.unet import AttentionBlock, ResBlock


def split(network: Predictor) -> None:
    """Split a network over all processes, in place: block by block, and what is left as one more.

    From then on its gradients are means over processes. All of them must call this, and run the network, together.
    """
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # PyTorch splits no other
    mesh = init_device_mesh(next(network.parameters()).device.type, (dist.get_world_size(),))
    for block in network.modules():
        if isinstance(block, ResBlock | AttentionBlock):
            fully_shard(block, mesh=mesh)
            block.register_forward_pre_hook(_restride)
    fully_shard(network, mesh=mesh)


def _restride(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Undo what `fully_shard` does to the strides of a single image: group norm refuses them."""
    x, *others = inputs
    return (x.clone(memory_format=torch.channels_last) if len(x) == 1 else x, *others)


def part(x: Tensor) -> Tensor:
    """Return what this process holds of a tensor: all of it, if it is not split."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """Return a tensor as a whole. If it is split, all processes must call this together."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def gather(state: dict[str, Any], keep: bool) -> dict[str, Any]:
    """Return a state with its split tensors as a whole, on the CPU. All processes must call this together.

    Args:
        state: nested; what is not split stays as it is.
        keep: whether this process wants them; else they are None.
    """

    def gathered(x: Any) -> Any:
        if not isinstance(x, DTensor):
            return x
        full = whole(x)
        return full.cpu() if keep else None

    return tree_map(gathered, state)


def split_as(x: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor split and laid out in memory as another of its shape."""
    if isinstance(like, DTensor):
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)
