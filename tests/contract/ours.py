"""The optimizers of this package, as the checks take them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal
from torch.optim import Optimizer

from optimizers import natural, newton

from .problem import Evaluate, Subject

RATES: list[dict[str, Any]] = [{"lr": 0.5}, {"lr": torch.tensor(0.5)}]
MAXIMIZE: dict[str, Any] = {"maximize": True}

NATURAL: list[dict[str, Any]] = [
    *RATES,
    MAXIMIZE,
    {"delta": 0.1},
    {"damping": (1e-3, 1e-1), "scales": (0.5, 1.0)},
    {"cg_max_iter": 3, "backtrack_factor": 0.5, "max_backtracks": 3},
    {"max_kl": 0.05},
    {"penalty": 10.0, "kl_target": 1e-3},
]

NEWTON: list[dict[str, Any]] = [
    *RATES,
    MAXIMIZE,
    {"radius": 0.1, "rule": "classic"},
    {"solver": "steihaug"},
    {"damping": 0.1, "damping_factor": 1.5},
    {"max_iter": 3, "rtol": 0.1, "max_rejections": 3},
]


def _natural(_: Optimizer, evaluate: Evaluate) -> Callable[[], tuple[Tensor, Normal]]:
    def closure() -> tuple[Tensor, Normal]:
        loss, outputs = evaluate()
        return loss, Normal(outputs, 1.0)

    return closure


def _newton(_: Optimizer, evaluate: Evaluate) -> Callable[[], Tensor]:
    return lambda: evaluate()[0]


def _gauss_newton(_: Optimizer, evaluate: Evaluate) -> Evaluate:
    return evaluate


def _adaptive(params: Any, **options: Any) -> Optimizer:
    following = {"max_delta": 1.0, "damping_factor": 1.5, "warm_start": 0.9}
    return natural(params, **following, **options)


def _hessian_free(params: Any, **options: Any) -> Optimizer:
    return newton(
        params,
        math.inf,
        curvature="ggn",
        damping=1.0,
        damping_factor=1.5,
        solver="cg",
        warm_start=0.95,
        **options,
    )


OURS = {
    "NaturalTrustRegion": Subject(natural, _natural, NATURAL),
    "NaturalTrustRegion, all adaptive": Subject(_adaptive, _natural, [*RATES, MAXIMIZE]),
    "NewtonTrustRegion": Subject(newton, _newton, NEWTON),
    # the least squares here are convex: to maximise them by Gauss-Newton is refused
    "NewtonTrustRegion, Hessian-free": Subject(_hessian_free, _gauss_newton, RATES),
}
