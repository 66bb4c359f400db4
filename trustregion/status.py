"""The outcome of every solver and step, one word each, with the sentence a user reads."""

from __future__ import annotations

import enum


class Status(enum.Enum):
    """How a solve or a step ended.

    A numerical failure is a value of this type, never an exception and never a silent patch.
    ``status.value`` is a stable word for logs and files, ``str(status)`` the sentence.

    Example:
        >>> Status("max_iter") is Status.MAX_ITER
        True
        >>> print(Status.STATIONARY)
        The gradient is exactly zero: nothing to do, the parameters are unchanged.

    """

    message: str

    # Linear solves
    CONVERGED = "converged", "The residual is below the tolerance."
    MAX_ITER = "max_iter", "The iteration limit was reached before the tolerance."
    NEGATIVE_CURVATURE = (
        "negative_curvature",
        "The operator is not positive definite: a search direction has negative curvature.",
    )
    ZERO_CURVATURE = (
        "zero_curvature",
        "The curvature along the direction is zero to working precision: it does not bound a step.",
    )
    INDEFINITE_PRECONDITIONER = (
        "indefinite_preconditioner",
        "The preconditioner is not positive definite: r'Mr is not positive for some residual r.",
    )
    NONFINITE_INPUT = (
        "nonfinite_input",
        "The right-hand side or the starting point holds a NaN or an infinity.",
    )
    NONFINITE_OPERATOR = (
        "nonfinite_operator",
        "A product with the operator or the preconditioner held a NaN or an infinity,"
        " or the solution overflowed.",
    )

    STAGNATED = (
        "stagnated",
        "The residual cannot be brought, or shown to be, below the tolerance: the working precision"
        " allows no more.",
    )
    PROGRESS_BELOW_TOLERANCE = (
        "progress_below_tolerance",
        "The model value improved by less than the asked fraction an iteration.",
    )
    BREAKDOWN = (
        "breakdown",
        "The recurrence broke down: a search direction vanished while the residual has not."
        " The preconditioner is singular, or a vector underflowed.",
    )
    LEAST_SQUARES = (
        "least_squares",
        "The system has no solution; x makes the residual's norm as small as it can be.",
    )

    # Trust-region subproblems
    BOUNDARY = "boundary", "The path of iterates left the trust region: the step ends at its edge."
    INFEASIBLE = (
        "infeasible",
        "No step within the ball satisfies the linear constraints: the step returned reduces their"
        " violation.",
    )

    # Optimizer steps
    ACCEPTED = "accepted", "The step was taken: the loss fell and the KL is within delta."
    RECOVERING = (
        "recovering",
        "The step was taken to reduce the violation of a constraint: the KL is within delta, the"
        " loss may have risen.",
    )
    STATIONARY = (
        "stationary",
        "The gradient is exactly zero: nothing to do, the parameters are unchanged.",
    )
    ZERO_LENGTH = (
        "zero_length",
        "The learning rate of every group is zero: the parameters are unchanged.",
    )
    NOT_A_DESCENT = (
        "not_a_descent",
        "The computed direction does not reduce the linear model of the loss:"
        " the parameters are unchanged.",
    )
    REJECTED_LOSS = (
        "rejected_loss",
        "No trial of the line search improved the loss inside the KL ball:"
        " the parameters were restored.",
    )
    REJECTED_KL = (
        "rejected_kl",
        "The line search ended outside the KL ball: the parameters were restored.",
    )
    REJECTED_CONSTRAINT = (
        "rejected_constraint",
        "No trial of the line search kept the constraints: the parameters were restored.",
    )
    REJECTED_RATIO = (
        "rejected_ratio",
        "No radius that was tried reduced the loss as its quadratic model said: the parameters were"
        " restored.",
    )
    NOT_REPRODUCIBLE = (
        "not_reproducible",
        "The closure returned something else at the parameters before the step than in its first"
        " call, so no trial can be compared: the parameters were restored. check_closure tests for"
        " it.",
    )
    NONFINITE_LOSS = (
        "nonfinite_loss",
        "The loss is NaN or infinite at the current parameters, which are unchanged.",
    )
    NONFINITE_GRADIENT = (
        "nonfinite_gradient",
        "The gradient holds a NaN or an infinity: the parameters are unchanged.",
    )
    NONFINITE_TRIAL = (
        "nonfinite_trial",
        "The loss, the KL or a parameter was NaN or infinite at the last trial of the line search:"
        " the parameters were restored.",
    )

    def __new__(cls, value: str, message: str) -> Status:
        """Make a member known by its word, carrying its sentence."""
        member = object.__new__(cls)
        member._value_ = value
        member.message = message
        return member

    def __str__(self) -> str:
        """Return the sentence a user reads."""
        return self.message
