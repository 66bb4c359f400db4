"""Reverse-mode differentiation of a user's graph, with errors that name the remedy."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from . import recorded

_NOT_TWICE = (
    "derivative for", "double backward", "differentiate twice", "support automatic differentiation",
)  # fmt: skip


def differentiate(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the vector-Jacobian products, and keep the graph.

    The result is None for an input that the outputs do not depend on. No ``.grad`` is read or
    written.

    Args:
        outputs: tensors with a graph.
        inputs: tensors to differentiate with respect to.
        cotangents: one tensor of the shape of each output; None for scalar outputs.
        create_graph: record a graph of the result.

    Raises:
        ValueError: with ``create_graph``, a hook changes the gradient of an input.
        RuntimeError: the graph was freed or overwritten, or has no second derivative.

    """
    if create_graph:
        require_unhooked(inputs)
    with explained():
        return torch.autograd.grad(
            outputs,
            inputs,
            cotangents,
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )


def under_transform() -> bool:
    """Return whether a :mod:`torch.func` transform, such as ``vmap``, is running."""
    try:
        torch.zeros(()).requires_grad_()
    except RuntimeError:  # Only torch.func forbids this.
        return True
    return False


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports exhausted memory, which no fallback may hide."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error) for w in _CPU_ALLOCATOR)


_CPU_ALLOCATOR = ("not enough memory", "can't allocate memory")


def require_unhooked(inputs: Iterable[Tensor]) -> None:
    """Raise a ValueError if a gradient hook changes the gradient of an input.

    Autograd passes the gradient through such a hook. The result is then not the gradient of the
    function whose Jacobian or Hessian the products use. Each hook is called once with a large
    random gradient to find out; hooks that return it unchanged, or return None, are allowed.
    """
    for i, t in enumerate(inputs):
        for key, hook in recorded.gradient_hooks(t).items():
            if key in _ONLY_LOOK:
                continue
            if _changes(hook, t):
                raise ValueError(
                    "a gradient hook (register_hook) changes the gradient of tensor"
                    f" {i}, of shape {tuple(t.shape)}, so that it no longer"
                    " belongs to the function whose curvature is computed. Remove the hook:"
                    " clipping is not needed, since delta or the radius bounds the step; entries"
                    " that must stay fixed belong in a separate tensor without requires_grad"
                )
            if len(_ONLY_LOOK) > _MANY:
                _ONLY_LOOK.clear()
            _ONLY_LOOK.add(key)


_ONLY_LOOK: set[tuple[int, int]] = set()  # hooks that left the trial gradient unchanged
_MANY = 10_000  # hooks in that set, after which it is emptied


@torch.no_grad()
def _changes(hook: Callable[[Tensor], Any], t: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    scale = (
        1024.0 if torch.finfo(t.dtype).bits == 16 else 2.0**20
    )  # above any sensible clipping threshold
    probe = (scale * torch.randn(t.shape, generator=generator, device="cpu")).to(t)
    given = probe.clone()
    try:
        result = hook(given)
    except Exception as error:
        if out_of_memory(error):
            raise
        return False  # The hook guards against large gradients, and changes none.
    return not all(torch.equal(probe, x) for x in (given, result) if x is not None)


@contextmanager
def explained() -> Iterator[None]:
    """Replace torch's errors about a graph that cannot be differentiated by explanations."""
    try:
        yield
    except RuntimeError as error:
        raise_in_words(error)


def raise_in_words(error: RuntimeError) -> NoReturn:
    """Raise the error with an explanation, or unchanged if none is known."""
    reason = explanation(error)
    if reason is None:
        raise error
    raise RuntimeError(f"{reason} (torch said: {error})") from error


def explanation(error: Exception) -> str | None:
    """Return why a graph cannot be differentiated; None if the error says enough."""
    text = str(error)
    if "backward through the graph a second time" in text:
        return (
            "the graph was already freed: the closure must not call backward(), it only returns"
            " the loss and the distribution"
        )
    if "modified by an inplace operation" in text:
        return "a tensor that the graph needs was modified in place after the forward pass"
    if "between dense and sparse" in text:
        return "a gradient is sparse, and curvature needs dense ones: build with sparse=False"
    if "vmap: inplace arithmetic" in text:
        return (
            "these products cannot be taken under torch.func.vmap: make the operator with"
            ' backend="graph"'
        )
    if any(words in text.lower() for words in _NOT_TWICE):
        return (
            "the model cannot be differentiated twice. Use the module without torch.compile, run"
            " attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), recurrent layers on"
            " the GPU under torch.backends.cudnn.flags(enabled=False)"
        )
    return None


NOT_TWICE = (
    "the model cannot be differentiated twice: it holds a torch.autograd.Function whose backward is"
    " marked with once_differentiable. Write its backward with differentiable operations"
)


def require_recorded(node: Any) -> None:
    """Raise a RuntimeError if the graph behind a node was never recorded."""
    if recorded.is_reentrant_checkpoint(node):
        raise RuntimeError(
            "the graph holds a reentrant checkpoint, which hides the parameters behind it:"
            " call torch.utils.checkpoint.checkpoint with use_reentrant=False"
        )


def edge_of(t: Tensor) -> tuple[Any, int]:
    """Return the edge of the graph that leads to ``t``, which may be a leaf."""
    node, number, *_ = get_gradient_edge(t)
    return node, number


def upstream(
    starts: Iterable[tuple[Any, int]], cut: Container[Any] = ()
) -> Iterator[tuple[Any, int]]:
    """Yield the starting edges and all edges behind them, but none behind ``cut``.

    Raises:
        RuntimeError: a Function of the graph is marked with ``once_differentiable``. Autograd
            either raises for its second derivative or treats it as zero.

    """
    todo, seen = list(starts), set()
    while todo:
        edge = todo.pop()
        if edge in seen:
            continue
        seen.add(edge)
        yield edge
        if edge in cut:
            continue
        node = edge[0]
        require_recorded(node)
        if recorded.is_once_differentiable(node):
            raise RuntimeError(NOT_TWICE)
        todo += [source for source in recorded.sources(node) if source[0] is not None]
