"""Which way of differentiating makes the Jacobian products."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..autodiff import differentiate
from ..vector import ParameterVector, dot, norm
from .base import Linearisation
from .graph import GraphLinearisation
from .tape import TapeLinearisation, UnreadableGraph

BACKENDS = ("auto", "tape", "graph")


def linearise(
    outputs: Sequence[Tensor], vector: ParameterVector, backend: str = "auto"
) -> Linearisation:
    """Return the Jacobian of ``outputs`` in the parameters, by the fastest way that can.

    Args:
        outputs: tensors with the graph that made them; the graph is kept alive.
        vector: the parameters.
        backend: ``"tape"``: sweeps over the recorded graph, node by node, without autograd;
            ``"graph"``: double backward through it; ``"auto"``: the first where it can and where
            it agrees with autograd on a random vector, and the second otherwise. Graphs of a
            structure that has agreed are not compared again. Cost of the comparison: about two
            products.

    Raises:
        ValueError: an unknown backend, or outputs that do not depend on the parameters.
        RuntimeError: a part of the model cannot be differentiated, or its graph was freed.

    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "graph":
        return GraphLinearisation(outputs, vector)
    try:
        tape = TapeLinearisation(outputs, vector)
        if backend == "tape" or tape.structure in _AGREED or agrees_with_autograd(tape):
            _AGREED.add(tape.structure)
            return tape
    except (UnreadableGraph, RuntimeError):
        if backend == "tape":
            raise
    return GraphLinearisation(outputs, vector)


_AGREED: set[int] = set()  # structures of graphs on which the tape was compared with autograd


@torch.no_grad()
def agrees_with_autograd(J: Linearisation) -> bool:
    """Whether ``J'u`` is that of autograd and ``u'(Jv) = v'(J'u)``, for random ``u`` and ``v``."""
    generator = torch.Generator().manual_seed(0)
    used = [i for i, y in enumerate(J.outputs) if y.requires_grad]

    def draw(like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=generator)
        return noise.to(like.device, like.dtype)

    v = draw(J.vector.values())
    u = [draw(y) if i in used else torch.zeros_like(y) for i, y in enumerate(J.outputs)]
    inputs = [J.vector.params[i] for i in J.used]
    grads = differentiate([J.outputs[i] for i in used], inputs, [u[i] for i in used])
    reference = J.vector.ravel_at(J.used, grads)
    tangents = [t.reshape(-1) for t in J.jvp(v)]
    lowest = max(torch.finfo(t.dtype).eps for t in (v, *tangents))
    tolerance = math.sqrt(lowest)  # rounding is far below it, a wrong rule far above
    error = norm(J.vjp(u) - reference)
    along = sum(dot(x.reshape(-1), t) for x, t in zip(u, tangents, strict=True))
    sizes = math.hypot(
        *(norm(x.reshape(-1).double()) * norm(t.double()) for x, t in zip(u, tangents, strict=True))
    )
    gap = abs(along - dot(v, reference))
    return error <= tolerance * norm(reference) and gap <= tolerance * max(
        sizes, norm(v) * norm(reference)
    )
