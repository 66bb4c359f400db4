"""Calling the user's closure, and saying in words what is wrong with what it returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..autodiff import differentiate
from ..distributions import Joint, Prediction, joint_of
from ..vector import ParameterVector

Closure: TypeAlias = "Callable[[], tuple[Tensor, Prediction] | tuple[Tensor, Prediction, Tensor]]"
T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """What one call of a closure says.

    Attributes:
        loss: the loss, a scalar.
        joint: the prediction.
        constraints: values that should not be positive, shape ``(m,)``; empty without any.

    """

    loss: Tensor
    joint: Joint
    constraints: Tensor


@contextmanager
def comparable_kernels() -> Iterator[None]:
    """Run the model on kernels that can be differentiated twice: attention by its math, compiled
    models as they were written.

    For the whole step: the line search then compares values of one kernel, and activation
    checkpointing recomputes in the backward pass what it saw in the forward pass.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _without_validation() -> Iterator[None]:
    """Let a trial's distribution have impossible parameters: its KL or loss then refuses it."""
    default = Distribution._validate_args  # torch has a setter for it and no getter
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(default)


def read_prediction(returned: object) -> Evaluation:
    """Return what a closure of ``(loss, distribution)`` or with constraints returned, checked."""
    if not (isinstance(returned, tuple) and len(returned) in (2, 3)):
        raise TypeError(
            f"the closure must return the tuple (loss, distribution), got {_shown(returned)}. The"
            " distribution is the model's prediction, whose KL is bounded: for example"
            " `return loss, Categorical(logits=logits)`"
        )
    loss, prediction, *rest = returned
    if isinstance(loss, Distribution) and isinstance(prediction, Tensor):
        raise TypeError("the closure returned (distribution, loss): the loss comes first")
    loss = read_loss(loss)
    return Evaluation(loss, joint_of(prediction), _constraints(rest, loss))


@dataclass(frozen=True)
class Judgement:
    """What one call of a closure of NewtonTrustRegion says.

    Attributes:
        loss: the loss, a scalar.
        outputs: the outputs of the model that it was computed from; empty without.
        joint: the prediction; None without.

    """

    loss: Tensor
    outputs: tuple[Tensor, ...] = ()
    joint: Joint | None = None

    @property
    def weight(self) -> float:
        """How many samples the loss is the mean over, as far as is known."""
        if self.joint is not None:
            return self.joint.total
        return float(self.outputs[0].shape[0] if self.outputs and self.outputs[0].ndim else 1)


def read_judgement(returned: object) -> Judgement:
    """Return what a closure of a loss, or of ``(loss, outputs or distribution)``, returned."""
    if not (isinstance(returned, tuple) and len(returned) == 2):
        return Judgement(read_loss(returned))
    loss, second = read_loss(returned[0]), returned[1]
    if isinstance(second, Tensor):
        return Judgement(loss, outputs=(second,))
    if isinstance(second, (tuple, list)) and all(isinstance(t, Tensor) for t in second):
        return Judgement(loss, outputs=tuple(second))
    return Judgement(loss, joint=joint_of(second))


def read_loss(returned: object) -> Tensor:
    """Return the loss that a closure returned, checked."""
    if not isinstance(returned, Tensor):
        hint = ": do not call .item()" if isinstance(returned, float) else ""
        raise TypeError(f"the loss must be a tensor, got {_shown(returned)}{hint}")
    if returned.numel() != 1 or not returned.is_floating_point():
        raise ValueError(
            f"the loss must be one real number, got shape {tuple(returned.shape)}, dtype"
            f" {returned.dtype}: reduce it, for example with .mean()"
        )
    return returned


def _constraints(rest: list[object], loss: Tensor) -> Tensor:
    if not rest:
        return loss.new_zeros(0)
    (given,) = rest
    if not isinstance(given, Tensor) or given.ndim != 1 or not given.is_floating_point():
        shown = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(
            "constraints must be a real tensor of shape (m,), one value for each, which should not"
            f" be positive, got {shown}: for example torch.stack([cost - limit])"
        )
    return given


def _shown(returned: object) -> str:
    sized = isinstance(returned, (tuple, list))
    return f"a {type(returned).__name__}" + (f" of length {len(returned)}" if sized else "")


def evaluate(closure: Callable[[], object], read: Callable[[object], T], *, graph: bool) -> T:
    """Call the closure and check its return value.

    Args:
        closure: the user's closure.
        read: checks what it returned.
        graph: record the graph, in the first call of a step. Without it the call is a trial: a
            forward pass only, in which torch does not validate the arguments of distributions.

    """
    if graph:
        with torch.enable_grad():
            return read(closure())
    try:
        with torch.no_grad(), _without_validation():
            return read(closure())
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise RuntimeError(
            "the closure took a derivative in a trial of the line search, which records no graph."
            " It must not call backward(); a derivative that the loss itself needs goes under"
            f" torch.enable_grad() in the closure (torch said: {error})"
        ) from error


def why_not_reproducible(
    first: tuple[float, float], again: tuple[float, float], promised: float, dtype: torch.dtype
) -> str:
    """Return what is different in another call at the same parameters; empty if nothing is.

    A loss may differ by its rounding, or by too little to mislead a search.

    Args:
        first: the loss, and the KL that would be too large.
        again: the same of the other call, the KL from the first one's prediction.
        promised: how much the model of the loss falls along the step.
        dtype: of the parameters.

    """
    (loss, delta), (other, kl) = first, again
    rounding = math.sqrt(torch.finfo(dtype).eps) * max(abs(loss), abs(other))
    if not abs(other - loss) <= max(rounding, 0.01 * abs(promised)):
        return f"the loss was {loss} in the first call and {other} in another"
    if not kl <= 0.01 * min(delta, 1.0):
        return f"the KL of the prediction from that of the first call is {kl}, not 0"
    return ""


class Calls:
    """The calls of the closure in one step: all of them see the same random numbers.

    Dropout then draws the same mask in each, so that the line search compares like with like.
    After the step the generators stand where one call would have left them. Torch's own generators
    are meant, that of the CPU and that of the parameters' device; not numpy's, nor the closure's.
    """

    def __init__(self, closure: Callable[[], object], device: torch.device) -> None:
        self.closure, self.count = closure, 0
        self._device = device if device.type == "cuda" else None
        self._start, self._end = self._states(), None

    def first(self, read: Callable[[object], T]) -> T:
        """Call with a graph."""
        self.count += 1
        try:
            return evaluate(self.closure, read, graph=True)
        finally:
            end = self._states()
            same = all(map(torch.equal, end, self._start))
            self._end = None if same else end

    def trial(self, read: Callable[[object], T]) -> T:
        """Call without a graph."""
        return self.again(lambda: evaluate(self.closure, read, graph=False))

    def again(self, call: Callable[[], T]) -> T:
        """Call once more, with the random numbers that the first call saw."""
        self.count += 1
        return self.beside(call)

    def beside(self, call: Callable[[], T]) -> T:
        """Run something else with the random numbers that the first call saw."""
        if self._end is None:
            return call()
        self._restore(self._start)
        try:
            return call()
        finally:
            self._restore(self._end)

    def _states(self) -> list[Tensor]:
        cuda = [torch.cuda.get_rng_state(self._device)] if self._device else []
        return [torch.get_rng_state(), *cuda]

    def _restore(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device:
            torch.cuda.set_rng_state(states[1], self._device)


def gradient(loss: Tensor, vector: ParameterVector, what: str = "loss") -> Tensor:
    """Return the gradient of the loss, shape ``(n,)``; ``.grad`` is untouched.

    The graph is kept, since the distribution shares it.
    """
    if not loss.requires_grad:
        raise ValueError(
            f"the {what} carries no graph, so it has no gradient: compute it from the model's"
            " outputs with grad enabled, without detach() or torch.no_grad()"
        )
    grads = differentiate([loss], vector.params)
    for name, grad in zip(vector.names, grads, strict=True):
        if grad is not None and grad.layout is not torch.strided:
            raise TypeError(
                f"the gradient of parameter {name} is sparse: build the layer with sparse=False"
            )
    return vector.ravel(grads)
