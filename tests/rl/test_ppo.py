import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from agents import MEDIUM, SMALL, TwoNumbers, logs_of, same, weights
from rl import PPO, Policy
from toys import Bandit, Paid, Slide, vector


def test_one_optimizer_has_every_parameter_once():
    for shared in (False, True):
        agent = PPO("CartPole-v1", shared_encoder=shared, **SMALL)
        held = [id(p) for group in agent.optimizer.param_groups for p in group["params"]]
        both = {id(p) for m in (agent.policy, agent.critic) for p in m.parameters()}
        assert len(held) == len(set(held))
        assert set(held) == both


def test_coefficients_move_over_learn():
    seen = []
    agent = PPO(
        "CartPole-v1", lr=1e-3, final_lr=0.0, entropy_coef=0.1, final_entropy_coef=0.0, **MEDIUM
    )
    scheduled = agent.scheduled
    agent.scheduled = lambda *pair: seen.append(scheduled(*pair)) or seen[-1]
    rates = [log["train/learning_rate"] for log in logs_of(agent, 1000)]
    assert rates[0] == 1e-3
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 5e-4
    assert seen[0] == 0.1 > seen[-2]


def test_the_entropy_bonus_keeps_entropy():
    entropies = []
    for coefficient in (0.0, 3.0):
        agent = PPO(vector(Bandit, 4), entropy_coef=coefficient, lr=1e-2, **MEDIUM)
        entropies.append(-logs_of(agent, 2000)[-1]["train/entropy_loss"])
    assert entropies[1] > 0.5 > 0.3 > entropies[0]


def test_passes_end_at_the_kl_limit():
    agent = PPO("CartPole-v1", lr=0.05, kl_limit=1e-3, **MEDIUM)
    assert all(log["train/n_updates"] < 10 for log in logs_of(agent, 500))


def test_passes_that_diverge_are_undone():
    agent = PPO(Paid, lr=1e20, batch_size=8, **MEDIUM)
    before, state = weights(agent), None

    def keep(agent, _):
        nonlocal before, state
        before, state = weights(agent), agent.optimizer.state_dict()

    with pytest.raises(ValueError, match="PPO diverged"):
        agent.learn(2_000, progress=False, callback=keep)
    assert same(before, weights(agent))
    assert all(p.isfinite().all() for p in before)


class Normalised(Policy):
    """Has running statistics, and is interrupted in one of its calls."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.calls_left = 10**9

    def forward(self, rows):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise KeyboardInterrupt
        return Independent(Normal(self.net(rows), 1.0), 1)


def test_passes_that_are_interrupted_are_undone_with_buffers_and_moments():
    torch.manual_seed(0)
    agent = PPO(Slide, policy=Normalised(), **SMALL).learn(64, progress=False)
    path = agent.training.collector.collect(agent.policy, 16)
    kept = {k: x.clone() for k, x in agent.policy.state_dict().items()}
    state = {
        (i, k): x.clone()
        for i, entry in agent.optimizer.state_dict()["state"].items()
        for k, x in entry.items()
    }
    agent.policy.calls_left = 6
    with pytest.raises(KeyboardInterrupt):
        agent.update(path)
    assert same([*kept.values()], [*agent.policy.state_dict().values()])
    assert state
    for (i, k), x in state.items():
        assert torch.equal(agent.optimizer.state_dict()["state"][i][k], x)


def test_a_family_without_entropy_is_fine_unless_entropy_is_asked_for():
    class Squashed(TwoNumbers):
        def forward(self, rows):
            base = super().forward(rows).base_dist
            return Independent(TransformedDistribution(base, [TanhTransform(cache_size=1)]), 1)

    PPO(Slide, policy=Squashed(copies=True), **SMALL).learn(64, progress=False)
    with pytest.raises(ValueError, match="has no entropy: set entropy_coef to 0"):
        PPO(Slide, policy=Squashed(copies=True), entropy_coef=0.1, **SMALL).learn(64, False)
