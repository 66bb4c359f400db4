"""Steps per second of whole trainings, against sb3-contrib, and of the bare rollout loop.

Everybody has as many environments, steps an update and threads; "fast" makes fewer passes over the
critic's data and takes the curvature from a tenth of the states. envpool steps its environments in
threads of its own, as many as there are cores. The trainings take turns, A, B, A, B, so that a slow
moment of the machine falls on all; the first turn warms up. "bare loop" is the policy's network,
sampling and the environments, and nothing else, in plain torch on gymnasium's SyncVectorEnv: what a
loop that costs nothing would reach.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median
from typing import Any

import gymnasium
import torch
from sb3_contrib import TRPO as Sb3TRPO
from stable_baselines3.common.env_util import make_vec_env
from threadpoolctl import threadpool_limits
from torch import nn

from rl import TRPO, LBFGSFit

N_ENVS, STEPS = 8, 2048
FAST: dict[str, Any] = {"critic_fit": LBFGSFit(steps=5), "curvature_fraction": 0.1}


def ours(env: str, **options: Any) -> Callable[[int], int]:
    """Return a training of ours that goes on for so many steps, and says how many it took."""
    agent = TRPO(env, n_envs=N_ENVS, steps_per_update=STEPS, **options)

    def train(steps: int) -> int:
        before = agent.num_timesteps
        agent.learn(steps, progress=False)
        return agent.num_timesteps - before

    return train


def sb3(env: str) -> Callable[[int], int]:
    """Return a training of sb3-contrib's."""
    envs = make_vec_env(env, N_ENVS, seed=0)
    model = Sb3TRPO(
        "MlpPolicy",
        envs,
        n_steps=STEPS // N_ENVS,
        batch_size=128,
        n_critic_updates=10,
        device="cpu",
    )

    def train(steps: int) -> int:
        before = model.num_timesteps
        model.learn(steps, reset_num_timesteps=False)
        return model.num_timesteps - before

    return train


def bare(env: str) -> Callable[[int], int]:
    """Return the loop without any learning."""
    envs = gymnasium.make_vec(env, N_ENVS, "sync", vector_kwargs={"copy": False})
    space = envs.single_action_space
    discrete = isinstance(space, gymnasium.spaces.Discrete)
    shape = envs.single_observation_space.shape
    assert shape is not None
    outputs = int(space.n) if isinstance(space, gymnasium.spaces.Discrete) else space.shape[0]  # pyright: ignore[reportOptionalSubscript] # a Box has one
    net = nn.Sequential(
        nn.Linear(shape[0], 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)
    )
    observation, _ = envs.reset(seed=0)
    state = [torch.as_tensor(observation, dtype=torch.float32)]

    @torch.inference_mode()
    def loop(steps: int) -> int:
        for _ in range(steps // N_ENVS):
            out = net(state[0])
            if discrete:
                action = (out - torch.empty_like(out).exponential_().log()).argmax(-1).numpy()
            else:
                action = (out + torch.randn_like(out)).clamp(-1, 1).numpy()
            observation, *_ = envs.step(action)
            state[0] = torch.as_tensor(observation, dtype=torch.float32)
        return steps // N_ENVS * N_ENVS

    return loop


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--envs", nargs="+", default=["CartPole-v1", "Hopper-v5"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--updates", type=int, default=4, help="a turn")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # MuJoCo's of its own models
    torch.set_num_threads(1)
    threadpool_limits(1)
    print("| environment | what | steps / s | times sb3-contrib |")
    print("| --- | --- | ---: | ---: |")
    for env in args.envs:
        runs = {
            "sb3-contrib": sb3(env),
            "ours": ours(env),
            "ours, sync": ours(env, vectorization="sync"),
            "ours, fast": ours(env, **FAST),
            "bare loop, sync": bare(env),
        }
        if find_spec("envpool"):
            runs["ours, fast, envpool"] = ours(env, vectorization="envpool", **FAST)
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        # MuJoCo logs its warnings to the working directory
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            for turn in range(args.turns + 1):
                for name, run in runs.items():
                    begin = time.perf_counter()
                    steps = run(args.updates * STEPS)
                    if turn:
                        speeds[name].append(steps / (time.perf_counter() - begin))
        for name, values in speeds.items():
            ratio = median(v / s for v, s in zip(values, speeds["sb3-contrib"], strict=True))
            print(f"| {env} | {name} | {median(values):,.0f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
