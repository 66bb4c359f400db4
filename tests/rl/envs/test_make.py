import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Text

from agents import SMALL
from rl import TRPO, ObservationLayout, evaluate, load, make_envs
from rl.envs.make import describe
from toys import Clock, vector


class Wrong(Clock):
    def __init__(self, **spaces):
        super().__init__()
        self.__dict__.update(spaces)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("GymV21Environment-v0", "cannot make environment 'GymV21Environment-v0'"),
        ("NoSuch-v1", "cannot make environment 'NoSuch-v1'"),
        ("nomodule:NoSuch-v1", "cannot make environment"),
        (lambda: Wrong(observation_space=Text(3)), "unsupported observation space Text"),
        (lambda: Wrong(action_space=Dict(a=Discrete(2))), "unsupported action space Dict"),
        (lambda: Wrong(action_space=Box(0, 5, (2,), np.int64)), "must be of real numbers"),
        (lambda: Wrong(action_space=Box(0, 5, (0,), np.float32)), "it has no entries"),
    ],
)
def test_unsupported_environments_are_refused_in_words(env, words):
    with pytest.raises(ValueError, match=words):
        TRPO(env, n_envs=2)


def test_what_makes_environments():
    assert make_envs("Acrobot-v1", 3).num_envs == 3
    assert make_envs(Clock, 2).num_envs == 2
    assert make_envs(Clock(), 8).num_envs == 1
    envs = vector(Clock, 4)
    assert make_envs(envs, 2) is envs
    with pytest.raises(TypeError, match="an id such as"):
        make_envs(3, 2)
    with pytest.raises(ValueError, match="n_envs"):
        make_envs("CartPole-v1", 0)
    with pytest.raises(ValueError, match="vectorization must be one of"):
        make_envs("CartPole-v1", 2, "threads")
    with pytest.raises(ValueError, match="env_timeout must be a positive, finite number, got 0"):
        make_envs(Clock, 2, env_timeout=0)
    with pytest.raises(ValueError, match="on_env_error must be one of raise, restart, got 'stop'"):
        make_envs(Clock, 2, on_env_error="stop")
    with pytest.raises(ValueError, match="is for ids"):
        make_envs(Clock, 2, "vector_entry_point")


def test_how_copies_are_stepped_is_chosen_and_said():
    own, sync = make_envs("CartPole-v1", 2), make_envs("Acrobot-v1", 2)
    assert "vectorised CartPoleVectorEnv" in describe(own)
    assert describe(sync) == "2 x Acrobot-v1, stepped in turn in this process"
    assert "in turn" in describe(make_envs("CartPole-v1", 2, "sync"))
    processes = make_envs("CartPole-v1", 2, "async")
    assert "each in a process of its own" in describe(processes)
    processes.close()
    with pytest.raises(ValueError, match="cannot make environment 'Acrobot-v1'"):
        make_envs("Acrobot-v1", 2, "vector_entry_point")


def test_a_function_must_make_new_environments():
    env = Clock()
    with pytest.raises(ValueError, match="the same environment twice"):
        TRPO(lambda: env, **SMALL)


def test_an_id_may_name_the_module_that_registers_it(tmp_path, monkeypatch):
    (tmp_path / "clocks_of_mine.py").write_text(
        "import gymnasium\nfrom toys import Clock\n"
        "gymnasium.register('MyClock-v0', entry_point=Clock, max_episode_steps=9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    agent = TRPO("clocks_of_mine:MyClock-v0", **SMALL).learn(64, progress=False)
    agent.save(tmp_path / "agent.zip")
    assert load(tmp_path / "agent.zip").env_id == "clocks_of_mine:MyClock-v0"
    assert evaluate(agent, agent.env_id, 2).lengths == (3, 3)
    with pytest.raises(ValueError, match="cannot make environment 'no_such_module:X-v0'"):
        TRPO("no_such_module:X-v0")
    del sys.modules["clocks_of_mine"]


def test_bytes_that_are_not_brightness_are_no_image():
    board, screen = Box(0, 4, (10, 10), np.uint8), Box(0, 255, (10, 10), np.uint8)
    assert [part.kind for part in ObservationLayout(board).parts] == ["vector"]
    assert [part.kind for part in ObservationLayout(screen).parts] == ["image"]
