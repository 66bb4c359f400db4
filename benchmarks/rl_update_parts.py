"""Where the milliseconds of one TRPO policy step go.

A step of 2048 states is taken again and again from the same parameters: policies of 64-64 tanh for
CartPole (4 inputs, 2 logits) and Hopper (11 inputs, 3 means), one thread, at most 10 iterations of
conjugate gradients, with the Fisher matrix of all states and of a tenth of them. The functions of
each part are wrapped from outside. A part is the processor time spent in them and in none of the
parts within; the median over the steps is printed. The wrappers take about a microsecond per call.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pkgutil import resolve_name
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gymnasium import spaces
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.allocator import keep_freed_memory
from rl import ObservationLayout, Path, normalise
from rl.experience.surrogate import surrogate_closure
from rl.networks.encoders import Encoder
from rl.networks.heads import make_head
from rl.networks.policy import HeadPolicy, Policy
from trustregion import NaturalTrustRegion, StepInfo, subsample

STATES = 2048
SPACES: dict[str, tuple[int, spaces.Space[Any]]] = {
    "CartPole": (4, spaces.Discrete(2)),
    "Hopper": (11, spaces.Box(-1, 1, (3,), np.float32)),
}
# The functions by name, since they are none of the package's public ones.
PARTS = {
    "closure, with a graph": ["optim.calls.Calls.first"],
    "gradient": ["optim.natural.gradient"],
    "forward of the curvature's states": ["optim.calls.Calls.beside"],
    "linearisation": ["optim.natural.fisher"],
    "products": ["operators.fisher.FisherOperator.mv"],
    "conjugate gradients, without products": ["optim.natural.solve"],
    "length of the step": ["optim.natural.to_the_edge"],
    "closure, in trials": ["optim.calls.Calls.again"],
    "KL in float64": ["distributions.joint.Joint.mean_kl", "distributions.joint.Joint.frozen"],
    "search, without the above": ["optim.natural.search"],
}
BEFORE, REST = "log-probabilities, before the step", "everything else"
ROWS = [BEFORE, *PARTS, REST]
WARMUP = 3


class Clock:
    """Processor time by part; time within an inner part does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def turn(self) -> None:
        """Charge the time since the last turn to the innermost part."""
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge a block to a part."""
        self.turn()
        self._open.append(name)
        try:
            yield
        finally:
            self.turn()
            self._open.pop()

    def watching(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are charged to a part."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return watched


def make_case(name: str) -> tuple[Policy, Path, Tensor]:
    """Return a policy that is not quite uniform, a path of one step, and its advantages."""
    width, space = SPACES[name]
    torch.manual_seed(0)
    layout = ObservationLayout(spaces.Box(-np.inf, np.inf, (width,), np.float32))
    policy = HeadPolicy(Encoder(layout, (64, 64)), make_head(space))
    observations, noise = torch.randn(STATES, width), torch.randn(STATES)
    with torch.no_grad():
        for p in policy.linear.parameters():
            p.mul_(30)
        distribution = policy(observations)
        actions = distribution.sample()
        log_prob = distribution.log_prob(actions)
    advantages = noise + observations[:, 0] * actions.reshape(STATES, -1)[:, 0]
    no, yes = torch.zeros(1, STATES, dtype=torch.bool), torch.ones(1, STATES, dtype=torch.bool)
    path = Path(
        observations=observations.expand(2, -1, -1),
        actions=actions[None],
        log_prob=log_prob[None],
        signals={},
        terminated=no,
        truncated=no,
        starts=yes,
        mask=yes,
        finals=observations[:0],
        final_at=torch.empty(0, 2, dtype=torch.long),
    )
    return policy, path, normalise(advantages[None])


def measure(
    policy: Policy, path: Path, advantages: Tensor, fraction: float, turns: int
) -> tuple[list[dict[str, float]], StepInfo]:
    """Take the same step many times; return the seconds of each part in each, and the report."""
    start = [p.detach().clone() for p in policy.parameters()]
    optimizer = NaturalTrustRegion(
        policy.parameters(), 0.01, damping=0.1, cg_max_iter=10, maximize=True
    )
    rows = path.rows[subsample(STATES, fraction)]
    curvature = None if fraction == 1 else lambda: policy(rows)
    results: list[dict[str, float]] = []
    for _ in range(turns + WARMUP):
        with torch.no_grad():
            for p, value in zip(policy.parameters(), start, strict=True):
                p.copy_(value)
        clock = Clock()
        with ExitStack() as stack:
            for name, functions in PARTS.items():
                for function in functions:
                    place = f"trustregion.{function}"
                    watched = clock.watching(name, resolve_name(place))
                    stack.enter_context(patch(place, watched))
            with clock.part(BEFORE), torch.no_grad():
                policy(path.rows).log_prob(path.flat(path.actions))
            with clock.part(REST):
                closure = surrogate_closure(policy, path, advantages)
                optimizer.step(closure, curvature=curvature)
        results.append(clock.seconds)
    assert optimizer.info is not None  # after a step
    return results[WARMUP:], optimizer.info


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=100, help="steps that are timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    threadpool_limits(1)
    keep_freed_memory()
    columns: dict[str, list[str]] = {}
    for name in SPACES:
        policy, path, advantages = make_case(name)
        for fraction in (1.0, 0.1):
            results, info = measure(policy, path, advantages, fraction, args.turns)
            header = f"{name}, {'all' if fraction == 1 else 'a tenth'}"
            column = [f"{1e3 * median(r[part] for r in results):.2f}" for part in ROWS]
            whole = [sum(r.values()) - r[BEFORE] for r in results]
            column += [f"{1e3 * f(whole):.2f}" for f in (median, min)]
            columns[header] = [*column, f"{info.products} / {info.evaluations}"]
    print(f"| ms | {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * len(columns)}")
    names = [*ROWS, "**whole step**, median", "least", "products / calls of the closure"]
    for name, *cells in zip(names, *columns.values(), strict=True):
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
