"""The same faults for this package and for stable-baselines3: what is said, what is left.

Each fault is a plain script in a process of its own, with a time limit. Written for docs/faults.md:

    python -m benchmarks.rl_faults
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT = 40  # seconds after which a script counts as hanging
MARK = "RL_FAULTS_MARK"

ENVIRONMENT = """
import os, time
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv

class TwoArguments(Exception):
    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")

class Faulty(CartPoleEnv):
    steps = 0
    def step(self, action):
        Faulty.steps += 1
        obs, reward, terminated, truncated, info = super().step(action)
        if Faulty.steps == 300:
            kind = os.environ["FAULT"]
            if kind == "raises": raise ValueError("the motor is hot")
            if kind == "raises, two arguments": raise TwoArguments(7, "the motor is hot")
            if kind == "process dies": os._exit(1)
            if kind == "segmentation fault": os.kill(os.getpid(), 11)
            if kind == "hangs": time.sleep(10**6)
            if kind == "observation is NaN": obs = obs * np.nan
            if kind == "reward is NaN": reward = float("nan")
            if kind == "observation of another shape": obs = obs[:1]
        return obs, reward, terminated, truncated, info
"""
FAULTS = (
    "raises",
    "raises, two arguments",
    "process dies",
    "segmentation fault",
    "hangs",
    "observation is NaN",
    "reward is NaN",
    "observation of another shape",
)
OURS = """
from rl import TRPO
from faulty import Faulty
agent = TRPO(Faulty, n_envs=2, vectorization={how!r}, steps_per_update=512, env_timeout=5.0)
try:
    agent.learn(4096, progress=False)
    print("went on")
finally:
    print("finite", all(p.isfinite().all() for p in agent.policy.parameters()))
    agent.close()
"""
SB3 = """
from faulty import Faulty
from sb3_contrib import TRPO
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
if __name__ == "__main__":
    envs = {kind}([Faulty] * 2)
    agent = TRPO("MlpPolicy", envs, n_steps=256, device="cpu")
    try:
        agent.learn(4096)
        print("went on")
    finally:
        print("finite", all(p.isfinite().all() for p in agent.policy.parameters()))
        envs.close()
"""
OURS_RESUME = """
import hashlib
from pathlib import Path
from rl import TRPO, load
def save(agent, log):
    if agent.iterations == 2: agent.save("agent.zip")
whole = TRPO("{env}", n_envs=2, vectorization="{how}", steps_per_update=512)
whole.learn(2048, progress=False, callback=save)
other = load("agent.zip").learn(progress=False)
sums = []
for agent in (whole, other):
    agent.save("state.zip", run=False)  # equal states are equal files
    sums.append(hashlib.sha256(Path("state.zip").read_bytes()).hexdigest())
    agent.close()
print("equal", sums[0] == sums[1], sums[0][:16])
"""
SB3_RESUME = """
import gymnasium
import torch
from sb3_contrib import TRPO
make = lambda: TRPO("MlpPolicy", "{env}", n_steps=512, seed=0, device="cpu")
whole = make().learn(2048)
half = make().learn(1024); half.save("agent")
other = TRPO.load("agent", env=gymnasium.make("{env}"), device="cpu")
other.learn(1024, reset_num_timesteps=False)
pairs = zip(whole.policy.parameters(), other.policy.parameters())
print("equal", all(torch.equal(p, q) for p, q in pairs))
"""


def processes(mark: str) -> list[int]:
    """Return the processes that were started with a mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:  # it ended, or is somebody else's
                pass
    return found


@contextmanager
def started(arguments: list[str], folder: Path, **extra: str) -> Iterator[tuple]:
    """Run Python; afterwards end what is left of it."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **extra,
            MARK: mark,
            "PYTHONPATH": f"{Path.cwd()}:{folder}",
        },
        stdout=(folder / "out").open("w"),
        stderr=(folder / "err").open("w"),
    )
    try:
        yield process, mark
    finally:
        for number in processes(mark):
            os.kill(number, signal.SIGKILL)
        process.wait()


def outcome(script: str, fault: str) -> str:
    """Run a script with a fault, and say in words what became of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "faulty.py").write_text(ENVIRONMENT)
        (folder / "script.py").write_text(script)
        with started(["script.py"], folder, FAULT=fault) as (process, mark):
            try:
                code = process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                return f"hangs (killed after {LIMIT} s)"
            time.sleep(0.5)
            orphans = len(processes(mark))
        said = [line for line in (folder / "err").read_text().splitlines() if line.strip()]
        printed = (folder / "out").read_text()
        words = []
        if code < 0:
            words.append(f"dies of {signal.Signals(-code).name}")
        elif "went on" in printed:
            words.append("trains on")
        else:
            errors = [line for line in said if ERROR.match(line)] or said or ["ends silently"]
            errors = [line for line in errors if "Fault" in line] or errors  # not of the notes
            text = ERROR.sub(r"\1", errors[-1])[:150]
            words.append(f"`{text}`")
        if "finite False" in printed:
            words.append("weights are NaN")
        if orphans:
            words.append(f"{orphans} processes left")
        return "; ".join(words)


def environments() -> None:
    """Print the table of environments' faults."""
    print("| the environment | in | ours | stable-baselines3 |")
    print("| --- | --- | --- | --- |")
    for fault in FAULTS:
        for where, how, kind in (
            ("workers", "async", "SubprocVecEnv"),
            ("the process", "sync", "DummyVecEnv"),
        ):
            if how == "sync" and fault in ("process dies", "segmentation fault", "hangs"):
                continue  # nothing can be done
            cells = outcome(OURS.format(how=how), fault), outcome(SB3.format(kind=kind), fault)
            print(f"| {fault} | {where} | {cells[0]} | {cells[1]} |", flush=True)


ERROR = re.compile(r"^(?:\w+\.)*(\w+(?:Error|Fault|Arguments))(?=:|$)")
OURS_STOPPED = """
import sys
from rl.__main__ import main
command = ["train", "CartPole-v1", "--out", "run", "--total-timesteps", "100000000"]
sys.exit(main([*command, "--log-every", "1", "--save-every", "0.05"]))  # minutes
"""
SB3_STOPPED = """
from sb3_contrib import TRPO
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
class Steps(BaseCallback):
    def _on_step(self): return True
    def _on_rollout_end(self): print(self.num_timesteps, flush=True)
agent = TRPO("MlpPolicy", "CartPole-v1", device="cpu")
agent.learn(100_000_000, callback=[Steps(), CheckpointCallback(3 * 2500, "run")])  # some 3 s
agent.save("run/rl_model_0_steps")
"""
LOADED = """
import sys
from rl.run.folder import load_newest
from rl import load
from pathlib import Path
print(load_newest(Path("run"), load)[0].num_timesteps)
"""


def stopped(script: str, name: str, seconds: float) -> tuple[int, int, int]:
    """Send a signal to a training after some seconds; return steps made and kept, and its code."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "script.py").write_text(script)
        with started(["script.py"], folder) as (process, _):
            while not re.search(r"^ *[\d,]+\b", (folder / "out").read_text(), re.M):
                time.sleep(0.05)
            time.sleep(seconds)
            process.send_signal(getattr(signal, name))
            code = process.wait(LIMIT)
        rows = re.findall(r"^ *([\d,]+)\b", (folder / "out").read_text(), re.M)
        steps = int(rows[-1].replace(",", ""))
        if "rl.__main__" in script:
            loaded = subprocess.run(
                [sys.executable, "-c", LOADED],
                cwd=folder,
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": str(Path.cwd())},
                check=False,
            ).stdout
            kept = int(loaded or 0)
        else:
            found = [re.findall(r"_(\d+)_steps", p.name) for p in folder.glob("run/*.zip")]
            kept = max((int(steps) for (steps,) in found), default=0)
        return steps, kept, code


def stops(runs: int = 5) -> None:
    """Print the work that is lost when a training is stopped."""
    print("\n| signal | ours: steps lost of those made | exit | stable-baselines3 | exit |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"):
        cells = []
        for script in (OURS_STOPPED, SB3_STOPPED):
            found = [stopped(script, name, 3.0 + 1.7 * i) for i in range(runs)]
            made, lost = (sum(x) for x in ([f[0] for f in found], [f[0] - f[1] for f in found]))
            codes = ", ".join(str(code) for code in sorted({f[2] for f in found}))
            cells.append(f"{max(lost, 0) / made:.0%} | {codes}")
        print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)


RESUMED = "CartPole-v1 Acrobot-v1 Pendulum-v1 MountainCarContinuous-v0 LunarLander-v3"
RESUMED += " Hopper-v5 HalfCheetah-v5"


def printed(script: str) -> str:
    """Return what a script printed last, in two minutes at most."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "script.py").write_text(script)
        with started(["script.py"], folder) as (process, _):
            process.wait(120)
        return ((folder / "out").read_text().splitlines() or ["nothing"])[-1]


def resumes() -> None:
    """Print whether a training that was saved and loaded ends in the state of the whole one."""
    print("\n| environment | ours, in this process | ours, in workers | stable-baselines3 |")
    print("| --- | --- | --- | --- |")
    for env in RESUMED.split():
        ours = [printed(OURS_RESUME.format(env=env, how=how)) for how in ("sync", "async")]
        other = printed(SB3_RESUME.format(env=env))
        cells = [x.replace("equal True", "equal,").replace("equal False", "differs") for x in ours]
        theirs = {"equal True": "equal", "equal False": "differs"}.get(other, other)
        print(f"| {env} | {cells[0]} | {cells[1]} | {theirs} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["environments", "resumes", "stops"])
    only = parser.parse_args().only
    # what a shell starts in the background ignores it, and so would the processes started here
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, table in (("environments", environments), ("stops", stops), ("resumes", resumes)):
        if only in (None, name):
            table()
