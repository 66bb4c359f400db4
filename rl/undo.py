"""Going back to where a fit began."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn


@contextmanager
def undone_on_error(
    *networks: nn.Module, optimizers: Iterable[torch.optim.Optimizer] = ()
) -> Iterator[None]:
    """Put networks and optimizers back as they were, where the block raises or is interrupted.

    Args:
        networks: whose parameters and buffers are kept.
        optimizers: whose state is kept.

    """
    tensors = chain.from_iterable((*n.parameters(), *n.buffers()) for n in networks)
    kept = [(x, x.detach().clone()) for x in tensors]
    states = [(o, copy.deepcopy(o.state_dict())) for o in optimizers]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for x, value in kept:
                x.copy_(value)
        for optimizer, state in states:
            optimizer.load_state_dict(state)
        raise
