"""A player's step: its average, and that nothing waits for a GPU but the one decision."""

import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from ibmd_cli.training.optimise import Player, Schedule


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads from single tensors (`item`, `float`, `if`)."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def player(ema=None, **settings):
    torch.manual_seed(0)
    return Player(
        "p", torch.nn.Linear(3, 1), Accelerator(cpu=True), Schedule(0.1), steps=9, seed=0, ema=ema, **settings
    )


def loss_of(player):
    def compute(rng, backward):
        loss = (player.model(torch.randn(2, 3, generator=rng)) - 1).square().mean()
        backward(loss)
        return loss.detach()

    return compute


def test_average_warms_up_to_its_decay():
    one = player(ema=0.4)
    expected = None
    for step, decay in enumerate((0, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4, 0.4)):
        one.update(step, loss_of(one))
        now = one.network.weight.detach().clone()
        expected = now if expected is None else decay * expected + (1 - decay) * now
        torch.testing.assert_close(one.averaged().weight, expected, rtol=1e-6, atol=1e-7)
        assert not one.averaged().weight.requires_grad or one.averaged().weight.grad is None


def test_step_reads_nothing_but_loss_and_norm_together():
    one = player(clip=1.0, micro_batches=2)
    with Reads() as reads:
        for step in range(3):
            one.update(step, loss_of(one))
    assert reads.count == 0  # `tolist`, once a step, is not a read of a single number
    with Reads() as reads:
        float(torch.ones(()))
    assert reads.count == 1


def test_losses_may_stay_tensors():
    one, other = player(), player()
    losses = one.update(0, loss_of(one)), other.update(0, lambda *a: loss_of(other)(*a).item())
    assert losses[0] == losses[1]
    assert isinstance(losses[0], float)
