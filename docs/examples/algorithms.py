"""Compare all algorithms of ``rl`` on one environment, with equal steps and several seeds.

They share the collection of experience, advantages, critic and loop, and differ in what they do
with a path of it. TRPO and the natural policy gradient (NPG) take a step of a given KL, TRPO with a
line search and NPG without one. KLPenalty has the KL in its loss. PPO makes ten passes of
minibatches with a clipped ratio. VPG takes one step of Adam. Options are the defaults, except for a
learning rate of 0.03 for VPG.

Run ``python docs/examples/algorithms.py``; it takes about three minutes.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from rl import CSVLog, evaluate
from rl.algorithms import ALGORITHMS
from rl.run.plots import plot_runs

OPTIONS: dict[str, dict[str, Any]] = {"vpg": {"policy_lr": 0.03}}
PLOT = Path(__file__).with_suffix(".png")


class Result(NamedTuple):
    """The result of one training run."""

    mean: float  # the mean return of the evaluation
    largest_kl: float
    seconds: float  # processor seconds of training alone


def train(name: str, env: str, steps: int, seed: int, folder: Path) -> Result:
    """Train, evaluate, and leave a run folder to plot."""
    agent = ALGORITHMS[name](env, seed=seed, **OPTIONS.get(name, {}))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"algorithm": name, "env_id": env}))
    kls: list[float] = []
    begin = time.process_time()
    agent.learn(
        steps,
        progress=False,
        callback=[
            CSVLog(folder / "progress.csv"),
            lambda _, log: kls.append(log["train/kl_divergence_loss"]),
        ],
    )
    seconds = time.process_time() - begin
    return Result(evaluate(agent, env, 20).mean, max(kls), seconds)


def table(results: dict[str, list[Result]]) -> str:
    """Return a table of the evaluations, the largest KL of any update, and the time."""
    lines = ["              return: mean   lowest   largest KL   seconds"]
    for name, group in results.items():
        returns = [result.mean for result in group]
        kl, seconds = max(r.largest_kl for r in group), fmean(r.seconds for r in group)
        label = ALGORITHMS[name].__name__
        lines.append(
            f"{label:<12}{fmean(returns):14.1f}{min(returns):9.1f}{kl:13.4f}{seconds:10.1f}"
        )
    return "\n".join(lines)


def main(
    *,
    env: str = "CartPole-v1",
    steps: int = 40_000,
    seeds: int = 5,
    plot: Path = PLOT,
    quiet: bool = False,
) -> dict[str, list[Result]]:
    """Train them all, print a table, save the plot; return the results of each by seed."""
    results: dict[str, list[Result]] = {name: [] for name in ALGORITHMS}
    jobs = [(name, seed) for seed in range(seeds) for name in ALGORITHMS]
    with tempfile.TemporaryDirectory() as scratch:
        folders: list[Path] = []
        for name, seed in tqdm(jobs, disable=quiet):
            folders.append(Path(scratch) / f"{name}-{seed}")
            results[name].append(train(name, env, steps, seed, folders[-1]))
        plot_runs(folders, plot)
    print(table(results))
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--env", default="CartPole-v1", help="environment id")
    parser.add_argument("--steps", type=int, default=40_000, help="environment steps")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--plot", type=Path, default=PLOT, help="where to save the plot")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    torch.set_num_threads(1)  # Such small networks gain nothing from more.
    main(**vars(parser.parse_args()))
