"""Thread pools during training: numpy's never, torch's only for networks that repay it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController
from torch import nn

from .interrupts import surely

# Parameters of a network whose products occupy several threads. Measured on two cores with two
# hidden layers: of 64 (4,500 parameters) no gain, of 256 (67,000) 7 %, of 512 (265,000) 34 %.
_WIDE = 2**16


@contextmanager
def few_threads(*networks: nn.Module) -> Iterator[None]:
    """Run a block on one thread, or on torch's own number where a network is large.

    A step of a small network takes microseconds. numpy's BLAS and torch's OpenMP each keep a pool
    of threads that go on spinning for milliseconds after each product, in case of the next; where
    numpy and torch take turns, each pool spins on the cores that the other one needs, and training
    is 20 times slower on two idle cores than on one thread. So numpy's BLAS has one thread within
    the block, and torch has one unless a network is large. Every setting is put back at the end, of
    the last block where several threads train at once.

    Args:
        networks: what is to be computed.

    """
    large, block = any(map(_is_large, networks)), object()
    try:
        _enter(block)
        if not large:
            torch.set_num_threads(1)
        yield
    finally:
        surely(lambda: _leave(block, large))


def _is_large(network: nn.Module) -> bool:
    """Say whether a product with the network occupies several threads."""
    if any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in network.modules()):
        return True
    return sum(p.numel() for p in network.parameters()) >= _WIDE


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()  # a few milliseconds: it looks through the loaded libraries


_lock = threading.Lock()
_blocks: dict[object, int] = {}  # those that run now, and torch's threads that each puts back
_before = 1  # torch's threads before the first of them
_blas = None  # numpy's limit, while there are any


def _enter(block: object) -> None:
    """Limit numpy's BLAS, and note torch's number of threads."""
    global _before, _blas
    with _lock:
        own = torch.get_num_threads()
        if not _blocks:
            _blas, _before = _controller().limit(limits=1, user_api="blas"), own
        # a thread that was started while another one trains begins with the other's limit
        _blocks[block] = _before if own == 1 else own


def _leave(block: object, large: bool) -> None:
    """Put back what the block, if it was entered, has changed."""
    global _blas
    with _lock:
        if block in _blocks:
            if not large:
                torch.set_num_threads(_blocks[block])
            del _blocks[block]
        if not _blocks and _blas is not None:
            _blas.restore_original_limits()
            _blas = None
