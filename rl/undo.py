"""Going back to where a fit began."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


@contextmanager
def undone_on_error(
    *networks: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Iterator[None]:
    """Put networks and an optimizer back as they were, where the block raises or is interrupted.

    Args:
        networks: whose parameters and buffers are kept.
        optimizer: whose state is kept; None for none.

    """
    tensors = chain.from_iterable((*n.parameters(), *n.buffers()) for n in networks)
    kept = [(x, x.detach().clone()) for x in tensors]
    state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for x, value in kept:
                x.copy_(value)
        if optimizer is not None and state is not None:
            optimizer.load_state_dict(state)
        raise
