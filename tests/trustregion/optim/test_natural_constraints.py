"""Linear constraints of NaturalTrustRegion."""

import pytest
import torch
from torch import distributions as td

from natural_cases import rising
from optimizers import natural
from problems import learnable_problem
from trustregion import (
    Status,
    mean_kl,
)


def constrained(limit):
    """A policy over three arms for each state, with a bound on how often arm 0 is used."""
    model, _, x = learnable_problem()
    reward = torch.tensor([1.0, 0.3, 0.0], dtype=torch.float64)

    def closure():
        distribution = td.Categorical(logits=model(x))
        p = distribution.probs
        return -(p @ reward).mean(), distribution, (p[:, 0].mean() - limit).reshape(1)

    return model, closure


def test_a_constraint_is_kept_and_the_loss_falls_as_far_as_it_allows():
    model, closure = constrained(limit=0.45)
    assert closure()[2].item() < 0
    optimizer = natural(model.parameters(), 0.02, damping=1e-4, cg_max_iter=50)
    losses = [closure()[0].item()]
    for _ in range(60):
        optimizer.step(closure)
        info = optimizer.info
        if info.accepted:
            assert info.status is Status.ACCEPTED
            assert info.new_loss < losses[-1]
            assert info.constraints == (pytest.approx(closure()[2].item(), abs=1e-15),)
            losses.append(info.new_loss)
        assert closure()[2].item() <= 0
    # arm 0 in 45 % and arm 1 for the rest is the best there is
    assert losses[-1] == pytest.approx(-(0.45 + 0.3 * 0.55), abs=0.01)
    assert closure()[2].item() > -0.01


def test_a_violated_constraint_is_repaired_first():
    model, closure = constrained(limit=0.1)
    assert closure()[2].item() > 0.1
    optimizer = natural(model.parameters(), 0.02, damping=1e-4, cg_max_iter=50)
    violations = [closure()[2].item()]
    while violations[-1] > 0:
        _, old, _ = closure()
        optimizer.step(closure)
        assert optimizer.info.status is Status.RECOVERING
        assert optimizer.info.accepted
        assert mean_kl(old, closure()[1]) <= 0.02
        violations.append(closure()[2].item())
        assert violations[-1] < violations[-2]
        assert len(violations) < 30
    optimizer.step(closure)
    assert optimizer.info.status is not Status.RECOVERING


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (lambda p: p.sum(), TypeError, r"shape \(m,\)"),
        (lambda p: [p.sum()], TypeError, r"got list"),
        (lambda p: p.detach()[:1] - 1, ValueError, "constraint 0 carries no graph"),
    ],
)
def test_wrong_constraints_are_refused_in_words(given, error, words):
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = natural([p])
    with pytest.raises(error, match=words):
        optimizer.step(lambda: ((p - 1).square().sum(), td.Normal(p, 1.0), given(p)))
    assert torch.equal(p, torch.zeros(2, dtype=torch.float64))


def test_a_number_of_constraints_that_changes_is_refused_and_restored():
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    calls = []

    def closure():
        calls.append(0)
        return (p - 1).square().sum(), td.Normal(p, 1.0), p[: len(calls)] - 10

    optimizer = natural([p])
    with pytest.raises(ValueError, match="returned 2 constraints in a trial, and 1"):
        optimizer.step(closure)
    assert torch.equal(p, torch.zeros(2, dtype=torch.float64))


def test_constraints_that_no_trial_keeps_are_named():
    p, closure = rising(constraint=True)
    optimizer = natural([p])
    optimizer.step(closure)
    assert optimizer.info.status is Status.REJECTED_CONSTRAINT
    assert "the constraints 1" in optimizer.info.detail
    assert torch.equal(p, torch.zeros(2, dtype=torch.float64))


def linear(power, rates=(1.0, 1.0), start=(0.0, 0.0)):
    """A loss and a constraint that are linear, but for the scale of the loss."""
    a, b = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in start)

    def closure():
        return -(2.0**power) * (a + b).sum(), td.Normal(torch.cat([a, b]), 1.0), a - 0.01

    groups = [{"params": [p], "lr": lr} for p, lr in zip((a, b), rates, strict=True)]
    return a, b, closure, groups


@pytest.mark.parametrize("power", [-20, 0, 20])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (1.0, 0.5)])
def test_the_constrained_step_satisfies_its_conditions(power, rates):
    a, b, closure, groups = linear(power, rates)
    optimizer = natural(groups, 0.02, damping=0.0)
    optimizer.step(closure)
    info = optimizer.info
    # the batch holds two samples, so that F = I / 2, and the ball is |s| <= sqrt(0.08)
    assert info.scale > 0.97  # the KL is a quadratic: a step at the edge is outside by rounding
    s, t = a.item() / info.scale, b.item() / info.scale
    assert s == pytest.approx(0.01, rel=1e-9)
    assert s**2 + t**2 == pytest.approx(0.08, rel=1e-9)
    assert info.predicted_reduction == pytest.approx(2.0**power * (a + b).item(), rel=1e-9)
    # stationarity: -2^k + nu s / 2 + mu = 0 and -2^k + nu t / 2 = 0
    assert info.multipliers == (pytest.approx(2.0**power * (1 - s / t), rel=1e-6),)


def test_a_violation_is_repaired_without_a_gradient_and_moves_no_adaptive_option():
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = natural([p], 0.01, max_delta=1.0, damping_factor=1.5)
    group = dict(optimizer.param_groups[0])
    optimizer.step(lambda: (p.square().sum(), td.Normal(p, 1.0), 1 - p[:1]))
    assert optimizer.info.status is Status.RECOVERING
    assert p[0].item() > 0.1
    assert optimizer.param_groups[0] == group
