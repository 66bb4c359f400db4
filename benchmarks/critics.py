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
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from rl import TRPO
from rl.agent import Log
from rl.experience.path import Batch
from rl.fits import FITS
from rl.networks.critic import Critic

ENVIRONMENTS = ("CartPole-v1", "Pendulum-v1", "Hopper-v5", "HalfCheetah-v5")
SETTINGS: dict[str, dict[str, Any]] = {
    "Adam, 10 passes of 128": {"critic_fit": "adam"},
    "Adam, 10 passes of 512": {
        "critic_fit": "adam",
        "critic_batch_size": 512,
        "critic_lr": 3e-3,
    },
    "L-BFGS, 10 iterations": {"critic_fit": "lbfgs", "critic_steps": 10},
    "L-BFGS, 20 iterations": {"critic_fit": "lbfgs", "critic_steps": 20},
    "trust region, 3 steps": {"critic_fit": "trust_region", "critic_steps": 3},
    "trust region, 10 steps": {"critic_fit": "trust_region", "critic_steps": 10},
}
UPDATES, FIRST, EVERY = 9, 2, 2


class Recording(TRPO):
    """TRPO that keeps what each fit of its critic started from."""

    def fit_critic(self, batch: Batch) -> Log:
        assert isinstance(self.critic, Critic)
        self.records: list[tuple[Critic, Batch]] = [
            *getattr(self, "records", []),
            (copy.deepcopy(self.critic), batch),
        ]
        return super().fit_critic(batch)


def measure(agent: Recording, options: dict[str, Any]) -> tuple[list[float], float]:
    """Return the error after over the error before, for each record, and the median ms."""
    shares, times = [], []
    for start, batch in agent.records[FIRST::EVERY]:
        critic = copy.deepcopy(start)
        config = replace(agent.config, **options)
        fit = FITS[config.critic_fit](critic, list(critic.parameters()), config)
        with torch.no_grad():
            before = fit.error(batch.observations, batch.returns).item()
        begin = time.process_time()
        fit.fit(batch.observations, batch.returns, torch.Generator().manual_seed(0))
        times.append(1e3 * (time.process_time() - begin))
        with torch.no_grad():
            shares.append(fit.error(batch.observations, batch.returns).item() / before)
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
        results = {name: measure(agent, options) for name, options in SETTINGS.items()}
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
