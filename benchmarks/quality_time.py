"""How good is a direction after the time that ten iterations of the peers' way take?

The quality is that of ``quality.py``: the fraction of the best linear improvement inside the ball
of ``F + damping I`` that a direction reaches. The peers' way is plain conjugate gradients on the
double backward of the KL with its gradient graph kept, in float32. Its ten iterations alone are the
time allowed, without building that graph. Ours has to fit in everything that follows the gradient:
making the operator and the preconditioner, and the solve.

*Next* is the solve of the update after one that has already been solved: what a preconditioner
keeps from it, it may use.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal, kl_divergence

from benchmarks.allocator import keep_freed_memory
from benchmarks.quality import (
    DAMPINGS,
    ENVIRONMENTS,
    Batch,
    Recording,
    fisher_diagonal,
    quality,
    recorded,
    row,
)
from rl import Path
from rl.experience.surrogate import Objective
from trustregion import KFAC, FisherOperator, Identity, Jacobi, LinearOperator, Nystrom, Status, cg
from trustregion.preconditioners import Preconditioner, Recycled

ITERATIONS = 10
PROBES = (4, 16)
"""Iterations at which a method is timed to find how many fit."""
WARMUP, TARGET = 3, 0.95


def preconditioners(policy: torch.nn.Module) -> dict[str, Callable[[], Preconditioner]]:
    """Return those of the package, at their defaults."""
    return {
        "KFAC": lambda: KFAC(policy),
        "Jacobi": Jacobi,
        "Nystrom": lambda: Nystrom(10),
        "Recycled": lambda: Recycled(10),
    }


class TwoRecordings(Recording):
    """Keeps what its last two updates started from."""

    previous: Batch

    def objective(self, path: Path, advantages: Tensor) -> Objective:
        if hasattr(self, "batch"):
            self.previous = self.batch
        return super().objective(path, advantages)


def batches_of(env: str) -> tuple[Batch, Batch]:
    """Return the batch that the update after the first few starts from, and the one before."""
    agent = recorded(env, TwoRecordings)
    return agent.previous, agent.batch


@dataclass(frozen=True)
class Start:
    """What all have before the clock starts: the predictions with their graph, the gradient."""

    policy: torch.nn.Module
    prediction: Distribution
    gradient: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Start:
        return cls(batch.policy, batch.policy(batch.observations), batch.problem()[1])

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.policy.parameters())


def _detached(prediction: Distribution) -> Distribution:
    if isinstance(prediction, Categorical):
        return Categorical(logits=prediction.logits.detach())
    assert isinstance(prediction, Independent)
    normal = prediction.base_dist
    return Independent(Normal(normal.loc.detach(), normal.scale.detach()), 1)


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def peers_product(start: Start, damping: float) -> Callable[[Tensor], Tensor]:
    """Return the double backward of the KL on a kept graph, with the damping."""
    params = start.parameters
    kl = kl_divergence(_detached(start.prediction), start.prediction).mean()
    g = _flat(torch.autograd.grad(kl, params, create_graph=True))
    return lambda v: (
        _flat(torch.autograd.grad((g * v).sum(), params, retain_graph=True)) + damping * v
    )


def peers_solve(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Conjugate gradients as the TRPO scripts write them, a product an iteration."""
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = r @ r
    for _ in range(ITERATIONS):
        Ap = product(p)
        alpha = rr / (p @ Ap)
        x += alpha * p
        r -= alpha * Ap
        new = r @ r
        p = r + new / rr * p
        rr = new
    return x


def our_solve(
    start: Start,
    damping: float,
    iterations: int,
    rule: Preconditioner | None,
    *,
    reorthogonalize: bool,
) -> Tensor:
    """Make the operator and the preconditioner, and solve."""
    F = FisherOperator(start.prediction, start.parameters)
    M = None if rule is None else rule.build(F, damping)
    watched = F if rule is None else rule.watch(F)
    A = watched + damping * Identity(start.gradient.numel(), start.gradient.dtype)
    solve = cg(
        A, start.gradient, M=M, rtol=0.0, max_iter=iterations, reorthogonalize=reorthogonalize
    )
    if rule is not None:
        rule.observe(solve)
    return solve.x


@dataclass(frozen=True)
class Method:
    """One of our ways to a direction."""

    run: Callable[[int, Preconditioner | None], Tensor]
    """(iterations, preconditioner) -> direction."""
    fresh: Callable[[], Preconditioner | None] = lambda: None
    """Makes the preconditioner, outside the clock; all of its work is in ``build``."""


def methods(before: Start, start: Start, damping: float) -> dict[str, Method]:
    """Return our ways, plain and with each preconditioner, at its first solve and its next."""

    def way(reorthogonalize: bool) -> Callable[[int, Preconditioner | None], Tensor]:
        return lambda k, rule: our_solve(start, damping, k, rule, reorthogonalize=reorthogonalize)

    found = {"cg": Method(way(False)), "cg, reorthogonalised": Method(way(True))}
    earlier = preconditioners(before.policy)
    for name, fresh in preconditioners(start.policy).items():
        found[name] = Method(way(True), fresh)
        old = earlier[name]()
        our_solve(before, damping, ITERATIONS, old, reorthogonalize=True)

        def again(
            fresh: Callable[[], Preconditioner] = fresh, old: Preconditioner = old
        ) -> Preconditioner:
            rule = fresh()
            rule.load_state_dict(copy.deepcopy(old.state_dict()))
            return rule

        if old.state_dict():
            found[f"{name}, next"] = Method(way(True), again)
    return found


def seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes, by the processor's time."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def ratios(peer: Callable[[], object], runs: dict[Any, tuple[Method, int]], turns: int) -> dict:
    """Return, for each method at its iterations, its times over the peers', turn by turn."""
    found: dict[Any, list[float]] = {key: [] for key in runs}
    for turn in range(WARMUP + turns):
        allowed = seconds(peer)
        for key, (method, iterations) in runs.items():
            rule = method.fresh()
            taken = seconds(lambda m=method, k=iterations, r=rule: m.run(k, r))
            if turn >= WARMUP:
                found[key].append(taken / allowed)
    return found


def fitting(peer: Callable[[], object], ways: dict[str, Method], turns: int) -> dict:
    """Return the iterations that fit in the peers' time, and the share of it that they take."""
    probes = {(name, k): (way, k) for name, way in ways.items() for k in PROBES}
    at = {key: median(values) for key, values in ratios(peer, probes, turns).items()}
    low, high = PROBES
    counts = {}
    for name in ways:
        slope = max(at[name, high] - at[name, low], 1e-3) / (high - low)
        counts[name] = max(1, low + math.floor((1 - at[name, low]) / slope) + 1)
    found, open_names = {}, list(ways)
    while open_names:  # one fewer until it fits
        runs = {name: (ways[name], counts[name]) for name in ways if name in open_names}
        for name, values in ratios(peer, runs, turns).items():
            if median(values) <= 1 or counts[name] == 1:
                found[name] = counts[name], values
                open_names.remove(name)
            else:
                counts[name] -= 1
    return {name: found[name] for name in ways}


def optimum(batch: Batch, damping: float) -> tuple[LinearOperator, Tensor, float]:
    """Return the system in float64, and the largest value of what the quality is a fraction of."""
    double = batch.to(torch.float64)
    F, b = double.problem()
    inverse = 1 / (fisher_diagonal(double) + damping)
    A = F + damping * Identity(len(b), b.dtype)
    solution = cg(A, b, M=lambda v: inverse * v, rtol=1e-8, reorthogonalize=True)
    assert solution.status is Status.CONVERGED
    return A, b, math.sqrt((b @ solution.x).item())


def study(env: str, before: Batch, batch: Batch, damping: float, turns: int) -> list[str]:
    """Return the rows of one system."""
    A, b, best = optimum(batch, damping)
    start, product = Start.of(batch), peers_product(Start.of(batch), damping)
    F = FisherOperator(start.prediction, start.parameters)
    v, Fv = start.gradient, F @ start.gradient + damping * start.gradient
    assert (product(v) - Fv).norm() < 1e-3 * Fv.norm()

    def peer() -> Tensor:
        return peers_solve(product, start.gradient)

    def graded(x: Tensor) -> float:
        return quality(A, b, x.double()) / best

    q, ms = graded(peer()), 1e3 * median(seconds(peer) for _ in range(turns))
    lines = [row(env, f"{damping:g}", f"peers, {ms:.1f} ms", ITERATIONS, "1", f"{q:.3f}", "")]
    ways = methods(Start.of(before), start, damping)
    for name, (count, values) in fitting(peer, ways, turns).items():
        q = graded(ways[name].run(count, ways[name].fresh()))
        low, middle, high = quantiles(values)
        share = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        met = "met" if q >= TARGET and middle <= 1 else "missed"
        lines.append(row(env, f"{damping:g}", name, count, share, f"{q:.3f}", met))
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description="Quality in the peers' time, on batches of policies."
    )
    parser.add_argument("--envs", nargs="+", default=list(ENVIRONMENTS))
    parser.add_argument("--turns", type=int, default=20, help="turns, after the warm-up")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    mujoco = importlib.util.find_spec("mujoco") is not None
    target = f"quality >= {TARGET:g}"
    print(row("batch", "damping", "who", "iterations", "time / peers' time", "quality", target))
    print(row("---", "---:", "---", "---:", "---:", "---:", "---"))
    for env in args.envs:
        if mujoco or env.startswith("CartPole"):
            before, batch = batches_of(env)
            for damping in DAMPINGS:
                print("\n".join(study(env, before, batch, damping, args.turns)), flush=True)


if __name__ == "__main__":
    main()
