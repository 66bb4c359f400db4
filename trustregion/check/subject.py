"""A closure under examination: its values at the parameters and near them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import recorded
from ..autodiff import differentiate, edge_of
from ..optim.closure import Evaluation
from ..optim.objective import Objective
from ..vector import ParameterVector
from .restore import random_states


class Subject:
    """A closure, called as a step calls it: once with a graph, then without.

    Args:
        objective: The closure, which has not been called yet.

    Attributes:
        vector: The parameters.
        theta: Their values.
        first: The call with a graph.
        old: Its prediction, frozen.
        pair: Two calls without a graph.
        drawn: The global random number generators that a call draws from.
        unit: The coarsest rounding unit between the parameters and the values.

    """

    def __init__(self, objective: Objective) -> None:
        self._objective, self.vector = objective, objective.vector
        before = random_states(self.vector.device)
        objective.first()
        after = random_states(self.vector.device)
        self.drawn = [name for name in before if before[name] != after[name]]
        self.theta, self.first = objective.theta, objective.here
        self.old = self.first.prediction.frozen()
        self.pair = [objective.evaluate() for _ in range(2)]
        outputs = [*self.scalars.values(), *self.first.prediction.flat_parameters()]
        self.unit = _coarsest_unit(outputs, self.vector)
        self.here = values_of(self.pair[0])

    @property
    def scalars(self) -> dict[str, Tensor]:
        """The loss and the constraints with their graph, by name."""
        with torch.enable_grad():  # an element is an operation
            constraints = enumerate(self.first.constraints.unbind())
        return {"loss": self.first.loss, **{f"constraint {i}": c for i, c in constraints}}

    def gradients(self) -> list[Sequence[Tensor | None]]:
        """Return the gradients of :attr:`scalars`, None where a parameter is not in the graph."""
        params = self.vector.params
        return [
            differentiate([value], params) if value.requires_grad else [None] * len(params)
            for value in self.scalars.values()
        ]

    def kl(self, e: Evaluation) -> float:
        """Return the KL of a call's prediction from the first one."""
        return self.old.mean_kl(e.prediction).item()

    def changes(self, new: Tensor) -> Tensor:
        """Return the changes of the values at other parameters, and the KL; float64."""
        there = self._objective.at(new)
        change = self.here.new_tensor([there.loss, *there.constraints]) - self.here
        return torch.cat([change, change.new_tensor([there.kl])])


def values_of(e: Evaluation) -> Tensor:
    """Return the loss and the constraints, shape ``(1 + m,)``, float64."""
    return torch.cat([e.loss.detach().double().reshape(1), e.constraints.detach().double()])


def _coarsest_unit(outputs: Sequence[Tensor], vector: ParameterVector) -> float:
    """Return the largest rounding unit on the way from the parameters, as under autocast.

    Cast weights are stairs: steps that are too small to change them would show no rounding.
    """
    todo = [edge_of(t)[0] for t in outputs if t.requires_grad]
    seen, units = set(), [torch.finfo(vector.dtype).eps]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        units += [torch.finfo(t).eps for t in recorded.dtypes(node) if t.is_floating_point]
        todo += [source for source, _ in recorded.sources(node) if source is not None]
    return max(units)
