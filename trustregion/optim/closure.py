"""Calling the user's closure, and saying in words what is wrong with what it returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..autodiff import differentiate
from ..distributions import Joint, Prediction, joint_of
from ..vector import ParameterVector

Closure: TypeAlias = Callable[[], tuple[Tensor, Prediction]]


@contextmanager
def comparable_kernels() -> Iterator[None]:
    """Run attention on its math kernel, the one that can be differentiated twice.

    For the whole step: the line search then compares values of one kernel, and activation
    checkpointing recomputes in the backward pass what it saw in the forward pass.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
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


def evaluate(closure: Closure, *, graph: bool) -> tuple[Tensor, Joint]:
    """Call the closure and check its return value.

    Args:
        closure: the user's closure.
        graph: record the graph, in the first call of a step. Without it the call is a trial: a
            forward pass only, in which torch does not validate the arguments of distributions.

    """
    if graph:
        with torch.enable_grad():
            return _checked(closure())
    try:
        with torch.no_grad(), _without_validation():
            return _checked(closure())
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise RuntimeError(
            "the closure took a derivative in a trial of the line search, which records no graph."
            " It must not call backward(); a derivative that the loss itself needs goes under"
            f" torch.enable_grad() in the closure (torch said: {error})"
        ) from error


def _checked(returned: object) -> tuple[Tensor, Joint]:
    if not (isinstance(returned, tuple) and len(returned) == 2):
        sized = isinstance(returned, (tuple, list))
        length = f" of length {len(returned)}" if sized else ""
        raise TypeError(
            f"the closure must return the tuple (loss, distribution), got a"
            f" {type(returned).__name__}{length}. The distribution is the model's prediction, whose"
            " KL is bounded: for example `return loss, Categorical(logits=logits)`"
        )
    loss, prediction = returned
    if isinstance(loss, Distribution) and isinstance(prediction, Tensor):
        raise TypeError("the closure returned (distribution, loss): the loss comes first")
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss must be a tensor, got {type(loss).__name__}: do not call .item()"
        )
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"the loss must be one real number, got shape {tuple(loss.shape)}, dtype {loss.dtype}:"
            " reduce it, for example with .mean()"
        )
    return loss, joint_of(prediction)


def gradient(loss: Tensor, vector: ParameterVector) -> Tensor:
    """Return the gradient of the loss, shape ``(n,)``; ``.grad`` is untouched.

    The graph is kept, since the distribution shares it.
    """
    if not loss.requires_grad:
        raise ValueError(
            "the loss carries no graph, so it has no gradient: compute it from the model's outputs"
            " with grad enabled, without detach() or torch.no_grad()"
        )
    grads = differentiate([loss], vector.params)
    for name, grad in zip(vector.names, grads, strict=True):
        if grad is not None and grad.layout is not torch.strided:
            raise TypeError(
                f"the gradient of parameter {name} is sparse: build the layer with sparse=False"
            )
    return vector.ravel(grads)
