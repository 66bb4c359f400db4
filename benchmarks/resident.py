"""How much memory something takes, as the system sees it. Linux only; needs no package."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable
from pathlib import Path

_SELF = Path("/proc/self")


def _status(name: str) -> int:
    for line in (_SELF / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def growth(run: Callable[[], object]) -> tuple[int, int]:
    """Return by how many bytes the resident memory rose, at the end of ``run`` and at its peak.

    What ``run`` returns is alive at the end. Freed memory is given back to the system first, and
    the kernel's high-water mark is set back.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    (_SELF / "clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = _status("VmRSS")
    result = run()
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    kept, peak = _status("VmRSS"), _status("VmHWM")
    del result
    return kept - before, peak - before
