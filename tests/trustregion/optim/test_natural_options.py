"""The options of NaturalTrustRegion."""

import math

import pytest
import torch
from torch import distributions as td
from torch import nn

from natural_cases import EXACT, derivatives, moved, rising
from optimizers import natural
from problems import learnable_problem, theta
from trustregion import (
    FisherOperator,
    Jacobi,
    mean_kl,
    subsample,
    to_dense,
)

# -- the edge of the ball


@pytest.mark.parametrize("delta", [1e-6, 1e-3, 1e-2])
@pytest.mark.parametrize("lr", [1.0, 0.5, 2.0])
def test_an_accepted_step_uses_nine_tenths_of_the_ball_within_three_trials(delta, lr):
    model, closure, _ = learnable_problem()
    optimizer = natural(model.parameters(), delta, lr=lr)
    for check in (1, 0, 0):  # far from the minimum, where the loss allows it
        optimizer.step(closure)
        info = optimizer.info
        assert info.accepted
        assert 0.9 * min(1, lr**2) <= info.kl / delta <= 1
        assert info.evaluations <= 1 + 3 + check


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
    optimizer = natural(
        model.parameters(), 0.05, damping=dampings, scales=scales, **(EXACT | {"cg_max_iter": 67})
    )
    optimizer.step(closure)
    info = optimizer.info
    best = min(outcomes, key=outcomes.get)
    assert (info.damping, info.scale) == best
    assert info.new_loss == pytest.approx(outcomes[best], rel=1e-9)
    assert info.new_loss == closure()[0].item()  # and it is what the parameters are at
    assert info.evaluations == 1 + len(dampings) * len(scales) + 1
    assert info.products <= 67


def test_candidates_that_all_fail_are_followed_by_a_search():
    model, closure, _ = learnable_problem()
    far = natural(model.parameters(), 1e-4, damping=(1e-3, 1e-2), scales=(40.0, 50.0))
    far.step(closure)
    assert far.info.accepted
    assert far.info.evaluations > 1 + 4
    assert far.info.scale < 40


def test_several_dampings_and_a_preconditioner_are_refused_in_words():
    model, closure, _ = learnable_problem()
    optimizer = natural(model.parameters(), damping=(1e-3, 1e-2), preconditioner=Jacobi())
    kept = theta(model)
    with pytest.raises(ValueError, match="one Krylov space"):
        optimizer.step(closure)
    assert torch.equal(theta(model), kept)


# -- a cap on every sample


def test_no_sample_moves_more_than_its_cap():
    model, closure, _ = learnable_problem()
    optimizer = natural(model.parameters(), 0.05, max_kl=0.06)
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

    optimizer = natural(model.parameters(), 1e-4, damping=0.1, **EXACT)
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

    optimizer = natural(model.parameters(), 0.01)
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales": ()}, "scales must be a tuple of numbers"),
        ({"scales": (1.0, 0.0)}, "scales must be positive and finite, got 0.0"),
        ({"scales": 1.0}, "scales must be a tuple of numbers"),
        ({"damping": ()}, "damping must be a tuple of numbers"),
        ({"damping": (1e-3, -1.0)}, "damping must be finite"),
        ({"damping": (1e-3, 1e-2), "damping_factor": 1.5}, "give one of the two"),
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
        natural([p], **options)


def test_a_failed_grid_is_searched_below_its_shortest_and_most_damped_candidate():
    model, closure, _ = learnable_problem()
    far = natural(model.parameters(), 1e-4, damping=(1e-3, 1e-2), scales=(40.0, 50.0))
    tried = []

    def watched():
        tried.append(theta(model))
        return closure()

    far.step(watched)
    start, candidates, first = tried[0], tried[1:5], tried[5]
    assert far.info.damping == 1e-2
    assert far.info.products == 10
    torch.testing.assert_close(first - start, 0.7 * (candidates[2] - start), rtol=1e-9, atol=1e-12)


def test_random_numbers_stand_as_before_the_step_if_a_trial_raises():
    p, _ = rising()
    calls = []

    def closure():
        calls.append(torch.get_rng_state())
        if len(calls) > 1:
            raise KeyboardInterrupt
        torch.rand(3)
        return (p - 1).square().sum(), td.Normal(p, 1.0)

    with pytest.raises(KeyboardInterrupt):
        natural([p]).step(closure)
    assert len(calls) == 2
    assert torch.equal(torch.get_rng_state(), calls[0])
