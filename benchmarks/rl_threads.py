"""Steps per second of a plain script, whatever the number of torch's threads.

Each row is a Python process of its own with no environment variable set, which imports, makes an
agent with all options at their defaults, warms up for one update and trains. torch's threads are
unset, 1, 2 or 4. The same of sb3-contrib's TRPO with as many environments, steps per update and
passes over the critic's data. Then two such trainings at once. The processes take turns, so that a
slow moment of the machine falls on all of them.
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
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()
    print("| environment | side | torch's threads | steps / s | of the best |")
    print("| --- | --- | --- | ---: | ---: |")
    for env in args.envs:
        rows: dict[tuple[str, str], list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(args.turns):
                for side, template in SCRIPTS.items():
                    script = template.format(env=env, steps=args.steps)
                    for threads in THREADS:
                        key = side, "default" if threads is None else str(threads)
                        rows.setdefault(key, []).extend(speeds([start(script, threads, folder)]))
                    both = speeds([start(script, None, folder) for _ in range(2)])
                    rows.setdefault((side, "default, two at once"), []).append(sum(both) / 2)
        for side in SCRIPTS:
            best = max(median(v) for (name, _), v in rows.items() if name == side)
            for (name, threads), values in rows.items():
                if name == side:
                    speed = median(values)
                    print(
                        f"| {env} | {side} | {threads} | {speed:,.0f} | {speed / best:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
