"""The outcome of a solve or a step: one word, and a sentence for the user."""

from __future__ import annotations

import enum


class Status(enum.Enum):
    """How a solve or a step ended.

    A numerical failure is a value of this type, never an exception and never a silent correction.
    ``status.value`` is a stable word for logs and files; ``str(status)`` is the sentence.

    Example:
        >>> Status("max_iter") is Status.MAX_ITER
        True
        >>> print(Status.STATIONARY)
        The gradient is exactly zero: the parameters are unchanged.

    """

    message: str

    # Linear solves
    CONVERGED = "converged", "The tolerance is met: no further iteration or step is needed."
    MAX_ITER = "max_iter", "The iteration limit was reached before the tolerance."
    NEGATIVE_CURVATURE = (
        "negative_curvature",
        "The operator is not positive definite: a search direction has negative curvature.",
    )
    ZERO_CURVATURE = (
        "zero_curvature",
        "The curvature along a direction is zero to working precision: it does not bound a step.",
    )
    INDEFINITE_PRECONDITIONER = (
        "indefinite_preconditioner",
        "The preconditioner is not positive definite: r'Mr is not positive for some residual r.",
    )
    NONFINITE_INPUT = (
        "nonfinite_input",
        "The right-hand side or the starting point contains a NaN or an infinity.",
    )
    NONFINITE_OPERATOR = (
        "nonfinite_operator",
        "A product with the operator or the preconditioner contains a NaN or an infinity,"
        " or the solution overflowed.",
    )

    STAGNATED = (
        "stagnated",
        "The working precision does not allow the residual to be reduced below the tolerance, or"
        " to be verified to be below it.",
    )
    PROGRESS_BELOW_TOLERANCE = (
        "progress_below_tolerance",
        "The model value improved by less than the requested fraction per iteration.",
    )
    BREAKDOWN = (
        "breakdown",
        "The recurrence broke down: a search direction vanished and the residual did not."
        " The preconditioner is singular, or a vector underflowed.",
    )
    LEAST_SQUARES = (
        "least_squares",
        "The system has no solution; x minimizes the norm of the residual.",
    )

    # Trust-region subproblems
    BOUNDARY = "boundary", "The iterates left the trust region: the step ends at its boundary."
    INFEASIBLE = (
        "infeasible",
        "No step within the ball satisfies the linear constraints: the returned step reduces their"
        " violation.",
    )

    # Optimizer steps
    ACCEPTED = (
        "accepted",
        "The step was taken: the loss decreased, and the KL, if one is bounded, is within delta.",
    )
    RECOVERING = (
        "recovering",
        "The step was taken to reduce the violation of a constraint: the KL is within delta, but"
        " the loss may have increased.",
    )
    STATIONARY = (
        "stationary",
        "The gradient is exactly zero: the parameters are unchanged.",
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
        "No radius that was tried reduced the loss as its quadratic model predicted: the parameters"
        " were restored.",
    )
    NOT_REPRODUCIBLE = (
        "not_reproducible",
        "Two calls of the closure at the same parameters returned different values, so no trial can"
        " be compared: the parameters were restored. check_closure tests a closure for this.",
    )
    NONFINITE_LOSS = (
        "nonfinite_loss",
        "The loss is NaN or infinite at the current parameters, which are unchanged.",
    )
    NONFINITE_GRADIENT = (
        "nonfinite_gradient",
        "The gradient contains a NaN or an infinity: the parameters are unchanged.",
    )
    NONFINITE_TRIAL = (
        "nonfinite_trial",
        "The loss, the KL or a parameter was NaN or infinite at the last trial of the line search:"
        " the parameters were restored.",
    )

    def __new__(cls, value: str, message: str) -> Status:
        """Make a member with ``value`` as its word and ``message`` as its sentence."""
        member = object.__new__(cls)
        member._value_ = value
        member.message = message
        return member

    def __str__(self) -> str:
        """Return the sentence for the user."""
        return self.message
