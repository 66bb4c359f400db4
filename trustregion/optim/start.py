"""Where a step starts from: the parameters, and what the closure says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..vector import ParameterVector
from .closure import Calls
from .replicas import Replicas

T = TypeVar("T")


@dataclass(frozen=True)
class Start(Generic[T]):
    """The first call of the closure.

    Attributes:
        theta: the parameters, shape ``(n,)``.
        evaluation: what the closure returned here, with its graph.
        loss: the mean over the samples of all processes.
        constraints: the same of the constraints, shape ``(m,)``, float64.
        share: of the samples that are in this process.

    """

    theta: Tensor
    evaluation: T
    loss: float
    constraints: Tensor
    share: float


def enter(
    calls: Calls,
    read: Callable[[object], T],
    parts: Callable[[T], tuple[Tensor, Tensor, float]],
    vector: ParameterVector,
    replicas: Replicas,
    settings: str,
) -> Start[T]:
    """Look at the parameters and call the closure for the first time.

    Args:
        calls: of the closure.
        read: checks what it returns.
        parts: of that the loss, the constraints, and how many samples they are the mean over.
        vector: the parameters.
        replicas: the processes of the step.
        settings: all that decides about the step, to compare between them.

    """
    held: list[tuple[Tensor, T, Tensor]] = []

    def look() -> Tensor:
        theta = entry_values(vector)
        evaluation = calls.first(read)
        loss, constraints, weight = parts(evaluation)
        held.append((theta, evaluation, constraints.detach().double()))
        m = len(constraints)
        return loss.new_tensor([weight, m, m * m, weight * loss.item()], dtype=torch.float64)

    like = vector.params[0].new_zeros(4, dtype=torch.float64)
    weight, m, squares, loss = replicas.total(look, like).tolist()
    ((theta, evaluation, constraints),) = held
    replicas.require_same(theta, settings)
    if replicas.size * squares != m * m:
        raise ValueError("the processes of the group disagree on the number of constraints")
    here = parts(evaluation)[2]
    if not weight > 0:
        raise ValueError(
            "the closure's prediction holds no samples, or their weights sum to zero: skip the step"
            " of an empty batch"
        )
    share = here / weight
    if len(constraints):
        constraints = replicas.mean(lambda: constraints, constraints, share)
    mean = parts(evaluation)[0].item() if replicas.size == 1 else loss / weight
    return Start(theta, evaluation, mean, constraints, share)


def entry_values(vector: ParameterVector) -> Tensor:
    """Return the parameters as a vector.

    Raises:
        RuntimeError: no graph can be recorded.
        ValueError: a parameter is not finite.

    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "step() cannot run under torch.inference_mode(), where no graph is recorded: leave it,"
            " or use torch.no_grad() around the code that needs it"
        )
    theta = vector.values()
    nonfinite = vector.name_nonfinite(theta)
    if nonfinite is not None:
        raise ValueError(
            f"parameter {nonfinite} holds a NaN or an infinity before the step. This optimizer"
            " never writes one: look at the initialisation, a loaded checkpoint or other code that"
            " writes the parameters"
        )
    return theta


def require_seen(seen: set[int], vector: ParameterVector, slopes: Sequence[Tensor]) -> None:
    """Refuse parameters that move the loss but not the distribution: no KL bounds them."""
    parts = [vector.unravel(g) for g in slopes]
    unused = set(range(len(vector.params))).difference(seen)
    unseen = [i for i in sorted(unused) if any(bool(part[i].any()) for part in parts)]
    if unseen:
        names = ", ".join(vector.names[i] for i in unseen)
        raise ValueError(
            f"the loss depends on parameter(s) {names}, the distribution does not, so the KL radius"
            " says nothing about them. Give them to another optimizer, or return a joint"
            " distribution that covers them, for example {'action': ..., 'value': Normal(v, 1)}"
        )
