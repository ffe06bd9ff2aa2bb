"""What the C library does with freed memory. Only glibc is told; others are left alone."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
"""Parameters of glibc's `mallopt`: free bytes at the end of a heap, of which −1 is any number, are given back; blocks
that are larger are mapped by themselves, and given back when they are freed; how many such blocks there may be at a
time; how many heaps there may be for the threads."""
BLOCK = 32 << 20  # bytes: the most that glibc takes for M_MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Have all freed memory kept for the next tensors, where it would be given back to the system.

    Else the system maps and clears the pages of large tensors anew in each step.
    """
    _set(M_MMAP_MAX, 0)
    _set(M_TRIM_THRESHOLD, -1)


def share_freed_memory() -> None:
    """Have what one thread frees used by the next, and 64 MB of it kept; blocks above 32 MB are given back at once.

    Else each thread keeps a heap of its own, as large as it ever was, and the pages of a network's tensors are given
    back and cleared anew in each layer: a tenth of its time, where images are small.
    """
    _set(M_ARENA_MAX, 1)
    _set(M_MMAP_THRESHOLD, BLOCK)
    _set(M_TRIM_THRESHOLD, 2 * BLOCK)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(parameter, value)
