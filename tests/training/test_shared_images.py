"""Images that updates of the bridge model share: made for every `reuse`-th, the same after a resume."""

from itertools import islice

import pytest
import torch

from ibmd_cli.method.distillation import Iterations, Pair, Sources
from ibmd_cli.method.noise import randn, stream
from ibmd_cli.training.shared_images import SharedImages


class Streams:
    """The random streams of a player, by update and micro-batch; counts nothing else."""

    def streams(self, update: int, micro: int) -> torch.Generator:
        return stream(0, update, micro)


def images_of(iterations: Iterations, reuse: int, micro_batches: int = 1) -> tuple[list[torch.Tensor], int]:
    """Return the images that each update to be made sees, and how many were made."""
    made = []

    def make(rng: torch.Generator) -> Pair:
        made.append(randn((2, 3, 4, 4), rng))
        return Pair(Sources(made[-1]), made[-1])

    shared, player = SharedImages(make, Streams(), iterations, reuse), Streams()  # type: ignore[arg-type]
    seen = []
    for k in iterations.of_student():
        for update in iterations.of_bridge_model(k):
            shared.begin(update, k)
            seen.append(torch.stack([shared(player.streams(update, m)).x_0 for m in range(micro_batches)]))
    return seen, len(made)


@pytest.mark.parametrize("reuse", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("steps", "bridge_steps", "warmup"), [(3, 5, 0), (2, 4, 3), (1, 1, 0)])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_updates_share_within_one_update_of_the_student(
    reuse: int, steps: int, bridge_steps: int, warmup: int, micro_batches: int
):
    iterations = Iterations(steps, bridge_steps, warmup)
    seen, made = images_of(iterations, reuse, micro_batches)
    updates = [(k, l) for k in iterations.of_student() for l in iterations.of_bridge_model(k)]  # noqa: E741
    groups = [(k, (l - iterations.first(k)) // reuse) for k, l in updates]  # noqa: E741
    assert made == len(set(groups)) * micro_batches
    for i, one in enumerate(groups):
        for j, other in enumerate(groups):
            assert torch.equal(seen[i], seen[j]) == (one == other)


@pytest.mark.parametrize("done", range(11))
def test_run_that_continues_between_updates_sees_the_same_images(done: int):
    whole, _ = images_of(Iterations(2, 5, 1), 3, 2)
    updates = [(k, l) for k in range(2) for l in Iterations(2, 5, 1).of_bridge_model(k)]  # noqa: E741
    k, l = next(islice(updates, done, None), (2, 11))  # noqa: E741
    rest, _ = images_of(Iterations(2, 5, 1, start=k, bridge_start=l), 3, 2)
    assert len(rest) == len(whole) - done
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[done:], strict=True))
