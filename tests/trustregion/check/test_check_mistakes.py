"""Each mistake in a closure or a family fails its own check."""

import math
import random
from itertools import count

import numpy as np
import pytest
import torch
from torch import distributions as td
from torch import nn

from check_reports import GRADIENT, SECOND, outcome, value
from problems import closure_of, data
from trustregion import Family, NaturalTrustRegion, check_closure, register_distribution

REPEATS = {"the loss repeats", "the distribution repeats"}


def advice(report):
    return " ".join(check.advice for check in report.checks if check.passed is False)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda _, g: torch.randint(48, (16,), generator=g), "a fresh batch"),
        (lambda i, _: torch.arange(16) + i, "a fresh batch"),
        (lambda *_: torch.tensor(random.sample(range(48), 16)), "draw from random"),
        (lambda *_: torch.from_numpy(np.random.permutation(48)[:16]), "draw from numpy.random"),  # noqa: NPY002
    ],
    ids=["generator", "counter", "random", "numpy"],
)
def test_a_fresh_batch_in_each_call(draw, words):
    model, x, y = data()
    numbers, generator = count(), torch.Generator().manual_seed(0)

    def closure():
        rows = draw(next(numbers), generator)
        return closure_of(model, x[rows], y[rows])()

    report = check_closure(closure, model.parameters())
    others = {"random numbers repeat"} if words.startswith("draw from") else set()
    assert outcome(report, False) == REPEATS | others
    assert outcome(report, None) == {"the derivatives"}
    assert words in advice(report)


def test_a_batch_of_another_size():
    model, x, y = data()
    numbers = count(10)

    def closure():
        n = next(numbers)
        return closure_of(model, x[:n], y[:n])()

    report = check_closure(closure, model.parameters())
    assert outcome(report, False) == REPEATS
    assert "differ in structure" in advice(report)


def test_a_noisy_loss_on_a_fixed_distribution():
    model, x, y = data()
    numbers = count()

    def closure():
        loss, distribution = closure_of(model, x, y)()
        return loss + 1e-3 * next(numbers), distribution

    report = check_closure(closure, model.parameters())
    assert outcome(report, False) == {"the loss repeats"}
    assert value(report, "the loss repeats") == pytest.approx(2e-3)


class WrongBackward(torch.autograd.Function):
    """The identity, whose backward is off by a factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 1.05 * grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mistake", ["backward", "detached"])
def test_a_wrong_gradient(dtype, seed, mistake):
    model, x, y = data(dtype, seed=seed)

    def closure():
        loss, distribution = closure_of(model, x, y)()
        if mistake == "backward":
            return WrongBackward.apply(loss), distribution
        return loss + 0.3 * distribution.entropy().mean().detach(), distribution

    report = check_closure(closure, model.parameters(), seed=seed)
    assert outcome(report, False) == {GRADIENT}, str(report)
    assert outcome(report, None) == set()
    assert value(report, GRADIENT) == pytest.approx(1, abs=0.3)
    assert "detached" in advice(report)


class OwnNormal(td.Normal):
    """A Normal that each test registers for itself."""


def regression(family, dtype=torch.float64):
    register_distribution(OwnNormal, family)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    x, y = torch.randn(40, 3, dtype=dtype), torch.randn(40, dtype=dtype)

    def closure():
        mean, log_std = model(x).unbind(1)
        distribution = OwnNormal(mean, log_std.exp())
        return -distribution.log_prob(y).mean(), distribution

    return closure, model.named_parameters()


def normal_kl(old, new):
    (m0, s0), (m1, s1) = old, new
    return (s1 / s0).log() + (s0**2 + (m0 - m1) ** 2) / (2 * s1**2) - 0.5


def normal_fisher(mean=1.0, scale=2.0, cross=(0.0, 0.0)):
    def fisher(params):
        w = params[1] ** -2
        return lambda d: (
            w * (mean * d[0] + cross[0] * d[1]),
            w * (scale * d[1] + cross[1] * d[0]),
        )

    return fisher


def own(fisher=None, kl=normal_kl):
    return Family(lambda d: (d.loc, d.scale), kl, fisher or normal_fisher())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_family_that_is_right(dtype):
    closure, params = regression(own(), dtype)  # its KL cancels: small ones have few digits
    report = check_closure(closure, params)
    assert outcome(report, False) == set()
    assert outcome(report, None) == set(), str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("family", "failed"),
    [
        (own(normal_fisher(scale=1.0)), {SECOND}),
        (own(normal_fisher(mean=1.2)), {SECOND}),
        (own(normal_fisher(0.0, 0.0)), {SECOND}),
        (own(normal_fisher(cross=(0.5, -0.5))), {"the Fisher matrix is symmetric"}),
        (own(normal_fisher(-1.0, -2.0)), {SECOND, "the Fisher matrix is semidefinite"}),
        (own(kl=lambda old, new: 2 * normal_kl(old, new)), {SECOND}),
        (own(kl=lambda old, new: normal_kl(old, new) + 0.1), {"KL(old || old) is zero"}),
    ],
    ids=["scale", "slightly", "zero", "skew", "negative", "kl", "offset"],
)
def test_a_family_that_is_wrong(dtype, family, failed):
    closure, params = regression(family, dtype)
    report = check_closure(closure, params)
    assert outcome(report, False) == failed, str(report)
    assert "Family" in advice(report)


def test_a_loss_without_parameters():
    model, x, y = data()
    other, _, _ = data(seed=1)

    def closure(loss_of):
        loss, distribution = closure_of(model, x, y)()
        return loss_of(loss), distribution

    for loss_of in (torch.Tensor.detach, lambda _: closure_of(other, x, y)()[0]):
        report = check_closure(lambda loss_of=loss_of: closure(loss_of), model.parameters())
        assert outcome(report, False) == {"the loss depends on the parameters"}
        assert outcome(report, None) == {"the derivatives"}


def test_a_distribution_without_parameters():
    model, x, y = data()

    def closure():
        loss, distribution = closure_of(model, x, y)()
        return loss, td.Categorical(logits=distribution.logits.detach())

    report = check_closure(closure, model.parameters())
    assert outcome(report, False) == {"the distribution depends on the parameters"}
    assert "detach" in advice(report)


def test_parameters_that_no_kl_bounds_and_idle_ones_are_named():
    model, x, y = data()
    head, spare = nn.Linear(5, 1).double(), nn.Linear(5, 1).double()

    def closure():
        loss, distribution = closure_of(model, x, y)()
        return loss + head(x).square().mean(), distribution

    named = [*model.named_parameters(), ("head.weight", head.weight), ("head.bias", head.bias)]
    report = check_closure(closure, named)
    assert outcome(report, False) == {"the KL bounds what moves the loss"}
    assert "parameters head.weight, head.bias, the distribution does not" in advice(report)
    with pytest.raises(ValueError, match="head"):
        NaturalTrustRegion(named).step(closure)

    named = [*model.named_parameters(), ("spare.weight", spare.weight)]
    report = check_closure(closure_of(model, x, y), named)
    assert outcome(report, False) == {"no parameter is idle"}
    assert "parameter spare.weight," in advice(report)
    frozen = spare.weight.requires_grad_(False)
    assert check_closure(closure_of(model, x, y), [*model.parameters(), frozen]).ok


def test_a_loss_that_is_not_finite():
    model, x, y = data()

    def closure():
        loss, distribution = closure_of(model, x, y)()
        return loss * math.inf, distribution

    report = check_closure(closure, model.parameters())
    assert outcome(report, False) == {"the loss is finite"}


def test_what_is_no_closure_raises_as_in_a_step():
    model, x, y = data()
    closure = closure_of(model, x, y)
    cases = [
        (lambda: closure()[0], TypeError, "must return the tuple"),
        (lambda: (closure()[0].item(), closure()[1]), TypeError, "the loss must be a tensor"),
        (lambda: (closure()[1].logits, closure()[1]), ValueError, "one real number"),
        (lambda: (closure()[0], td.Uniform(model(x), 9.0)), TypeError, "Uniform is refused"),
    ]
    for bad, error, words in cases:
        for run in (check_closure, lambda c, p: NaturalTrustRegion(p).step(c)):
            with pytest.raises(error, match=words):
                run(bad, model.parameters())
