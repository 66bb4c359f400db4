import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from agents import SMALL, TwoNumbers, weights
from rl import (
    TRPO,
    EnvCollector,
    EnvironmentFault,
    ObservationLayout,
    Policy,
    Stepper,
    TRPOConfig,
    evaluate,
)
from rl.build import make_networks
from rl.experience.collector import Episodes
from toys import Clock, Slide, vector


def collector(envs, seed=0, kind=EnvCollector):
    layout = ObservationLayout(envs.single_observation_space)
    generator = torch.Generator().manual_seed(seed)
    return kind(Stepper(envs), layout, seed=seed, generator=generator)


def policy_for(envs):
    layout = ObservationLayout(envs.single_observation_space)
    return make_networks(layout, envs.single_action_space, None, TRPOConfig(hidden=(4,)))[0]


def test_dummy_transitions_are_masked_and_final_observations_are_true():
    envs = vector(lambda: Clock(length=3))
    path = collector(envs).collect(policy_for(envs), 9)
    episode, time = path.observations[:, 0].T.tolist()
    # three steps, the dummy step that resets, three steps, ...
    assert path.mask[:, 0].tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 1]
    assert path.terminated[:, 0].tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert path.starts[:, 0].tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert time == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert episode == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert path.rewards[path.mask].eq(1).all()
    assert path.steps == 7


def test_masked_steps_reach_no_environment():
    envs = vector(lambda: Clock(length=3))
    collector(envs).collect(policy_for(envs), 9)
    assert len(envs.envs[0].unwrapped.actions) == 7


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_paths_continue_where_the_last_one_stopped(mode):
    """Whatever a path is cut into, all of its parts are those of one long path."""
    lengths = iter((3, 4) * 2)
    whole, parts = (vector(lambda: Clock(length=next(lengths)), 2, mode) for _ in range(2))
    policy = policy_for(whole)
    one, two = collector(whole), collector(parts)
    long = one.collect(policy, 11)
    pieces = [two.collect(policy, k) for k in (3, 1, 4, 3)]
    for name in ("rewards", "log_prob", "terminated", "truncated", "starts", "mask", "actions"):
        joined = torch.cat([getattr(piece, name) for piece in pieces])
        assert torch.equal(joined, getattr(long, name)), name
    joined = torch.cat([piece.observations[:-1] for piece in pieces])
    assert torch.equal(joined, long.observations[:-1])
    assert torch.equal(torch.cat([piece.finals for piece in pieces]), long.finals)
    begins = torch.tensor([[0, 0], [3, 0], [4, 0], [8, 0]])
    places = [piece.final_at + begin for piece, begin in zip(pieces, begins, strict=True)]
    assert torch.equal(torch.cat(places), long.final_at)
    assert one.episodes.returns == two.episodes.returns
    assert one.episodes.lengths == two.episodes.lengths


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_an_episode_starts_at_its_first_action_and_nowhere_else(mode):
    """Across paths, and also where an episode ends with the last step of one."""
    lengths = iter((3, 2))
    envs = vector(lambda: Clock(length=next(lengths)), 2, mode)
    keeper, policy = collector(envs), policy_for(envs)
    starts = 0
    for steps in (3, 1, 2, 4, 1, 5):
        path = keeper.collect(policy, steps)
        first = path.observations[:-1, :, 1] == 0  # its time
        assert torch.equal(path.starts, first & path.mask)
        starts += int(path.starts.sum())
    assert starts == (4 + 6 if mode is AutoresetMode.NEXT_STEP else 6 + 8)


def test_an_interrupted_path_is_followed_by_new_episodes():
    class Interrupted(Policy):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls_left = inner, 10**9

        def forward(self, rows):
            return self.inner(rows)

        def act(self, rows, noise):
            self.calls_left -= 1
            if self.calls_left == 0:
                raise KeyboardInterrupt
            return super().act(rows, noise)

    envs = vector(lambda: Clock(length=5), 2)
    keeper, policy = collector(envs), Interrupted(policy_for(envs))
    keeper.collect(policy, 3)
    policy.calls_left = 2
    with pytest.raises(KeyboardInterrupt):
        keeper.collect(policy, 3)
    path = keeper.collect(policy, 6)
    assert path.observations[:, 0, 1].tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert path.starts[:, 0].tolist() == [1, 0, 0, 0, 0, 0]
    assert list(keeper.episodes.lengths) == [5, 5]


def test_the_log_prob_is_that_of_the_policy_that_acted_and_zero_elsewhere():
    envs = vector(lambda: Clock(length=3), 4)
    policy = policy_for(envs)
    path = collector(envs).collect(policy, 9)
    with torch.no_grad():
        expected = policy(path.observations[:-1]).log_prob(path.actions)
    assert not path.log_prob.requires_grad
    torch.testing.assert_close(path.log_prob[path.mask], expected[path.mask])
    assert (path.log_prob[path.mask] < 0).all()
    assert (path.log_prob[~path.mask] == 0).all()
    assert (~path.mask).any()


def test_the_log_prob_has_the_dtype_of_the_policy():
    class Double(TwoNumbers):
        def forward(self, rows):
            return super().forward(rows.double())

    envs = vector(Slide, 2)
    path = collector(envs).collect(Double(copies=True).double(), 6)
    assert path.log_prob.dtype == torch.float64
    assert path.rewards.dtype == torch.float32


def test_the_version_counts_the_updates_of_the_policy():
    envs = vector(Clock, 2)
    assert collector(envs).collect(policy_for(envs), 4).version == 0
    assert collector(envs).collect(policy_for(envs), 4, version=7).version == 7
    seen = []

    class Spy(EnvCollector):
        def collect(self, policy, steps, *, version=0):
            path = super().collect(policy, steps, version=version)
            seen.append(path.version)
            return path

    agent = TRPO(Clock, collector=Spy, **SMALL)
    agent.learn(100, progress=False).learn(40, progress=False)
    assert seen == list(range(agent.iterations))


@pytest.mark.parametrize("n", [1, 3])
def test_signals_are_what_the_collector_says(n):
    class Costly(EnvCollector):
        def signals(self, step):
            return super().signals(step) | {"time": step.observations[:, 1], "two": 2}

    path = collector(vector(lambda: Clock(length=3), n), kind=Costly).collect(
        policy_for(vector(Clock, n)), 5
    )
    assert path.signals.keys() == {"reward", "time", "two"}
    assert path.signals["time"][:, 0].tolist() == [1, 2, 3, 0, 1]
    assert {x.dtype for x in path.signals.values()} == {torch.float32}
    assert (path.signals["two"] == 2).all()


def test_a_signal_that_is_not_given_at_every_step_is_named():
    class Sometimes(EnvCollector):
        def signals(self, step):
            late = {"cost": step.rewards} if step.observations[0, 1] > 1 else {}
            return super().signals(step) | late

    envs = vector(lambda: Clock(length=3))
    with pytest.raises(ValueError, match=r"environment 0 gave a cost that is NaN.* at step 0"):
        collector(envs, kind=Sometimes).collect(policy_for(envs), 3)


def test_episode_returns_and_lengths_do_not_count_resets():
    envs = vector(lambda: Clock(length=4, truncate=True), 2)
    keeper = collector(envs)
    keeper.collect(policy_for(envs), 15)
    assert list(keeper.episodes.returns) == [4.0] * 6
    assert list(keeper.episodes.lengths) == [4] * 6


def test_episodes_are_kept_in_the_order_of_their_ends():
    """Environment 1 ends first; the second call goes on with what the first began."""
    episodes = Episodes(2)
    assert math.isnan(episodes.mean_return)
    assert math.isnan(episodes.mean_length)
    mask = np.ones((3, 2), bool)
    rewards = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    episodes.add(rewards, np.array([[0, 0], [0, 1], [1, 0]], bool), mask)
    assert list(episodes.returns) == [30.0, 7.0]
    assert list(episodes.lengths) == [2, 3]
    assert (episodes.mean_return, episodes.mean_length) == (18.5, 2.5)
    mask[0, 0] = False  # its dummy step, whatever it pays
    episodes.add(rewards, np.array([[0, 0], [1, 0], [0, 1]], bool), mask)
    assert list(episodes.returns) == [30.0, 7.0, 2.0, 110.0]
    assert list(episodes.lengths) == [2, 3, 1, 4]
    episodes.restart()
    episodes.add(rewards[:1], np.array([[1, 1]], bool), np.ones((1, 2), bool))
    assert list(episodes.returns)[-2:] == [1.0, 10.0]


def test_box_actions_are_clipped_on_their_way_only():
    space = Box(-0.1, 0.2, (1,), np.float32)
    envs = vector(lambda: Clock(action_space=space))
    path = collector(envs).collect(policy_for(envs), 40)
    assert path.actions.abs().max() > 0.5
    seen = np.array(envs.envs[0].unwrapped.actions)
    assert seen.min() >= np.float32(-0.1)
    assert seen.max() <= np.float32(0.2)
    assert seen.dtype == np.float32


def test_discrete_actions_start_where_the_space_does():
    envs = vector(lambda: Clock(action_space=Discrete(2, start=5)))
    collector(envs).collect(policy_for(envs), 40)
    assert set(envs.envs[0].unwrapped.actions) == {5, 6}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_rewards_are_named(bad):
    envs = vector(lambda: Clock(poison=bad), 2)
    with pytest.raises(
        ValueError, match=r"environment 0 gave a reward.*at step 1, on action [01],"
    ):
        collector(envs).collect(policy_for(envs), 3)


def test_sampling_uses_its_own_generator():
    envs = vector(Clock)
    policy, state = policy_for(envs), torch.get_rng_state()
    a, b, c = (collector(envs, seed).collect(policy, 30).actions for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# -- the three ways to reset


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("truncate", [False, True])
def test_every_autoreset_mode_gives_the_same_experience(mode, truncate):
    """Episodes of 3, 4 steps: what counts is the same whoever resets, and finals are true."""
    lengths = iter((3, 4))
    envs = vector(lambda: Clock(length=next(lengths), truncate=truncate), 2, mode)
    keeper = collector(envs)
    path = keeper.collect(policy_for(envs), 20)
    before, after = path.values(lambda rows: rows[..., 1])  # the value of a state: its time
    for i, length in enumerate((3, 4)):
        kept = path.mask[:, i]
        assert (after[kept, i] == before[kept, i] + 1).all()  # also where an episode ended
        assert before[kept, i].tolist() == [t % length for t in range(int(kept.sum()))]
        ends = (path.truncated if truncate else path.terminated)[:, i]
        assert (after[ends, i] == length).all()
    whole = mode is not AutoresetMode.NEXT_STEP
    assert path.mask.all() == whole
    assert torch.equal(path.final_at, path.done.nonzero() if whole else path.final_at[:0])
    assert len(path.finals) == len(path.final_at)
    assert set(keeper.episodes.returns) == {3.0, 4.0}


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_final_observations_of_composed_spaces(mode):
    class Composed(Clock):
        def __init__(self):
            super().__init__()
            inner = Tuple((Box(0, 99, (1,), np.float32), Discrete(9)))
            self.observation_space = Dict(pair=inner, time=Discrete(9))

        def _observation(self):
            return {"pair": (np.float32([self.episode]), self.time), "time": self.time}

    envs = SyncVectorEnv([Composed] * 2, autoreset_mode=mode)
    path = collector(envs).collect(policy_for(envs), 7)
    layout = ObservationLayout(envs.single_observation_space)
    expected = layout.flat(
        {"pair": (np.float32([[0], [0], [1], [1]]), np.full(4, 3)), "time": np.full(4, 3)}
    )
    assert torch.equal(path.finals, torch.from_numpy(expected))
    assert path.final_at.tolist() == [[2, 0], [2, 1], [5, 0], [5, 1]]


def test_an_environment_that_does_not_say_how_it_resets_is_refused():
    envs = vector(Clock)
    envs.metadata = {}
    with pytest.raises(ValueError, match="does not say how it resets"):
        Stepper(envs)


def test_an_error_of_an_environment_is_kept():
    class Broken(Clock):
        def step(self, action):
            if self.time == 2:
                raise ZeroDivisionError("in the simulator")
            return super().step(action)

    agent = TRPO(Broken, **SMALL)
    before = weights(agent)
    with pytest.raises(EnvironmentFault, match="ZeroDivisionError: in the simulator") as caught:
        agent.learn(64, progress=False)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "at step 2 of a rollout. Nothing was updated" in caught.value.__notes__[-1]
    assert all(map(torch.equal, before, weights(agent)))
    assert agent.num_timesteps == 0


# -- action masks


class Picky(Clock):
    """Allows action ``time % 3`` alone, in its infos, and complains about any other."""

    def __init__(self, length=7):
        super().__init__(length, action_space=Discrete(3))

    def reset(self, **arguments):
        return super().reset(**arguments)[0], self.info()

    def info(self):
        return {"action_mask": (np.arange(3) == self.time % 3).astype(np.int8)}

    def step(self, action):
        assert self.info()["action_mask"][action] or not self.info()["action_mask"].any()
        return *super().step(action)[:-1], self.info()


def test_forbidden_actions_are_never_taken():
    agent = TRPO(Picky, **SMALL).learn(200, progress=False)
    assert agent.layout.info_mask.shape == (3,)
    assert evaluate(agent, Picky, 4).lengths == (7,) * 4
    action, _ = agent.predict(np.zeros(2), action_masks=np.array([0, 0, 1]))
    assert action == 2
    with pytest.raises(ValueError, match="action_mask"):
        agent.predict(np.zeros(2))


@pytest.mark.parametrize("mode", AutoresetMode)
def test_masks_in_infos_hold_in_every_autoreset_mode(mode):
    lengths = iter((3, 4, 5))
    envs = vector(lambda: Picky(next(lengths)), 3, mode)
    agent = TRPO(envs, steps_per_update=60, hidden=(4,)).learn(120, progress=False)
    assert evaluate(agent, lambda: Picky(4), 2).lengths == (4, 4)


class Stuck(Picky):
    """Allows nothing from its third step on."""

    def info(self):
        return {"action_mask": super().info()["action_mask"] * (self.time < 2)}


def test_a_state_without_an_action_is_named():
    agent = TRPO(Stuck, **SMALL)
    with pytest.raises(ValueError, match="environment 0 allowed no action at step 2"):
        agent.learn(64, progress=False)
