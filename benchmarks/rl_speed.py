"""Steps per second of plain training scripts, whatever the number of torch's threads.

Each row is a Python process of its own with no environment variable set, which imports, makes an
agent with all options at their defaults, warms up for one update and trains. torch's threads are
unset, 1, 2 or 4. The same of sb3-contrib's TRPO with as many environments and steps per update.
Then two such trainings at once. "Bare loop" is a policy network, sampling and gymnasium's
SyncVectorEnv in plain torch on one thread, with nothing learnt: what a loop that costs nothing else
would reach. The processes take turns, so that a slow moment of the machine falls on all of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from statistics import median

OURS = """
import time
from rl import TRPO
agent = TRPO("{env}")
agent.learn(2048, progress=False)
begin, before = time.perf_counter(), agent.num_timesteps
agent.learn({steps}, progress=False)
print((agent.num_timesteps - before) / (time.perf_counter() - begin))
"""
SB3 = """
import time
from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env
model = TRPO("MlpPolicy", make_vec_env("{env}", 8), n_steps=256, device="cpu")
model.learn(2048)
begin, before = time.perf_counter(), model.num_timesteps
model.learn({steps}, reset_num_timesteps=False)
print((model.num_timesteps - before) / (time.perf_counter() - begin))
"""
BARE = """
import time
import gymnasium, torch
from torch import nn
torch.set_num_threads(1)
envs = gymnasium.make_vec("{env}", 8, "sync", vector_kwargs=dict(copy=False))
space = envs.single_action_space
discrete = isinstance(space, gymnasium.spaces.Discrete)
inputs, outputs = envs.single_observation_space.shape[0], space.n if discrete else space.shape[0]
net = nn.Sequential(
    nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)
)
observation, _ = envs.reset(seed=0)
begin = time.perf_counter()
with torch.inference_mode():
    for _ in range({steps} // 8):
        out = net(torch.as_tensor(observation, dtype=torch.float32))
        if discrete:
            action = (out - torch.empty_like(out).exponential_().log()).argmax(-1).numpy()
        else:
            action = (out + torch.randn_like(out)).clamp(-1, 1).numpy()
        observation, *_ = envs.step(action)
print({steps} // 8 * 8 / (time.perf_counter() - begin))
"""
SCRIPTS = {"ours": OURS, "sb3-contrib": SB3}
THREADS = (None, 1, 2, 4)
UNSET = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")


def start(script: str, threads: int | None, folder: str) -> subprocess.Popen[str]:
    """Start a training, in a process with default settings."""
    chosen = "" if threads is None else f"import torch\ntorch.set_num_threads({threads})\n"
    variables = {name: value for name, value in os.environ.items() if name not in UNSET}
    variables["PYTHONPATH"] = os.getcwd()
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", chosen + script],
        env=variables,
        cwd=folder,  # MuJoCo logs its warnings to the working directory
        stdout=subprocess.PIPE,
        text=True,
    )


def speeds(processes: list[subprocess.Popen[str]]) -> list[float]:
    """Wait for trainings and return their steps per second."""
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("a training failed: its error is above")
    return [float(output) for output in outputs]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--envs", nargs="+", default=["CartPole-v1", "Hopper-v5"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20_480)
    args = parser.parse_args()
    print("| environment | side | torch's threads | steps / s | of its best | times sb3-contrib |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for env in args.envs:
        rows = measure(env, args.turns, args.steps)
        best = {side: max(v for (name, _), v in rows.items() if name == side) for side, _ in rows}
        for (side, threads), speed in rows.items():
            print(
                f"| {env} | {side} | {threads} | {speed:,.0f} | {speed / best[side]:.2f} |"
                f" {speed / best['sb3-contrib']:.2f} |",
                flush=True,
            )


def measure(env: str, turns: int, steps: int) -> dict[tuple[str, str], float]:
    """Return the median steps per second of each side and setting of threads."""
    rows: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(turns):
            for side, template in SCRIPTS.items():
                script = template.format(env=env, steps=steps)
                for threads in THREADS:
                    key = side, "default" if threads is None else str(threads)
                    rows.setdefault(key, []).extend(speeds([start(script, threads, folder)]))
                both = speeds([start(script, None, folder) for _ in range(2)])
                rows.setdefault((side, "default, two at once"), []).append(sum(both) / 2)
            bare = start(BARE.format(env=env, steps=steps), None, folder)
            rows.setdefault(("bare loop", "1"), []).extend(speeds([bare]))
    return {key: median(values) for key, values in rows.items()}


if __name__ == "__main__":
    main()
