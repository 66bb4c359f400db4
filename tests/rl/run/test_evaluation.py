"""How many episodes are played, in which environments, and what the predictor is told."""

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from rl import TRPO, EvaluateBest, Evaluation, evaluate
from rl.envs.pool import PoolVectorEnv
from rl.run.evaluation import _as_in_training
from toys import Clock, vector

SMALL = {"n_envs": 2, "steps_per_update": 8, "hidden": (4,)}


class First:
    """Takes action 0."""

    def predict(self, obs, deterministic=False):
        return np.zeros(len(obs), np.int64), None


def endless():
    return Clock(length=-1)


def clocks(*lengths):
    return SyncVectorEnv([lambda n=n: Clock(length=n) for n in lengths])


def test_an_episode_that_never_ends_is_cut_off():
    agent = TRPO(endless, **SMALL)
    result = evaluate(agent, endless, 5, max_episode_steps=7)
    assert (result.returns, result.lengths, result.cut_off) == ((7.0, 7.0), (7, 7), 2)
    assert str(result).endswith(" over 2 episodes, 2 of them cut off after 7 steps")
    log = {}
    EvaluateBest(endless, episodes=5, max_episode_steps=4)(agent, log)
    assert log == {"eval/mean_reward": 4.0, "eval/mean_ep_length": 4.0, "eval/cut_off": 2}


@pytest.mark.parametrize(
    ("lengths", "expected", "cut_off"),
    [
        ((5, 3), (3, 5, 3, 5, 3, 5), 0),  # the last step allowed is the last one of the episode
        ((12, 3), (3, 5, 3, 3), 1),  # it has not ended when all others have
        ((6, 3), (3, 5, 3, 3, 5), 2),  # it ends after all, and the next one begins
    ],
)
def test_the_others_play_their_share(lengths, expected, cut_off):
    """Three episodes each, with a reset that takes a step in between."""
    result = evaluate(First(), clocks(*lengths), 6, max_episode_steps=5)
    assert (result.lengths, result.cut_off) == (expected, cut_off)


def test_the_limit_is_a_longer_one_of_the_environment(monkeypatch):
    monkeypatch.setattr("rl.run.evaluation._STEPS", 4)
    monkeypatch.setattr(gymnasium.envs.registration, "registry", {})
    gymnasium.register("Endless-v0", entry_point=endless, max_episode_steps=6)
    assert evaluate(First(), endless, 1).lengths == (4,)
    for env in ("Endless-v0", lambda: gymnasium.make("Endless-v0")):
        result = evaluate(First(), env, 1)
        assert (result.lengths, result.cut_off) == ((6,), 0)


@pytest.mark.parametrize("name", ["episodes", "max_episode_steps"])
def test_counts_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        evaluate(First(), Clock, **{name: 0})
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        EvaluateBest(Clock, **{name: 0})


def test_it_reads_well():
    assert str(Evaluation((0.0152, 0.0148), (10, 10))) == (
        "mean return 0.01500 (standard deviation 0.0002000) over 2 episodes"
    )
    assert str(Evaluation((5e9,), (3,))).startswith("mean return 5.000e+09 (standard deviation 0.0")


# -- as many copies as in training, stepped alike


@pytest.mark.parametrize(("n_envs", "episodes", "copies"), [(3, 20, 3), (3, 2, 2), (1, 5, 1)])
def test_no_more_copies_than_in_training(n_envs, episodes, copies):
    agent, made = TRPO(Clock, **SMALL | {"n_envs": n_envs, "steps_per_update": 12}), []
    assert len(evaluate(agent, lambda: made.append(1) or Clock(), episodes).returns) == episodes
    assert len(made) == copies


def test_copies_of_a_predictor_that_says_so_or_not():
    model = SimpleNamespace(n_envs=5)  # as stable-baselines3's do
    assert _as_in_training(model, None, "A-v0") == (5, "auto")
    assert _as_in_training(First(), None, "A-v0") == (8, "auto")


def pool(name):
    envs = PoolVectorEnv.__new__(PoolVectorEnv)
    envs.spec = gymnasium.envs.registration.EnvSpec(name)
    return envs


@pytest.mark.parametrize(
    ("option", "trained_in", "env", "how"),
    [
        ("auto", None, "A-v0", "auto"),
        ("sync", None, "A-v0", "sync"),
        ("async", None, Clock, "async"),
        ("async", None, "B-v0", "async"),
        ("vector_entry_point", None, "A-v0", "vector_entry_point"),
        ("vector_entry_point", None, "B-v0", "auto"),  # which may have none
        ("envpool", None, "A-v0", "envpool"),
        ("envpool", None, "B-v0", "auto"),  # an id of gymnasium's
        ("envpool", None, Clock, "auto"),
        ("auto", AsyncVectorEnv.__new__(AsyncVectorEnv), Clock, "async"),
        ("auto", pool("C-v0"), "C-v0", "envpool"),
    ],
)
def test_copies_are_stepped_as_in_training(option, trained_in, env, how):
    config = SimpleNamespace(vectorization=option)
    agent = SimpleNamespace(config=config, env_id="A-v0")
    assert _as_in_training(agent, trained_in, env) == (8, how)


# -- predictors with a state


class Remembering:
    """Counts the steps of each episode in its state, and compares with what the clock shows."""

    steps = 0

    def predict(self, obs, state=None, episode_start=None, deterministic=False):
        time = obs[:, 1]
        assert (episode_start == (time == 0)).all()
        state = np.where(episode_start, 0, 0 if state is None else state + 1)
        assert (state == time).all()
        self.steps += 1
        return np.zeros(len(obs), np.int64), state


@pytest.mark.parametrize("mode", AutoresetMode)
def test_a_recurrent_predictor_gets_its_state_back(mode):
    predictor, lengths = Remembering(), iter((2, 3, 5))
    result = evaluate(predictor, vector(lambda: Clock(next(lengths)), 3, mode), 9)
    assert sorted(result.lengths) == [2, 2, 2, 3, 3, 3, 5, 5, 5]
    assert predictor.steps >= 15


def test_models_of_stable_baselines3_are_evaluated():
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.A2C("MlpPolicy", gymnasium.make("CartPole-v1"), device="cpu")
    result = evaluate(model, "CartPole-v1", 3)
    assert len(result.returns) == 3
    assert result.returns == result.lengths
