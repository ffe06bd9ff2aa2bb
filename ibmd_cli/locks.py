"""Several processes at one list of files: each does its share, and none does what another is doing.

Processes that were started together (`torchrun`, `accelerate launch`: RANK and WORLD_SIZE) take every WORLD_SIZE-th
input. Commands that were started apart with `--on-exists skip` claim each output before they begin with it, by a
locked file `.ibmd-….claim` beside it. The system releases the lock when its process ends in whatever way, so
what a killed process left is done by the next. Without such locks (Windows, some network folders) nothing is claimed:
then two such commands may do an image twice, with the same result.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Claims:
    """The outputs that this process is working on.

    Args:
        warn: told once if the file system has no locks.
    """

    def __init__(self, warn: Callable[[str], None] = warnings.warn) -> None:
        self.held: dict[Path, int] = {}
        self.warn, self.locks, self.saying = warn, fcntl is not None, Lock()

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for output in list(self.held):
            self.give_back(output)

    def take(self, output: Path) -> bool:
        """Claim an output, unless it exists or another process has claimed it."""
        if self.locks and not os.path.lexists(output):
            file = _claim_file(output)
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = os.path.samestat(os.fstat(handle), os.stat(file))  # not given back since it was opened
            except (BlockingIOError, FileNotFoundError):
                mine = False
            except OSError as error:
                file.unlink(missing_ok=True)
                os.close(handle)
                self._do_without(error)
                return not os.path.lexists(output)
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
            _claim_file(output).unlink(missing_ok=True)
            os.close(handle)

    def _do_without(self, error: OSError) -> None:
        with self.saying:
            if self.locks:
                self.warn(
                    f"files cannot be locked in the output's folder ({error.strerror}): "
                    "another run on the same images may do some of them, too; run one at a time there"
                )
            self.locks = False


def _claim_file(output: Path) -> Path:
    name = hashlib.blake2b(os.fsencode(output.name), digest_size=8).hexdigest()  # however long the output's name is
    return output.with_name(f".ibmd-{name}.claim")
