"""Takes the memory allocator's moods out of the timings."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of <malloc.h>


def keep_freed_memory() -> None:
    """Stop glibc from giving freed activations back to the system, call after call.

    Whether it does so depends on what else lies on the heap. A product then takes up to 500 page
    faults, a fifth of its time, and the peers, which allocate more, suffer more. Elsewhere than
    on glibc this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_TRIM_THRESHOLD, 1 << 30)
