import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agents import SMALL
from rl import PPO, TRPO, clipped_surrogate, surrogate
from rl.experience.surrogate import distribution_now, normalise, surrogate_closure
from toys import Clock, vector


# of two subnormal numbers the mean may be one of them
@given(st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=2, max_size=20))
def test_normalised_advantages_have_mean_zero_and_are_never_nan(values):
    weights = normalise(torch.tensor(values, dtype=torch.float64))
    assert weights.isfinite().all()
    if weights.any():
        # centring leaves a mean of eps times the values, seen through the spread
        assert abs(weights.mean()) < 0.2
        assert weights.square().mean().item() == pytest.approx(1, rel=1e-6)
    else:
        assert max(values) - min(values) < 1e-12 * max(map(abs, values), default=0) + 1e-300


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_normalisation_works_at_every_scale(scale):
    x = torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(normalise(x * scale), normalise(x))


def test_advantages_that_do_not_vary_become_zero():
    assert not normalise(torch.full((3,), 0.95)).any()


def test_the_surrogate_at_the_old_policy_is_the_mean_advantage_with_the_policy_gradient():
    log_prob = torch.randn(5, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(5, dtype=torch.float64)
    objective = surrogate(log_prob, log_prob.detach(), advantages)
    torch.testing.assert_close(objective.detach(), advantages.mean())
    objective.backward()
    torch.testing.assert_close(log_prob.grad, advantages / 5)


def test_normalised_advantages_of_a_single_sample_are_zero():
    assert normalise(torch.tensor([3.0])).tolist() == [0.0]


@given(st.integers(0, 2**31), st.integers(1, 20))
def test_only_what_the_mask_holds_is_normalised(seed, n):
    g = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(n, 2, generator=g), torch.rand(n, 2, generator=g) < 0.7
    mask[0] = True  # a path has a step that counts
    garbage = torch.where(mask, x, torch.nan)
    found = normalise(garbage, mask)
    assert torch.equal(found[~mask], torch.zeros(int((~mask).sum())))
    assert torch.equal(found[mask], normalise(x[mask]))


@given(
    ratios=st.lists(st.floats(0.1, 3), min_size=1, max_size=5),
    advantage=st.floats(-2, 2),
    clip=st.floats(0.05, 0.5),
)
def test_the_clipped_objective_is_a_bound(ratios, advantage, clip):
    log_prob = torch.tensor(ratios, dtype=torch.float64).log()
    old, a = torch.zeros_like(log_prob), torch.full_like(log_prob, advantage)
    clipped, share = clipped_surrogate(log_prob, old, a, clip)
    assert clipped <= surrogate(log_prob, old, a) + 1e-12
    by_hand = [
        min(r * advantage, min(max(r, 1 - clip), 1 + clip) * advantage)
        for r in log_prob.exp().tolist()
    ]
    assert clipped.item() == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-12)
    outside = [abs(r - 1) > clip for r in log_prob.exp().tolist()]
    assert share.item() == pytest.approx(sum(outside) / len(outside))


def test_the_closure_of_a_path_weighs_each_step_that_counts_by_its_ratio():
    agent = TRPO(vector(lambda: Clock(length=3), 4), **SMALL).learn(1, progress=False)
    path = agent.training.collector.collect(agent.policy, 16)
    assert not path.mask.all()
    with torch.no_grad():  # the policy is no longer the one that acted
        for p in agent.policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    advantages = torch.randn(16, 4)
    objective, distribution = surrogate_closure(agent.policy, path, advantages)()
    assert distribution.batch_shape == (path.steps,)
    total = 0.0
    for t, i in path.mask.nonzero().tolist():
        now = agent.policy(path.observations[t, i : i + 1]).log_prob(path.actions[t, i])
        total += (now - path.log_prob[t, i]).exp().item() * advantages[t, i].item()
    assert objective.item() == pytest.approx(total / path.steps, rel=1e-4)  # float32, another order


def test_the_present_distribution_is_kept_when_the_policy_moves():
    policy = PPO(Clock, **SMALL).policy
    rows = torch.randn(5, 2)
    old, expected = distribution_now(policy, rows), policy(rows).logits.detach().clone()
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(2).add_(1)
    assert torch.equal(old.logits, expected)
    assert not torch.equal(policy(rows).logits, expected)


def test_trials_follow_the_parameters_and_agree_with_the_graph():
    """They are computed apart from torch's graph, by arrays that share the parameters' memory."""
    agent = TRPO(vector(lambda: Clock(length=3), 4), **SMALL).learn(1, progress=False)
    path = agent.training.collector.collect(agent.policy, 16)
    closure = agent.objective(path, normalise(torch.randn(path.mask.shape), path.mask))
    for _ in range(2):
        value, distribution = closure()
        with torch.no_grad():
            tried, other = closure()
        torch.testing.assert_close(tried, value.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.logits, distribution.logits.detach())
        assert value.requires_grad
        assert not tried.requires_grad
        with torch.no_grad():
            for p in agent.policy.parameters():
                p.add_(0.1 * torch.randn_like(p))
