"""A closure as a function of the flat parameters, for the duration of one step."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..arguments import finite
from ..distributions import Joint
from ..interrupts import interruptible
from ..status import Status
from ..vector import ParameterVector
from .calls import Buffers, Calls, comparable_kernels
from .closure import Evaluation
from .info import StepInfo
from .processes import Processes
from .units import Units
from .values import Values, agree, difference, have_settled

SETTLING = 100  # The most repetitions of a call whose values move with its buffers.


T = TypeVar("T")


class Objective:
    """The loss, the prediction and the constraints of a closure at any parameters.

    Used as a context, it leaves the parameters bit for bit as they were, unless :meth:`keep` was
    called. If anything is raised, parameters, buffers and torch's generators are as before. All
    values and derivatives are means over the samples of all processes.

    :attr:`info` collects what the step has to report, :attr:`options` the new values of options
    that follow the steps, and :attr:`solution` is where the next warm start begins. The optimizer
    writes them when the step is over.

    Args:
        closure: The user's closure.
        read: Checks what the closure returned.
        vector: The parameters.
        processes: The processes that take the step together.
        units: The learning rates.
        sign: -1 to maximize the closure's loss, else 1.
        repeats: The closure is known to return the same values in every call of a step.
        modules: The modules that the closure calls; None to find them in the first call.

    """

    def __init__(
        self,
        closure: Callable[[], object],
        read: Callable[[Any], Evaluation],
        vector: ParameterVector,
        processes: Processes,
        units: Units,
        sign: float = 1.0,
        *,
        repeats: bool = True,
        modules: WeakSet[nn.Module] | None = None,
    ) -> None:
        self._closure, self._read = closure, read
        self.vector, self.processes, self.units, self.sign = vector, processes, units, sign
        self.repeats = repeats
        self._calls = Calls(modules)
        self._here: Evaluation | None = None
        self._old: Joint | None = None
        self._moved = self._kept = False
        self.options: dict[str, float] = {}
        self.solution: Tensor | None = None
        self._buffers_matter = True

    def __enter__(self) -> Self:
        self._scope = comparable_kernels()
        self._scope.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        failed = error[0] is not None
        with ExitStack() as stack:  # Each of these happens even if another one fails.
            stack.push(self._scope.__exit__)
            if failed:
                stack.callback(self._calls.undo)
            if self._moved and (failed or not self._kept):
                stack.callback(self.vector.assign, self.theta)

    def first(self, settings: str = "", state: object = None) -> None:
        """Call the closure at the present parameters and keep its graph.

        Args:
            settings: The options, which have to agree between the processes.
            state: Everything else that decides the step and has to agree.

        Raises:
            RuntimeError: No graph can be recorded.
            ValueError: A parameter is not finite, there are no samples, or processes disagree.

        """

        def look() -> tuple[tuple[Tensor, Evaluation], Tensor]:
            theta = finite_values(self.vector)
            here = self._calls.first(self._call)
            if self._calls.left and not self.repeats:
                here = self._settled_start(here)
            total, m = here.total, len(here.constraints)
            sums = [total, m, m * m, total * here.loss.item(), self.repeats]
            return (theta, here), here.loss.new_tensor(sums, dtype=torch.float64)

        like = first_sums(self.vector.params[0])
        (self.theta, here), sums = self.processes.total(look, like)
        total, m, squares, loss, repeats = sums.tolist()
        self.repeats = repeats == self.processes.size  # All take the same calls.
        self.processes.require_same(self.theta, settings, state)
        if self.processes.size * squares != m * m:  # by Cauchy and Schwarz, unless all are equal
            raise ValueError("the processes of the group disagree on the number of constraints")
        if not total > 0:
            raise ValueError(
                "the closure's prediction holds no samples, or their weights sum to zero: skip the"
                " step of an empty batch"
            )
        self._here, self.share = here, here.total / total
        self.returned = here.loss.detach().clone()  # The loss may be a parameter itself.
        self.loss = here.loss.item() if self.processes.size == 1 else loss / total
        if self.processes.size > 1:
            self.returned = self.returned.new_tensor(self.loss)
        constraints = here.constraints.detach().double()
        if m:
            constraints = self.processes.mean(lambda: constraints, constraints, self.share)
        self.constraints = constraints
        self.violation = sum(max(c, 0.0) for c in constraints.tolist())
        self._report = {
            "status": Status.NONFINITE_LOSS,
            "loss": self.loss,
            "new_loss": self.loss,
            "maximize": self.sign < 0,
            "constraints": tuple(constraints.tolist()),
        }

    def _call(self) -> Evaluation:
        return self._read(interruptible(self._closure))

    def _settled_start(self, here: Evaluation) -> Evaluation:
        """Let the buffers of a model settle before the first step of an optimizer.

        The power iteration of a new spectral norm moves the prediction from call to call. The first
        evaluation is repeated until it does not, and then taken again with its graph.
        """
        last = here
        for _ in range(SETTLING):
            again = self.evaluate(self._calls.left)
            if have_settled(last, again):
                break
            last = again
        return here if last is here else self._calls.first_again(self._call)

    @property
    def here(self) -> Evaluation:
        """The first evaluation, with its graph."""
        assert self._here is not None, "the graph is kept from first() to release()"
        return self._here

    @property
    def modules(self) -> WeakSet[nn.Module] | None:
        """The modules that the closure calls, once they have been found."""
        return self._calls.modules

    @property
    def evaluations(self) -> int:
        """The number of closure evaluations so far."""
        return self._calls.count

    def note(self, **changes: Any) -> None:
        """Add to the report of the step."""
        self._report.update(changes)

    @property
    def info(self) -> StepInfo:
        """The report of the step so far."""
        return StepInfo(**self._report)

    def beside(self, call: Callable[[], T]) -> T:
        """Run another function of the user, with a graph, on the closure's random numbers."""
        return self._calls.beside(lambda: interruptible(call))

    def release(self) -> None:
        """Free the graph of the first evaluation; its prediction is kept in float64."""
        if self._here is not None and self._here.joint is not None:
            self._old = self._here.joint.frozen()
        self._here = None

    def evaluate(self, buffers: Buffers | None = None) -> Evaluation:
        """Call the closure at the present parameters, without a graph.

        Args:
            buffers: Where the buffers start from, if not from where they were before the step.

        """
        try:
            return self._calls.again(self._call, buffers)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise RuntimeError(
                "the closure took a derivative in a trial of the line search, which records no"
                " graph. It must not call backward(); a derivative that the loss itself needs goes"
                f" under torch.enable_grad() in the closure (torch said: {error})"
            ) from error

    def at(self, theta: Tensor, *, largest_kl: bool = False, settle: bool = True) -> Values:
        """Write other parameters, and return the values there; NaN where they are not finite.

        The graph of the first evaluation is released.

        Args:
            theta: The parameters, shape ``(n,)``.
            largest_kl: Measure the KL of the sample where it is largest, too.
            settle: Repeat the call until its values do not move with the buffers.

        """
        if not finite(theta):
            nothing = (math.nan,) * len(self.constraints)
            return Values(loss=math.nan, kl=math.nan, constraints=nothing, buffers=[])
        self.release()
        self._moved = True
        self.vector.assign(theta)
        values = self._measure(largest_kl=largest_kl)
        if not (settle and values.moved):
            return values
        return self._settled(values, largest_kl=largest_kl)

    def _settled(self, values: Values, *, largest_kl: bool) -> Values:
        """Repeat a call whose buffers move until its values do not move with them.

        A power iteration, as of a spectral norm, lags behind the parameters, and would move the
        prediction after the step. Running statistics in train mode move no value: one repetition
        per step shows that.
        """
        for repetition in range(SETTLING if self._buffers_matter else 0):
            again = self._measure(values.buffers, largest_kl=largest_kl)
            if agree(values, again, self.info.delta):
                self._buffers_matter = repetition > 0
                break
            values = again
        return values

    def _measure(self, buffers: Buffers | None = None, *, largest_kl: bool = False) -> Values:
        """Return the values at the present parameters."""
        m, top = len(self.constraints), self.theta.new_zeros(1, dtype=torch.float64)
        like = self.theta.new_zeros(3 + m, dtype=torch.float64)

        def measure() -> Tensor:
            new = self.evaluate(buffers)
            if len(new.constraints) != m:
                raise ValueError(
                    f"the closure returned {len(new.constraints)} constraints in a trial, and {m}"
                    " in its first call: their number must stay the same"
                )
            kl = like[:1]
            if self._old is not None and new.joint is not None:
                kl = self._old.mean_kl(new.joint).reshape(1)
                if largest_kl:
                    top.copy_(self._old.largest_kl(new.joint).reshape(1))
            loss, moved = new.loss.detach().reshape(1).to(kl), bool(self._calls.left)
            return torch.cat([loss, kl, kl.new_tensor([moved]), new.constraints.to(kl)])

        loss, kl, moved, *constraints = self.processes.mean(measure, like, self.share).tolist()
        largest = self.processes.largest(lambda: top, top).item() if largest_kl else None
        return Values(
            loss=loss,
            kl=kl,
            largest_kl=largest,
            constraints=tuple(constraints),
            moved=moved > 0,
            buffers=self._calls.left,
        )

    def keep(self, theta: Tensor, values: Values, promised: float) -> bool:
        """Leave the parameters at ``theta``, where ``values`` were measured.

        An objective that is not known to repeat is measured there once more first, and the step is
        ``NOT_REPRODUCIBLE`` if the values differ.

        Args:
            theta: The parameters of an acceptable trial.
            values: The values of that trial.
            promised: The reduction of the loss that the model predicts.

        """
        if not self.repeats:
            different = self._difference(values, self.at(theta), promised)
            if different:
                self.note(status=Status.NOT_REPRODUCIBLE, detail=different)
                return False
            self.repeats = True
        self.vector.assign(theta)
        self._calls.leave(values.buffers)
        self._kept = True
        return True

    def compare_start(self, promised: float) -> None:
        """After a step that failed, call the closure once more where the step began.

        The step is ``NOT_REPRODUCIBLE`` if the values differ, since no trial could be compared.

        Args:
            promised: The reduction of the loss that the model predicts.

        """
        start = Values(loss=self.loss, kl=0.0, buffers=[])
        different = self._difference(start, self.at(self.theta, settle=False), promised)
        if different:
            self.note(status=Status.NOT_REPRODUCIBLE, detail=different)

    def _difference(self, one: Values, other: Values, promised: float) -> str:
        unit = math.sqrt(torch.finfo(self.theta.dtype).eps)
        return difference(one, other, unit, promised, self.info.delta or math.inf)


def first_sums(p: Tensor) -> Tensor:
    """Return a vector like that of the first reduction of every step."""
    return torch.zeros(5, dtype=torch.float64, device=p.device)


def finite_values(vector: ParameterVector) -> Tensor:
    """Return a copy of the parameters, of which a graph can be recorded.

    Raises:
        RuntimeError: Inference mode is on.
        ValueError: A parameter is not finite.

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
            " never writes one: look at the initialization, a loaded checkpoint or other code that"
            " writes the parameters"
        )
    return theta
