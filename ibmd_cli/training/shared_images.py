"""Images of the student that several bridge-model updates in a row learn from (`--reuse`)."""

from collections.abc import Callable

from ibmd_cli.method.distillation import Iterations, Pair
from ibmd_cli.method.noise import Streams
from ibmd_cli.training.optimise import Player


class SharedImages:
    """Has the student make images for every `reuse`-th bridge-model update alone.

    The updates between see the same images at new times and with new noise. Differs from the paper (1): the student is
    run less often, for images that vary less. They are shared between two updates of the student, not across one.

    Args:
        make: makes images with the given random streams (`distillation.generate`).
        player: the bridge model.
        iterations: numbers of the updates.
        reuse: updates that share images.
    """

    def __init__(self, make: Callable[[Streams], Pair], player: Player, iterations: Iterations, reuse: int) -> None:
        self.make, self.player, self.iterations, self.reuse = make, player, iterations, reuse
        self.made: list[Pair] = []  # one for each micro-batch
        self.update = self.maker = self.micro_batch = -1

    def begin(self, update: int, k: int) -> None:
        """Begin bridge-model update number `update`, which comes before student update k."""
        maker = self.iterations.maker(update, k, self.reuse)
        if maker != self.maker:
            self.made = []
        self.update, self.maker, self.micro_batch = update, maker, 0

    def __call__(self, rng: Streams) -> Pair:
        """Return the images of the next micro-batch of this update."""
        if self.micro_batch == len(self.made):
            # A run that continues between two updates that share images makes them again, as they were.
            lost = self.update != self.maker
            self.made.append(self.make(self.player.streams(self.maker, self.micro_batch) if lost else rng))
        self.micro_batch += 1
        return self.made[self.micro_batch - 1]
