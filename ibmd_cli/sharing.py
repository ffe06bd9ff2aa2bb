"""Several processes at one list of files: each does its share, and none does what another is doing.

Processes that were started together (`torchrun`, `accelerate launch`: RANK and WORLD_SIZE) take every WORLD_SIZE-th
input. Commands that were started apart with `--on-exists skip` claim each output before they begin with it, by a
locked file `.ibmd-….claim` beside it. The system releases the lock when its process ends in whatever way, so
what a killed process left is done by the next. (Without such locks, on Windows, nothing is claimed.)
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Total = Callable[[Sequence[int]], list[int]]


def place() -> tuple[int, int]:
    """Return the number of this process and how many there are: (0, 1) for one that was started alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def company() -> Iterator[Total]:
    """Give a function that adds up numbers over the processes of a launcher. All must call it; it waits for the last.

    The first process gets the sums, the others zeros: it alone reports failures, and at the end, since a launcher stops
    all processes as soon as one of them does. Processes that no launcher connects each keep their own numbers.
    """
    process, processes = place()
    if processes == 1 or "MASTER_ADDR" not in os.environ:
        yield list
        return

    def total(values: Sequence[int]) -> list[int]:
        sums = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(sums)
        return [int(v) if process == 0 else 0 for v in sums]

    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield total
    finally:
        dist.destroy_process_group()


class Claims:
    """The outputs that this process is working on."""

    def __init__(self) -> None:
        self.held: dict[Path, int] = {}

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for output in list(self.held):
            self.give_back(output)

    def take(self, output: Path) -> bool:
        """Claim an output, unless it exists or another process has claimed it."""
        if fcntl is None:
            return not os.path.lexists(output)
        file = _file(output)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(handle), os.stat(file))  # not given back since it was opened
        except OSError:
            mine = False
        if not mine:
            os.close(handle)
            return False
        self.held[output] = handle
        if os.path.lexists(output):
            self.give_back(output)
            return False
        return True

    def give_back(self, output: Path) -> None:
        """Let others have an output, if it was claimed; after it was written, they see that it exists."""
        handle = self.held.pop(output, None)
        if handle is not None:
            _file(output).unlink(missing_ok=True)
            os.close(handle)


def _file(output: Path) -> Path:
    name = hashlib.blake2b(os.fsencode(output.name), digest_size=8).hexdigest()  # however long the output's name is
    return output.with_name(f".ibmd-{name}.claim")
