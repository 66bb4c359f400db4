"""The solvers behind one signature, and how their iterates are seen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from sb3_contrib.common.utils import conjugate_gradient_solver
from scipy.sparse import linalg as scipy_linalg
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchopt.linear_solve import solve_cg

import trustregion

with warnings.catch_warnings():  # torch.jit.script, which torch calls deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    from linear_operator.utils.linear_cg import linear_cg
from linear_operator.utils.warnings import NumericalWarning

Arrays: TypeAlias = Callable[[np.ndarray], np.ndarray]
Tensors: TypeAlias = Callable[[Tensor], Tensor]
Observer: TypeAlias = Callable[[Tensor], None]


class Counted:
    """A product that counts its calls, on tensors and on arrays."""

    def __init__(self, product: Tensors, arrays: Arrays | None = None) -> None:
        self.product, self.calls = product, 0
        self.arrays = arrays or (lambda v: product(torch.from_numpy(v)).numpy())

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.product(v)

    def on_array(self, v: np.ndarray) -> np.ndarray:
        self.calls += 1
        return self.arrays(v)


@dataclass(frozen=True)
class Answer:
    """What a solver returns."""

    x: Tensor
    converged: bool
    """It says so, or, where it returns ``x`` alone, it stopped before its limit."""
    word: str
    """How it says so."""


@dataclass(frozen=True)
class Ask:
    """What a solver is asked for."""

    product: Counted
    b: Tensor
    rtol: float
    limit: int
    """On iterations."""
    observe: Observer | None = None
    """Called with each iterate, as the solver would return it with that limit."""


Solver: TypeAlias = Callable[[Ask], Answer]


def _ours(solution: trustregion.LinearSolution, x: Tensor) -> Answer:
    status = solution.status
    return Answer(x, status is trustregion.Status.CONVERGED, status.value)


def our_cg(ask: Ask, *, reorthogonalize: bool = False) -> Answer:
    solution = trustregion.cg(
        ask.product,
        ask.b,
        rtol=ask.rtol,
        max_iter=ask.limit,
        reorthogonalize=reorthogonalize,
        callback=ask.observe,
    )
    return _ours(solution, solution.x)


def our_reorthogonalized_cg(ask: Ask) -> Answer:
    return our_cg(ask, reorthogonalize=True)


def our_minres(ask: Ask) -> Answer:
    solution = trustregion.minres(
        ask.product, ask.b, rtol=ask.rtol, max_iter=ask.limit, callback=ask.observe
    )
    return _ours(solution, solution.x)


def our_multishift_cg(ask: Ask) -> Answer:
    """One shift, of zero, and a basis of a thousand vectors at most.

    Its iterates are not shown: it has no callback.
    """
    limit = min(ask.limit, ask.b.numel(), 1000)
    solution = trustregion.multishift_cg(ask.product, ask.b, [0.0], rtol=ask.rtol, max_iter=limit)
    return _ours(solution, solution.x[:, 0])


def _scipy(solve: Callable[..., tuple[np.ndarray, int]]) -> Solver:
    def run(ask: Ask) -> Answer:
        b, observe = ask.b.numpy(), ask.observe
        A = scipy_linalg.LinearOperator((len(b), len(b)), ask.product.on_array, dtype=b.dtype)
        callback = None if observe is None else lambda x: observe(torch.from_numpy(x))
        with np.errstate(all="ignore"):  # it divides by zero once the residual is zero
            x, info = solve(A, b, rtol=ask.rtol, maxiter=ask.limit, callback=callback)
        return Answer(torch.from_numpy(x), info == 0, f"info {info}")

    return run


class _Follower(TorchFunctionMode):
    """Shows the iterates of a solver that offers no callback, to an observer.

    The first vector that such a solver multiplies is its starting point. It then either adds to it
    in place, or makes the next one with ``x.add``. When the solver asks for a product, the vector
    followed is the iterate after one product less: the first one was of the starting point.
    """

    def __init__(self, ask: Ask, scale: Tensor | float = 1.0) -> None:
        super().__init__()
        self.product, self.observe, self.scale = ask.product, ask.observe, scale
        self.first = ask.product.calls
        self.x: Tensor | None = None

    def __call__(self, v: Tensor) -> Tensor:
        if self.x is None:
            self.x = v
        elif self.product.calls > self.first + 1 and self.observe is not None:
            self.observe(self.x * self.scale)
        return self.product(v)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is Tensor.add and args[0] is self.x:
            self.x = out
        return out


def linear_operator_cg(ask: Ask) -> Answer:
    """With what a careful user has to set.

    The tolerance is 1 by default; the iterations of its Lanczos matrix, although none is asked for,
    must not exceed the limit; two constants of 1e-10 end the work on a small residual and take a
    small curvature for zero.
    """
    size = ask.b.norm()  # it solves for b / |b|
    follower = _Follower(ask, size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = linear_cg(
            lambda V: follower(V.squeeze(-1)).unsqueeze(-1),
            ask.b,
            tolerance=ask.rtol,
            max_iter=ask.limit,
            max_tridiag_iter=min(20, ask.limit),
            eps=torch.finfo(ask.b.dtype).tiny,
            stop_updating_after=0.0,
        )
    if follower.observe is not None:
        follower.observe(x)
    warned = any(issubclass(w.category, NumericalWarning) for w in caught)
    return Answer(x, not warned, "warning" if warned else "no warning")


def linear_operator_defaults(ask: Ask) -> Answer:
    """With its defaults; a tolerance is not passed on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = linear_cg(lambda V: ask.product(V.squeeze(-1)).unsqueeze(-1), ask.b)
    return Answer(x, not caught, "warning" if caught else "no warning")


def _by_itself(ask: Ask, follower: _Follower, x: Tensor) -> Answer:
    """Return the account of a solver that returns ``x`` alone, and spends a product on its start.

    It stopped by itself where it took fewer iterations than it was allowed.
    """
    if follower.observe is not None:
        follower.observe(x)
    stopped = ask.product.calls - follower.first < ask.limit + 1
    return Answer(x, stopped, "stopped" if stopped else "limit")


def torchopt_cg(ask: Ask) -> Answer:
    follower = _Follower(ask)
    solve = solve_cg(rtol=ask.rtol, maxiter=ask.limit)
    if ask.observe is None:
        return _by_itself(ask, follower, solve(ask.product, ask.b))
    with follower:
        x = solve(follower, ask.b)
    return _by_itself(ask, follower, x)


def sb3_cg(ask: Ask) -> Answer:
    """With its tolerance, which is on the square of the residual, made relative."""
    torch.manual_seed(0)  # it starts from noise
    follower = _Follower(ask)
    tolerance = (ask.rtol * ask.b.norm().item()) ** 2
    x = conjugate_gradient_solver(follower, ask.b, max_iter=ask.limit, residual_tol=tolerance)
    return _by_itself(ask, follower, x)


OURS: dict[str, Solver] = {
    "our cg": our_cg,
    "our cg, reorth.": our_reorthogonalized_cg,
    "our minres": our_minres,
    "our multishift_cg": our_multishift_cg,
}
PEERS: dict[str, Solver] = {
    "scipy cg": _scipy(scipy_linalg.cg),
    "scipy minres": _scipy(scipy_linalg.minres),
    "linear_cg": linear_operator_cg,
    "torchopt": torchopt_cg,
    "sb3-contrib": sb3_cg,
}
SOLVERS = OURS | PEERS
