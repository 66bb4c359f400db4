"""The values of an objective, and how those of two calls compare."""

from __future__ import annotations

from dataclasses import dataclass

from .calls import Buffers
from .closure import Evaluation


@dataclass(frozen=True, kw_only=True)
class Values:
    """The values of an objective at some parameters, over the samples of all processes.

    Attributes:
        loss: The closure's loss.
        kl: KL(old || new) in nats, from float64; 0 without a prediction.
        largest_kl: The KL of the sample where it is largest, if it was asked for.
        constraints: The closure's constraint values.
        moved: The call moved buffers, in some process.
        buffers: The buffers that the call moved in this process, as it left them.

    """

    loss: float
    kl: float
    largest_kl: float | None = None
    constraints: tuple[float, ...] = ()
    moved: bool = False
    buffers: Buffers

    @property
    def violation(self) -> float:
        """The sum of the positive constraint values."""
        return sum(max(c, 0.0) for c in self.constraints)


def difference(one: Values, other: Values, unit: float, promised: float, delta: float) -> str:
    """Say what differs between two calls at the same parameters; empty if nothing does.

    A loss may differ by its rounding, or by too little to mislead a search.

    Args:
        one: The values of the first call.
        other: The values of the other call.
        unit: The rounding of a loss, relative to its size.
        promised: The reduction of the loss that the model predicts.
        delta: The KL radius.

    """
    rounding = unit * max(abs(one.loss), abs(other.loss))
    if not abs(other.loss - one.loss) <= max(rounding, 0.01 * abs(promised)):
        return f"the loss was {one.loss} in the first call and {other.loss} in another"
    if not abs(other.kl - one.kl) <= 0.01 * min(delta, 1.0):
        return f"the KL was {one.kl} in the first call and {other.kl} in another"
    return ""


def agree(one: Values, other: Values, delta: float) -> bool:
    """Say whether two calls agree so well that the buffers between them do not matter."""
    near = abs(other.loss - one.loss) <= 1e-6 * abs(one.loss)
    return near and abs(other.kl - one.kl) <= 1e-4 * min(delta or 1.0, 1.0)


def have_settled(one: Evaluation, other: Evaluation) -> bool:
    """Say whether a call no longer moves the values of the next one, or is not finite."""
    loss, gap = one.loss.item(), 0.0
    if one.joint is not None and other.joint is not None:
        gap = one.joint.frozen().mean_kl(other.joint).item()
    moves = abs(other.loss.item() - loss) > 1e-6 * abs(loss) or gap > 1e-10
    return not moves
