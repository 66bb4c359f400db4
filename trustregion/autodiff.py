"""Reverse-mode differentiation of a user's graph, with its errors in words."""

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
    """Return the vector-Jacobian products, None where an input is not used; the graph is kept.

    No ``.grad`` is read or written.

    Args:
        outputs: tensors with a graph.
        inputs: tensors to differentiate in.
        cotangents: one an output, of its shape; None for scalar outputs.
        create_graph: record a graph of the result.

    Raises:
        ValueError: a graph of the result would hold a gradient hook of an input.
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


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory did not suffice, which no other way mends."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error) for w in _CPU_ALLOCATOR)


_CPU_ALLOCATOR = ("not enough memory", "can't allocate memory")


def require_unhooked(inputs: Iterable[Tensor]) -> None:
    """Raise a ValueError where a gradient hook changes the gradient of an input.

    Autograd's gradient passes through such a hook and is then not that of the function, of which
    the products with its Jacobian or its Hessian are. Each hook is called once, with a large random
    gradient, to see whether it changes it; hooks that only look are allowed.
    """
    for i, t in enumerate(inputs):
        for key, hook in recorded.gradient_hooks(t).items():
            if key in _ONLY_LOOK:
                continue
            if _changes(hook, t):
                raise ValueError(
                    "a gradient hook (register_hook) changes the gradient of tensor"
                    f" {i}, of shape {tuple(t.shape)}, to one that is not that of the function,"
                    " whose curvature is asked for. Remove the hook: clipping is not needed, since"
                    " delta or the radius bounds the step; entries that must stay fixed belong in a"
                    " tensor of their own that does not require a gradient"
                )
            if len(_ONLY_LOOK) > _MANY:
                _ONLY_LOOK.clear()
            _ONLY_LOOK.add(key)


_ONLY_LOOK: set[tuple[int, int]] = set()  # hooks that were called once and changed nothing
_MANY = 10_000  # hooks in that set, after which it is emptied


@torch.no_grad()
def _changes(hook: Callable[[Tensor], Any], t: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    scale = 1024.0 if torch.finfo(t.dtype).bits == 16 else 2.0**20  # beyond any sensible clip
    probe = (scale * torch.randn(t.shape, generator=generator)).to(t)
    given = probe.clone()
    try:
        result = hook(given)
    except Exception as error:
        if out_of_memory(error):
            raise
        return False  # a guard against large gradients: it stops a step, and changes none
    return not all(torch.equal(probe, x) for x in (given, result) if x is not None)


@contextmanager
def explained() -> Iterator[None]:
    """Say in words what torch says of a graph that cannot be differentiated."""
    try:
        yield
    except RuntimeError as error:
        raise_in_words(error)


def raise_in_words(error: RuntimeError) -> NoReturn:
    """Raise the error in words, or as it is where torch says enough."""
    reason = explanation(error)
    if reason is None:
        raise error
    raise RuntimeError(f"{reason} (torch said: {error})") from error


def explanation(error: Exception) -> str | None:
    """Return in words why a graph cannot be differentiated; None where torch says enough."""
    text = str(error)
    if "backward through the graph a second time" in text:
        return (
            "the graph was already freed: the closure must not call backward(), it only returns"
            " the loss and the distribution"
        )
    if "modified by an inplace operation" in text:
        return "a tensor that the graph needs was modified in place after the forward pass"
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
    "the model cannot be differentiated twice: it holds a torch.autograd.Function that is marked as"
    " differentiable once only. Write its backward with differentiable operations"
)


def require_recorded(node: Any) -> None:
    """Raise a RuntimeError where the graph behind a node was never recorded."""
    if recorded.is_reentrant_checkpoint(node):
        raise RuntimeError(
            "the graph holds a reentrant checkpoint, behind which the parameters cannot be seen:"
            " call torch.utils.checkpoint.checkpoint with use_reentrant=False"
        )


def edge_of(t: Tensor) -> tuple[Any, int]:
    """Return the edge of the graph that ``t`` is, also for a leaf."""
    node, number, *_ = get_gradient_edge(t)
    return node, number


def upstream(
    starts: Iterable[tuple[Any, int]], cut: Container[Any] = ()
) -> Iterator[tuple[Any, int]]:
    """Yield the edges of the graph behind some edges, these included, but none behind ``cut``.

    Raises:
        RuntimeError: a Function of the graph is marked with ``once_differentiable``. Autograd takes
            the derivative of its derivative for zero, where it does not raise.

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
