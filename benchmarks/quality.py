"""How good is a solve after k products? On batches of policies in training, against the optimum.

For a direction ``x`` the best linear improvement inside the ball of ``A = F + damping I`` is
proportional to ``g'x / sqrt(x'Ax)``, and largest for ``x = A^-1 g``. The quality is the fraction
of that largest value which ``x`` reaches.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.func import functional_call, jacrev, vmap

from rl import TRPO, Path, surrogate
from rl.experience.surrogate import Objective, normalise
from trustregion import FisherOperator, Identity, LinearOperator, Status, cg, lanczos

STATES, UPDATES = 2048, 5
SIZES = (1, 2, 3, 5, 10, 20, 30, 50)
DAMPINGS = (1e-3, 1e-1)
ENVIRONMENTS = ("CartPole-v1", "HalfCheetah-v5", "Hopper-v5")


@dataclass(frozen=True)
class Batch:
    """What an update starts from."""

    policy: torch.nn.Module
    observations: Tensor
    actions: Tensor
    weights: Tensor
    """Advantages, normalised."""

    def to(self, dtype: torch.dtype) -> Batch:
        """Return the batch in another precision."""
        actions = self.actions.to(dtype) if self.actions.is_floating_point() else self.actions
        return Batch(
            copy.deepcopy(self.policy).to(dtype),
            self.observations.to(dtype),
            actions,
            self.weights.to(dtype),
        )

    def problem(self) -> tuple[LinearOperator, Tensor]:
        """Return the Fisher matrix and the gradient."""
        parameters = list(self.policy.parameters())
        prediction = self.policy(self.observations)
        log_prob = prediction.log_prob(self.actions)
        objective = surrogate(log_prob, log_prob.detach(), self.weights)
        grads = torch.autograd.grad(objective, parameters, retain_graph=True)
        return FisherOperator(prediction, parameters), torch.cat([g.reshape(-1) for g in grads])


class Recording(TRPO):
    """TRPO that keeps what its last update started from."""

    batch: Batch

    def objective(self, path: Path, advantages: Tensor) -> Objective:
        self.batch = Batch(
            copy.deepcopy(self.policy),
            path.rows[:STATES],
            path.flat(path.actions)[:STATES],
            normalise(path.flat(advantages)[:STATES]),
        )
        return super().objective(path, advantages)


R = TypeVar("R", bound=Recording)


def batch_of(env: str) -> Batch:
    """Return the batch that the update after the first few starts from."""
    return recorded(env, Recording).batch


def recorded(env: str, kind: type[R]) -> R:
    """Return the agent after its first few updates."""
    steps = STATES + STATES // 8  # of which some are resets
    seen = 0

    def enough(*_: object) -> bool:
        nonlocal seen
        seen += 1
        return seen <= UPDATES

    # MuJoCo logs its warnings to the working directory
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        agent = kind(env, seed=0, steps_per_update=steps)
        agent.learn(10 * UPDATES * steps, progress=False, callback=enough)
    assert len(agent.batch.observations) == STATES
    return agent


def fisher_diagonal(batch: Batch) -> Tensor:
    """Return the diagonal of the Fisher matrix, exactly, from the Jacobian of every state."""
    parameters = dict(batch.policy.named_parameters())

    def outputs(parameters: Mapping[str, Tensor], observation: Tensor) -> Tensor:
        prediction = functional_call(batch.policy, dict(parameters), (observation[None],))
        if isinstance(prediction, Categorical):
            return prediction.logits[0]
        return torch.cat([prediction.mean[0], prediction.stddev[0].log()])

    def metric(observation: Tensor) -> Tensor:
        y = outputs(parameters, observation)
        if isinstance(batch.policy(observation[None]), Categorical):
            p = y.softmax(-1)
            return p.diag() - torch.outer(p, p)
        k = len(y) // 2
        return torch.cat([(-2 * y[k:]).exp(), torch.full_like(y[k:], 2.0)]).diag()

    total = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=torch.float64)
    for chunk in batch.observations.split(128):
        with torch.no_grad():
            M = torch.stack([metric(observation) for observation in chunk])
        jacobians = vmap(jacrev(outputs), (None, 0))(parameters, chunk)
        J = torch.cat([jacobians[name].flatten(2) for name in parameters], dim=2).detach()
        total += torch.einsum("baj,bac,bcj->j", J, M, J)
    return total / len(batch.observations)


def check_diagonal(F: LinearOperator, diagonal: Tensor) -> None:
    """Assert that some entries are those that products give."""
    for i in torch.linspace(0, len(diagonal) - 1, 7).long():
        unit = torch.zeros_like(diagonal)
        unit[i] = 1.0
        entry = (F @ unit)[i]
        torch.testing.assert_close(entry, diagonal[i], rtol=1e-9, atol=1e-12)


def iterates(
    name: str, F: LinearOperator, g: Tensor, diagonal: Tensor, dampings: tuple[float, ...]
) -> Iterator[list[Tensor]]:
    """Yield the directions after each number of products, damping by damping."""
    space = lanczos(F, g, max_iter=max(SIZES)) if name == "re-damped Lanczos" else None
    for damping in dampings:
        if space is not None:
            yield [space.solve(damping, size=k).x for k in SIZES]
            continue
        inverse = (1 / (diagonal + damping)).to(g.dtype)
        M = (lambda v, inverse=inverse: inverse * v) if name == "cg, Jacobi" else None
        A = F + damping * Identity(g.numel(), g.dtype)
        seen: list[Tensor] = []
        cg(A, g, M=M, rtol=0.0, max_iter=max(SIZES), callback=lambda x, s=seen: s.append(x.clone()))
        yield [seen[min(k, len(seen)) - 1] for k in SIZES]


@dataclass(frozen=True)
class Study:
    """The qualities of one environment."""

    env: str
    parameters: int
    rows: dict[tuple[str, str, float], list[float]]
    """(method, precision, damping) -> the quality at each size."""


def study(env: str) -> Study:
    """Solve the systems of one environment by each method in both precisions."""
    single = batch_of(env)
    double = single.to(torch.float64)
    exact, b = double.problem()
    diagonal = fisher_diagonal(double)
    check_diagonal(exact, diagonal)
    operators, best = [], []
    for damping in DAMPINGS:
        A = exact + damping * Identity(len(b), b.dtype)
        inverse = 1 / (diagonal + damping)
        solution = cg(A, b, M=lambda v, d=inverse: d * v, rtol=1e-8, reorthogonalize=True)
        assert solution.status is Status.CONVERGED
        operators.append(A)
        best.append(math.sqrt((b @ solution.x).item()))
    rows = {}
    for precision, batch in (("float32", single), ("float64", double)):
        F, g = batch.problem()
        for name in ("cg", "cg, Jacobi", "re-damped Lanczos"):
            found = iterates(name, F, g, diagonal, DAMPINGS)
            for damping, A, top, xs in zip(DAMPINGS, operators, best, found, strict=True):
                values = [quality(A, b, x.double()) / top for x in xs]
                rows[name, precision, damping] = values
    return Study(env, len(b), rows)


def quality(A: LinearOperator, g: Tensor, x: Tensor) -> float:
    """Return the linear improvement of ``x`` scaled to the ball of ``A``."""
    return (g @ x).item() / math.sqrt((x @ (A @ x)).item())


def row(*values: object) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(map(str, values))} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Quality of solves on batches of policies.")
    parser.add_argument("--envs", nargs="+", default=list(ENVIRONMENTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    mujoco = importlib.util.find_spec("mujoco") is not None
    studies = [study(env) for env in args.envs if mujoco or env.startswith("CartPole")]

    print("Quality after k products, float32:\n")
    print(row("batch", "damping", "method", *(f"k = {k}" for k in SIZES)))
    print(row("---", "---:", "---", *["---:"] * len(SIZES)))
    for s in studies:
        for damping in DAMPINGS:
            for (name, precision, level), values in s.rows.items():
                if precision == "float32" and level == damping:
                    print(row(s.env, f"{damping:g}", name, *(f"{q:.4f}" for q in values)))

    print("\nWhat is missing to 1, in both precisions:\n")
    print(row("batch", "damping", "method", "precision", *(f"k = {k}" for k in SIZES[3:])))
    print(row("---", "---:", "---", "---", *["---:"] * len(SIZES[3:])))
    for s in studies:
        for damping in DAMPINGS:
            for (name, precision, level), values in s.rows.items():
                if name != "cg, Jacobi" and level == damping:
                    # the optimum itself is good to about 1e-14
                    missing = (f"{1 - q:.1e}" if 1 - q > 1e-13 else "< 1e-13" for q in values[3:])
                    print(row(s.env, f"{damping:g}", name, precision, *missing))
    print()
    for s in studies:
        print(f"{s.env}: {s.parameters} parameters")
    total = len(DAMPINGS) * max(SIZES)
    print(f"products for all dampings, k = {max(SIZES)}: cg {total}, Lanczos {max(SIZES)}")


if __name__ == "__main__":
    main()
