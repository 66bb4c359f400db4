"""Action masks of infos: complete where an action is chosen, not needed where an episode ended."""

from itertools import islice

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given
from hypothesis import strategies as st

from rl import TRPO, ObservationLayout, Stepper, evaluate, make_envs
from rl.envs.masks import flat_mask, forbidden_rows, whole_masks
from rl.envs.stepper import play
from toys import Clock

SMALL = {"n_envs": 3, "steps_per_update": 60, "hidden": (4,)}


class Game(Clock):
    """Allows the action ``time % 3`` alone, and says nothing once the game is over."""

    def __init__(self, length=4, silent_from=99):
        super().__init__(length=length, action_space=Discrete(3))
        self.silent_from = silent_from  # a time within the episode

    def _info(self):
        if self.time in (self.length, self.silent_from):
            return {}
        return {"action_mask": (np.arange(3) == self.time % 3).astype(np.int8)}

    def reset(self, **arguments):
        return super().reset(**arguments)[0], self._info()

    def step(self, action):
        assert action == self.time % 3
        return *super().step(action)[:-1], self._info()


def games(*arguments, mode=AutoresetMode.NEXT_STEP):
    return SyncVectorEnv([lambda a=a: Game(*a) for a in arguments], autoreset_mode=mode)


def take(n, steps):
    return list(islice(steps, n))


def allowed(observations, infos):
    """Return the action that the masks allow; where everything is allowed, any."""
    return infos["action_mask"].argmax(1)


# -- every autoreset mode


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("lengths", [(4,), (4, 4), (3, 4, 5)])
def test_masks_are_those_of_the_state_and_ones_where_it_ended(mode, lengths):
    envs = games(*((n,) for n in lengths), mode=mode)
    layout = ObservationLayout(envs.single_observation_space, mask=3)
    ends = 0
    for step in take(25, play(Stepper(envs), 0, allowed)):
        rows = layout.flat(step.observations, step.infos, step.ended)
        expected = rows[:, 1:2] % 3 == np.arange(3)
        assert np.array_equal(rows[:, 2:], expected | step.ended[:, None])
        if mode is AutoresetMode.NEXT_STEP:
            assert np.array_equal(step.ended, step.terminated | step.truncated)
        else:
            assert not step.ended.any()
        ends += step.terminated.sum()
    assert ends > 4 * len(lengths)


@pytest.mark.parametrize("mode", AutoresetMode)
def test_an_agent_trains_where_ended_games_have_no_mask(mode):
    agent = TRPO(games((3,), (4,), mode=mode), steps_per_update=64, hidden=(4,))
    agent.learn(128, progress=False)
    assert evaluate(agent, Game, 3).lengths == (4, 4, 4)


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("time", [0, 2])
def test_a_mask_that_is_missing_where_it_is_needed_is_named(mode, time):
    envs = games((4,), (4, time), mode=mode)
    with pytest.raises(ValueError, match=r"environment 1 gave no infos\['action_mask'\]"):
        take(5, play(Stepper(envs), 0, allowed))


def test_a_mask_that_comes_up_after_a_reset_without_is_refused():
    class Late(Game):
        def reset(self, **arguments):
            return super().reset(**arguments)[0], {}

        def step(self, action):
            return *Clock.step(self, action)[:-1], {"action_mask": [1, 1, 1]}

    with pytest.raises(ValueError, match=r"none at its first reset.*give a mask at every"):
        TRPO(Late, **SMALL).learn(60, progress=False)


def test_a_mask_that_all_leave_out_is_none():
    layout = ObservationLayout(Discrete(2))
    infos = {"action_mask": np.full(2, None), "_action_mask": np.zeros(2, bool)}
    assert layout.flat(np.array([0, 1]), infos).tolist() == [[1, 0], [0, 1]]


def test_masks_in_observations_are_ones_where_an_episode_ended():
    layout = ObservationLayout(Dict(action_mask=MultiBinary(2), x=Discrete(2)))
    batch = {"action_mask": np.array([[0, 1], [0, 0]]), "x": np.array([0, 0])}
    assert layout.flat(batch, ended=np.array([False, True]))[:, :2].tolist() == [[0, 1], [1, 1]]
    assert layout.flat(batch, ended=True)[:, :2].tolist() == [[1, 1], [1, 1]]
    assert layout.flat(batch)[:, :2].tolist() == [[0, 1], [0, 0]]


# -- the forms that masks come in

MASKS = [[1, 0, 1], [0, 1, 1]]
THERE = {"_action_mask": np.array([True, True])}


def objects(*rows):
    stacked = np.empty(len(rows), object)
    stacked[:] = rows
    return stacked


@pytest.mark.parametrize(
    "infos",
    [
        {"action_mask": np.array(MASKS, np.int8)},
        {"action_mask": np.array(MASKS, np.int8)} | THERE,
        {"action_mask": np.array(MASKS, bool)},
        {"action_mask": torch.tensor(MASKS)},
        {"action_mask": MASKS},
        {"action_mask": objects(*MASKS)} | THERE,
        {"action_mask": objects(torch.tensor(MASKS[0]), tuple(MASKS[1]))},
        {"action_mask": objects(([1], [0, 1]), [np.array([0]), np.array([1, 1])])},
    ],
)
def test_every_form_of_a_mask(infos):
    going = np.zeros(2, np.bool_)
    assert whole_masks(infos, going, 3).tolist() == MASKS
    assert whole_masks(infos, ~going, 3).tolist() == [[1, 1, 1]] * 2
    with pytest.raises(ValueError, match="an action mask must be 2 numbers"):
        whole_masks(infos, going, 2)


@pytest.mark.parametrize("given", [None, objects(MASKS[0], None), objects(None, None)])
def test_masks_that_only_ended_environments_leave_out(given):
    assert whole_masks({"action_mask": given}, np.array([True, True]), 3).all()
    with pytest.raises(ValueError, match="environment 1 gave no"):
        whole_masks({"action_mask": given}, np.array([True, False]), 3)


@pytest.mark.parametrize("bad", ["left", {"left": 1}, 1, [[1, 0], "x"]])
def test_what_is_no_mask_is_refused(bad):
    with pytest.raises(ValueError, match="an action mask must be an array of numbers"):
        flat_mask(bad)


def test_a_vector_environment_gives_one_mask_each():
    with pytest.raises(ValueError, match="must hold 3 masks"):
        whole_masks({"action_mask": MASKS}, np.zeros(3, np.bool_), 3)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_masks_of_varying_kinds_are_merged(how):
    class Varied(Game):
        def reset(self, seed=None, **arguments):
            if seed is not None:
                self.kind = [np.array, torch.tensor, list][seed % 3]
            return super().reset(seed=seed, **arguments)

        def _info(self):
            info = super()._info()
            return {"action_mask": self.kind(info["action_mask"]) if info else None}

    envs = make_envs(Varied, 3, how)
    steps = take(9, play(Stepper(envs), 0, allowed))
    assert all(len(step.infos["action_mask"]) == 3 for step in steps)
    envs.close()


@pytest.mark.parametrize("mask", [[1, 1], np.ones(4), "all", {"a": 1}])
def test_a_mask_that_does_not_fit_the_actions_is_named(mask):
    class Misfit(Game):
        def _info(self):
            return super()._info() if self.time == 0 else {"action_mask": mask}

    envs = make_envs(Misfit, 2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="an action mask must be 3 numbers, one for each action"):
        envs.step(np.zeros(2, int))


# -- masks that allow nothing


@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    shape=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    seed=st.integers(0, 99),
)
def test_components_without_an_action(counts, shape, seed):
    masks = np.random.default_rng(seed).integers(0, 2, (*shape, sum(counts)))
    parts = np.split(masks, np.cumsum(counts)[:-1], axis=-1)
    expected = np.stack([(part == 0).all(-1) for part in parts], -1)
    assert np.array_equal(forbidden_rows(masks, MultiDiscrete(counts)), expected)
    assert np.array_equal(forbidden_rows(masks, Discrete(sum(counts)))[..., 0], expected.all(-1))


def test_a_component_without_an_action_is_named():
    class Env(Clock):
        def __init__(self):
            super().__init__(length=9, action_space=MultiDiscrete([2, 3]))
            self.observation_space = Dict(action_mask=MultiBinary(5), x=Box(-1, 1, (1,)))

        def _observation(self):
            mask = np.ones(5, np.int8)
            mask[2:] = self.time != 3
            return {"action_mask": mask, "x": np.zeros(1, np.float32)}

    with pytest.raises(ValueError, match=r"0 allowed no action at step 3 .* in component 1:"):
        TRPO(Env, **SMALL).learn(60, progress=False)
