"""The lowest point of a linear function in the part of a ball that lies in a polyhedron."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..status import Status
from ..vector import dot, norm
from .nnls import EPS, least_distance, lowest_point, nnls

TOUCHING = 64 * EPS  # a distance this near to the radius equals it
MOVES = 200  # enough to halve a bracket down to rounding, and for any number of active sets seen


@dataclass(frozen=True, kw_only=True, eq=False)
class BallPoint:
    r"""The minimizer of a linear function over the part of the unit ball in a polyhedron.

    Attributes:
        y: the point, shape ``(n,)``, with :math:`\|y\| \le 1`.
        multipliers: :math:`\mu \ge 0`, shape ``(m,)``, with :math:`c + \nu y = G'\mu`.
        ball_multiplier: :math:`\nu \ge 0`.
        status: ``CONVERGED``; ``INFEASIBLE`` if the ball misses the polyhedron, or ``STAGNATED`` if
            rounding hides the minimizer or its existence, both with zero multipliers.

    """

    y: Tensor
    multipliers: Tensor
    ball_multiplier: float
    status: Status


def lowest_in_ball(c: Tensor, G: Tensor, h: Tensor, rounding: float) -> BallPoint:
    r"""Minimize :math:`c'y` subject to :math:`\|y\| \le 1` and :math:`Gy \ge h`, in float64.

    Args:
        c: the gradient, of unit norm or zero, shape ``(n,)``.
        G: the normals, of unit norm or zero, shape ``(m, n)``.
        h: the bounds, shape ``(m,)``.
        rounding: a remainder of ``c`` on the active constraints counts as zero up to this.

    Returns:
        The minimizer. If there is none, the shortest point of the polyhedron, scaled into the ball.
        If the polyhedron is empty, the one with the least sum of squared violations is used.

    """
    start, none = least_distance(G, h), torch.zeros_like(h)
    size = norm(start.x)
    if start.status is not Status.CONVERGED or size > 1 + TOUCHING:
        exists = start.status is Status.CONVERGED
        y = start.x if exists else _least_violation(G, h)
        status = Status.INFEASIBLE if exists else start.status
        return BallPoint(
            y=y / max(norm(y), 1.0), multipliers=none, ball_multiplier=0.0, status=status
        )
    y = start.x / max(size, 1.0)
    if not bool(c.any()):
        return BallPoint(y=y, multipliers=none, ball_multiplier=0.0, status=Status.CONVERGED)
    if size >= 1 - TOUCHING:  # one point, at which multipliers grow without bound
        infinite = torch.where(start.active, math.inf, 0.0)
        return BallPoint(
            y=y, multipliers=infinite, ball_multiplier=math.inf, status=Status.CONVERGED
        )
    piece = _crossing(c, G, h, rounding)
    if piece is None:
        return BallPoint(y=y, multipliers=none, ball_multiplier=0.0, status=Status.STAGNATED)
    active, y, weights, nu = piece
    none[active] = weights.clamp(min=0.0)
    return BallPoint(
        y=y / max(norm(y), 1.0), multipliers=none, ball_multiplier=nu, status=Status.CONVERGED
    )


def _crossing(
    c: Tensor, G: Tensor, h: Tensor, rounding: float
) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """Return the active set, the minimizer, the active multipliers and the ball multiplier.

    The minimizer at the ball multiplier ``1 / t`` is the point ``y(t)`` of the polyhedron nearest
    to ``-t c``. On one active set it is ``foot - t flat``: the shortest point where the active
    constraints are equations, and ``c`` without its part in the span of their normals. The two are
    orthogonal, so that the ``t`` of norm 1 follows in closed form. The norm of ``y(t)`` grows with
    ``t``, which brackets the crossing; the next ``t`` is the crossing of the current active set.
    """
    low, high, t, aim = 0.0, math.inf, 1.0, 0.0
    before = torch.zeros_like(h, dtype=torch.bool)
    for _ in range(MOVES):
        near = least_distance(G, h + t * (G @ c))
        if near.status is not Status.CONVERGED:
            return None
        foot, pull = lowest_point(G[near.active], h[near.active])
        along, lift = _shadow(G[near.active], c)
        flat = c - along
        slope, room = norm(flat), 1 - dot(foot, foot)
        if slope <= rounding and room >= 0 and (t > 1 / EPS or bool((lift >= -rounding).all())):
            return near.active, foot, lift, 0.0
        settled = t == aim and torch.equal(near.active, before)
        low, high = (t, high) if (t * slope) ** 2 <= room else (low, t)
        if settled or high <= (1 + 4 * EPS) * low:
            return near.active, foot - t * flat, lift + pull / t, 1 / t
        aim = math.sqrt(max(room, 0.0)) / slope if slope > rounding else math.inf
        t = aim if low < aim < high else 4 * t if high == math.inf else 0.5 * (low + high)
        before = near.active
    return None


def _shadow(B: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the projection of ``c`` to the span of independent rows, and its coordinates."""
    Q, R = torch.linalg.qr(B.T)
    z = Q.T @ c
    z = z + Q.T @ (c - Q @ z)
    return Q @ z, torch.linalg.solve_triangular(R, z.unsqueeze(1), upper=True).squeeze(1)


def _least_violation(G: Tensor, h: Tensor) -> Tensor:
    r"""Return the shortest ``y`` with the least :math:`\|(h - Gy)_+\|`.

    The violations are ``N (h + w)`` with the projector ``N`` to the complement of the range of
    ``G`` and the ``w >= 0`` that makes them shortest, the surplus of the bounds that are met.
    """
    bounds = h.clamp(-1 / EPS, 1 / EPS)
    N = torch.eye(len(h), dtype=h.dtype, device=h.device) - G @ torch.linalg.pinv(G)
    violation = (N @ (bounds + nnls(N, -N @ bounds).x)).clamp(min=0.0)
    slack = math.sqrt(EPS) * violation.max()  # rounding must not empty the polyhedron again
    return least_distance(G, bounds - violation - slack).x
