"""Jacobian products by sweeps over the recorded graph, with one small rule per node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .. import recorded
from ..autodiff import explained, raise_in_words, require_recorded
from ..recorded import Place
from ..vector import ParameterVector
from .base import Linearisation, Unmoved, active, require_used, rounding_unit, trainable
from .buffers import plan
from .catalogue import rule_for
from .rules import Rule, Site, Step, UnreadableGraph
from .shapes import Transpose


class TapeLinearisation(Linearisation):
    """``J`` by a forward and a backward sweep over the graph that the outputs carry.

    The nodes of the graph expose what they saved. A forward sweep with the Jacobian of each node
    gives ``Jv``, and a backward sweep gives ``J'u``. A dense layer costs two matrix products in
    each sweep. Nothing is recorded, intermediate results stay in memory that all products share,
    and nothing is concatenated. Memory: the graph, the slopes of the activation functions, and the
    intermediate results that are alive at the same time.

    Raises:
        UnreadableGraph: a node is not one of torch's own, or no rule can differentiate it.
        ValueError: the outputs do not depend on the parameters.
        RuntimeError: the graph was freed, or a tensor that it saved was overwritten.

    """

    backend = "tape"

    def __init__(self, outputs: Sequence[Tensor], vector: ParameterVector) -> None:
        positions = trainable(vector)
        with_graph = active(outputs)
        edges = [get_gradient_edge(y) if i in with_graph else None for i, y in enumerate(outputs)]
        if any(vector.params[i].grad_fn is not None for i in positions):
            raise UnreadableGraph(
                "a parameter was computed from other tensors, so that it is no leaf of the graph:"
                ' use backend="graph"'
            )
        index = {id(vector.params[i]): i for i in positions}
        with explained():
            self._read(edges, index)
        super().__init__(outputs, vector, sorted(self._leaves.values()))
        require_used(self.used, vector)
        saved = [t for step in self._steps for t in step.rule.site.saved_tensors]
        places = [place for step in self._steps for place in step.rule.site.outputs]
        self.eps = rounding_unit([vector.dtype, *(place.dtype for place in places)])
        self._unmoved = Unmoved([*saved, *(vector.params[i] for i in self.used)])
        self._v, self._jt_u = (
            torch.zeros(vector.numel, dtype=vector.dtype, device=vector.device) for _ in range(2)
        )
        self._plan()

    def _plan(self) -> None:
        """Plan the memory, and precompute everything that is the same in each sweep."""
        ends = {value for value in self._ends if value is not None}
        parts = self.vector.unravel(self._jt_u)
        results = {value: parts[position] for value, position in self._leaves.items()}
        written = plan(self._steps, results, ends)
        self._collected = [(v, part) for v, part in results.items() if v not in written]
        self._backward = [
            step
            for step in reversed(self._steps)
            # A cotangent that is written directly needs no transposition.
            if not (isinstance(step.rule, Transpose) and step.inputs[0] in written)
        ]
        tangents: list[Tensor | None] = [None] * self._values
        parts = self.vector.unravel(self._v)
        for value, position in self._leaves.items():
            tangents[value] = parts[position]
        self._forward: list[Step] = []
        for step in self._steps:
            out = step.rule.fixed_tangent([None if i < 0 else tangents[i] for i in step.inputs])
            tangents[step.outputs.start] = out
            if out is None or step.rule.buffered:
                self._forward.append(step)
        self._tangents = tangents

    def _read(self, edges: Sequence[Any], index: dict[int, int]) -> None:
        """Number the values, and find the rule of each node that depends on the parameters."""
        self._leaves: dict[int, int] = {}  # value: position of the parameter
        self._steps: list[Step] = []
        first: dict[Any, int] = {}
        places: dict[Any, tuple[Place, ...]] = {}
        self._values = 0
        for node in _topological([e.node for e in edges if e is not None]):
            places[node] = recorded.outputs(node)
            size = len(places[node])
            variable = recorded.leaf(node)
            inputs = [first[n] + k if n in first else -1 for n, k in recorded.sources(node)]
            if variable is not None:
                if id(variable) not in index:
                    continue
                self._leaves[self._values] = index[id(variable)]
            elif max(inputs, default=-1) < 0:
                continue
            else:
                site = _site(node, inputs, places)
                values = range(self._values, self._values + size)
                self._steps.append(Step(rule_for(site), tuple(inputs), values))
            first[node] = self._values
            self._values += size
        known = (None if e is None else first.get(e.node) for e in edges)
        self._ends = [
            None if start is None or e is None else start + e.output_nr
            for e, start in zip(edges, known, strict=True)
        ]
        self._require_first_outputs()

    def _require_first_outputs(self) -> None:
        """Raise if anything depends on an output that the rule of its node ignores."""
        left_out = {v for s in self._steps if type(s.rule) is not Rule for v in s.outputs[1:]}
        read = {*(end for end in self._ends if end is not None)}
        read.update(*(step.inputs for step in self._steps))
        for step in self._steps:
            if left_out & read & {*step.outputs}:
                raise UnreadableGraph(
                    f"a second output of {recorded.name(step.rule.site.node)} is used, such as a"
                    ' mean or a scale: use backend="graph"'
                )

    @property
    def structure(self) -> int:
        """A hash of the nodes, their numbers and shapes, their connections and their rules."""
        program = tuple(
            (step.inputs, type(step.rule), step.rule.case, step.rule.site.facts())
            for step in self._steps
        )
        return hash((program, tuple(self._ends), tuple(self._leaves.items())))

    @torch.no_grad()
    def jvp(self, v: Tensor) -> tuple[Tensor, ...]:
        """Return ``Jv``. Cost: one forward sweep."""
        self._unmoved.check()
        if v.shape != self._v.shape:
            raise ValueError(f"v must have the shape {tuple(self._v.shape)}, got {tuple(v.shape)}")
        try:  # This is cheaper than a context manager in every product.
            return self._forwards(v)
        except RuntimeError as error:
            raise_in_words(error)

    def _forwards(self, v: Tensor) -> tuple[Tensor, ...]:
        self._v.copy_(v)
        tangents = self._tangents.copy()
        for step in self._forward:
            out = step.rule.jvp([None if i < 0 else tangents[i] for i in step.inputs])
            if isinstance(out, Tensor):
                tangents[step.outputs.start] = out
            else:
                tangents[step.outputs.start : step.outputs.stop] = out
        out = [None if end is None else tangents[end] for end in self._ends]
        pairs = zip(out, self.outputs, strict=True)
        return tuple(torch.zeros_like(y) if t is None else t for t, y in pairs)

    @torch.no_grad()
    def vjp(self, u: Sequence[Tensor]) -> Tensor:
        """Return ``J'u``. Cost: one backward sweep."""
        self._unmoved.check()
        try:
            return self._backwards(u)
        except RuntimeError as error:
            raise_in_words(error)

    def _backwards(self, u: Sequence[Tensor]) -> Tensor:
        cotangents: list[Tensor | None] = [None] * self._values
        for end, part in zip(self._ends, u, strict=True):
            if end is not None:
                _accumulate(cotangents, end, part)
        for step in self._backward:
            given = cotangents[step.outputs.start : step.outputs.stop]
            if given[0] is None and all(c is None for c in given):
                step.rule.vanish()
                continue
            for value, grad in zip(step.inputs, step.rule.vjp(given), strict=True):
                if value >= 0 and grad is not None:
                    _accumulate(cotangents, value, grad)
        for value, part in self._collected:
            grad = cotangents[value]
            _ = part.zero_() if grad is None else part.copy_(grad)
        return self._jt_u.clone()


def _accumulate(cotangents: list[Tensor | None], value: int, grad: Tensor) -> None:
    present = cotangents[value]
    cotangents[value] = grad if present is None else present + grad


def _topological(roots: Sequence[Any]) -> list[Any]:
    """Return the nodes behind the roots, each after those that it depends on."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            require_recorded(node)
            seen.add(node)
            stack.append((node, True))
            stack += [(n, False) for n, _ in recorded.sources(node) if n is not None]
    return order


def _site(node: Any, inputs: Sequence[int], places: Mapping[Any, tuple[Place, ...]]) -> Site:
    """Return a node and its surroundings.

    Raises:
        UnreadableGraph: the node is complex, or is a custom Function.

    """
    outputs = places[node]
    if any(place.dtype.is_complex for place in outputs):
        raise UnreadableGraph('the graph holds complex numbers: use backend="graph"')
    if recorded.is_custom(node):
        raise UnreadableGraph(
            f"the graph holds {recorded.name(node)}, which cannot be linearised on its own: use"
            ' backend="graph"'
        )
    before = [None if n is None else places[n][k] for n, k in recorded.sources(node)]
    return Site(node, tuple(i >= 0 for i in inputs), tuple(before), outputs)
