"""A closure under examination: its values at the parameters and near them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..autodiff import differentiate, edge_of
from ..optim.closure import Calls, Closure, Evaluation, read_prediction
from ..vector import ParameterVector
from .restore import random_states


class Subject:
    """A closure, called as a step calls it: under grad once, then without.

    Args:
        closure: the closure.
        vector: the parameters, at whose present values it is called three times.

    Attributes:
        vector: the parameters.
        theta: their values.
        first: the call under grad, with its graph.
        old: its prediction, frozen.
        pair: two calls without a graph.
        drawn: the global random number generators that a call draws from.
        unit: the coarsest rounding unit between the parameters and the values.

    """

    def __init__(self, closure: Closure, vector: ParameterVector, theta: Tensor) -> None:
        self.vector, self.theta = vector, theta
        before = random_states(vector.device)
        self._calls = Calls(closure, vector.device)
        self.first = self._calls.first(read_prediction)
        after = random_states(vector.device)
        self.drawn = [name for name in before if before[name] != after[name]]
        self.old = self.first.joint.frozen()
        self.pair = [self._calls.trial(read_prediction) for _ in range(2)]
        outputs = [*self.scalars.values(), *self.first.joint.flat_parameters()]
        self.unit = _coarsest_unit(outputs, vector)
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

    def changes(self, new: Tensor) -> Tensor:
        """Return by how much the values change at other parameters, and the KL; float64."""
        self.vector.assign(new)
        trial = self._calls.trial(read_prediction)
        kl = self.old.mean_kl(trial.joint)
        return torch.cat([values_of(trial) - self.here, kl.reshape(1)])


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
        dtypes = (getattr(meta, "dtype", None) for meta in node._input_metadata)
        units += [torch.finfo(t).eps for t in dtypes if t is not None and t.is_floating_point]
        todo += [source for source, _ in node.next_functions if source is not None]
    return max(units)
