"""Faults at random moments of a training: what is left is always its last whole update.

``make faults`` runs them; each prints its counts.
"""

import gc
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from contextlib import suppress

import pytest
import torch

from agents import SMALL
from rl import PPO, TRPO, CSVLog, load
from rl.__main__ import main
from rl.run.folder import load_newest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]


def digest(agent):
    """Return a hash of networks and optimizers."""
    sums = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            sums.update(value.numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            sums.update(repr(value).encode())

    add(agent.state_dict()["parts"])
    return sums.hexdigest()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a __del__
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", [TRPO, PPO])
def test_interrupts_at_random_moments_leave_the_last_whole_update(kind, times, capsys):
    """An interrupt waits for the end of an update; a second one undoes the update."""
    chance, counts = random.Random(0), {"at the last update": 0, "at the end of another": 0}
    agent = kind("CartPole-v1", normalise_rewards=True, normalise_observations=True, **SMALL)
    agent.learn(64, progress=False)
    whole, armed = {agent.iterations: digest(agent)}, threading.Event()

    def remember(agent, log):
        whole[agent.iterations] = digest(agent)

    def interrupt():
        while armed.wait() and not stopped:
            time.sleep(chance.uniform(0, 0.05))
            armed.clear()
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)  # the main thread acts on it
                time.sleep(chance.uniform(0, 0.002))
            over.set()

    def act(number, frame):
        if inside:  # the second signal may come when learn has ended
            raise KeyboardInterrupt

    stopped, over, inside = [], threading.Event(), []
    thread = threading.Thread(target=interrupt)
    thread.start()
    before = signal.signal(signal.SIGINT, act)
    for _ in range(500):
        over.clear()
        with suppress(KeyboardInterrupt):
            inside.append(True)
            armed.set()
            agent.learn(10**9, False, remember)
        inside.clear()
        over.wait()
        another = agent.iterations not in whole
        assert agent.iterations <= max(whole) + 1
        assert digest(agent) == whole.setdefault(agent.iterations, digest(agent))
        counts["at the end of another" if another else "at the last update"] += 1
        assert torch.is_grad_enabled()
        assert signal.getsignal(signal.SIGINT) is act
        assert all(module.training for module in agent.policy.modules())
    signal.signal(signal.SIGINT, before)
    stopped.append(True)
    armed.set()
    thread.join()
    with capsys.disabled():
        print(f"\n{kind.name}, {times} at once: {counts}, {agent.iterations} updates")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
def test_kill_at_random_moments_leaves_a_run_that_goes_on(tmp_path, capsys):
    """One run, killed 300 times while it trains and saves all the time, reaches its end."""
    chance, out, kills, none = random.Random(1), tmp_path / "run", 0, 0
    tiny = ["--n-envs", "4", "--steps-per-update", "64", "--hidden", "8", "--save-every", "1e-9"]
    start = ["train", "CartPole-v1", "--out", str(out), *tiny, "--total-timesteps", str(10**9)]
    steps = 0
    while kills < 300:
        child = os.fork()
        if child == 0:  # the process that is killed
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 # until its end
            resume = ["train", "--resume", str(out), "--save-every", "1e-9"]
            os._exit(main(resume if out.exists() else start))
        time.sleep(chance.uniform(0.3, 1.5))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL  # not an error of its own
        kills += 1
        if not (out / "checkpoint.zip").exists() and not (out / "checkpoint-before.zip").exists():
            none += 1
            for path in out.glob("*"):  # nothing was saved yet: start again
                path.unlink()
            if out.exists():
                (out / ".lock").unlink(missing_ok=True)
                out.rmdir()
            continue
        agent, _, faults = load_newest(out, load)
        assert not faults
        assert agent.num_timesteps >= steps  # nothing that was saved is lost
        steps = agent.num_timesteps
    assert steps > 0
    with capsys.disabled():
        print(f"\n300 kills, {none} before the first checkpoint, {steps:,} steps, none lost")


def test_a_long_run_with_faults_leaks_nothing_and_its_log_is_complete(tmp_path, capsys):
    """A million steps of CartPole, interrupted, failing, saved and loaded every few thousand."""
    chance, path, log = random.Random(2), tmp_path / "agent.zip", tmp_path / "log.csv"
    agent, logger, memory, faults = TRPO("CartPole-v1"), CSVLog(log), [], 0
    total, goal = 1_000_000, 0

    def failing(self_update, error):
        def update(path):
            self_update(path)
            raise error

        return update

    while agent.num_timesteps < total:
        goal = agent.num_timesteps + chance.randrange(2000, 8000)

        def until(agent, _, goal=goal):
            return agent.num_timesteps < goal

        unfinished = agent.training.call is not None
        agent.learn(None if unfinished else total, False, until, logger)
        if agent.progress >= 1:
            break
        whole, faults = digest(agent), faults + 1
        error = chance.choice([KeyboardInterrupt, ValueError, torch.OutOfMemoryError, None])
        if error is None:
            agent.save(path)
            agent.close()
            agent = load(path)
        else:
            agent.update = failing(agent.update, error)
            with pytest.raises(error):
                agent.learn(progress=False, logger=logger)
            del agent.update
        assert digest(agent) == whole
        if faults % 10 == 0:
            gc.collect()
            memory.append((agent.num_timesteps, *resources()))
    rows = [*map(int, open_column(log))]
    assert rows == [*range(1, agent.iterations + 1)]
    with capsys.disabled():
        print(f"\n{faults} faults, {len(rows)} updates; steps, MiB, files, threads:")
        print(json.dumps(memory))
    early, late = (sum(row[1] for row in part) / len(part) for part in (memory[3:8], memory[-5:]))
    assert late < early + 20  # MiB; a leak of one path per update would be 60
    assert memory[-1][2:] == memory[3][2:]


def resources():
    """Return MiB of memory, open files and threads of this process."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    files = len(os.listdir("/proc/self/fd"))
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1), files, threading.active_count()


def open_column(path):
    """Yield the numbers of the updates in a log."""
    from rl.run.logs import read_csv

    return read_csv(path)["time/iterations"]
