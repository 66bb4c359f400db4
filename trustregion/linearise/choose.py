"""Which way of differentiating makes the Jacobian products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ..autodiff import differentiate
from ..vector import ParameterVector, dot, norm
from .base import Linearisation, trainable
from .graph import GraphLinearisation
from .tape import TapeLinearisation

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
            it agrees with autograd at random vectors, and the second otherwise. Graphs of a
            structure that has agreed are not compared again. Cost of the comparison: about two
            products. Gradient hooks are seen only where it is made.

    Raises:
        ValueError: an unknown backend, or outputs that do not depend on the parameters.
        RuntimeError: a part of the model cannot be differentiated, or its graph was freed.

    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "tape":
        return TapeLinearisation(outputs, vector)
    if backend == "auto":
        with suppress(RuntimeError):  # autograd may still be able, or says why it is not
            tape = TapeLinearisation(outputs, vector)
            # rounding is far below the root of the unit, a wrong rule far above
            if _is_right(tape, math.sqrt(tape.eps)):
                return tape
    graph = GraphLinearisation(outputs, vector)
    # far above the rounding of single precision, far below a derivative left out
    if graph.eps < 1e-6 and not _is_right(graph, 0.1):
        raise RuntimeError(
            "the model cannot be differentiated twice: the derivative of its gradient is not that"
            " of its outputs. A torch.autograd.Function in it needs a backward made of"
            " differentiable operations"
        )
    return graph


_AGREED: set[int] = set()  # structures of graphs whose products were those of autograd
_MANY = 10_000  # of them, after which the set is emptied


def _is_right(J: TapeLinearisation | GraphLinearisation, tolerance: float) -> bool:
    """Whether the products are those of autograd; the tape only where there is no doubt."""
    structure = J.structure
    if structure in _AGREED:
        return True
    found = disagreement(J)
    right = found.size <= tolerance
    if right and found.complete:
        if len(_AGREED) > _MANY:
            _AGREED.clear()
        _AGREED.add(structure)
    return right or (math.isnan(found.size) and isinstance(J, GraphLinearisation))


@dataclass(frozen=True)
class Disagreement:
    """How far the products are from those of autograd.

    Attributes:
        size: the largest relative error found; NaN where the values are not finite.
        complete: every parameter that is used had a part in it.
    """

    size: float
    complete: bool


@torch.no_grad()
def disagreement(J: Linearisation) -> Disagreement:
    r"""Compare ``J'u`` with autograd's ``r`` for a random ``u``, and :math:`u'(Jv)` with ``r'v``.

    ``J'u`` parameter by parameter. For the second, ``v`` is :math:`r_p / |r_p|^2` in each parameter
    ``p``, so that every one of them, however small its derivative, adds one to ``r'v``; what is
    below the rounding of the largest is left out.
    """
    generator = torch.Generator().manual_seed(0)
    u = [torch.randn(y.shape, generator=generator).to(y) * y.requires_grad for y in J.outputs]
    with_graph = [i for i, y in enumerate(J.outputs) if y.requires_grad]
    positions = trainable(J.vector)
    inputs = [J.vector.params[i] for i in positions]
    grads = differentiate([J.outputs[i] for i in with_graph], inputs, [u[i] for i in with_graph])
    reference = J.vector.unravel(J.vector.ravel_at(positions, grads))
    sizes = [norm(r.reshape(-1)) for r in reference]
    noise = min(100 * J.eps, 0.01) * max(sizes)
    pairs = zip(J.vector.unravel(J.vjp(u)), reference, sizes, strict=True)
    errors = [norm((x - r).reshape(-1)) / (size + noise or 1.0) for x, r, size in pairs]
    seen = [size > noise for size in sizes]
    parts = zip(reference, sizes, seen, strict=True)
    v = J.vector.ravel(
        [r / size / size if here else torch.zeros_like(r) for r, size, here in parts]
    )
    terms = [(x.reshape(-1), t.reshape(-1)) for x, t in zip(u, J.jvp(v), strict=True)]
    count, rounding = sum(seen), J.eps * sum(norm(x) * norm(t) for x, t in terms)
    gap = abs(sum(dot(x, t) for x, t in terms) - count)
    errors.append(max(gap - rounding, 0.0) / math.sqrt(count or 1))
    finite = count and all(map(math.isfinite, [*errors, gap, rounding]))
    return Disagreement(max(errors) if finite else math.nan, all(seen[i] for i in J.used))
