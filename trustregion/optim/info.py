"""What an optimizer says about its last step."""

from __future__ import annotations

from dataclasses import dataclass

from ..status import Status


@dataclass(frozen=True)
class StepInfo:
    """The account of one step.

    Losses are the closure's own values; reductions are in the direction of optimisation, so that
    positive is better also under ``maximize``.

    Attributes:
        status: how the step ended; ``ACCEPTED`` if the parameters moved, or ``RECOVERING`` if they
            did to reduce the violation of a constraint.
        loss: loss before the step.
        new_loss: loss after it; equal to ``loss`` if nothing moved.
        kl: KL(old || new) after it in nats, from float64; 0 if nothing moved.
        largest_kl: that of the sample where it is largest, if ``max_kl`` caps it.
        predicted_reduction: reduction the linear model promised for the last trial.
        actual_reduction: reduction achieved; 0 if nothing moved.
        delta: the KL radius of this step.
        radius: the radius of the last trial of :class:`NewtonTrustRegion`.
        damping: the damping of the direction taken.
        penalty: the price of the KL in the penalised form.
        constraints: values of the constraints after the step.
        multipliers: what a unit of each constraint costs of the linear model of the loss.
        cg_status: how the linear solve ended; None if it was not reached.
        cg_iterations: iterations of the linear solve.
        cg_residual: residual of the linear solve relative to the gradient's norm.
        products: Fisher products spent in this step, those of a preconditioner included.
        backend: which way of differentiating made them, as of :class:`FisherOperator`.
        preconditioner: which one, whether it was used, and the gain that its last test found.
        scale: the line search's factor on the full step, of the last trial.
        backtracks: how many trials of the line search were made before one would do.
        evaluations: calls of the closure, the first included.
        detail: what to look at when the step failed, for example a parameter's name.

    """

    status: Status
    loss: float
    new_loss: float
    kl: float = 0.0
    largest_kl: float | None = None
    predicted_reduction: float = 0.0
    actual_reduction: float = 0.0
    delta: float = 0.0
    radius: float = 0.0
    damping: float = 0.0
    penalty: float | None = None
    constraints: tuple[float, ...] = ()
    multipliers: tuple[float, ...] = ()
    cg_status: Status | None = None
    cg_iterations: int = 0
    cg_residual: float = 0.0
    products: int = 0
    backend: str = ""
    preconditioner: str = ""
    scale: float = 0.0
    backtracks: int = 0
    evaluations: int = 1
    detail: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the parameters moved."""
        return self.status in (Status.ACCEPTED, Status.RECOVERING)

    @property
    def rho(self) -> float:
        """Actual over predicted reduction; 0 if nothing moved or nothing was predicted."""
        if not self.accepted or self.predicted_reduction == 0:  # it can underflow
            return 0.0
        return self.actual_reduction / self.predicted_reduction

    def __str__(self) -> str:
        """Return one line to print in a training loop."""
        if not self.accepted:
            return f"{self.status.value}: {self.status}" + (f" ({self.detail})" * bool(self.detail))
        return (
            f"{self.status.value}: loss {self.loss:.6g} -> {self.new_loss:.6g}, kl {self.kl:.3g},"
            f" rho {self.rho:.3g}, cg {self.cg_iterations}, backtracks {self.backtracks}"
        )
