import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary
from gymnasium.vector import AutoresetMode

from rl import Collector, make_envs
from rl.policies import make_policy
from toys import Clock, vector


def collector(envs, seed=0):
    return Collector(envs, seed=seed, generator=torch.Generator().manual_seed(seed))


def policy_for(envs):
    return make_policy(2, envs.single_action_space, (4,))


def test_dummy_transitions_are_masked_and_final_observations_are_true():
    envs = vector(lambda: Clock(length=3))
    rollout = collector(envs).collect(policy_for(envs), 9)
    episode, time = rollout.observations[:, 0].T.tolist()
    # three steps, the dummy step that resets, three steps, ...
    assert rollout.valid[:, 0].tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 1]
    assert rollout.terminated[:, 0].tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0]
    assert time == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert episode == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert rollout.rewards[rollout.valid].eq(1).all()


def test_masked_steps_reach_no_environment():
    envs = vector(lambda: Clock(length=3))
    collector(envs).collect(policy_for(envs), 9)
    assert len(envs.envs[0].unwrapped.actions) == 7


def test_rollouts_continue_where_the_last_one_stopped():
    whole = vector(lambda: Clock(length=3), 2)
    parts = vector(lambda: Clock(length=3), 2)
    policy = policy_for(whole)
    one, two = collector(whole), collector(parts)
    long = one.collect(policy, 11)
    pieces = [two.collect(policy, k) for k in (3, 4, 4)]
    for name in ("rewards", "terminated", "truncated", "valid", "actions"):
        joined = torch.cat([getattr(piece, name) for piece in pieces])
        assert torch.equal(joined, getattr(long, name))
    joined = torch.cat([piece.observations[:-1] for piece in pieces])
    assert torch.equal(joined, long.observations[:-1])
    assert one.returns == two.returns


def test_an_interrupted_rollout_is_followed_by_new_episodes():
    envs = vector(lambda: Clock(length=5), 2)
    keeper, policy = collector(envs), policy_for(envs)
    keeper.collect(policy, 3)

    class Interrupted(type(policy)):
        calls = 0

        def sample(self, observations, generator):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().sample(observations, generator)

    broken = Interrupted(2, envs.single_action_space, (4,))
    with pytest.raises(KeyboardInterrupt):
        keeper.collect(broken, 3)
    rollout = keeper.collect(policy, 6)
    assert rollout.observations[:, 0, 1].tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert list(keeper.lengths) == [5, 5]


def test_episode_returns_and_lengths_do_not_count_resets():
    envs = vector(lambda: Clock(length=4, truncate=True), 2)
    keeper = collector(envs)
    keeper.collect(policy_for(envs), 15)
    assert list(keeper.returns) == [4.0] * 6
    assert list(keeper.lengths) == [4] * 6


def test_box_actions_are_clipped_on_their_way_only():
    space = Box(-0.1, 0.2, (1,), np.float32)
    envs = vector(lambda: Clock(action_space=space))
    rollout = collector(envs).collect(policy_for(envs), 40)
    assert rollout.actions.abs().max() > 0.5
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
    with pytest.raises(ValueError, match=r"environment 0 gave a reward.*at step 1"):
        collector(envs).collect(policy_for(envs), 3)


def test_sampling_uses_its_own_generator():
    envs = vector(lambda: Clock())
    state = torch.get_rng_state()
    a = collector(envs, 1).collect(policy_for(envs), 30).actions
    assert not torch.equal(torch.get_rng_state(), state)  # policy_for draws weights
    policy, state = policy_for(envs), torch.get_rng_state()
    a = collector(envs, 1).collect(policy, 30).actions
    b = collector(envs, 1).collect(policy, 30).actions
    c = collector(envs, 2).collect(policy, 30).actions
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_samples_follow_the_distribution():
    g = torch.Generator().manual_seed(0)
    observation = torch.randn(1, 2).expand(20_000, 2)
    discrete = make_policy(2, Discrete(3), (4,))
    with torch.no_grad():
        discrete.net[-1].bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
        counts = discrete.sample(observation, g).bincount(minlength=3) / 20_000
        expected = discrete(observation[:1]).probs[0]
    # five standard errors of a frequency over 20,000 draws
    torch.testing.assert_close(counts, expected, rtol=0, atol=5 * 0.5 / 20_000**0.5)
    box = make_policy(2, Box(-1, 1, (2,), np.float32), (4,))
    with torch.no_grad():
        box.log_std.copy_(torch.tensor([0.0, -1.0]))
        samples, distribution = box.sample(observation, g), box(observation[:1])
    standard_error = distribution.stddev[0] / 20_000**0.5
    assert ((samples.mean(0) - distribution.mean[0]).abs() < 5 * standard_error).all()
    torch.testing.assert_close(samples.std(0), distribution.stddev[0], rtol=0.03, atol=0)
    assert distribution.batch_shape == (1,)


class Wrong(Clock):
    def __init__(self, **spaces):
        super().__init__()
        self.__dict__.update(spaces)


@pytest.mark.parametrize(
    ("envs", "words"),
    [
        (lambda: vector(Clock, mode=AutoresetMode.SAME_STEP), "NEXT_STEP"),
        (
            lambda: vector(lambda: Wrong(observation_space=Discrete(3))),
            "unsupported observation space Discrete",
        ),
        (
            lambda: vector(lambda: Wrong(action_space=MultiBinary(3))),
            "unsupported action space MultiBinary",
        ),
        (
            lambda: vector(lambda: Wrong(action_space=Box(0, 5, (2,), np.int64))),
            "unsupported action space Box",
        ),
        (
            lambda: vector(lambda: Wrong(action_space=Box(0, 5, (0,), np.float32))),
            "it has no entries",
        ),
        (lambda: "GymV21Environment-v0", "cannot make environment 'GymV21Environment-v0'"),
        (lambda: "NoSuch-v1", "cannot make environment 'NoSuch-v1'"),
        (lambda: "nomodule:NoSuch-v1", "cannot make environment"),
        (lambda: "Blackjack-v1", "unsupported observation space Tuple"),
    ],
)
def test_unsupported_environments_are_refused_in_words(envs, words):
    with pytest.raises(ValueError, match=words):
        make_envs(envs(), 2)


def test_single_environments_are_told_how_to_be_wrapped():
    with pytest.raises(TypeError, match="SyncVectorEnv"):
        make_envs(gymnasium.make("CartPole-v1"), 2)
    with pytest.raises(ValueError, match="n_envs"):
        make_envs("CartPole-v1", 0)


def test_unsupported_actions_have_no_policy():
    with pytest.raises(ValueError, match="unsupported action space"):
        make_policy(2, MultiBinary(2), (4,))
