"""The interface of a linearized model: products with its Jacobian and its transpose."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..vector import ParameterVector


class Unusable(ValueError):
    """No backend can linearize these outputs with respect to these parameters."""


class Linearisation(abc.ABC):
    r"""The Jacobian :math:`J = dy/d\theta` of a model's outputs at its current parameters.

    It is made once at one point, from the graph that computed the outputs. No product runs the
    model again.

    Attributes:
        outputs: the tensors ``y``; those without a graph do not depend on the parameters.
        vector: the parameters as one flat vector.
        used: positions of the parameters that the outputs depend on.
        backend: the name of the method that computes the products.
        eps: the largest rounding unit of the dtypes that the products are computed in.
    """

    backend: str
    eps: float

    def __init__(
        self, outputs: Sequence[Tensor], vector: ParameterVector, used: Sequence[int]
    ) -> None:
        self.outputs, self.vector, self.used = tuple(outputs), vector, tuple(used)

    @abc.abstractmethod
    def jvp(self, v: Tensor) -> tuple[Tensor, ...]:
        """Return ``J v`` for ``v`` of shape ``(n,)``: one tensor of the shape of each output.

        The next call may overwrite the result.
        """

    @abc.abstractmethod
    def vjp(self, u: Sequence[Tensor]) -> Tensor:
        """Return ``J'u`` as a new tensor of shape ``(n,)``; ``u`` is not modified."""


def rounding_unit(dtypes: Iterable[torch.dtype]) -> float:
    """Return the largest rounding unit of the floating-point dtypes."""
    return max(torch.finfo(d).eps for d in {*dtypes} if d.is_floating_point)


def active(outputs: Sequence[Tensor]) -> list[int]:
    """Return the positions of the outputs that carry a graph.

    Raises:
        Unusable: no output carries a graph, or one was made in inference mode.

    """
    if any(y.is_inference() for y in outputs):
        raise Unusable(
            "the outputs were made under torch.inference_mode(), which records no graph: leave it,"
            " or use torch.no_grad() around the code that needs it"
        )
    positions = [i for i, y in enumerate(outputs) if y.requires_grad]
    if not positions:
        raise Unusable(
            "the outputs carry no graph: build the distribution, or the loss, from the model's"
            " outputs with grad enabled, without detach(), .item() or torch.no_grad()"
        )
    return positions


def trainable(vector: ParameterVector) -> list[int]:
    """Return the positions of the parameters that require a gradient.

    Raises:
        Unusable: no parameter does.

    """
    positions = [i for i, p in enumerate(vector.params) if p.requires_grad]
    if not positions:
        raise Unusable("no parameter requires a gradient: all of them are frozen")
    return positions


def require_used(used: Sequence[int], vector: ParameterVector) -> None:
    """Raise :class:`Unusable` if the outputs use none of the parameters."""
    if not used:
        raise Unusable(
            "the outputs do not depend on the parameters: their graph leads to none of the"
            f" {len(vector.params)} given"
        )


class Unmoved:
    """Tensors that a linearization refers to and that must not be modified while it is used."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._versions = [(t, t._version) for t in tensors]

    def check(self) -> None:
        """Raise a RuntimeError if one of the tensors was modified."""
        for tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    "a tensor that the graph needs was modified in place after the forward pass:"
                    " the parameters have moved, or an activation was overwritten. Build the"
                    " operator again at the new parameters"
                )
