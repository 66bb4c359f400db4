import pytest
import torch

from agents import MEDIUM, logs_of
from rl import NPG, TRPO


def move(agent):
    """Return what one update changes in the policy, as one vector."""
    before = torch.cat([p.detach().flatten().clone() for p in agent.policy.parameters()])
    agent.learn(1, progress=False)
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()]) - before


def test_a_natural_step_has_the_kl_that_was_asked_for():
    """To second order: the measured KL is within a few per cent of delta at a small delta."""
    for log in logs_of(NPG("CartPole-v1", delta=1e-4, **MEDIUM), 1000):
        assert log["train/kl_divergence_loss"] == pytest.approx(1e-4, rel=0.05)
        assert log["trust/actual_reduction"] == pytest.approx(
            log["trust/predicted_reduction"], rel=0.2
        )


def test_a_fixed_step_is_proportional_to_its_size():
    one, two = (move(NPG("CartPole-v1", step_size=s, **MEDIUM)) for s in (1e-3, 2e-3))
    # differences of float32 parameters
    torch.testing.assert_close(2 * one, two, rtol=1e-2, atol=1e-6)


def test_it_is_trpo_without_the_search():
    """Both go along the same direction."""
    one = move(NPG("CartPole-v1", delta=1e-3, **MEDIUM))
    other = move(TRPO("CartPole-v1", delta=1e-3, curvature_fraction=1, **MEDIUM))
    assert torch.cosine_similarity(one, other, dim=0) > 0.999
