"""The choice of a backend for the Jacobian products, and its verification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..autodiff import differentiate, out_of_memory, require_unhooked
from ..vector import ParameterVector, dot, norm
from .base import Linearisation, Unusable, trainable
from .graph import GraphLinearisation
from .rules import UnreadableGraph
from .tape import TapeLinearisation

BACKENDS = ("auto", "tape", "graph")


def linearise(
    outputs: Sequence[Tensor], vector: ParameterVector, backend: str = "auto"
) -> Linearisation:
    """Return the Jacobian of ``outputs`` by the fastest backend that is right.

    Args:
        outputs: tensors with the graph that made them; the graph is kept alive.
        vector: the parameters.
        backend: ``"tape"``: sweeps over the recorded graph, node by node, without autograd.
            ``"graph"``: double backward through it. ``"auto"``: the first if it can be made and
            agrees with autograd, and the second otherwise. Each is compared with autograd at random
            vectors, which costs about two products, unless a graph of the same structure, read by
            the same rules, has agreed before. Hooks on activations are seen only where the
            comparison is made, hooks on parameters always.

    Raises:
        ValueError: the backend is unknown, the outputs do not depend on the parameters, or a
            gradient hook changes the gradient of a parameter.
        RuntimeError: a part of the model cannot be differentiated, or its graph was freed.

    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    require_unhooked(vector.params[i] for i in trainable(vector))
    if backend == "tape":
        return _required_tape(outputs, vector)
    tape = _trusted_tape(outputs, vector) if backend == "auto" else None
    return tape or _verified_graph(outputs, vector)


def _required_tape(outputs: Sequence[Tensor], vector: ParameterVector) -> TapeLinearisation:
    """Return the tape; raise if it cannot be built or its products are wrong."""
    try:
        tape, distance = _compared_tape(outputs, vector)
    except (Unusable, UnreadableGraph):
        raise
    except Exception as error:
        if out_of_memory(error) or (isinstance(error, RuntimeError) and "torch said" in str(error)):
            raise
        raise UnreadableGraph(f'the tape cannot be built ({error}): use backend="graph"') from error
    if distance > _tolerance(tape):
        raise UnreadableGraph(
            "the products of the tape differ from autograd's: none of its rules is right for a node"
            ' of this graph. Use backend="graph"'
        )
    return tape


def _trusted_tape(outputs: Sequence[Tensor], vector: ParameterVector) -> Linearisation | None:
    """Return the tape; None if it cannot be built or its products differ from autograd's."""
    try:
        tape, distance = _compared_tape(outputs, vector)
        return tape if distance <= _tolerance(tape) else None
    except Unusable:
        raise
    except Exception as error:  # double backward may still work, or explains why nothing does
        if out_of_memory(error):
            raise
        return None


def _compared_tape(
    outputs: Sequence[Tensor], vector: ParameterVector
) -> tuple[TapeLinearisation, float]:
    tape = TapeLinearisation(outputs, vector)
    return tape, _distance(tape, _tolerance(tape))


def _tolerance(tape: TapeLinearisation) -> float:
    """Return a tolerance far above rounding errors and far below the error of a wrong rule."""
    return math.sqrt(tape.eps)


def _verified_graph(outputs: Sequence[Tensor], vector: ParameterVector) -> Linearisation:
    graph = GraphLinearisation(outputs, vector)
    if graph.eps > 1e-6:  # In half precision rounding can be as large as a missing derivative.
        return graph
    distance = _distance(graph, 0.1)
    if distance == math.inf:
        raise RuntimeError(
            "the model cannot be differentiated twice: the derivative of its gradient is not finite"
            " where the gradient is. Use the default backend, or from_function(fn, params, ...,"
            ' backend="functional"), which differentiates in forward mode'
        )
    if distance > 0.1:
        raise RuntimeError(
            "the model cannot be differentiated twice: the derivative of its gradient is not that"
            " of its outputs. A torch.autograd.Function in it needs a backward made of"
            " differentiable operations"
        )
    return graph  # A NaN distance means NaN values, which the solver reports.


_AGREED: set[int] = set()  # structures of graphs whose products agreed with autograd's
_MANY = 10_000  # structures in that set, after which it is emptied


def _distance(J: TapeLinearisation | GraphLinearisation, tolerance: float) -> float:
    """Return the relative error against autograd; 0 for a structure that has agreed before."""
    if J.structure in _AGREED:
        return 0.0
    found = disagreement(J)
    if found.complete and found.size <= tolerance:
        if len(_AGREED) > _MANY:
            _AGREED.clear()
        _AGREED.add(J.structure)
    return found.size


@dataclass(frozen=True)
class Disagreement:
    """The distance between the products and autograd's.

    Attributes:
        size: the largest relative error found; infinite where the products are not finite though
            the gradients are, and NaN where the outputs or the gradients are not numbers.
        complete: whether the comparison covered every parameter that the outputs depend on.
    """

    size: float
    complete: bool


@torch.no_grad()
def disagreement(J: Linearisation) -> Disagreement:
    r"""Compare ``J'u`` with autograd's ``r`` for a random ``u``, and :math:`u'(Jv)` with ``r'v``.

    The comparison of ``J'u`` is made parameter by parameter. In the second one ``v`` is
    :math:`r_p / |r_p|^2` in each parameter ``p``, so that each of them adds one to ``r'v``, however
    small its derivative is. Parameters whose derivative is below the rounding of the largest one
    are left out.
    """
    generator = torch.Generator().manual_seed(0)
    u = [
        torch.randn(y.shape, generator=generator, device="cpu").to(y) * y.requires_grad
        for y in J.outputs
    ]
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
    if not any(sizes):  # All units are dead, so the products must be zero along any vector.
        v = torch.randn(v.shape, generator=generator, device="cpu").to(v)
    terms = [(x.reshape(-1), t.reshape(-1)) for x, t in zip(u, J.jvp(v), strict=True)]
    count, rounding = sum(seen), J.eps * sum(norm(x) * norm(t) for x, t in terms)
    gap = abs(sum(dot(x, t) for x, t in terms) - count)
    errors.append(max(gap - rounding, 0.0) / math.sqrt(count or 1))
    complete = all(seen[i] for i in J.used)
    if any(bool(y.isnan().any()) for y in J.outputs) or not all(
        map(math.isfinite, [*sizes, norm(v) ** 2])
    ):
        return Disagreement(math.nan, complete)
    if not any(sizes):
        errors += [norm(t) for _, t in terms]
    finite = all(map(math.isfinite, [*errors, gap, rounding]))
    return Disagreement(max(errors) if finite else math.inf, complete)
