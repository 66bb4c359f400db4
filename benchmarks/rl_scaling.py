"""Steps per second and memory over the number of environments, and over the states of an update.

Every point is a process of its own on one thread, so that its peak memory is its own: an agent on
CartPole-v1 makes an update to warm up, and then some that are timed. sb3-contrib has the same
environments, states per update and passes of its critic, in minibatches of 128.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

ENV = "CartPole-v1"
ENVS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STATES = (1024, 4096, 16384, 65536, 204800)
STATES_AT_ENVS, ENVS_AT_STATES = 2048, 64
LONG_ENOUGH = 16384  # steps to time, at least one update
SIDES = ("ours", "sb3-contrib")


def trainer(side: str, n_envs: int, states: int) -> tuple[Callable[[int], Any], Callable[[], int]]:
    """Return what trains for so many steps, and what says how many were made."""
    if side == "ours":
        from rl import TRPO

        agent = TRPO(ENV, n_envs=n_envs, steps_per_update=states)
        return lambda steps: agent.learn(steps, progress=False), lambda: agent.num_timesteps
    from sb3_contrib import TRPO as Sb3TRPO
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env(ENV, n_envs, seed=0)
    model = Sb3TRPO("MlpPolicy", envs, n_steps=states // n_envs, device="cpu", seed=0)
    return lambda s: model.learn(s, reset_num_timesteps=False), lambda: model.num_timesteps


def measure(side: str, n_envs: int, states: int) -> dict[str, float]:
    """Return the speed and the peak memory of this process."""
    torch.set_num_threads(1)
    threadpool_limits(1)
    learn, count = trainer(side, n_envs, states)
    learn(states)
    first, begin = count(), time.perf_counter()
    learn(max(states, LONG_ENOUGH))
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB
    return {"steps_per_second": (count() - first) / seconds, "memory_mib": peak}


def in_a_process(side: str, n_envs: int, states: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.rl_scaling", "--point", side, str(n_envs)]
    made = subprocess.run([*command, str(states)], check=True, capture_output=True, text=True)
    return json.loads(made.stdout)


def plot(results: dict[str, list[tuple[int, str, dict[str, float]]]], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col", layout="constrained")
    measures = (("steps_per_second", "steps per second"), ("memory_mib", "peak memory, MiB"))
    for column, (over, points) in zip(axes.T, results.items(), strict=True):
        for axis, (key, label) in zip(column, measures, strict=True):
            for side in SIDES:
                mine = [(x, made[key]) for x, which, made in points if which == side]
                axis.plot(*zip(*mine, strict=True), marker="o", label=side)
            axis.set(xscale="log", ylabel=label)
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_formatter("{x:,.0f}")
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.grid(alpha=0.3)
        column[-1].set_xlabel(over)
    axes[0, 0].legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    """Print a Markdown table and save the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/rl_scaling.png"))
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(args.point[0], int(args.point[1]), int(args.point[2]))))
        return
    grid = {
        f"environments ({STATES_AT_ENVS} states per update)": [
            (n, n, STATES_AT_ENVS) for n in ENVS
        ],
        f"states per update ({ENVS_AT_STATES} environments)": [
            (b, ENVS_AT_STATES, b) for b in STATES
        ],
    }
    results: dict[str, list[tuple[int, str, dict[str, float]]]] = {over: [] for over in grid}
    print("| environments | states per update | side | steps / s | peak memory, MiB |")
    print("| ---: | ---: | --- | ---: | ---: |")
    for over, points in grid.items():
        for x, n_envs, states in points:
            for side in SIDES:
                made = in_a_process(side, n_envs, states)
                results[over].append((x, side, made))
                print(
                    f"| {n_envs} | {states:,} | {side} | {made['steps_per_second']:,.0f} |"
                    f" {made['memory_mib']:,.0f} |",
                    flush=True,
                )
    plot(results, args.out)


if __name__ == "__main__":
    main()
