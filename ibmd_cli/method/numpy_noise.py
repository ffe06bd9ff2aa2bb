"""The random numbers of `noise.stream` without PyTorch, for students that run without it.

PyTorch's generator on the CPU is the Mersenne Twister MT19937, as NumPy's; normal numbers are made of its bits by Box
and Muller's method, in an order of its own, which is followed here. Logarithms and cosines are computed in float64
and rounded; PyTorch's own, in float32, depend on the processor. So the numbers agree to about 1.4e-6, not to the bit.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

_ANY = "surrogateescape"  # as Python reads bytes of names that are no text in the locale
_GROUP = 16  # numbers that PyTorch makes at a time: eight radii, eight angles


def seed_of(seed: int, *place: int | str) -> int:
    """Return the seed of the random stream of a place, −2⁶³ … 2⁶³ − 1; names of files count as UTF-8 in any locale."""
    as_utf8 = (p.encode("utf-8", _ANY).decode("utf-8", _ANY) if isinstance(p, str) else p for p in place)
    digest = hashlib.sha256(repr((seed, *as_utf8)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


class Normals:
    """A random stream: `Normals(seed, *place)` draws what `noise.stream(seed, *place)` draws, on any processor.

    Args:
        seed: of all noise.
        place: what the stream is for.

    Source: PyTorch 2.13, `normal_fill` and `normal_distribution<double>`.
    """

    def __init__(self, seed: int, *place: int | str) -> None:
        self.bits = np.random.RandomState(seed_of(seed, *place) & 0xFFFFFFFF)
        self.left: float | None = None  # the second of a pair that was drawn one by one

    def __call__(self, shape: Sequence[int]) -> np.ndarray:
        """Draw standard normal numbers, float32, as `torch.randn(shape, generator=…)`."""
        count = math.prod(shape)
        if count < _GROUP:
            return np.array([self._one() for _ in range(count)], dtype=np.float32).reshape(shape)
        numbers = np.empty(count)
        whole = count - count % _GROUP
        uniform = self._uniform(count)
        numbers[:whole] = _box_muller(uniform[:whole])
        if whole < count:  # the last group is drawn again, and overlaps the one before
            numbers[-_GROUP:] = _box_muller(self._uniform(_GROUP))
        return numbers.astype(np.float32).reshape(shape)

    def _words(self, count: int) -> np.ndarray:
        return self.bits.randint(0, 2**32, count, dtype=np.uint32)

    def _uniform(self, count: int) -> np.ndarray:
        return (self._words(count) & 0xFFFFFF) * 2.0**-24  # float64 in [0, 1)

    def _one(self) -> float:
        if self.left is not None:
            number, self.left = self.left, None
            return number
        a, b, c, d = (int(word) for word in self._words(4))
        angle, u = (((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in ((a, b), (c, d)))
        radius = math.sqrt(-2 * math.log1p(-u))
        self.left = radius * math.sin(2 * math.pi * angle)
        return radius * math.cos(2 * math.pi * angle)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    u, angle = np.moveaxis(uniform.reshape(-1, 2, _GROUP // 2), 1, 0)
    radius = np.sqrt(-2 * np.log(1 - u))
    return np.stack([radius * np.cos(2 * np.pi * angle), radius * np.sin(2 * np.pi * angle)], axis=1).ravel()
