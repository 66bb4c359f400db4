"""Jacobian products of single nodes of the autograd graph, from what the node has saved.

A node is callable: it maps the cotangents of its outputs to those of its inputs, and can be
differentiated itself. So every node has a rule; those of the common ones, below, save work.
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
    """The graph holds a node that is not a plain function; another backend may cope with it."""


@dataclass(frozen=True)
class Site:
    """A node of the graph, and its surroundings.

    Attributes:
        node: the node.
        needs: for each input, whether the parameters reach it.
        inputs: what each input is; None where it carries no graph.
        outputs: what each output is.
        saved_tensors: filled by :meth:`saved`; a later write to one of them must be noticed.
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
        """Return all there is to know of the node but the elements of its tensors."""
        return (recorded.name(self.node), self.inputs, self.outputs, self.numbers())

    def numbers(self) -> tuple[object, ...]:
        """Return all numbers that the node has saved; of a tensor only that there is one."""
        return tuple(_shown(self.number(name)) for name in recorded.saved_names(self.node))


def _shown(value: Any) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(map(_shown, value))
    known = isinstance(value, (int, float, str)) or value is None
    return value if known else type(value).__name__


@dataclass(frozen=True)
class Step:
    """A node in the order of the forward pass: a rule between numbered values.

    Attributes:
        rule: its Jacobian.
        inputs: the values it takes; -1 for one that the parameters do not reach.
        outputs: the values it makes, one after the other.
    """

    rule: Rule
    inputs: tuple[int, ...]
    outputs: range


class Rule:
    """The Jacobian of any node, by calling it: the derivative of its pullback gives ``jvp``.

    Attributes:
        buffered: the products write to ``tangent`` and ``cotangents`` where these are set.
        elementwise: these may be the memory of what the product is taken of.
        fresh: the tangents share no memory with those of the inputs.
        gives: the tangents, and the cotangents it writes to no given memory, are new tensors that
            nothing else refers to, so that the next rule may write over them.
        case: what else decides whether the rule is right: facts about the saved values.
        over: whether :meth:`jvp` and :meth:`vjp` write over what they are given.
        tangent: where :meth:`jvp` writes.
        cotangents: where :meth:`vjp` writes, for each input.
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
        """Whether :meth:`vjp` writes to ``cotangents[which]`` if set, or else to a new tensor."""
        return self.buffered and self.site.needs[which]

    def fixed_tangent(self, tangents: Tangents) -> Tensor | None:
        """Return the tensor that :meth:`jvp` makes of these, if it is the same one each time."""
        return tangents[0] if self.over[0] else self.tangent

    def vanish(self) -> None:
        """Do what :meth:`vjp` does for a cotangent of zero."""
        for cotangent in self.cotangents:
            if cotangent is not None:
                cotangent.zero_()

    def jvp(self, tangents: Tangents) -> Tensor | Sequence[Tensor]:
        """Return the change of the output, or outputs, for that of the inputs; None is zero."""
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
        """Record the pullback at ones: ``w``, and what the node makes of it for each input.

        It is linear in ``w``; yet some nodes compute it by way of the logarithm of ``w``, which has
        no derivative at zero.
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
        """Return the cotangent of each input for those of the outputs; None where not needed."""
        grads = self.site.node(*cotangents)
        grads = grads if isinstance(grads, tuple) else (grads,)
        triples = zip(grads, self.site.needs, self.site.inputs, strict=True)
        return [reduce_to(place, g) if need else None for g, need, place in triples]


def reduce_to(place: Place | None, grad: Tensor | None) -> Tensor | None:
    """Sum over the dimensions that the node broadcast, as the engine does between two nodes."""
    if grad is None or place is None:
        return grad
    if grad.shape != place.shape:
        grad = grad.sum_to_size(place.shape)
    return grad if grad.dtype is place.dtype else grad.to(place.dtype)
