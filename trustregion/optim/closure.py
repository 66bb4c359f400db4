"""Calling the user's closure, and saying in words what is wrong with what it returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..autodiff import differentiate
from ..distributions import Joint, Prediction, joint_of

Closure: TypeAlias = Callable[[], tuple[Tensor, Prediction]]


def evaluate(closure: Closure, *, graph: bool) -> tuple[Tensor, Joint]:
    """Call the closure and check its return value.

    Attention runs on its math kernel, the one that can be differentiated twice; in every call, so
    that the line search compares values of one kernel.

    Args:
        closure: the user's closure.
        graph: whether to record the graph; without it the call costs a forward pass only.

    """
    with torch.set_grad_enabled(graph), sdpa_kernel(SDPBackend.MATH):
        returned = closure()
    if not (isinstance(returned, tuple) and len(returned) == 2):
        given = (
            f"a tuple of length {len(returned)}"
            if isinstance(returned, tuple)
            else f"a {type(returned).__name__}"
        )
        raise TypeError(
            f"the closure must return (loss, distribution), got {given}: the loss alone does not"
            " define a KL. Return the distribution the model predicts beside it, for example"
            " `return loss, Categorical(logits=logits)`"
        )
    loss, prediction = returned
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


def gradient(loss: Tensor, params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradient of the loss, None where a parameter is not used; ``.grad`` is untouched.

    The graph is kept, since the distribution shares it.
    """
    if not loss.requires_grad:
        raise ValueError(
            "the loss carries no graph, so it has no gradient: compute it from the model's outputs"
            " with grad enabled, without detach() or torch.no_grad()"
        )
    return differentiate([loss], params)
