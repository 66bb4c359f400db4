"""Copies of single environments: their answers can be merged."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Graph, Sequence

from rl import TRPO, make_envs
from toys import Clock

BOTH = pytest.mark.parametrize("how", ["sync", "async"])
NOTHING = np.zeros(2, int)


class Says(Clock):
    """Gives another info where its seed is odd."""

    def __init__(self, info=lambda _: {}, reward=float, terminated=bool):
        super().__init__()
        self.info, self.reward, self.ended = info, reward, terminated

    def reset(self, *, seed=None, options=None):
        self.odd = seed % 2 if seed is not None else self.odd
        return super().reset(seed=seed)[0], self.info(self.odd)

    def step(self, action):
        observation, reward, terminated, truncated, _ = super().step(action)
        return (
            *(observation, self.reward(reward), self.ended(terminated)),
            truncated,
            self.info(self.odd),
        )


INFOS = {
    "none or a number": lambda odd: {"x": None if odd else 3},
    "arrays of other lengths": lambda odd: {"x": np.zeros(2 + odd)},
    "a dict or a number": lambda odd: {"x": {"a": 1} if odd else 2.0},
    "a word or a number": lambda odd: {"x": "won" if odd else 2.0},
    "a number or an array": lambda odd: {"x": np.zeros(3) if odd else 2.0},
    "other keys": lambda odd: {"x" * (1 + odd): 2.0},
}


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize("source", ["function", "single"])
def test_infos_that_nobody_reads_are_dropped(name, source):
    make = lambda: Says(INFOS[name])  # noqa: E731 # a factory
    envs = make_envs(make if source == "function" else make(), 2)
    assert envs.reset(seed=0)[1] == {}
    assert envs.step(NOTHING[: envs.num_envs])[-1] == {}


@BOTH
def test_numbers_that_are_asked_for_are_kept(how):
    infos = lambda odd: {"cost": np.array([3.0 + odd]), "x": "y"}  # noqa: E731 # a factory
    envs = make_envs(lambda: Says(infos), 2, how, keep=("cost", "other"))
    envs.reset(seed=0)
    kept = envs.step(NOTHING)[-1]
    assert set(kept) == {"cost", "_cost"}
    assert kept["cost"].tolist() == [3.0, 4.0]
    envs.close()


def test_what_is_asked_for_and_is_no_number_is_named():
    envs = make_envs(lambda: Says(lambda _: {"cost": "high"}), 2, keep=("cost",))
    with pytest.raises(ValueError, match=r"infos\['cost'\] must be one number, got 'high'"):
        envs.reset(seed=0)


FORMS = {
    "numbers of numpy": (np.float32, np.bool_),
    "whole numbers": (int, int),
    "arrays of shape ()": (np.array, np.array),
    "arrays of shape (1,)": (lambda x: np.array([x]), lambda x: np.array([x])),
    "tensors": (torch.tensor, lambda x: torch.tensor([x])),
    "lists": (lambda x: [x], lambda x: [x]),
}


@BOTH
@pytest.mark.parametrize("form", FORMS)
def test_rewards_and_dones_of_every_form(how, form):
    reward, terminated = FORMS[form]
    envs = make_envs(lambda: Says(reward=reward, terminated=terminated), 2, how)
    envs.reset(seed=0)
    steps = [envs.step(NOTHING) for _ in range(5)]
    assert [s[1].tolist() for s in steps] == [[1, 1]] * 3 + [[0, 0], [1, 1]]
    assert [s[2].tolist() for s in steps] == [[False] * 2] * 2 + [[True] * 2] + [[False] * 2] * 2
    envs.close()


@BOTH
@pytest.mark.parametrize(
    ("forms", "words"),
    [
        ({"reward": lambda x: [x, x]}, r"reward must be one number, got \[1.0, 1.0\]"),
        ({"reward": lambda _: None}, "reward must be one number, got None"),
        ({"terminated": lambda _: "no"}, "terminated must be one number, got 'no'"),
        ({"terminated": lambda _: 0.5}, "terminated must be True or False"),
    ],
)
def test_rewards_and_dones_that_are_none_are_named(how, forms, words):
    envs = make_envs(lambda: Says(**forms), 2, how)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=words):
        envs.step(NOTHING)


@pytest.mark.parametrize("space", [Sequence(Box(-1, 1, (2,))), Graph(Box(-1, 1, (2,)), None)])
@pytest.mark.parametrize("how", ["sync", "async"])
def test_observations_that_have_no_row_are_refused_in_words(space, how):
    class Odd(Clock):
        def __init__(self):
            super().__init__()
            self.observation_space = space

        def _observation(self):
            return self.observation_space.sample()

    with pytest.raises(ValueError, match="unsupported observation space"):
        TRPO(Odd, n_envs=2, vectorization=how)


# -- how they are made


@pytest.mark.parametrize("how", ["auto", "sync", "async", "vector_entry_point"])
def test_an_id_without_a_version_is_the_latest_one(how):
    envs = make_envs("CartPole", 2, how)
    assert envs.spec.id == "CartPole-v1"
    assert envs.reset(seed=0)[0].shape == (2, 4)
    envs.close()


def test_an_unknown_id_without_a_version_is_named():
    with pytest.raises(ValueError, match="cannot make environment 'CartPoll'"):
        make_envs("CartPoll", 2, "sync")


def test_an_agent_is_built_with_the_seed_of_its_first_rollout():
    seeds = []

    class Seeded(Clock):
        def reset(self, *, seed=None, options=None):
            seeds.append(seed)
            return super().reset(seed=seed)

    TRPO(Seeded, n_envs=2, seed=5, steps_per_update=64, hidden=(4,)).learn(64, progress=False)
    given = [seed for seed in seeds if seed is not None]
    assert given[:2] == given[2:]
    assert len(set(given)) == 2
    assert not {0, 1} & set(given)
