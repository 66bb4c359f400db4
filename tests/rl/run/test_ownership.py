"""What the user made, the user closes; what an id or a function made, is closed."""

import gc

import pytest
from gymnasium.spaces import Text
from gymnasium.vector import SyncVectorEnv

from agents import SMALL
from rl import TRPO, EvaluateBest, evaluate, make_envs
from rl.run.video import record
from toys import Clock, vector


class Closable(Clock):
    closed = 0

    def close(self):
        self.closed += 1


class Unlearnable(Closable):
    def __init__(self):
        super().__init__()
        self.observation_space = Text(3)


class Failing:
    def predict(self, obs, deterministic=False):
        raise ZeroDivisionError


@pytest.fixture
def agent():
    return TRPO(Clock, **SMALL | {"steps_per_update": 8})


def made_by(factory, made):
    def make():
        made.append(factory())
        return made[-1]

    return make


def test_evaluation_leaves_the_users_environments_open(agent):
    env = Closable()
    envs = SyncVectorEnv([Closable] * 2)
    for _ in range(2):
        assert evaluate(agent, env, 3).lengths == (3, 3, 3)
        evaluate(agent, envs, 3)
    gc.collect()
    assert env.closed == 0
    assert not envs.closed
    assert [e.closed for e in envs.envs] == [0, 0]


def test_repeated_evaluations_leave_them_open(agent):
    env = Closable()
    agent.learn(24, False, EvaluateBest(env, episodes=2))
    assert env.closed == 0
    assert env.episode > 4  # it was played in


@pytest.mark.parametrize(("player", "copies"), [(None, 3), (Failing(), 3)])
def test_evaluation_closes_what_it_made(agent, player, copies):
    made = []
    if player is None:
        evaluate(agent, made_by(Closable, made), 3)
    else:
        with pytest.raises(ZeroDivisionError):
            evaluate(player, made_by(Closable, made), 3)
    assert [env.closed for env in made] == [1] * copies


def test_an_agent_that_cannot_be_made_leaves_the_users_environments_open():
    env, envs = Unlearnable(), vector(Unlearnable, 2)
    for source in (env, envs):
        with pytest.raises(ValueError, match="unsupported observation space"):
            TRPO(source)
    gc.collect()
    assert env.closed == 0
    assert not envs.closed


def test_an_agent_that_cannot_be_made_closes_what_it_made():
    made = []
    with pytest.raises(ValueError, match="unsupported observation space"):
        TRPO(made_by(Unlearnable, made), **SMALL)
    assert [env.closed for env in made] == [1] * 4


def test_a_video_that_fails_closes_what_it_made(agent, monkeypatch, tmp_path):
    env = Closable()
    monkeypatch.setattr(env, "render", lambda: 1 / 0)
    monkeypatch.setattr("rl.run.video.gymnasium.make", lambda *_, **__: env)
    with pytest.raises(ValueError, match=r"cannot render .*: division by zero"):
        record(agent, "Clock-v0", tmp_path / "film.gif")
    assert env.closed == 1


def test_closing_the_vector_around_an_environment_leaves_it_open():
    env = Closable()
    envs = make_envs(env, 1)
    assert envs.envs[0].unwrapped is env
    envs.close()
    assert env.closed == 0
