"""The recurrence of conjugate gradients, shared by ``cg`` and ``steihaug``.

It is a generator that asks for one product at a time, ``Ap = yield p``, so that several right-hand
sides can advance together on one block product while each stops by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators.base import LinearOperator, product
from ..status import Status
from ..vector import dot, norm
from .basis import Basis, orthogonalise
from .stopping import Progress
from .verified import Asking, Run, why_no_direction


@dataclass(frozen=True)
class Rules:
    """When a run stops, in the units of the unit-scale system."""

    tolerance: float
    """On the norm of the recurred residual."""
    max_iter: int
    progress: Progress | None = None
    radius: float = math.inf
    """On ``|x|`` in the metric ``M^-1``."""
    reorthogonalize: bool = False


class Recurrence:
    r"""Alg. 5.3 of Nocedal and Wright on ``A x = b`` of unit scale, from ``x = 0``.

    Vectors are carried in float64 and handed to ``A`` and ``M`` in their own dtype: the products
    are then the only float32 rounding, and the recurred residual parts from the true one by about
    ``eps |A| sum |alpha p|``, however many iterations there are. Memory: five vectors in float64,
    two more with a preconditioner, and one an iteration with reorthogonalisation (two with both).
    """

    def __init__(
        self,
        b: Tensor,
        dtype: torch.dtype,
        M: LinearOperator | None,
        rules: Rules,
        observe: Callable[[Tensor], object] | None = None,
    ) -> None:
        self.dtype, self.M, self.rules, self.observe = dtype, M, rules, observe
        self.eps, self.largest = torch.finfo(dtype).eps, torch.finfo(dtype).max
        x = torch.zeros_like(b)
        self.run = Run(x, x if M is None else torch.zeros_like(b), b.clone(), dot(b, b))
        self.p = torch.zeros_like(b)
        self.w = self.p if M is None else torch.zeros_like(b)  # M^-1 p
        self.r_next = torch.empty_like(b)
        narrow = dtype is not b.dtype
        self.asked = torch.empty_like(b, dtype=dtype) if narrow else None
        self.given = torch.empty_like(b) if narrow else None
        if rules.reorthogonalize:
            self.W = Basis(b)
            self.Z = self.W if M is None else Basis(b)

    def iterate(self) -> Asking:
        """Run to the end; afterwards ``status`` is set.

        At small n the time is that of the calls, so the common path makes few: six of torch, two
        more for an operator in float32.
        """
        run, rules, plain = self.run, self.rules, self.M is None
        rz, pp = math.inf, 0.0
        while run.status is None:
            size = math.sqrt(run.rr)
            # Below a tenth of the gap to the true residual the recurred one means nothing.
            if size <= rules.tolerance or size <= 0.1 * run.gap(self.eps):
                run.status = Status.CONVERGED
                break
            if run.iterations >= rules.max_iter:
                run.status = Status.MAX_ITER
                break
            z = run.r if self.M is None else product(self.M, run.r.to(self.dtype)).double()
            rz_old, rz = rz, run.rr if plain else dot(run.r, z)
            if not 0 < rz < math.inf:
                run.status = why_no_direction(rz)
                break
            if rules.reorthogonalize:
                self._keep(z, rz)
            beta = min(rz / rz_old, self.largest)
            torch.add(z, self.p, alpha=beta, out=self.p)
            # without M the residual and the old p are orthogonal
            pp = rz + beta * beta * pp if plain else self._turn(beta)
            if not 0 < pp < math.inf:
                run.status = Status.BREAKDOWN
                break
            Ap = yield self.p if self.asked is None else self.asked.copy_(self.p)
            run.products += 1
            run.status = self._step(Ap if self.given is None else self.given.copy_(Ap), rz, pp)
        return run

    def _turn(self, beta: float) -> float:
        """Turn ``M^-1 p`` with ``p``, and return ``p'p``."""
        torch.add(self.run.r, self.w, alpha=beta, out=self.w)
        return dot(self.p, self.p)

    def _keep(self, z: Tensor, rz: float) -> None:
        scale = 1 / math.sqrt(rz)
        self.W.append(self.run.r * scale)
        if self.Z is not self.W:
            self.Z.append(z * scale)

    def _step(self, Ap: Tensor, rz: float, pp: float) -> Status | None:
        """Move along ``p`` to the minimum of the model; return why to stop, or None."""
        run, length = self.run, math.sqrt(pp)
        pAp = torch.dot(self.p, Ap).item()
        if not math.isfinite(pAp):
            return Status.NONFINITE_OPERATOR
        alpha, rr = rz / pAp if pAp > 0 else math.inf, math.inf
        if alpha < math.inf:
            torch.add(run.r, Ap, alpha=-alpha, out=self.r_next)
            if self.rules.reorthogonalize:
                self._reorthogonalise()
            rr = torch.dot(self.r_next, self.r_next).item()
            if not math.isfinite(rr):
                return Status.NONFINITE_OPERATOR
            # Without M |alpha Ap|^2 = r'r + r_next'r_next, since the two are orthogonal.
            free = math.sqrt(run.rr + rr) / alpha if self.M is None else norm(Ap)
            run.norm_A = max(run.norm_A, free / length)
        if pAp <= self.eps * run.norm_A * pp:
            return self._stop_at_curvature(Ap, pAp, rz, pp)
        if self.rules.radius < math.inf:
            size = dot(self.p, self.w)  # in the metric M^-1
            if not 0 < size < math.inf:
                return why_no_direction(size)
            tau = self._to_the_edge()[0]
            if alpha >= tau:
                self._jump(Ap, tau)
                run.at_edge = True
                return Status.BOUNDARY
        run.reach += alpha * length
        if not max(alpha, run.reach) <= self.largest:
            return Status.NONFINITE_OPERATOR
        self._move(alpha)
        run.r, self.r_next, run.rr = self.r_next, run.r, rr
        run.iterations += 1
        if self.observe is not None:
            self.observe(run.x)
        if self.rules.progress is not None and self.rules.progress.stops_after(0.5 * alpha * rz):
            return Status.PROGRESS_BELOW_TOLERANCE
        return None

    def _reorthogonalise(self) -> None:
        r = orthogonalise(self.r_next, self.W.rows, self.Z.rows)
        self.run.removed += norm(self.r_next.sub_(r))
        self.r_next = r

    def _move(self, length: float) -> None:
        self.run.x.add_(self.p, alpha=length)
        if self.M is not None:
            self.run.y.add_(self.w, alpha=length)

    def _jump(self, Ap: Tensor, tau: float) -> None:
        """End at ``x + tau p``."""
        run = self.run
        self._move(tau)
        run.r = torch.add(run.r, Ap, alpha=-tau)
        run.rr = dot(run.r, run.r)
        run.reach += abs(tau) * math.sqrt(dot(self.p, self.p))
        run.iterations += 1

    def _to_the_edge(self) -> tuple[float, float]:
        """Return both roots ``tau`` of ``|x + tau p| = radius``, the positive one first.

        In units of the radius and without a difference of nearly equal numbers.
        """
        radius, x, y, w = self.rules.radius, self.run.x, self.run.y, self.w
        unit = math.sqrt(dot(self.p, w))
        along = dot(x, w) / unit / radius
        room = max(1 - dot(x, y) / radius / radius, 0.0)
        root = math.sqrt(along * along + room)
        forth = room / (along + root) if along > 0 else root - along
        back = -room / (root - along) if along < 0 else -(root + along)
        return forth * radius / unit, back * radius / unit

    def _stop_at_curvature(self, Ap: Tensor, pAp: float, rz: float, pp: float) -> Status:
        """Record ``p``, along which the model has no minimum that shows, and follow it."""
        run = self.run
        run.direction = self.p.to(self.dtype, copy=True)
        if self.rules.radius < math.inf:
            size = dot(self.p, self.w)
            if not 0 < size < math.inf:
                return why_no_direction(size)
            forth, back = self._to_the_edge()
            # a curvature that is positive, if only by rounding, has its minimum before the edge
            before = [rz / pAp] if 0 < rz < forth * pAp else []
            values = {t: t * (0.5 * t * pAp - rz) for t in (forth, back, *before)}
            tau = min(values, key=values.__getitem__)
            self._jump(Ap, tau)
            run.at_edge = tau not in before
        norm_A = max(run.norm_A, math.sqrt(dot(Ap, Ap) / pp))
        negative = pAp < -self.eps * norm_A * pp
        return Status.NEGATIVE_CURVATURE if negative else Status.ZERO_CURVATURE
