"""Whatever a vector environment answers with, transitions are arrays of known shape and kind."""

from itertools import islice

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv

from rl import Stepper
from rl.envs.batches import as_numpy, flags, reals
from rl.envs.stepper import play
from toys import Clock, vector


class Own(VectorEnv):
    """Three episodes of 3, 4 and 5 steps, answered in arrays that are written to again."""

    single_observation_space, single_action_space = Box(-9, 9, (1,)), Discrete(2)
    num_envs = 3

    def __init__(self, mode, kind):
        self.metadata, self.mode, self.kind = {"autoreset_mode": mode}, mode, kind
        self.lengths, self.rewards, self.over = np.arange(3, 6), np.zeros(3), np.zeros(3, bool)

    def reset(self, seed=None, options=None):
        chosen = options["reset_mask"] if options else np.ones(3, bool)
        self.time = np.where(chosen, 0, self.time) if options else np.zeros(3)
        self.over[chosen] = False
        return self.kind(self.time[:, None]), {}

    def step(self, actions):
        assert isinstance(actions, np.ndarray)
        again = self.over if self.mode is AutoresetMode.NEXT_STEP else np.zeros(3, bool)
        self.rewards[:] = np.where(again, 0, 10 * np.arange(3) + self.time)
        self.time = np.where(again, 0, self.time + 1)
        self.over[:] = self.time == self.lengths
        last = self.kind(self.time[:, None].copy())
        answer = self.kind(self.rewards), self.kind(self.over), self.kind(np.zeros(3, bool))
        if self.mode is AutoresetMode.SAME_STEP:
            self.time[self.over] = 0
        return self.kind(self.time[:, None]), *answer, {"final_obs": last}


def walk(mode, kind, steps=12):
    stepper = Stepper(Own(mode, kind))
    return list(islice(play(stepper, 0, never), steps))


def never(observations, infos):
    return np.zeros(len(observations), int)


KINDS = {
    "the arrays themselves": lambda x: x,
    "uint8": lambda x: x.astype(np.uint8),
    "int64": lambda x: x.astype(np.int64),
    "float32": lambda x: x.astype(np.float32),
    "columns": lambda x: x.reshape(3, 1),
    "lists": np.ndarray.tolist,
    "tensors": torch.from_numpy,
    "tensors with gradient": lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True),
    "bfloat16": lambda x: torch.tensor(x, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_answer_gives_the_same_transitions(mode, kind):
    plain, other = walk(mode, np.copy), walk(mode, KINDS[kind])
    for one, two in zip(plain, other, strict=True):
        assert two.rewards.dtype == np.float64
        for name in ("rewards", "terminated", "truncated", "valid", "ended"):
            assert np.array_equal(getattr(one, name), getattr(two, name))
            assert getattr(one, name).dtype == getattr(two, name).dtype
        assert (one.finals is None) == (two.finals is None)
        if one.finals is not None:
            assert np.array_equal(one.finals, two.finals)
    if mode is AutoresetMode.NEXT_STEP:
        invalid = [np.flatnonzero(~step.valid).tolist() for step in plain]
        assert invalid == [[], [], [], [0], [1], [2], [], [0], [], [1], [], [0, 2]]
    else:
        assert all(step.valid.all() and not step.ended.any() for step in plain)
        ends = [(t, x) for t, s in enumerate(plain) if s.finals is not None for x in s.finals[:, 0]]
        assert ends == [(2, 3), (3, 4), (4, 5), (5, 3), (7, 4), (8, 3), (9, 5), (11, 3), (11, 4)]


@pytest.mark.parametrize(
    ("which", "bad", "words"),
    [
        (1, np.zeros(4), r"rewards must be an array of numbers of shape \(3,\), got array"),
        (1, np.zeros((3, 2)), "rewards must be"),
        (1, 1.0, "rewards must be"),
        (1, [None, 1.0, 2.0], r"rewards must be .*, got \[None"),
        (1, {"a": 1}, "rewards must be"),
        (1, np.zeros(3, complex), "rewards must be"),
        (2, np.full(3, 0.5), "terminated must be True or False, or 1 or 0"),
        (2, np.full(3, np.nan), "terminated must be True or False"),
        (3, np.full(3, 255, np.uint8), "truncated must be True or False"),
        (3, np.array(["yes"] * 3), "truncated must be an array of numbers"),
    ],
)
def test_answers_of_another_kind_are_named(which, bad, words):
    envs = Own(AutoresetMode.NEXT_STEP, np.copy)
    whole = envs.step
    envs.step = lambda actions: (*(answer := whole(actions))[:which], bad, *answer[which + 1 :])
    stepper = Stepper(envs)
    stepper.reset(0)
    with pytest.raises(ValueError, match=words):
        stepper.step(np.zeros(3))


def test_last_observations_that_same_step_autoreset_owes_are_named():
    envs = Own(AutoresetMode.SAME_STEP, np.copy)
    whole = envs.step
    envs.step = lambda actions: (*whole(actions)[:-1], {})
    with pytest.raises(ValueError, match=r"no infos\['final_obs'\] at the end of an episode"):
        list(islice(play(Stepper(envs), 0, never), 4))


def test_one_number_has_many_forms():
    for one in (2, 2.0, np.float32(2), np.array(2), np.array([2]), [2], (2,), torch.tensor([2.0])):
        assert reals("reward", one, ()).tolist() == 2.0
    for yes in (True, 1, 1.0, np.True_, np.array([1]), [True], torch.tensor(True)):
        assert flags("terminated", yes, ()).tolist() is True
    for bad in (None, "2", [1, 2], [], [[1]], {}):
        with pytest.raises(ValueError, match="reward must be one number, got"):
            reals("reward", bad, ())


def test_tensors_within_dicts_and_tuples_become_arrays():
    found = as_numpy({"a": (torch.ones(2), np.zeros(2)), "b": "c"})
    assert [type(x) for x in found["a"]] == [np.ndarray] * 2
    assert found["b"] == "c"


def test_play_chooses_from_what_it_yielded_last():
    seen = []

    def choose(observations, infos):
        seen.append(observations[0].tolist())
        return np.zeros(1, int)

    envs = vector(lambda: Clock(length=2), mode=AutoresetMode.SAME_STEP)
    steps = islice(play(Stepper(envs), 3, choose), 5)
    led_to = [step.observations[0].tolist() for step in steps]
    assert seen == [[0, 0], *led_to[:4]] == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]]
    assert envs.envs[0].unwrapped.np_random_seed == 3
