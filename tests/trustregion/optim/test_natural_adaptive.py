"""Options of NaturalTrustRegion that follow the steps: penalty, radius, damping, warm start."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td
from torch import nn

from natural_cases import EXACT, derivatives, moved, rising
from optimizers import natural
from problems import learnable_problem, theta
from strategies import costly
from trustregion import (
    Status,
    kl_ball_step,
    mean_kl,
)
from trustregion.solvers import classic_radius, kl_penalty_step, levenberg_marquardt_damping

# -- the penalty on the KL


@costly
@given(st.integers(0, 1000), st.floats(0, 4))
def test_the_penalised_step_is_the_solution_over_the_penalty(seed, log_penalty):
    penalty = 10**log_penalty
    model, closure, _ = learnable_problem(seed=seed)
    g, F = derivatives(model, closure)
    x = -torch.linalg.solve(F + 0.1 * torch.eye(len(g), dtype=g.dtype), g)
    _, old = closure()
    loss = closure()[0].item()
    optimizer = natural(model.parameters(), math.inf, penalty=penalty, damping=0.1, **EXACT)
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
    optimizer = natural(model.parameters(), 1e-3, penalty=1e-3)
    optimizer.step(closure)
    assert optimizer.info.accepted
    assert 0.5e-3 <= optimizer.info.kl <= 1e-3


def test_the_penalty_follows_the_measured_kl():
    model, closure, _ = learnable_problem()
    target = 1e-3
    optimizer = natural(model.parameters(), math.inf, penalty=1e-2, kl_target=target)
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
    optimizer = natural(model.parameters(), 1e-4, max_delta=1.0)
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
    optimizer = natural(model.parameters(), 0.3, damping_factor=1.5)
    for _ in range(15):
        damping = optimizer.param_groups[0]["damping"]
        optimizer.step(closure)
        info = optimizer.info
        rho = info.rho if info.accepted else -math.inf
        assert info.damping == damping
        assert optimizer.param_groups[0]["damping"] == levenberg_marquardt_damping(damping, rho)


def test_a_warm_start_continues_from_the_last_solution():
    cold, warm = learnable_problem()[0], learnable_problem()[0]
    x, residuals = learnable_problem()[2], {}
    y = torch.randint(3, (64,))

    def closure_of(model):
        def closure():
            d = td.Categorical(logits=model(x))
            return -d.log_prob(y).mean(), d

        return closure

    for name, model, factor in (("cold", cold, 0.0), ("warm", warm, 1.0)):
        optimizer = natural(model.parameters(), 1e-6, cg_max_iter=5, cg_rtol=0.0, warm_start=factor)
        for _ in range(4):
            optimizer.step(closure_of(model))
        residuals[name] = optimizer.info.cg_residual
    assert residuals["warm"] < residuals["cold"]


@pytest.mark.parametrize(
    "options",
    [
        {"warm_start": 0.9},
        {"max_delta": 1.0, "damping_factor": 1.5},
        {"penalty": 1.0, "kl_target": 0.01},
        {"damping": (1e-3, 1e-1), "scales": (0.5, 1.0)},
    ],
)
def test_a_resumed_optimizer_continues_bit_for_bit(options):
    model, closure, _ = learnable_problem(torch.float32)
    optimizer = natural(model.parameters(), 0.05, **options)
    for _ in range(3):
        optimizer.step(closure)
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), model.state_dict()), file)
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    other, resumed, _ = learnable_problem(torch.float32)
    other.load_state_dict(weights)
    fresh = natural(other.parameters(), 0.05, **options)
    fresh.load_state_dict(saved)
    for _ in range(3):
        optimizer.step(closure)
        fresh.step(resumed)
    assert torch.equal(theta(model), theta(other))
    assert optimizer.info == fresh.info


def test_a_rejected_step_raises_the_penalty():
    p, closure = rising()
    optimizer = natural([p], math.inf, penalty=1.0, kl_target=0.1)
    optimizer.step(closure)
    assert optimizer.info.status is Status.REJECTED_LOSS
    assert optimizer.param_groups[0]["penalty"] == 2.0


def test_a_penalised_step_is_judged_with_its_penalty_and_not_stretched():
    model, closure, _ = learnable_problem()
    options = {"penalty": 30.0, "damping": 0.1}
    one = natural(model.parameters(), 1.0, **options)
    one.step(closure)
    assert (one.info.accepted, one.info.scale, one.info.evaluations) == (True, 1.0, 3)
    assert one.info.kl < 0.01  # of 1.0
    # at three times the length the loss is lower still, and the KL costs more than that
    several = natural(model.parameters(), 1.0, scales=(1.0, 3.0), **options)
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


def test_the_largest_radius_is_reached_exactly():
    largest = next(d for d in (1e-6 + k * 1e-9 for k in range(99)) if math.sqrt(d) ** 2 > d)
    model, closure, _ = learnable_problem()
    optimizer = natural(model.parameters(), largest / 2, max_delta=largest)
    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["delta"] == largest
