"""What NaturalTrustRegion offers beside the plain step: each option against its own definition."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td
from torch import nn

from problems import learnable_problem, theta
from trustregion import (
    FisherOperator,
    Jacobi,
    NaturalTrustRegion,
    Status,
    kl_ball_step,
    mean_kl,
    subsample,
    to_dense,
)
from trustregion.solvers import classic_radius, kl_penalty_step, levenberg_marquardt_damping


def derivatives(model, closure):
    """The gradient and the Fisher matrix, dense."""
    params = list(model.parameters())
    loss, distribution = closure()
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(loss, params, retain_graph=True)])
    return g, to_dense(FisherOperator(distribution, params))


def moved(model, optimizer, closure, **given):
    before = theta(model)
    optimizer.step(closure, **given)
    return theta(model) - before


EXACT = {"cg_max_iter": 300, "cg_rtol": 1e-13}


# -- the edge of the ball


@pytest.mark.parametrize("delta", [1e-6, 1e-3, 1e-2])
@pytest.mark.parametrize("lr", [1.0, 0.5, 2.0])
def test_an_accepted_step_uses_nine_tenths_of_the_ball_within_three_trials(delta, lr):
    model, closure, _ = learnable_problem()
    optimizer = NaturalTrustRegion(model.parameters(), delta, lr=lr)
    for _ in range(3):  # far from the minimum, where the loss allows it
        optimizer.step(closure)
        info = optimizer.info
        assert info.accepted
        assert 0.9 * min(1, lr**2) <= info.kl / delta <= 1
        assert info.evaluations <= 1 + 3


# -- candidates from one Krylov space


def test_several_dampings_cost_the_products_of_one_and_the_best_loss_is_taken():
    dampings, scales = (1e-4, 1e-2, 1.0), (0.5, 1.0)
    model, closure, _ = learnable_problem()
    start, (loss, old) = theta(model), closure()
    outcomes = {}
    g, F = derivatives(model, closure)
    for damping in dampings:
        x = -torch.linalg.solve(F + damping * torch.eye(len(g), dtype=g.dtype), g)
        s = x * (2 * 0.05 / (x @ F @ x)).sqrt()
        for scale in scales:
            nn.utils.vector_to_parameters(start + scale * s, model.parameters())
            new_loss, new = closure()
            if mean_kl(old, new) <= 0.05 and new_loss < loss:
                outcomes[damping, scale] = new_loss.item()
    nn.utils.vector_to_parameters(start, model.parameters())
    optimizer = NaturalTrustRegion(
        model.parameters(), 0.05, damping=dampings, scales=scales, **(EXACT | {"cg_max_iter": 67})
    )
    optimizer.step(closure)
    info = optimizer.info
    best = min(outcomes, key=outcomes.get)
    assert (info.damping, info.scale) == best
    assert info.new_loss == pytest.approx(outcomes[best], rel=1e-9)
    assert info.new_loss == closure()[0].item()  # and it is what the parameters are at
    assert info.evaluations == 1 + len(dampings) * len(scales)
    assert info.products <= 67


def test_candidates_that_all_fail_are_followed_by_a_search():
    model, closure, _ = learnable_problem()
    far = NaturalTrustRegion(model.parameters(), 1e-4, damping=(1e-3, 1e-2), scales=(40.0, 50.0))
    far.step(closure)
    assert far.info.accepted
    assert far.info.evaluations > 1 + 4
    assert far.info.scale < 40


def test_several_dampings_and_a_preconditioner_are_refused_in_words():
    model, closure, _ = learnable_problem()
    optimizer = NaturalTrustRegion(
        model.parameters(), damping=(1e-3, 1e-2), preconditioner=Jacobi()
    )
    kept = theta(model)
    with pytest.raises(ValueError, match="one Krylov space"):
        optimizer.step(closure)
    assert torch.equal(theta(model), kept)


# -- a cap on every sample


def test_no_sample_moves_more_than_its_cap():
    model, closure, _ = learnable_problem()
    optimizer = NaturalTrustRegion(model.parameters(), 0.05, max_kl=0.06)
    for _ in range(3):
        _, old = closure()
        optimizer.step(closure)
        _, new = closure()
        each = torch.stack(
            [
                mean_kl(td.Categorical(logits=a[None]), td.Categorical(logits=b[None]))
                for a, b in zip(old.logits, new.logits, strict=True)
            ]
        )
        info = optimizer.info
        assert info.accepted
        assert info.largest_kl == pytest.approx(each.max().item(), rel=1e-12)
        assert info.largest_kl <= 0.06
        assert info.kl < 0.05 / 2  # the cap is what binds
        assert info.largest_kl >= 0.8 * 0.06  # a maximum is not a smooth function of the length


# -- the price of a KL


@given(st.integers(0, 1000), st.floats(0, 4))
def test_the_penalised_step_is_the_solution_over_the_penalty(seed, log_penalty):
    penalty = 10**log_penalty
    model, closure, _ = learnable_problem(seed=seed)
    g, F = derivatives(model, closure)
    x = -torch.linalg.solve(F + 0.1 * torch.eye(len(g), dtype=g.dtype), g)
    _, old = closure()
    loss = closure()[0].item()
    optimizer = NaturalTrustRegion(
        model.parameters(), math.inf, penalty=penalty, damping=0.1, **EXACT
    )
    s = moved(model, optimizer, closure)
    info = optimizer.info
    assert info.accepted
    torch.testing.assert_close(s, info.scale * x / penalty, rtol=1e-6, atol=1e-12)
    kl = mean_kl(old, closure()[1]).item()
    assert info.kl == kl
    assert info.new_loss + penalty * kl < loss
    assert info.penalty == penalty


def test_delta_bounds_the_penalised_step_too():
    model, closure, _ = learnable_problem()
    optimizer = NaturalTrustRegion(model.parameters(), 1e-3, penalty=1e-3)
    optimizer.step(closure)
    assert optimizer.info.accepted
    assert 0.5e-3 <= optimizer.info.kl <= 1e-3


def test_the_penalty_follows_the_measured_kl():
    model, closure, _ = learnable_problem()
    target = 1e-3
    optimizer = NaturalTrustRegion(model.parameters(), math.inf, penalty=1e-2, kl_target=target)
    for _ in range(12):
        before = optimizer.param_groups[0]["penalty"]
        optimizer.step(closure)
        info, after = optimizer.info, optimizer.param_groups[0]["penalty"]
        assert info.penalty == before
        if info.kl > 1.5 * target or not info.accepted:
            assert after == 2 * before
        elif info.kl < target / 1.5:
            assert after == before / 2
        else:
            assert after == before
    assert target / 3 < optimizer.info.kl < 3 * target


# -- options that follow the steps


def test_the_radius_follows_rho():
    model, closure, _ = learnable_problem()
    optimizer = NaturalTrustRegion(model.parameters(), 1e-4, max_delta=1.0)
    seen = set()
    for _ in range(40):
        delta = optimizer.param_groups[0]["delta"]
        optimizer.step(closure)
        info = optimizer.info
        rho = info.rho if info.accepted else -math.inf
        edge = info.accepted and info.kl >= 0.8 * delta
        radius = classic_radius(
            math.sqrt(delta), rho, on_boundary=edge, shrink=0.5, grow=math.sqrt(2), largest=1.0
        )
        assert optimizer.param_groups[0]["delta"] == pytest.approx(radius**2, rel=1e-12)
        seen.add((optimizer.param_groups[0]["delta"] / delta) > 1)
        assert info.delta == delta
        assert info.kl <= delta
    assert seen == {True, False}
    assert max(info.kl, delta) <= 1.0


def test_the_damping_follows_rho():
    model, closure, _ = learnable_problem()
    optimizer = NaturalTrustRegion(model.parameters(), 0.3, adapt_damping=True)
    for _ in range(15):
        damping = optimizer.param_groups[0]["damping"]
        optimizer.step(closure)
        info = optimizer.info
        rho = info.rho if info.accepted else -math.inf
        assert info.damping == damping
        assert optimizer.param_groups[0]["damping"] == levenberg_marquardt_damping(damping, rho)


def test_a_warm_start_goes_on_from_the_last_solution():
    cold, warm = learnable_problem()[0], learnable_problem()[0]
    x, residuals = learnable_problem()[2], {}
    y = torch.randint(3, (64,))

    def closure_of(model):
        def closure():
            d = td.Categorical(logits=model(x))
            return -d.log_prob(y).mean(), d

        return closure

    for name, model, factor in (("cold", cold, 0.0), ("warm", warm, 1.0)):
        optimizer = NaturalTrustRegion(
            model.parameters(), 1e-6, cg_max_iter=5, cg_rtol=0.0, warm_start=factor
        )
        for _ in range(4):
            optimizer.step(closure_of(model))
        residuals[name] = optimizer.info.cg_residual
    assert residuals["warm"] < residuals["cold"]


@pytest.mark.parametrize(
    "options",
    [
        {"warm_start": 0.9},
        {"max_delta": 1.0, "adapt_damping": True},
        {"penalty": 1.0, "kl_target": 0.01},
        {"damping": (1e-3, 1e-1), "scales": (0.5, 1.0)},
    ],
)
def test_a_resumed_optimizer_goes_on_bit_for_bit(options):
    model, closure, _ = learnable_problem(torch.float32)
    optimizer = NaturalTrustRegion(model.parameters(), 0.05, **options)
    for _ in range(3):
        optimizer.step(closure)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), model.state_dict()), file)
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    other, resumed, _ = learnable_problem(torch.float32)
    other.load_state_dict(weights)
    fresh = NaturalTrustRegion(other.parameters(), 0.05, **options)
    fresh.load_state_dict(saved)
    for _ in range(3):
        optimizer.step(closure)
        fresh.step(resumed)
    assert torch.equal(theta(model), theta(other))
    assert optimizer.info == fresh.info


# -- curvature of other samples


def test_curvature_comes_from_the_samples_it_is_given():
    model, closure, x = learnable_problem()
    keep = subsample(len(x), 0.25)
    g, _ = derivatives(model, closure)
    F = to_dense(FisherOperator(td.Categorical(logits=model(x[keep])), model.parameters()))
    direction = -torch.linalg.solve(F + 0.1 * torch.eye(len(g), dtype=g.dtype), g)
    calls = []

    def curvature():
        calls.append(torch.is_grad_enabled())
        return td.Categorical(logits=model(x[keep]))

    optimizer = NaturalTrustRegion(model.parameters(), 1e-4, damping=0.1, **EXACT)
    s = moved(model, optimizer, closure, curvature=curvature)
    assert calls == [True]
    torch.testing.assert_close(s / s.norm(), direction / direction.norm(), rtol=1e-6, atol=1e-9)
    assert 0.9e-4 <= optimizer.info.kl <= 1e-4  # that of all samples


# -- common random numbers


def test_dropout_draws_one_mask_a_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 3)).double()
    x, y = torch.randn(64, 5).double(), torch.randint(3, (64,))
    masks = []
    model[1].register_forward_hook(lambda *args: masks.append(args[2] == 0))

    def closure():
        distribution = td.Categorical(logits=model(x))
        return -distribution.log_prob(y).mean(), distribution

    optimizer = NaturalTrustRegion(model.parameters(), 0.01)
    first = []
    for _ in range(4):
        masks.clear()
        state = torch.get_rng_state()
        optimizer.step(closure)
        assert optimizer.info.accepted
        assert len(masks) == optimizer.info.evaluations >= 2
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        first.append(masks[0])
        after = torch.get_rng_state()  # as one call leaves it
        torch.set_rng_state(state)
        closure()
        assert torch.equal(after, torch.get_rng_state())
    assert not torch.equal(first[0], first[1])  # another one each step


# -- constraints


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
    optimizer = NaturalTrustRegion(model.parameters(), 0.02, damping=1e-4, cg_max_iter=50)
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
    optimizer = NaturalTrustRegion(model.parameters(), 0.02, damping=1e-4, cg_max_iter=50)
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
    optimizer = NaturalTrustRegion([p])
    with pytest.raises(error, match=words):
        optimizer.step(lambda: ((p - 1).square().sum(), td.Normal(p, 1.0), given(p)))
    assert torch.equal(p, torch.zeros(2, dtype=torch.float64))


def test_a_number_of_constraints_that_changes_is_refused_and_restored():
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    calls = []

    def closure():
        calls.append(0)
        return (p - 1).square().sum(), td.Normal(p, 1.0), p[: len(calls)] - 10

    optimizer = NaturalTrustRegion([p])
    with pytest.raises(ValueError, match="returned 2 constraints in a trial, and 1"):
        optimizer.step(closure)
    assert torch.equal(p, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales": ()}, "scales must hold positive numbers"),
        ({"scales": (1.0, 0.0)}, "scales must hold positive numbers"),
        ({"scales": 1.0}, "scales must be a tuple of numbers"),
        ({"damping": ()}, "damping must be finite"),
        ({"damping": (1e-3, -1.0)}, "damping must be finite"),
        ({"damping": (1e-3, 1e-2), "adapt_damping": True}, "give one of the two"),
        ({"damping": "big"}, "damping must be a number"),
        ({"max_kl": 0.0}, "max_kl must be positive"),
        ({"penalty": -1.0}, "penalty must be positive"),
        ({"kl_target": 0.01}, "pass penalty="),
        ({"max_delta": 1e-3}, "largest radius that delta may grow to"),
        ({"warm_start": 1.5}, r"warm_start must lie in \[0, 1\]"),
        ({"delta": math.inf}, "infinite with penalty="),
    ],
)
def test_wrong_options_are_refused_at_construction(options, words):
    p = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match=words):
        NaturalTrustRegion([p], **options)


# -- the corners of the options


def rising(constraint=None):
    """A closure whose loss, or constraint, is worse in every trial."""
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def closure():
        worse = float(p.any())
        loss, prediction = (p - 1).square().sum(), td.Normal(p, 1.0)
        if constraint is None:
            return loss + 100 * worse, prediction
        return loss, prediction, p[:1] - 100 + 200 * worse

    return p, closure


def test_a_rejected_step_raises_the_penalty():
    p, closure = rising()
    optimizer = NaturalTrustRegion([p], math.inf, penalty=1.0, kl_target=0.1)
    optimizer.step(closure)
    assert optimizer.info.status is Status.REJECTED_LOSS
    assert optimizer.param_groups[0]["penalty"] == 2.0


def test_constraints_that_no_trial_keeps_are_named():
    p, closure = rising(constraint=True)
    optimizer = NaturalTrustRegion([p])
    optimizer.step(closure)
    assert optimizer.info.status is Status.REJECTED_CONSTRAINT
    assert "the constraints 1" in optimizer.info.detail
    assert torch.equal(p, torch.zeros(2, dtype=torch.float64))


def test_a_penalised_step_is_judged_with_its_penalty_and_not_stretched():
    model, closure, _ = learnable_problem()
    options = {"penalty": 30.0, "damping": 0.1}
    one = NaturalTrustRegion(model.parameters(), 1.0, **options)
    one.step(closure)
    assert (one.info.accepted, one.info.scale, one.info.evaluations) == (True, 1.0, 2)
    assert one.info.kl < 0.01  # of 1.0
    # at three times the length the loss is lower still, and the KL costs more than that
    several = NaturalTrustRegion(model.parameters(), 1.0, scales=(1.0, 3.0), **options)
    start, loss = theta(model), closure()[0].item()
    several.step(closure)
    step = theta(model) - start
    nn.utils.vector_to_parameters(start + 3 * step, model.parameters())
    assert several.info.scale == 1.0
    assert closure()[0].item() < several.info.new_loss < loss


@pytest.mark.parametrize("penalty", [1e-3, 1e3])
def test_the_penalised_step_is_the_shorter_of_two(penalty):
    x, g = torch.tensor([-3.0, 1.0]).double(), torch.tensor([3.0, -1.0]).double()
    edge = kl_ball_step(x, g, 0.01, damped_curvature=10.0, damping=0.0)
    step = kl_penalty_step(x, g, penalty, 0.01, damped_curvature=10.0, damping=0.0)
    free = kl_penalty_step(x, g, penalty, damped_curvature=10.0, damping=0.0)
    torch.testing.assert_close(free.s, x / penalty)
    assert free.predicted_reduction == pytest.approx(10 / penalty)
    shorter = min(edge, free, key=lambda step: step.s.norm())
    assert torch.equal(step.s, shorter.s)


def test_a_failed_grid_is_searched_below_its_shortest_and_most_damped_candidate():
    model, closure, _ = learnable_problem()
    far = NaturalTrustRegion(model.parameters(), 1e-4, damping=(1e-3, 1e-2), scales=(40.0, 50.0))
    tried = []

    def watched():
        tried.append(theta(model))
        return closure()

    far.step(watched)
    start, candidates, first = tried[0], tried[1:5], tried[5]
    assert far.info.damping == 1e-2
    assert far.info.products == 10
    torch.testing.assert_close(first - start, 0.7 * (candidates[2] - start), rtol=1e-9, atol=1e-12)


def test_random_numbers_stand_as_after_one_call_also_if_a_trial_raises():
    p, _ = rising()
    calls = []

    def closure():
        calls.append(torch.get_rng_state())
        if len(calls) > 1:
            raise KeyboardInterrupt
        torch.rand(3)
        return (p - 1).square().sum(), td.Normal(p, 1.0)

    with pytest.raises(KeyboardInterrupt):
        NaturalTrustRegion([p]).step(closure)
    after = torch.get_rng_state()
    torch.set_rng_state(calls[0])
    torch.rand(3)
    assert torch.equal(after, torch.get_rng_state())


def test_the_largest_radius_is_reached_exactly():
    largest = next(d for d in (1e-6 + k * 1e-9 for k in range(99)) if math.sqrt(d) ** 2 > d)
    model, closure, _ = learnable_problem()
    optimizer = NaturalTrustRegion(model.parameters(), largest / 2, max_delta=largest)
    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["delta"] == largest


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
    optimizer = NaturalTrustRegion(groups, 0.02, damping=0.0)
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
    optimizer = NaturalTrustRegion([p], 0.01, max_delta=1.0, adapt_damping=True)
    group = dict(optimizer.param_groups[0])
    optimizer.step(lambda: (p.square().sum(), td.Normal(p, 1.0), 1 - p[:1]))
    assert optimizer.info.status is Status.RECOVERING
    assert p[0].item() > 0.1
    assert optimizer.param_groups[0] == group
