"""Settings of the process that overlapping scopes, in several threads, hold together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel


class Shared:
    """A setting that the first of the overlapping scopes makes, and the last one restores.

    Scopes that each put back what they found would leave the setting of the first one that ends.
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[object]]) -> None:
        self._setting = setting
        self._lock, self._holders, self._stack = threading.Lock(), 0, ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Hold the setting for the duration of a ``with`` block."""
        with self._lock:
            if not self._holders:
                self._stack.enter_context(self._setting())
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._stack.close()


math_attention = Shared(lambda: sdpa_kernel(SDPBackend.MATH))
"""Let attention use its math kernel: the fused ones have no double backward."""
