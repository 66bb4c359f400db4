"""How far and how fast each fit of the critic gets, on batches from training.

Every environment's agent is trained for nine updates; before its critic is fitted at every second
of them from the third on, all fits start from copies of that critic. The first row is what
stable-baselines3-contrib does: Adam, 10 passes of batches of 128.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
import time
import warnings
from statistics import median

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from rl import TRPO, AdamFit, CriticFit, Estimates, LBFGSFit, Path, Regression, TrustRegionFit
from rl.reports import Log

ENVIRONMENTS = ("CartPole-v1", "Pendulum-v1", "Hopper-v5", "HalfCheetah-v5")
SETTINGS: dict[str, CriticFit] = {
    "Adam, 10 passes of 128": AdamFit(lr=1e-3, epochs=10),
    "Adam, 5 passes of 128, rate 0.002": AdamFit(),
    "Adam, 10 passes of 512": AdamFit(lr=3e-3, epochs=10, batch_size=512),
    "L-BFGS, 10 iterations": LBFGSFit(steps=10),
    "L-BFGS, 20 iterations": LBFGSFit(steps=20),
    "trust region, 3 steps": TrustRegionFit(steps=3),
    "trust region, 10 steps": TrustRegionFit(steps=10),
}
UPDATES, FIRST, EVERY = 9, 2, 2


class Recording(TRPO):
    """TRPO that keeps what each fit of its critic started from."""

    def fit_critic(self, path: Path, estimates: Estimates) -> Log:
        start = task_of(self.critic, path.rows, path.flat(estimates.returns))
        self.records: list[Regression] = [*getattr(self, "records", []), start]
        return super().fit_critic(path, estimates)


def task_of(critic: nn.Module, rows: Tensor, returns: Tensor) -> Regression:
    """Return the task for a copy of a critic."""
    mine = copy.deepcopy(critic)
    generator = torch.Generator().manual_seed(0)
    return Regression(mine, list(mine.parameters()), rows, returns, generator)


@torch.no_grad()
def error_of(task: Regression) -> float:
    return (task.critic(task.rows) - task.returns).square().mean().item()


def measure(agent: Recording, fit: CriticFit) -> tuple[list[float], float]:
    """Return the error after over the error before, for each record, and the median ms."""
    shares, times = [], []
    for record in agent.records[FIRST::EVERY]:
        task = task_of(record.critic, record.rows, record.returns)
        optimizer, before = fit.optimizer(task.parameters), error_of(task)
        begin = time.process_time()
        fit(task, optimizer)
        times.append(1e3 * (time.process_time() - begin))
        shares.append(error_of(task) / before)
    return shares, median(times)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", nargs="+", default=ENVIRONMENTS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # MuJoCo's of its own models
    torch.set_num_threads(1)
    threadpool_limits(1)
    header = ["fit"]
    cells: dict[str, list[str]] = {name: [] for name in SETTINGS}
    for env in args.envs:
        # MuJoCo logs its warnings to the working directory
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            agent = Recording(env, seed=0)
            agent.learn(agent.config.steps_per_update * (UPDATES - 1), progress=False)
        results = {name: measure(agent, fit) for name, fit in SETTINGS.items()}
        base = next(iter(results.values()))
        header += [f"{env}: error", "time"]
        for name, (shares, ms) in results.items():
            cells[name] += [f"{median(shares):.3f}", f"{ms / base[1]:.2f} ({ms:.0f} ms)"]
    print(f"| {' | '.join(header)} |")
    print(f"| --- |{' ---: |' * (len(header) - 1)}")
    for name, row in cells.items():
        print(f"| {name} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
