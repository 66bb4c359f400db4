"""Jacobian products by double backward through the recorded graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import recorded
from ..autodiff import differentiate, edge_of, upstream
from ..vector import ParameterVector
from .base import Linearisation, Unmoved, active, require_used, rounding_unit, trainable


class GraphLinearisation(Linearisation):
    """``J`` by double backward, for any model that torch can differentiate twice.

    The graph is differentiated once, into ``w -> J'w``, recorded at a random ``w``. Its
    derivative in ``w`` along ``v`` is ``Jv``: one backward pass through the recorded map. Memory:
    the graph, and about as much again for its derivative.

    Raises:
        ValueError: the outputs do not depend on the parameters.
        RuntimeError: a part of the model cannot be differentiated twice, or its graph was freed.

    """

    backend = "graph"

    def __init__(self, outputs: Sequence[Tensor], vector: ParameterVector) -> None:
        positions = trainable(vector)
        self._active = active(outputs)
        self._y = [outputs[i] for i in self._active]
        # This raises for a Function of which Jv would be zero.
        nodes = [node for node, _ in upstream([edge_of(y) for y in self._y])]
        kinds = tuple(type(node).__name__ for node in nodes)
        self.structure = hash((self.backend, kinds, tuple(y.shape for y in self._y)))
        dtypes = (dtype for node in nodes for dtype in recorded.dtypes(node))
        self.eps = rounding_unit([vector.dtype, *dtypes])
        generator = torch.Generator().manual_seed(0)
        # The map is linear in w, but some nodes compute it through log(w), which fails at zero.
        random = (torch.randn(y.shape, generator=generator, device="cpu") for y in self._y)
        self._w = [w.to(y).requires_grad_() for w, y in zip(random, self._y, strict=True)]
        inputs = [vector.params[i] for i in positions]
        with torch.enable_grad():
            pullback = differentiate(self._y, inputs, self._w, create_graph=True)
        used = [
            (i, jt_w)
            for i, jt_w in zip(positions, pullback, strict=True)
            if jt_w is not None and jt_w.requires_grad
        ]
        super().__init__(outputs, vector, [i for i, _ in used])
        require_used(self.used, vector)
        self._inputs = [vector.params[i] for i in self.used]
        self._pullback = [jt_w for _, jt_w in used]
        self._unmoved = Unmoved(self._inputs)

    def jvp(self, v: Tensor) -> tuple[Tensor, ...]:
        """Return ``Jv``. Cost: one backward pass through ``w -> J'w``."""
        self._unmoved.check()
        parts = self.vector.tangents(v)
        tangents = differentiate(self._pullback, self._w, [parts[i] for i in self.used])
        slots: list[Tensor | None] = [None] * len(self.outputs)
        for i, tangent in zip(self._active, tangents, strict=True):
            slots[i] = tangent
        pairs = zip(slots, self.outputs, strict=True)
        return tuple(torch.zeros_like(y) if t is None else t for t, y in pairs)

    def vjp(self, u: Sequence[Tensor]) -> Tensor:
        """Return ``J'u``. Cost: one backward pass through the model's graph."""
        self._unmoved.check()
        grads = differentiate(self._y, self._inputs, [u[i] for i in self._active])
        return self.vector.ravel_at(self.used, grads)
