import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from agents import path_of
from rl import GAE, TRPO, MonteCarlo, NStep, gae, n_step, td_lambda
from rl.experience.advantages import ADVANTAGES
from rl.experience.path import Values
from toys import Clock


@st.composite
def batches(draw, dones=True, longest=17):
    T, N = draw(st.integers(1, longest)), draw(st.integers(1, 4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rewards, values, next_values = torch.randn(3, T, N, generator=g, dtype=torch.float64)
    terminated = torch.rand(T, N, generator=g) < (0.2 if dones else 0)
    truncated = (torch.rand(T, N, generator=g) < (0.2 if dones else 0)) & ~terminated
    return rewards, values, next_values, terminated, truncated


def of_one_critic(batch):
    """The value a step leads to is that of the next step, unless the episode ended."""
    rewards, values, next_values, terminated, truncated = batch
    following = torch.cat([values[1:], next_values[-1:]])
    next_values = torch.where(terminated | truncated, next_values, following)
    return rewards, values, next_values, terminated, truncated


factors = st.floats(0, 1)


@given(batches(), factors, factors)
def test_the_scan_is_the_defining_sum(batch, gamma, gae_lambda):
    advantages, returns = gae(*batch, gamma=gamma, gae_lambda=gae_lambda)
    expected = oracles.gae(*batch, gamma, gae_lambda)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(returns, advantages + batch[1])


@given(batches(), factors)
def test_lambda_zero_is_the_one_step_error(batch, gamma):
    rewards, values, next_values, terminated, _ = batch
    advantages, _ = gae(*batch, gamma=gamma, gae_lambda=0.0)
    expected = rewards + gamma * torch.where(terminated, 0.0, next_values) - values
    assert torch.equal(advantages, expected)


@given(batches(dones=False), st.floats(0.1, 1))
def test_lambda_one_is_the_discounted_return_minus_the_value(batch, gamma):
    rewards, values, _, terminated, truncated = batch
    next_values = torch.cat([values[1:], torch.zeros_like(values[:1])])
    _, returns = gae(
        rewards, values, next_values, terminated, truncated, gamma=gamma, gae_lambda=1.0
    )
    total = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        total = rewards[t] + gamma * total
        torch.testing.assert_close(returns[t], total, rtol=1e-10, atol=1e-10)


@given(batches(), factors, factors, st.data())
def test_nothing_after_a_done_flows_back(batch, gamma, gae_lambda, data):
    rewards, values, next_values, terminated, truncated = (x.clone() for x in batch)
    t = data.draw(st.integers(0, len(rewards) - 1))
    truncated[t], terminated[t] = True, False
    before, _ = gae(
        rewards, values, next_values, terminated, truncated, gamma=gamma, gae_lambda=gae_lambda
    )
    rewards[t + 1 :], values[t + 1 :] = 1e6, -1e6
    after, _ = gae(
        rewards, values, next_values, terminated, truncated, gamma=gamma, gae_lambda=gae_lambda
    )
    assert torch.equal(before[: t + 1], after[: t + 1])


def test_truncation_keeps_the_future_and_termination_does_not():
    one, no, yes = torch.ones(1, 1), torch.tensor([[False]]), torch.tensor([[True]])
    options = {"gamma": 0.5, "gae_lambda": 0.9}
    assert gae(one, 0 * one, 4 * one, no, yes, **options)[0].item() == 3.0
    assert gae(one, 0 * one, 4 * one, yes, no, **options)[0].item() == 1.0


@given(st.floats(0.5, 0.99), factors, st.floats(-3, 3))
def test_a_critic_that_is_right_leaves_no_advantage(gamma, gae_lambda, c):
    values = torch.full((6, 2), c, dtype=torch.float64)
    no = torch.zeros(6, 2, dtype=torch.bool)
    rewards = (1 - gamma) * values
    advantages, _ = gae(rewards, values, values, no, no, gamma=gamma, gae_lambda=gae_lambda)
    assert advantages.abs().max() <= 1e-14 * (1 + abs(c)) * 10


@given(batches().map(of_one_critic), factors, st.integers(1, 20))
def test_n_steps_are_n_rewards_and_the_value_after_them(batch, gamma, n):
    rewards, values, *rest = batch
    advantages, returns = n_step(*batch, gamma=gamma, n=n)
    expected = oracles.n_step_returns(rewards, *rest, gamma, n)
    torch.testing.assert_close(returns, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(returns, advantages + values)


@given(batches(longest=9), factors, factors)
def test_lambda_returns_are_mixtures_of_n_step_returns(batch, gamma, trace):
    rewards, _, *rest = batch
    returns = td_lambda(rewards, *rest, gamma=gamma, trace=trace)
    expected = oracles.lambda_returns(rewards, *rest, gamma, trace)
    torch.testing.assert_close(returns, expected, rtol=1e-12, atol=1e-12)


@given(batches().map(of_one_critic), factors, factors)
def test_of_one_critic_they_are_the_returns_of_gae(batch, gamma, trace):
    rewards, _, *rest = batch
    _, expected = gae(*batch, gamma=gamma, gae_lambda=trace)
    returns = td_lambda(rewards, *rest, gamma=gamma, trace=trace)
    torch.testing.assert_close(returns, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((3, 2), {"gamma": 1.5, "gae_lambda": 0.9}, "gamma must lie"),
        ((3, 2), {"gamma": 0.9, "gae_lambda": -0.1}, "gae_lambda must lie"),
        ((2, 2), {"gamma": 0.9, "gae_lambda": 0.9}, "one shape"),
    ],
)
def test_wrong_arguments_are_refused(shape, options, words):
    x, no = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=words):
        gae(x, torch.zeros(shape), x, no, no, **options)


def test_wrong_arguments_of_the_others_are_refused():
    x, no = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        n_step(x, x, x, no, no, gamma=0.9, n=0)
    with pytest.raises(ValueError, match="trace must lie"):
        td_lambda(x, x, no, no, gamma=0.9, trace=2.0)
    with pytest.raises(ValueError, match="one shape"):
        td_lambda(x[:0], x[:0], no[:0], no[:0], gamma=0.9, trace=0.5)


def test_shapes_that_differ_are_named():
    x, no = torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"one shape \(T, N\).*\(2, 2\), \(3, 2\)"):
        gae(x, x[:2], x, no, no, gamma=0.9, gae_lambda=0.9)
    with pytest.raises(ValueError, match=r"got \[\(3,\)\]"):
        td_lambda(x[:, 0], x[:, 0], no[:, 0], no[:, 0], gamma=0.9, trace=0.9)


# -- estimators of a path


@given(batches(), factors, factors, st.integers(1, 20), st.sampled_from(["reward", "cost"]))
def test_the_objects_are_the_functions(batch, gamma, trace, n, signal):
    rewards, now, following, terminated, truncated = batch
    other = torch.full_like(rewards, 1e6)
    signals = {"reward": other, "cost": other} | {signal: rewards}
    path = path_of(signals=signals, terminated=terminated, truncated=truncated)
    values = Values(now, following)
    for found, expected in (
        (GAE(trace), gae(*batch, gamma=gamma, gae_lambda=trace)),
        (NStep(n), n_step(*batch, gamma=gamma, n=n)),
        (MonteCarlo(), gae(*batch, gamma=gamma, gae_lambda=1.0)),
    ):
        for x, y in zip(found(path, values, gamma, signal), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GAE(1.5), r"gae_lambda must lie in \[0, 1\], got 1.5"),
        (lambda: GAE("much"), "gae_lambda must be a number, got 'much'"),
        (lambda: NStep(0), "n must be at least 1, got 0"),
        (lambda: NStep(2.5), "n must be a whole number, got 2.5"),
    ],
)
def test_estimators_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_monte_carlo_returns_are_those_of_whole_episodes():
    """Of three steps that pay 1 each; where the rollout cuts an episode off, the critic knows."""
    rewards, no = torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.bool)
    terminated = no.clone()
    terminated[2] = True
    path = path_of(signals={"reward": rewards}, terminated=terminated, truncated=no)
    now = torch.full((5, 1), 2.0)
    values = Values(now, torch.tensor([[2.0]] * 4 + [[8.0]]))
    _, returns = MonteCarlo()(path, values, 0.5)
    assert returns.flatten().tolist() == [1.75, 1.5, 1.0, 1.5 + 2.0, 1.0 + 4.0]


def test_every_estimator_has_a_name():
    assert {"gae": GAE, "n_step": NStep, "monte_carlo": MonteCarlo} == ADVANTAGES
    for text, estimator in (
        ("gae", GAE(0.5)),  # whose trace is also an option of its own
        ("gae:gae_lambda=0.25", GAE(0.25)),
        ("n_step:n=3", NStep(3)),
        ("monte_carlo", MonteCarlo()),
    ):
        assert TRPO(Clock, advantages=text, gae_lambda=0.5).advantages == estimator
