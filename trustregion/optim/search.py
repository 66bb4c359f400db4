"""Searching along steps with the user's closure: commit the best trial or restore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..distributions import Joint
from ..solvers.line_search import BallSearch, BallTrial, ball_search
from ..status import Status
from ..vector import ParameterVector
from .closure import Calls, read_prediction, why_not_reproducible
from .info import StepInfo
from .options import NaturalOptions
from .replicas import Replicas


@dataclass(frozen=True)
class Candidate:
    """A step that may be taken.

    Attributes:
        s: the step, shape ``(n,)``.
        predicted_reduction: what the linear model promises of the loss.
        damping: the damping it was made with.

    """

    s: Tensor
    predicted_reduction: float
    damping: float


@dataclass(frozen=True)
class _Outcome(BallTrial):
    """One evaluation, of the samples of all processes; the loss in the user's own direction."""

    loss: float
    kl: float
    largest_kl: float | None
    constraints: tuple[float, ...]

    @property
    def violation(self) -> float:
        return sum(max(c, 0.0) for c in self.constraints)


@dataclass(frozen=True)
class Search:
    """The trials of one step.

    Attributes:
        calls: of the closure.
        old: the prediction before the step, in float64.
        vector: the parameters.
        theta: their values before the step.
        replicas: the processes of the step.
        share: the samples here over those of all.
        options: of the optimizer.
        goal: what part of the ball a trial should use; 0 for any.
        slope: how fast the violation falls along the first candidate, where there is one.

    """

    calls: Calls
    old: Joint
    vector: ParameterVector
    theta: Tensor
    replicas: Replicas
    share: float
    options: NaturalOptions
    goal: float
    slope: float | None = None

    def run(self, candidates: Sequence[Candidate], info: StepInfo) -> StepInfo:
        """Commit the best trial or restore the parameters bit for bit; say how it went."""
        accepted, different = False, ""
        try:
            chosen, found = self._choose(candidates, info)
            if found.accepted:
                self.vector.assign(self.theta + found.scale * chosen.s)
            else:
                different = self._different(chosen, info)
            accepted = found.accepted
        finally:  # also on KeyboardInterrupt
            if not accepted:
                self.vector.assign(self.theta)
        info = replace(
            info,
            predicted_reduction=found.scale * chosen.predicted_reduction,
            damping=chosen.damping,
            scale=found.scale,
            backtracks=found.backtracks,
            evaluations=self.calls.count,
        )
        info = self._account(found.trial, found.accepted, info)
        if different:
            return replace(info, status=Status.NOT_REPRODUCIBLE, detail=different)
        return info

    def _different(self, chosen: Candidate, info: StepInfo) -> str:
        """Return what differs in one more call before the step; empty where it repeats."""
        again = self._evaluate(chosen, 0.0, info)
        first, other = (info.loss, self.options.delta), (again.loss, again.kl)
        return why_not_reproducible(first, other, chosen.predicted_reduction, self.theta.dtype)

    def _choose(
        self, candidates: Sequence[Candidate], info: StepInfo
    ) -> tuple[Candidate, BallSearch[_Outcome]]:
        """Take the best of several candidates and lengths, or search along the only one."""
        o, start = self.options, self._start_value(info)
        cap, first = o.max_backtracks, 1.0
        if len(candidates) * len(o.scales) > 1:
            best: tuple[Candidate, BallSearch[_Outcome]] | None = None
            pairs = [(c, scale) for c in candidates for scale in o.scales]
            for count, (c, scale) in enumerate(pairs, 1):
                trial = self._evaluate(c, scale, info)
                lowest = start if best is None else best[1].trial.value
                if trial.finite and trial.size <= 1 and trial.value < lowest:
                    best = (
                        c,
                        BallSearch(
                            accepted=True, scale=scale, trial=trial, evaluations=count, backtracks=0
                        ),
                    )
            if best is not None:
                return best
            first, cap = o.backtrack_factor * min(o.scales), max(cap - len(pairs), 0)
        else:
            first = o.scales[0]
        most_damped = max(candidates, key=lambda c: c.damping)
        slope = most_damped.predicted_reduction if self.slope is None else self.slope
        search = ball_search(
            lambda scale: self._evaluate(most_damped, scale, info),
            start,
            slope,
            factor=o.backtrack_factor,
            max_backtracks=cap,
            goal=self.goal,
            first=first,
        )
        return most_damped, search

    def _start_value(self, info: StepInfo) -> float:
        violation = sum(max(c, 0.0) for c in info.constraints)
        return violation if violation > 0 else self.options.sign * info.loss

    def _evaluate(self, candidate: Candidate, scale: float, info: StepInfo) -> _Outcome:
        trial = self.theta + scale * candidate.s
        m = len(info.constraints)
        if not bool(trial.isfinite().all()):
            return _Outcome(math.nan, math.nan, math.nan, math.nan, None, (math.nan,) * m)
        self.vector.assign(trial)
        largest: list[Tensor] = []

        def measure() -> Tensor:
            new = self.calls.trial(read_prediction)
            if len(new.constraints) != m:
                raise ValueError(
                    f"the closure returned {len(new.constraints)} constraints in a trial, and {m}"
                    " in its first call: their number must stay the same"
                )
            if self.options.max_kl is not None:
                largest.append(self.old.largest_kl(new.joint).reshape(1))
            kl = self.old.mean_kl(new.joint).reshape(1)
            return torch.cat([new.loss.reshape(1).to(kl), kl, new.constraints.to(kl)])

        like = self.theta.new_zeros(2 + m, dtype=torch.float64)
        loss, kl, *constraints = self.replicas.mean(measure, like, self.share).tolist()
        top = None
        if self.options.max_kl is not None:
            top = self.replicas.largest(lambda: largest[0], like[:1]).item()
        size = self._size(kl, top)
        value = self._value(loss, kl, constraints, info)
        return _Outcome(value, size, loss, kl, top, tuple(constraints))

    def _size(self, kl: float, largest: float | None) -> float:
        size = kl / self.options.delta
        if largest is None or self.options.max_kl is None:
            return size
        return math.nan if math.isnan(size) else max(size, largest / self.options.max_kl)

    def _value(self, loss: float, kl: float, constraints: Sequence[float], info: StepInfo) -> float:
        """Return what is minimised: the violation if there is any at the start, else the loss."""
        objective = self.options.sign * loss
        if not math.isfinite(objective):
            return math.nan
        if any(c > 0 for c in info.constraints):
            return sum(max(c, 0.0) for c in constraints)
        if any(not c <= 0 for c in constraints):
            return math.inf
        return objective + (self.options.penalty or 0.0) * kl

    def _account(self, last: _Outcome, accepted: bool, info: StepInfo) -> StepInfo:
        before = info.loss
        recovering = any(c > 0 for c in info.constraints)
        if accepted:
            return replace(
                info,
                status=Status.RECOVERING if recovering else Status.ACCEPTED,
                new_loss=last.loss,
                kl=last.kl,
                largest_kl=last.largest_kl,
                constraints=last.constraints,
                actual_reduction=self.options.sign * (before - last.loss),
            )
        detail = f"at the last trial the loss was {last.loss} and the KL {last.kl}"
        if info.constraints:
            detail += f", the constraints {', '.join(f'{c:.3g}' for c in last.constraints)}"
        if not (math.isfinite(last.loss) and not math.isnan(last.size)):
            status = Status.NONFINITE_TRIAL
        elif last.size > 1:
            status = Status.REJECTED_KL
        else:
            kept = last.violation <= 0 and not recovering
            status = Status.REJECTED_LOSS if kept else Status.REJECTED_CONSTRAINT
        return replace(info, status=status, detail=detail)
