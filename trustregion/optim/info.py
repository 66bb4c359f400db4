"""The report of an optimizer on its last step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..status import Status


@dataclass(frozen=True, kw_only=True)
class StepInfo:
    """The report on one step.

    Losses are the closure's own values. Reductions count in the direction of optimization, so that
    positive is better under ``maximize`` too. ``str(info)`` is a line of a log and
    ``dataclasses.asdict(info)`` a row of a table.

    Attributes:
        status: How the step ended. ``ACCEPTED`` means that the parameters moved, ``RECOVERING``
            that they moved to reduce the violation of a constraint, and ``CONVERGED`` that they
            did not have to.
        loss: The loss before the step.
        new_loss: The loss after the step; equal to ``loss`` if the parameters did not move.
        gradient_norm: The Euclidean norm of the gradient before the step.
        largest_gradient: The largest absolute entry of the gradient before the step.
        kl: KL(old || new) in nats after the step, from float64; 0 if the parameters did not move.
        largest_kl: The KL of the sample where it is largest, if ``max_kl`` bounds it.
        predicted_reduction: The reduction that the model predicted for the last trial.
        actual_reduction: The measured reduction; 0 if the parameters did not move.
        delta: The KL radius of this step.
        radius: The Euclidean or metric radius of the last trial of :class:`NewtonTrustRegion`.
        damping: The damping that the step was solved with.
        penalty: The price of the KL in the penalized form.
        constraints: The values of the constraints after the step.
        multipliers: The change of the linear model of the loss per unit of each constraint.
        cg_status: How the linear solve ended; None if there was none.
        cg_iterations: Iterations of the linear solve.
        cg_residual: The residual of the linear solve relative to the norm of the gradient.
        products: Curvature products spent in this step, including those of a preconditioner.
        backend: How the products were differentiated; see :class:`FisherOperator`.
        preconditioner: The preconditioner, whether it was used, and the gain its last test found.
        scale: The factor of the line search on the full step, at the last trial.
        backtracks: Trials of the line search before the first acceptable one.
        evaluations: Closure evaluations, including the first.
        maximize: The loss is maximized.
        detail: What to check when the step failed, for example the name of a parameter.

    """

    status: Status
    loss: float
    new_loss: float
    gradient_norm: float = math.nan
    largest_gradient: float = math.nan
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
    maximize: bool = False
    detail: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the parameters moved."""
        return self.status in (Status.ACCEPTED, Status.RECOVERING)

    @property
    def rho(self) -> float:
        """Actual over predicted reduction; 0 if nothing moved or nothing was predicted."""
        if not self.accepted or self.predicted_reduction == 0:  # The prediction can underflow.
            return 0.0
        return self.actual_reduction / self.predicted_reduction

    def __str__(self) -> str:
        """Return one line to print in a training loop."""
        if not self.accepted:
            return f"{self.status.value}: {self.status}" + (f" ({self.detail})" * bool(self.detail))
        objective = "objective" if self.maximize else "loss"
        losses = f"{objective} {self.loss:.6g} -> {self.new_loss:.6g}"
        return f"{self.status.value}: {losses}, {self._region()}, {self._work()}"

    def _region(self) -> str:
        """Return what bounded the step, and how much of it was used."""
        if self.radius == 0:
            bound = f" of {self.delta:.3g}" if self.delta < math.inf else ""
            return f"kl {self.kl:.3g}{bound}, rho {self.rho:.3g}"
        parts = [f"rho {self.rho:.3g}"]
        parts += [f"radius {self.radius:.3g}"] if self.radius < math.inf else []
        parts += [f"damping {self.damping:.3g}"] if self.damping > 0 else []
        return ", ".join(parts)

    def _work(self) -> str:
        return f"cg {self.cg_iterations}, backtracks {self.backtracks}"
