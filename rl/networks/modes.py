"""Training and evaluation mode of modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..interrupts import surely


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode within a block, and each back into its own mode after it.

    Dropout is off there, and batch normalisation uses its running statistics and leaves them alone.
    """
    training = [module for network in networks for module in network.modules() if module.training]

    def set_all(value: bool) -> None:
        for module in training:
            module.training = value

    try:
        set_all(False)
        yield
    finally:
        surely(lambda: set_all(True))
