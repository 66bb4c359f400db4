"""The one file that reads the private parts of torch's recorded autograd graph.

The nodes of the graph show what they saved as ``_saved_<name>``, and the shapes of their outputs as
``_input_metadata``. torch promises neither. Whatever is missing here, in another release of torch,
raises :class:`UnreadableNode`, and the caller then differentiates in a way that needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

Node: TypeAlias = Any
"""A node of the graph. What it saved has no static type."""
Edge: TypeAlias = tuple[Node, int]
"""An output of a node, by its position."""

_MISSING = object()


class UnreadableNode(RuntimeError):
    """A node lacks an attribute that it has in the releases of torch that are known."""


@dataclass(frozen=True)
class Place:
    """What one tensor looks like that a node takes or makes."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def numel(self) -> int:
        """The number of elements."""
        return self.shape.numel()


def name(node: Node) -> str:
    """Return the name of a node, such as ``"TanhBackward0"``."""
    if is_python(node):
        return type(node).__name__
    return _read(node, "name")()


def sources(node: Node) -> tuple[tuple[Node | None, int], ...]:
    """Return the edge that each input of a node came from; ``(None, 0)`` where it has no graph."""
    return _read(node, "next_functions")


def leaf(node: Node) -> Tensor | None:
    """Return the leaf tensor that a node stands for; None for a node that computes something."""
    if type(node).__name__ == "AccumulateGrad":
        return _read(node, "variable")
    return getattr(node, "variable", None)


def outputs(node: Node) -> tuple[Place, ...]:
    """Return what the outputs of the operation look like that a node is the derivative of."""
    entries = _read(node, "_input_metadata")
    try:
        return tuple(Place(torch.Size(m.shape), m.dtype, m.device) for m in entries)
    except AttributeError as error:
        raise UnreadableNode(f"{name(node)}: {error}") from error


def dtypes(node: Node) -> set[torch.dtype]:
    """Return the dtypes of the outputs; none for a node that does not tell."""
    entries = getattr(node, "_input_metadata", ())
    found = (getattr(m, "dtype", None) for m in entries)
    return {dtype for dtype in found if dtype is not None}


def saved(node: Node, argument: str) -> Any:
    """Return what a node saved under the name of an argument or a result of the operation.

    Whole numbers come with their sign, which torch drops from those of 64 bits.

    Raises:
        UnreadableNode: the node saved nothing under this name.
        RuntimeError: the graph was freed, or a saved tensor was overwritten.

    """
    return _signed(_read(node, f"_saved_{argument}"))


def saves(node: Node, argument: str) -> bool:
    """Return whether a node saves something under this name."""
    return argument in saved_names(node)


def saved_names(node: Node) -> tuple[str, ...]:
    """Return the names under which a node saves something."""
    return _names(type(node))


@cache
def _names(kind: type) -> tuple[str, ...]:
    prefix = "_saved_"
    return tuple(n.removeprefix(prefix) for n in dir(kind) if n.startswith(prefix))


def is_python(node: Node) -> bool:
    """Return whether a node is a :class:`torch.autograd.Function` written in Python."""
    return isinstance(node, BackwardCFunction)


def is_custom(node: Node) -> bool:
    """Return whether a node is a Function of a user, in Python or in C++."""
    return is_python(node) or name(node).startswith("torch::autograd::")


def is_reentrant_checkpoint(node: Node) -> bool:
    """Return whether a node is a checkpoint behind which the graph was never recorded."""
    return type(node).__name__ == "CheckpointFunctionBackward"


def is_once_differentiable(node: Node) -> bool:
    """Return whether a node is a Function whose backward is marked with ``once_differentiable``."""
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    return getattr(backward, "__code__", None) is _ONCE


_ONCE = getattr(once_differentiable(lambda _: None), "__code__", object())


def gradient_hooks(t: Tensor) -> dict[tuple[int, int], Callable[[Tensor], Any]]:
    """Return the hooks that ``t.register_hook`` holds, by a key that no other hook has.

    Hooks of :meth:`~torch.Tensor.register_post_accumulate_grad_hook` are not among them: they work
    on ``.grad``, which nothing here fills.
    """
    hooks = getattr(t, "_backward_hooks", None) or {}
    return {(number, id(hook)): hook for number, hook in hooks.items()}


@cache
def onednn_linear() -> Callable[..., Tensor] | None:
    """Return ``(x, w, row) -> x w' + row`` by oneDNN; None where torch has no such operator.

    torch's own compiler emits this operator, and may change it: one of another schema is not used.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    overload = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
    if overload is None or str(getattr(overload, "_schema", "")) != _LINEAR_POINTWISE:
        return None
    operator = cast(Callable[..., Tensor], overload)
    return lambda x, w, row=None: operator(x, w, row, "none", [], "")


_LINEAR_POINTWISE = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars,"
    " str? algorithm) -> Tensor Y"
)


def _read(node: Node, attribute: str) -> Any:
    value = getattr(node, attribute, _MISSING)
    if value is _MISSING:
        raise UnreadableNode(
            f"{type(node).__name__} has no attribute {attribute}, which it has in the releases of"
            f" torch that are known; this is torch {torch.__version__}"
        )
    return value


def _signed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_signed, value))
    return value - 2**64 if isinstance(value, int) and value >= 2**63 else value
