"""Jacobian products of a model given as a pure function of its parameters."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..autodiff import NOT_TWICE, out_of_memory, under_transform
from ..interrupts import deferred, interruptible
from ..replay import repeatable
from ..settings import math_attention
from ..vector import ParameterVector, dot, norm
from .base import Linearisation, Unmoved, rounding_unit
from .choose import BACKENDS

Tensors: TypeAlias = tuple[Tensor, ...]
Params: TypeAlias = Mapping[str, Tensor]
Run: TypeAlias = Callable[[Params], Any]
T = TypeVar("T")


class FunctionalLinearisation(Linearisation):
    """``J`` by one call of :func:`torch.func.vjp`, and :func:`torch.func.jvp` in each product.

    It works under :func:`torch.func.vmap` over stacked parameters, and for models that have a
    forward-mode derivative but no double backward, such as compiled modules. Each ``Jv`` runs the
    function again, which must therefore be deterministic, up to torch's global random numbers,
    which :func:`from_function` replays.

    Args:
        outputs_of: maps the parameters, one tensor each, to the outputs.
        vector: the parameters.

    Raises:
        RuntimeError: a part of the model has no forward-mode derivative; from a product, also if
            the parameters have been modified since.

    """

    backend = "functional"

    def __init__(self, outputs_of: Callable[..., Tensors], vector: ParameterVector) -> None:
        self._point = tuple(p.detach() for p in vector.params)
        self._unmoved = Unmoved(p for p in self._point if not p.is_inference())
        self._outputs_of = outputs_of
        with torch.enable_grad():
            pair = torch.func.vjp(outputs_of, *self._point)
        self._pullback = pair[1]
        super().__init__(pair[0], vector, range(len(self._point)))
        self.eps = rounding_unit([vector.dtype, *(y.dtype for y in pair[0])])

    def jvp(self, v: Tensor) -> Tensors:
        """Return ``Jv``. Cost: one run of the function in forward mode."""
        self._unmoved.check()
        return forward(self._outputs_of, self._point, tuple(self.vector.tangents(v)))

    def vjp(self, u: Sequence[Tensor]) -> Tensor:
        """Return ``J'u``. Cost: one backward pass."""
        self._unmoved.check()
        return self.vector.ravel(self._pullback(tuple(u)))


def forward(fn: Callable[..., Any], point: Tensors, tangents: Tensors) -> Any:
    """Return the derivative of ``fn`` at ``point`` along ``tangents``, in forward mode.

    Raises:
        RuntimeError: a part of ``fn`` has no forward-mode derivative.

    """
    _load_forward_mode()
    with _in_words():
        return torch.func.jvp(fn, point, tangents)[1]


def hessian(
    value: Callable[..., Tensor], point: Tensors
) -> tuple[Callable[..., Tensors], Callable[[Tensors], Tensors]]:
    """Return the gradient of ``value`` as a function, and ``d -> H d`` at ``point``.

    The gradient is differentiated in forward mode, or in reverse mode if it has no forward-mode
    derivative, as for ``huber_loss``, and for ``mse_loss`` with a mean. Reverse mode comes second,
    because it treats the derivative of a ``once_differentiable`` backward as zero. A product costs
    one run of ``value`` and one or two backward passes.

    Raises:
        ValueError: ``value`` is not a scalar.
        RuntimeError: it cannot be differentiated twice.

    """

    def scalar(*tensors: Tensor) -> Tensor:
        result = value(*tensors)
        check_scalar(result)
        return result

    gradient = torch.func.grad(scalar, tuple(range(len(point))))

    def product(d: Tensors) -> Tensors:
        try:
            return forward(gradient, point, d)
        except RuntimeError as error:
            if not any(words in str(error) for words in _REVERSE_ONLY):
                raise
        with _in_words():
            return torch.func.vjp(gradient, *point)[1](d)

    return gradient, product


_REVERSE_ONLY = ("use forward AD with", "ZeroTensors are immutable")


def check_scalar(loss: Tensor) -> None:
    """Raise if a loss is not a scalar tensor.

    Raises:
        TypeError: the loss is not a tensor.
        ValueError: the loss is not a scalar.

    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must be a scalar tensor, got {type(loss).__name__}")
    if loss.ndim:
        raise ValueError(
            f"the loss must be a scalar tensor of shape (), got shape {tuple(loss.shape)}: reduce"
            " it with .mean() or .sum()"
        )


_WAYS_OUT = {
    "forward AD": "the model has no forward-mode derivative: use backend='graph', or replace the"
    " operation that is named here",
    "forward mode AD": "the model has no forward-mode derivative: write the jvp of the"
    " torch.autograd.Function in it",
    "Batching rule not implemented": "the model holds an operation that torch.func.vmap cannot"
    " batch: loop over the parameters instead",
    "does not have vmap support": "the model holds a torch.autograd.Function that torch.func.vmap"
    " cannot batch, as checkpointing is in some releases: loop over the parameters instead",
    "saved tensor hooks": "the model uses saved tensor hooks, as checkpointing does, which"
    " torch.func does not allow: use backend='graph' outside of transforms, or no checkpointing",
    "in-place operation": "the model writes to a tensor of its own, as the running averages of"
    " BatchNorm in train mode, which torch.func does not allow: use backend='graph' outside of"
    " transforms, or module.eval()",
}


@contextmanager
def _in_words() -> Iterator[None]:
    """Add a remedy to the errors of :mod:`torch.func`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        reason = next((way for words, way in _WAYS_OUT.items() if words in text), None)
        if reason is None or reason in text:
            raise
        raise RuntimeError(f"{reason} (torch said: {error})") from error


@functools.cache
def _load_forward_mode() -> None:
    """Load torch's forward mode, whose first use emits a warning about torch itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a DeprecationWarning or a FutureWarning
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.zeros(()),))


def from_function(
    fn: Callable[..., Any],
    params: Params,
    inputs: Sequence[Any],
    backend: str,
    graph: Callable[[Any, dict[str, Tensor]], T],
    functional: Callable[[Run, ParameterVector], T],
    backends: Sequence[str] = BACKENDS,
) -> T:
    """Return an operator of ``fn(params, *inputs)``, by the first backend that works.

    With ``"auto"``, outside of transforms, the function runs once with a graph. Products with ``J``
    by double backward are compared with products with its transpose, since some modules refuse a
    second derivative only in a product, and a few return zero instead.

    Args:
        fn: the model.
        params: its parameters by name; they need not require a gradient.
        inputs: the other arguments of the model.
        backend: ``"functional"``, ``"auto"``, or a backend that reads the graph.
        graph: maps ``(result, leaves)`` to the operator, from the graph of one run.
        functional: maps ``(run, vector)`` to the operator, from the function itself.
        backends: the backends that read the graph, and ``"auto"``.

    Raises:
        TypeError: ``params`` is not a dict of tensors.
        ValueError: the backend is unknown.
        RuntimeError: no backend can differentiate the model, or inference mode is on.

    """
    known = (*backends, "functional")
    if backend not in known:
        raise ValueError(f"backend must be one of {', '.join(known)}, got {backend!r}")
    if not isinstance(params, Mapping):
        raise TypeError(
            "params must be a dict of tensors by name, such as dict(module.named_parameters()),"
            f" got {type(params).__name__}"
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "torch.inference_mode() lets nothing be differentiated: use torch.no_grad() instead"
        )
    vector = ParameterVector(params.values(), list(params))
    # One dropout mask in all runs.
    model = repeatable(lambda p: interruptible(lambda: fn(p, *inputs)))

    @deferred
    def run(p: Params) -> Any:
        with math_attention():
            return model(p)

    def by_function() -> T:
        with _in_words():
            return functional(run, vector)

    if backend == "functional" or (backend == "auto" and under_transform()):
        return by_function()
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    try:
        with torch.enable_grad():
            operator = graph(run(leaves), leaves)
        if backend == "auto" and getattr(operator, "backend", "") == "graph":
            _try_product(operator)
    except RuntimeError as error:
        if backend != "auto" or "cannot be differentiated twice" not in str(error):
            raise
        try:
            operator = by_function()
            _try_product(operator)
        except RuntimeError as other:
            if out_of_memory(other):
                raise
            raise RuntimeError(f"{error}. In forward mode: {other}") from other
    return operator


@torch.no_grad()
def _try_product(operator: Any) -> None:
    """Raise if ``J`` by double backward fails, or if ``u'(Jv)`` differs from ``v'(J'u)``."""
    if not hasattr(operator, "jvp"):  # A Hessian is only tested for failure.
        operator.mv(_zero(operator))
        return
    generator = torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device="cpu").to(like)

    v = draw(_zero(operator))
    u = [draw(y) for y in operator.outputs]
    tangents = operator.jvp(v)
    pairs = [(x.reshape(-1), t.reshape(-1)) for x, t in zip(u, tangents, strict=True)]
    slope = operator.vjp(u)
    gap = abs(sum(dot(x, t) for x, t in pairs) - dot(v, slope))
    size = sum(norm(x) * norm(t) for x, t in pairs) + norm(v) * norm(slope)
    eps = max(torch.finfo(t.dtype).eps for t in (v, *u))
    if math.isfinite(size) and gap > math.sqrt(eps) * size:
        raise RuntimeError(NOT_TWICE)


def _zero(operator: Any) -> Tensor:
    return torch.zeros(operator.shape[0], dtype=operator.dtype, device=operator.device)
