"""How well the algorithms learn with their presets, against sb3-contrib with the rl-zoo's settings.

``run`` trains, evaluates with 100 episodes and appends one line a run to a file; runs that the file
has are not repeated. ``table`` prints the file as a Markdown table. A run that fails is kept as a
run that failed.

Both sides make as many steps and have the same bound on the joint KL: stable-baselines3-contrib
averages the KL over the dimensions of an action, so that its ``target_kl`` times their number is
ours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from rl import evaluate, load_preset
from rl.algorithms import ALGORITHMS
from rl.run.plots import bootstrap_interval, iqm

EPISODES, EVALUATION_SEED = 100, 10_000
STEPS = {
    "CartPole-v1": 100_000,
    "Acrobot-v1": 100_000,
    "MountainCarContinuous-v0": 50_000,
    "Pendulum-v1": 100_000,
    "LunarLander-v3": 200_000,
    "InvertedDoublePendulum-v5": 300_000,
    "Hopper-v5": 300_000,
    "HalfCheetah-v5": 300_000,
}
# rl-zoo, hyperparams/trpo.yml; a key that is not there has sb3-contrib's default
MUJOCO: dict[str, Any] = {
    "normalize": True,
    "n_envs": 2,
    "n_steps": 1024,
    "batch_size": 128,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "cg_max_steps": 25,
    "cg_damping": 0.1,
    "n_critic_updates": 20,
    "learning_rate": 1e-3,
    "sub_sampling_factor": 1,
}
ZOO: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "n_envs": 2,
        "n_steps": 512,
        "batch_size": 512,
        "cg_damping": 1e-3,
        "gae_lambda": 0.98,
        "gamma": 0.99,
        "learning_rate": 1e-3,
        "n_critic_updates": 20,
    },
    "Acrobot-v1": {"normalize": True, "n_envs": 2, "n_steps": 1024},
    "MountainCarContinuous-v0": {
        "normalize": True,
        "n_envs": 2,
        "use_sde": True,
        "sde_sample_freq": 4,
    },
    "Pendulum-v1": {
        "n_envs": 2,
        "n_steps": 1024,
        "gamma": 0.9,
        "n_critic_updates": 15,
        "use_sde": True,
        "sde_sample_freq": 4,
    },
    "LunarLander-v3": {
        "n_envs": 2,
        "n_steps": 512,
        "cg_damping": 0.01,
        "gae_lambda": 0.98,
        "gamma": 0.99,
        "learning_rate": 1e-3,
        "n_critic_updates": 15,
    },
    "InvertedDoublePendulum-v5": MUJOCO,
    "Hopper-v5": MUJOCO,
    "HalfCheetah-v5": MUJOCO | {"target_kl": 0.04},
}


def train_ours(name: str, env: str, seed: int, steps: int, **options: Any) -> dict[str, Any]:
    """Train with the preset and other options, and evaluate."""
    agent = ALGORITHMS[name](env, seed=seed, **load_preset(name, env).options | options)
    kls: list[float] = []

    def keep(_: Any, log: dict[str, Any]) -> None:
        kls.append(log["train/kl_divergence_loss"])

    begin = time.perf_counter()
    agent.learn(steps, progress=False, callback=keep)
    seconds = time.perf_counter() - begin
    result = evaluate(agent, env, EPISODES, seed=EVALUATION_SEED)
    return {
        "steps": agent.num_timesteps,
        "seconds": seconds,
        "returns": result.returns,
        "kl": mean(kls),
        "largest_kl": max(kls),
    }


def train_sb3(name: str, env: str, seed: int, steps: int) -> dict[str, Any]:
    """Train sb3-contrib with the zoo's settings, and evaluate."""
    from sb3_contrib import TRPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.logger import KVWriter, Logger
    from stable_baselines3.common.vec_env import VecNormalize

    assert name == "trpo"
    options = dict(ZOO[env])
    normalise = options.pop("normalize", False)
    envs: Any = make_vec_env(env, options.pop("n_envs"), seed=seed)
    if normalise:
        envs = VecNormalize(envs, gamma=options.get("gamma", 0.99))
    space = envs.action_space
    dims = space.shape[0] if isinstance(space, spaces.Box) else 1
    kls: list[float] = []

    class Keep(KVWriter):
        def write(
            self,
            key_values: dict[str, Any],
            key_excluded: dict[str, tuple[str, ...]],  # noqa: ARG002 # the protocol's
            step: int = 0,  # noqa: ARG002 # as above
        ) -> None:
            if "train/kl_divergence_loss" in key_values:
                kls.append(dims * float(key_values["train/kl_divergence_loss"]))

        def close(self) -> None:
            pass

    model = TRPO("MlpPolicy", envs, seed=seed, device="cpu", **options)
    model.set_logger(Logger(None, [Keep()]))
    begin = time.perf_counter()
    model.learn(steps, log_interval=1)
    seconds = time.perf_counter() - begin
    test: Any = make_vec_env(env, 8, seed=EVALUATION_SEED)
    if normalise:
        test = VecNormalize(test, training=False, norm_reward=False)
        test.obs_rms = envs.obs_rms
    returns, _ = evaluate_policy(model, test, EPISODES, return_episode_rewards=True)
    return {
        "steps": model.num_timesteps,
        "seconds": seconds,
        "returns": returns,
        "kl": mean(kls),
        "largest_kl": max(kls),
    }


def train_fast(name: str, env: str, seed: int, steps: int) -> dict[str, Any]:
    """Train with the preset, and what is fast in the benchmark of speed."""
    return train_ours(name, env, seed, steps, **FAST)


FAST: dict[str, Any] = {"critic_fit": "lbfgs:steps=5", "curvature_fraction": 0.1}
SIDES: dict[str, Callable[[str, str, int, int], dict[str, Any]]] = {
    "ours": train_ours,
    "ours, fast": train_fast,
    "sb3-contrib": train_sb3,
}


def one(side: str, name: str, env: str, seed: int, steps: int) -> dict[str, Any]:
    """Make one run, in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # MuJoCo's of its own models
    run = {"side": side, "algorithm": name, "env": env, "seed": seed, "asked": steps}
    # MuJoCo logs its warnings to the working directory
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            return run | SIDES[side](name, env, seed, steps)
        except Exception:  # a run that failed is a result
            return run | {"error": traceback.format_exc()}


def run(args: argparse.Namespace) -> None:
    """Make the runs that the file does not have."""
    key = ("side", "algorithm", "env", "seed", "asked")
    done = {tuple(line[k] for k in key) for line in read(args.out)}
    wanted = [
        (side, args.algorithm, env, seed, args.steps or STEPS[env])
        for env in args.envs
        for seed in range(args.seeds)
        for side in args.sides
    ]
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.jobs, max_tasks_per_child=1) as pool, args.out.open("a") as file:
        runs = [pool.submit(one, *job) for job in wanted if job not in done]
        for made in as_completed(runs):
            result = made.result()
            file.write(json.dumps(result) + "\n")
            file.flush()
            score = f"{mean(result['returns']):.1f}" if "returns" in result else "failed"
            print(*(result[k] for k in key), score, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, none if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(args: argparse.Namespace) -> None:
    """Print one row for each environment, algorithm and side."""
    print(f"torch {torch.__version__}, gymnasium {gymnasium.__version__}, numpy {np.__version__}")
    print()
    print(
        "| environment, steps | algorithm | side | seeds | return of each seed | IQM |"
        " 95 % interval | mean and largest joint KL of an update |"
    )
    print("| --- | --- | --- | ---: | --- | ---: | --- | --- |")
    lines = read(args.out)
    order = list(STEPS)
    groups = {(line["env"], line["algorithm"], line["side"]) for line in lines}
    for env, name, side in sorted(groups, key=lambda g: (order.index(g[0]), g[1] != "trpo", g)):
        mine = [x for x in lines if (x["env"], x["algorithm"], x["side"]) == (env, name, side)]
        mine.sort(key=lambda line: line["seed"])
        good = [line for line in mine if "returns" in line]
        means = [mean(line["returns"]) for line in good]
        print(row(f"{env}, {mine[0]['asked']:,}", name, side, mine, means, good))


def row(
    what: str,
    name: str,
    side: str,
    mine: list[dict[str, Any]],
    means: Iterable[float],
    good: list[dict[str, Any]],
) -> str:
    scores = np.array(list(means))
    middle = float(iqm(scores[:, None])[0])
    low, high = (float(x[0]) for x in bootstrap_interval(scores[:, None]))
    each = ", ".join(
        f"{mean(line['returns']):.1f}" if "returns" in line else "failed" for line in mine
    )
    kl = f"{mean(line['kl'] for line in good):.4f}, {max(x['largest_kl'] for x in good):.4f}"
    return (
        f"| {what} | {name} | {side} | {len(mine)} | {each} | {middle:.1f} |"
        f" {low:.1f} to {high:.1f} | {kl} |"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    runner = commands.add_parser("run")
    runner.add_argument("--envs", nargs="+", default=list(STEPS)[:5])
    runner.add_argument("--algorithm", default="trpo", choices=ALGORITHMS)
    both = ["ours", "sb3-contrib"]
    runner.add_argument("--sides", nargs="+", default=both, choices=SIDES)
    runner.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    runner.add_argument("--steps", type=int, help="instead of those of the environment")
    runner.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    runner.set_defaults(call=run)
    printer = commands.add_parser("table")
    printer.set_defaults(call=table)
    for command in (runner, printer):
        command.add_argument("--out", type=Path, default=Path("runs/learning.jsonl"))
    args = parser.parse_args()
    args.call(args)


if __name__ == "__main__":
    main()
