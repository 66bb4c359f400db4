"""The point at which a function is minimized: tensors in any structure, and one flat vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..arguments import REAL, is_number
from ..autodiff import differentiate
from ..interrupts import deferred, interruptible
from ..optim.calls import comparable_kernels
from ..vector import ParameterVector

T = TypeVar("T")
DETACHED = (
    "fun(x) does not depend on x: torch records no derivative. Compute it from x by torch, without"
    " detach(), .item() or numpy on the way"
)


class Point:
    """A copy of ``x0`` that moves, and a function of it whose calls are counted.

    Args:
        fun: ``x`` -> a tensor.
        x0: A tensor, numbers or an array, or a dict, list or tuple of them.

    Attributes:
        vector: The point as a flat vector of shape ``(n,)``.
        calls: The number of calls of ``fun``.

    Raises:
        RuntimeError: Inference mode is on.
        TypeError: ``x0`` holds something else, or tensors of another dtype.
        ValueError: ``x0`` is empty or not finite.

    """

    def __init__(self, fun: Callable[[Any], Tensor], x0: Any) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "no derivative is recorded under torch.inference_mode(): call this function outside"
                " of it"
            )
        self._fun, self._x, self.calls = fun, copied("x0", x0), 0
        if not any(leaf.numel() for leaf in leaves(self._x)):
            raise ValueError(f"x0 must hold at least one number, got {x0}")
        self.vector = ParameterVector([leaf.requires_grad_() for leaf in leaves(self._x)])
        if not bool(self.vector.values().isfinite().all()):
            raise ValueError(f"x0 must be finite, got {x0}")

    def value(self) -> Tensor:
        """Return the value of a function to minimize."""
        value = self._call()
        if value.numel() != 1:
            raise ValueError(
                f"fun must return one number, got a tensor of shape {tuple(value.shape)}. For the"
                " sum of the squares of residuals, call least_squares"
            )
        return value

    def squares(self) -> tuple[Tensor, Tensor]:
        """Return the sum of the squares of the residuals, and the residuals."""
        r = self._call()
        if r.ndim == 0 or r.numel() == 0:
            raise ValueError(
                f"fun must return the residuals, got a tensor of shape {tuple(r.shape)}. Return"
                " them one by one, and not the sum of their squares; for a function of one value,"
                " call minimize"
            )
        return mse_loss(r, torch.zeros_like(r), reduction="sum"), r

    def _call(self) -> Tensor:
        self.calls += 1
        y = self._fun(self._x)
        if not isinstance(y, Tensor) or not y.is_floating_point():
            given = f"a tensor of {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise TypeError(f"fun must return a real tensor that torch computes, got {given}")
        if torch.is_grad_enabled() and not y.requires_grad:
            raise ValueError(DETACHED)
        return y

    @deferred
    def with_graph(self, call: Callable[[], T]) -> T:
        """Return what a call returns at the present point, with its graph."""
        with comparable_kernels(), torch.enable_grad():
            return interruptible(call)

    def gradient(self, y: Tensor) -> Tensor:
        """Return the gradient of one number, shape ``(n,)``; its graph is kept."""
        slopes = differentiate([y], self.vector.params)
        if all(slope is None for slope in slopes):
            raise ValueError(DETACHED)
        return self.vector.ravel(slopes)

    def structured(self, v: Tensor) -> Any:
        """Return a copy of a vector of shape ``(n,)`` with the structure of ``x0``."""
        return _filled(self._x, iter(self.vector.unravel(v.detach().clone())))

    def sizes(self, given: Any) -> Tensor:
        """Return the sizes of the parameters, shape ``(n,)``, from the argument ``x_scale``."""
        x = self.vector.values()
        if given is None:
            return torch.where(x == 0, 1.0, x.abs())
        parts = [part.to(x) for part in leaves(copied("x_scale", given))]
        shapes = [tuple(part.shape) for part in parts]
        expected = [tuple(p.shape) for p in self.vector.params]
        if shapes not in (expected, [()]):
            raise ValueError(
                f"x_scale must be a number or have the shapes {expected} of x0, got {shapes}"
            )
        sizes = self.vector.ravel(parts) if shapes == expected else parts[0].expand_as(x).clone()
        if not bool(((sizes > 0) & sizes.isfinite()).all()):
            raise ValueError(f"x_scale must hold positive finite numbers, got {given}")
        return sizes


def copied(name: str, given: Any) -> Any:
    """Return a structure of new tensors, in which numbers and arrays have become float64."""
    if isinstance(given, Mapping):
        return {key: copied(f"{name}[{key!r}]", part) for key, part in given.items()}
    if isinstance(given, (list, tuple)) and not _is_numbers(given):
        return type(given)(copied(f"{name}[{i}]", part) for i, part in enumerate(given))
    if isinstance(given, Tensor):
        if given.dtype not in REAL:
            raise TypeError(
                f"{name} must be float32 or float64, got {given.dtype}: convert it, for example by"
                " .double()"
            )
        return given.detach().clone(memory_format=torch.contiguous_format)
    try:
        return torch.as_tensor(given, dtype=torch.float64).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor, numbers or an array, or a dict, list or tuple of them, got"
            f" a {type(given).__name__}"
        ) from error


def _is_numbers(given: object) -> bool:
    if isinstance(given, (list, tuple)):
        return all(_is_numbers(part) for part in given)
    return is_number(given)


def leaves(x: Any) -> Iterator[Tensor]:
    """Yield the tensors of a structure in their order."""
    if isinstance(x, Tensor):
        yield x
    else:
        for part in x.values() if isinstance(x, Mapping) else x:
            yield from leaves(part)


def _filled(like: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the structure of ``like`` with other tensors in it."""
    if isinstance(like, Tensor):
        return next(tensors)
    if isinstance(like, Mapping):
        return {key: _filled(part, tensors) for key, part in like.items()}
    return type(like)(_filled(part, tensors) for part in like)
