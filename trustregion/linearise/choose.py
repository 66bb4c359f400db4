"""Which way of differentiating makes the Jacobian products."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..vector import ParameterVector
from .base import Linearisation
from .graph import GraphLinearisation

BACKENDS = ("auto", "graph")


def linearise(
    outputs: Sequence[Tensor], vector: ParameterVector, backend: str = "auto"
) -> Linearisation:
    """Return the Jacobian of ``outputs`` in the parameters, by the fastest way that can.

    Args:
        outputs: tensors with the graph that made them; the graph is kept alive.
        vector: the parameters.
        backend: ``"graph"``: double backward. ``"auto"``: that.

    Raises:
        ValueError: an unknown backend, or outputs that do not depend on the parameters.
        RuntimeError: a part of the model cannot be differentiated, or its graph was freed.

    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return GraphLinearisation(outputs, vector)
