"""What a closure may return, checked, with errors that say what to return instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from torch.distributions import Distribution

from ..distributions import Joint, Prediction, joint_of

NaturalClosure: TypeAlias = (
    "Callable[[], tuple[Tensor, Prediction] | tuple[Tensor, Prediction, Tensor]]"
)
NewtonClosure: TypeAlias = (
    "Callable[[], Tensor | tuple[Tensor, Tensor | tuple[Tensor, ...] | Prediction]]"
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of one call of a closure.

    Attributes:
        loss: The loss, one number.
        constraints: Values that should not be positive, shape ``(m,)``; empty without constraints.
        joint: The predicted distribution, or None if the closure returns none.
        outputs: The model outputs that the loss was computed from; empty if not returned.

    """

    loss: Tensor
    constraints: Tensor
    joint: Joint | None = None
    outputs: tuple[Tensor, ...] = ()

    @property
    def prediction(self) -> Joint:
        """The predicted distribution of a closure that :func:`read_natural` has read."""
        assert self.joint is not None
        return self.joint

    @property
    def total(self) -> float:
        """The number of samples, or the sum of their weights, that the loss is the mean over.

        A closure that returns the loss alone counts as one sample.
        """
        if self.joint is not None:
            return self.joint.total
        return float(self.outputs[0].shape[0] if self.outputs and self.outputs[0].ndim else 1)


def read_natural(returned: object) -> Evaluation:
    """Check what a closure of ``(loss, distribution)`` returned, with or without constraints."""
    if not (isinstance(returned, tuple) and len(returned) in (2, 3)):
        raise TypeError(
            f"the closure must return the tuple (loss, distribution), got {_shown(returned)}. The"
            " distribution is the model's prediction, whose KL is bounded: for example"
            " `return loss, Categorical(logits=logits)`"
        )
    loss, prediction, *rest = returned
    if isinstance(loss, Distribution) and isinstance(prediction, Tensor):
        raise TypeError("the closure returned (distribution, loss): the loss comes first")
    loss = _loss(loss)
    joint = joint_of(prediction)
    return Evaluation(loss=loss, constraints=_constraints(rest, loss), joint=joint)


def read_newton(returned: object) -> Evaluation:
    """Check what a closure of a loss, or of ``(loss, outputs or distribution)``, returned."""
    if not (isinstance(returned, tuple) and len(returned) == 2):
        loss = _loss(returned)
        return Evaluation(loss=loss, constraints=loss.new_zeros(0))
    loss, second = _loss(returned[0]), returned[1]
    none = loss.new_zeros(0)
    if isinstance(second, Tensor):
        return Evaluation(loss=loss, constraints=none, outputs=(second,))
    if isinstance(second, (tuple, list)) and all(isinstance(t, Tensor) for t in second):
        return Evaluation(loss=loss, constraints=none, outputs=tuple(second))
    return Evaluation(loss=loss, constraints=none, joint=joint_of(second))


def _loss(returned: object) -> Tensor:
    if not isinstance(returned, Tensor):
        hint = ": do not call .item()" if isinstance(returned, float) else ""
        raise TypeError(f"the loss must be a tensor, got {_shown(returned)}{hint}")
    if returned.numel() != 1 or not returned.is_floating_point():
        raise ValueError(
            f"the loss must be one real number, got shape {tuple(returned.shape)}, dtype"
            f" {returned.dtype}: reduce it, for example with .mean()"
        )
    return returned


def _constraints(rest: list[object], loss: Tensor) -> Tensor:
    if not rest:
        return loss.new_zeros(0)
    (given,) = rest
    if not isinstance(given, Tensor) or given.ndim != 1 or not given.is_floating_point():
        shown = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(
            "constraints must be a real tensor of shape (m,), one value for each, which should not"
            f" be positive, got {shown}: for example torch.stack([cost - limit])"
        )
    return given


def _shown(returned: object) -> str:
    sized = isinstance(returned, (tuple, list))
    return f"a {type(returned).__name__}" + (f" of length {len(returned)}" if sized else "")
