"""Jacobian products of single nodes of the autograd graph, from what the node has saved.

A node is callable. It maps the cotangents of its outputs to the cotangents of its inputs, and this
map can be differentiated in turn, so that the general rule works for any node. The special rules of
common nodes save work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import recorded
from ..recorded import Place

Tangents: TypeAlias = "Sequence[Tensor | None]"


class UnreadableGraph(RuntimeError):
    """The graph holds a node that no rule can read; another backend may still differentiate it."""


@dataclass(frozen=True)
class Site:
    """A node of the graph and its surroundings.

    Attributes:
        node: the node.
        needs: for each input, whether it depends on the parameters.
        inputs: the shape, dtype and device of each input; None for one without a graph.
        outputs: the shape, dtype and device of each output.
        saved_tensors: the tensors that :meth:`saved` has returned. The products are invalid once
            one of them has been modified.
    """

    node: Any
    needs: tuple[bool, ...]
    inputs: tuple[Place | None, ...]
    outputs: tuple[Place, ...]
    saved_tensors: list[Tensor] = field(default_factory=list)

    def saved(self, name: str) -> Tensor:
        """Return a tensor that the node has saved, without its graph."""
        tensor = recorded.saved(self.node, name).detach()
        self.saved_tensors.append(tensor)
        return tensor

    def number(self, name: str) -> Any:
        """Return a number, or a list of them, that the node has saved."""
        return recorded.saved(self.node, name)

    def facts(self) -> tuple[object, ...]:
        """Return everything about the node except the elements of its tensors."""
        return (recorded.name(self.node), self.inputs, self.outputs, self.numbers())

    def numbers(self) -> tuple[object, ...]:
        """Return all numbers that the node has saved, with a placeholder for each tensor."""
        return tuple(_shown(self.number(name)) for name in recorded.saved_names(self.node))


def _shown(value: Any) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(map(_shown, value))
    known = isinstance(value, (int, float, str)) or value is None
    return value if known else type(value).__name__


@dataclass(frozen=True)
class Step:
    """A node as one step of the forward pass, which maps numbered values to numbered values.

    Attributes:
        rule: the Jacobian of the node.
        inputs: the numbers of its inputs; -1 for one that does not depend on the parameters.
        outputs: the numbers of its outputs.
    """

    rule: Rule
    inputs: tuple[int, ...]
    outputs: range


class Rule:
    """The general rule: it calls the node for ``vjp``, and differentiates that call for ``jvp``.

    Attributes:
        buffered: whether the products write to ``tangent`` and ``cotangents`` if these are set.
        elementwise: whether a product may be written over its argument.
        fresh: whether the tangents of the outputs share no memory with those of the inputs.
        gives: whether the products are new tensors that nothing else refers to, so that the next
            rule may write over them. Cotangents with a buffer of their own are excepted.
        case: facts about the saved values that decide whether the rule is right. They are part of
            the structure of a graph.
        over: whether :meth:`jvp` and :meth:`vjp` write over their arguments.
        tangent: the buffer that :meth:`jvp` writes to.
        cotangents: the buffers that :meth:`vjp` writes to, one for each input.
    """

    buffered = elementwise = fresh = gives = False
    case: tuple[object, ...] = ()

    def __init__(self, site: Site) -> None:
        self.site = site
        self.tangent: Tensor | None = None
        self.over = [False, False]
        self.cotangents: list[Tensor | None] = [None] * len(site.needs)
        self._pullback: tuple[list[Tensor], list[Tensor | None]] | None = None

    def writes(self, which: int) -> bool:
        """Return whether :meth:`vjp` writes to ``cotangents[which]`` unless it is None."""
        return self.buffered and self.site.needs[which]

    def fixed_tangent(self, tangents: Tangents) -> Tensor | None:
        """Return the tensor that :meth:`jvp` returns, if it is the same one in each sweep."""
        return tangents[0] if self.over[0] else self.tangent

    def vanish(self) -> None:
        """Write zeros to the buffers, as :meth:`vjp` would for a cotangent of zero."""
        for cotangent in self.cotangents:
            if cotangent is not None:
                cotangent.zero_()

    def jvp(self, tangents: Tangents) -> Tensor | Sequence[Tensor]:
        """Return the tangents of the outputs for those of the inputs; None stands for zero."""
        if self._pullback is None:
            self._pullback = self._linearise()
        w, pullback = self._pullback
        pairs = [
            (p, t.to(p.dtype).expand_as(p))
            for p, t in zip(pullback, tangents, strict=True)
            if p is not None and t is not None and p.requires_grad
        ]
        if not pairs:
            return [torch.zeros_like(x) for x in w] if len(w) > 1 else torch.zeros_like(w[0])
        along, by = [p for p, _ in pairs], [t for _, t in pairs]
        grads = torch.autograd.grad(along, w, by, retain_graph=True, allow_unused=True)
        out = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, w, strict=True)]
        return out if len(out) > 1 else out[0]

    def _linearise(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return ``w``, a tensor of ones for each output, and its image under the node's pullback.

        The pullback is linear in ``w``, but some nodes compute it through the logarithm of ``w``,
        which has no derivative at zero.
        """
        w = [
            torch.ones(p.shape, dtype=p.dtype, device=p.device, requires_grad=True)
            for p in self.site.outputs
        ]
        with torch.enable_grad():
            pullback = self.site.node(*w)
        pullback = pullback if isinstance(pullback, tuple) else (pullback,)
        needed = zip(pullback, self.site.needs, strict=True)
        return w, [p if need else None for p, need in needed]

    def vjp(self, cotangents: Tangents) -> Sequence[Tensor | None]:
        """Return the cotangents of the inputs for those of the outputs; None where not needed."""
        grads = self.site.node(*cotangents)
        grads = grads if isinstance(grads, tuple) else (grads,)
        triples = zip(grads, self.site.needs, self.site.inputs, strict=True)
        return [reduce_to(place, g) if need else None for g, need, place in triples]


def reduce_to(place: Place | None, grad: Tensor | None) -> Tensor | None:
    """Sum a cotangent over the dimensions that were broadcast, as the autograd engine does."""
    if grad is None or place is None:
        return grad
    if grad.shape != place.shape:
        grad = grad.sum_to_size(place.shape)
    return grad if grad.dtype is place.dtype else grad.to(place.dtype)
