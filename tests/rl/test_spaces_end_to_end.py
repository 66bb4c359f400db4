"""TRPO on environments of every space: it updates, saves, loads, and predicts the same."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rl import TRPO, evaluate

OBSERVATIONS = {
    "box": spaces.Box(-1, 1, (2, 2), np.float64),
    "discrete": spaces.Discrete(5, start=2),
    "multi-discrete": spaces.MultiDiscrete([3, 4]),
    "multi-binary": spaces.MultiBinary(3),
    "dict": spaces.Dict(
        camera=spaces.Box(0, 255, (10, 12, 3), np.uint8), speed=spaces.Box(-1, 1, (2,))
    ),
    "tuple": spaces.Tuple((spaces.Discrete(3), spaces.Box(-1, 1, (2,)))),
    "image": spaces.Box(0, 255, (4, 16, 16), np.uint8),
}
ACTIONS = {
    "box": spaces.Box(-1, 1, (2,), np.float32),
    "discrete": spaces.Discrete(3),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(2),
}


class Anything(gymnasium.Env):
    """Random observations of a space; every action of another earns what it is worth."""

    def __init__(self, observation, action):
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        done = self.time == 5
        return self.observation_space.sample(), float(np.mean(action)), False, done, {}


def maker(observation, action):
    return lambda: Anything(OBSERVATIONS[observation], ACTIONS[action])


def agent_for(observation, action, **options):
    defaults = {"n_envs": 2, "steps_per_update": 64, "hidden": (8,), "delta": 0.05}
    return TRPO(maker(observation, action), **defaults | options)


@pytest.mark.parametrize(
    ("observation", "action", "options"),
    [
        *((name, "discrete", {}) for name in OBSERVATIONS),
        *(("box", name, {}) for name in ACTIONS),
        ("dict", "box", {"shared_encoder": True, "normalise_observations": True}),
        ("box", "box", {"squash_actions": True, "state_dependent_std": True}),
        ("tuple", "multi-discrete", {"normalise_rewards": True, "advantages": "monte_carlo"}),
        ("box", "discrete", {"advantages": "n_step", "td_lambda": 0.9}),
        ("image", "box", {"hidden": ()}),
    ],
)
def test_every_space_trains_saves_and_predicts(tmp_path, observation, action, options):
    make, agent = maker(observation, action), agent_for(observation, action, **options)
    logs = []
    agent.learn(160, progress=False, callback=lambda _, log: logs.append(log))
    assert [log["trust/status"] for log in logs] == ["accepted"] * len(logs)
    assert all(0 < log["train/kl_divergence_loss"] <= 0.05 for log in logs)
    agent.save(tmp_path / "agent.zip")
    loaded = TRPO.load(tmp_path / "agent.zip", make)
    one = OBSERVATIONS[observation].sample()
    chosen, _ = agent.predict(one, deterministic=True)
    assert ACTIONS[action].contains(chosen)
    np.testing.assert_array_equal(loaded.predict(one, deterministic=True)[0], chosen)
    assert len(evaluate(loaded, make, 3).returns) == 3
    loaded.learn(64, progress=False)


def test_a_shared_encoder_is_one_and_moves_with_the_policy_alone():
    agent = agent_for("box", "discrete", shared_encoder=True)
    assert agent.policy.encoder is agent.critic.encoder
    held = {id(p) for p in agent.critic_parameters}
    assert held == {id(p) for p in agent.critic.linear.parameters()}
    apart = agent_for("box", "discrete")
    assert apart.policy.encoder is not apart.critic.encoder


def test_moments_move_after_an_update_and_not_within():
    agent = agent_for("box", "discrete", normalise_observations=True, normalise_rewards=True)
    seen = []
    update = agent.update

    def spy(path):
        seen.append(agent.observation_norm.moments.count.item())
        log = update(path)
        seen.append(agent.observation_norm.moments.count.item())
        return log

    agent.update = spy
    agent.learn(128, progress=False)
    assert seen[0] == seen[1] == 0
    assert seen[2] == seen[3] > 0
    assert agent.observation_norm.moments.count > seen[2]


def test_evaluation_and_prediction_freeze_the_moments():
    agent = agent_for("box", "discrete", normalise_observations=True).learn(64, progress=False)
    before = agent.observation_norm.moments.mean.clone()
    evaluate(agent, maker("box", "discrete"), 3)
    assert torch.equal(agent.observation_norm.moments.mean, before)
