"""Policies: the package's, and those of one's own."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, Tuple

from agents import SMALL, TwoNumbers
from rl import TRPO, HeadPolicy, ObservationLayout, TRPOConfig
from rl.build import make_networks
from rl.envs.layout import Part
from toys import Clock


def policy_of(space):
    layout = ObservationLayout(Box(-np.inf, np.inf, (2,), np.float32))
    return make_networks(layout, space, None, TRPOConfig(hidden=(4,)))[0]


def test_samples_follow_the_distribution():
    g = torch.Generator().manual_seed(0)
    observation = torch.randn(1, 2).expand(20_000, 2)
    discrete = policy_of(Discrete(3))
    with torch.no_grad():
        discrete.linear[-1].bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
        noise = discrete.noise(1, 20_000, g)
        counts = discrete.act(observation, noise[0]).bincount(minlength=3) / 20_000
        expected = discrete(observation[:1]).probs[0]
    # five standard errors of a frequency over 20,000 draws
    torch.testing.assert_close(counts, expected, rtol=0, atol=5 * 0.5 / 20_000**0.5)
    box = policy_of(Box(-1, 1, (2,), np.float32))
    with torch.no_grad():
        box.head.log_std.copy_(torch.tensor([0.0, -1.0]))
        noise = box.noise(1, 20_000, g)
        samples, distribution = box.act(observation, noise[0]), box(observation[:1])
    standard_error = distribution.stddev[0] / 20_000**0.5
    assert ((samples.mean(0) - distribution.mean[0]).abs() < 5 * standard_error).all()
    torch.testing.assert_close(samples.std(0), distribution.stddev[0], rtol=0.03, atol=0)
    assert distribution.batch_shape == (1,)


def test_a_mask_that_is_not_of_the_actions_is_refused():
    policy = policy_of(Discrete(3))
    with pytest.raises(ValueError, match=r"mask of shape \(4,\) does not fit.*forbid 3 actions"):
        HeadPolicy(policy.encoder, policy.head, Part("action_mask", "mask", 0, (4,)))


def test_a_policy_of_ones_own_draws_from_the_agents_generator_alone():
    policy, rows = TwoNumbers(copies=True), torch.zeros(5, 2)
    state = torch.get_rng_state()
    noise = policy.noise(3, 5, torch.Generator().manual_seed(1))
    drawn = [policy.act(rows, n) for n in noise]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(drawn[0], drawn[1])
    again = policy.noise(3, 5, torch.Generator().manual_seed(1))
    assert torch.equal(drawn[0], policy.act(rows, again[0]))


def test_a_policy_of_ones_own_may_have_any_actions():
    class Pair(Clock):
        def __init__(self):
            super().__init__(action_space=Tuple([Discrete(2), Discrete(2)]))

        def step(self, action):
            assert self.action_space.contains(tuple(action))
            return super().step(action)

    class Halves(TwoNumbers):
        def to_env(self, actions):
            return tuple(np.stack([actions[:, 0] > 0, actions[:, 0] > 1], 0).astype(np.int64))

    agent = TRPO(Pair, policy=Halves(copies=True), **SMALL).learn(64, progress=False)
    assert agent.iterations == 2
    with pytest.raises(ValueError, match="unsupported action space"):
        TRPO(Pair, **SMALL)
