"""Ctrl-C, which a terminal sends to the worker processes, too."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from rl import TRPO, checkpoint, evaluate
from rl.algorithms import ALGORITHMS
from rl.envs.workers import in_processes
from rl.run.cli import main
from toys import Clock

ENVIRONMENT = """
import time
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Slow(CartPoleEnv):
    def step(self, action):
        time.sleep(0.001)
        return super().step(action)

gymnasium.register("Slow-v0", entry_point=Slow, max_episode_steps=50)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there Ctrl-C reaches the workers")
def test_an_interrupt_with_worker_processes_is_one_line_and_keeps_what_was_learnt(tmp_path):
    (tmp_path / "slow_env.py").write_text(textwrap.dedent(ENVIRONMENT))
    command = [sys.executable, "-m", "rl", "train", "slow_env:Slow-v0", "--out", "run"]
    command += ["--n-envs", "2", "--vectorization", "async"]
    command += ["--steps-per-update", "16", "--hidden", "4"]
    process = subprocess.Popen(
        [*command, "--total-timesteps", "1000000", "--log-every", "1"],
        cwd=tmp_path,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.rstrip().endswith("accepted"):
            os.killpg(process.pid, signal.SIGINT)
            break
    _, err = process.communicate(timeout=60)
    said = "note: SIGINT: this update is finished and saved; once more to stop at once\n"
    said += "stopped: python -m rl train slow_env:Slow-v0 --resume run goes on\n"
    assert (process.returncode, err) == (130, said)
    assert checkpoint.read(tmp_path / "run" / "checkpoint.zip")["agent"]["iterations"] >= 1


def interrupt_workers():
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="there Ctrl-C reaches the workers")
def test_workers_never_see_an_interrupt(tmp_path, monkeypatch):
    class Interrupting(TRPO):
        def update(self, path):
            interrupt_workers()
            return super().update(path)

        def predict(self, *arguments, **options):
            interrupt_workers()
            return super().predict(*arguments, **options)

    monkeypatch.setitem(ALGORITHMS, "trpo", Interrupting)
    command = ["train", "CartPole-v1", "--n-envs", "2", "--vectorization", "async"]
    command += ["--steps-per-update", "8", "--hidden", "4", "--total-timesteps", "16"]
    command += ["--eval-episodes", "2", "--max-episode-steps", "5", "--out", str(tmp_path / "run")]
    assert main(command) == 0


def test_an_evaluation_that_fails_ends_its_workers(monkeypatch):
    """A step is under way when the interrupt comes, which an ordinary close would wait for."""

    class Interrupted:
        def predict(self, obs, deterministic=False):
            copies[0].hands[0].send("step", (0,))
            raise KeyboardInterrupt

    copies = []

    def keep(*arguments):
        copies.append(in_processes([Clock] * 2))
        return copies[0]

    monkeypatch.setattr("rl.run.evaluation.make_envs", keep)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(), Clock, 2)
    assert copies[0].closed
    assert not multiprocessing.active_children()
