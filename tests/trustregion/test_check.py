"""check_closure tells a good closure from a bad one, and leaves no trace."""

import math
import random
from itertools import count

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td
from torch import nn

from problems import closure_of, data
from trustregion import Family, NaturalTrustRegion, check_closure, register_distribution
from trustregion.check.slopes import Curve, judge

REPEATS = {"the loss repeats", "the distribution repeats"}
GRADIENT, SECOND = "the gradient of the loss", "the Fisher matrix is the KL's"


def outcome(report, passed):
    return {check.name for check in report.checks if check.passed is passed}


def value(report, name):
    return next(check.value for check in report.checks if check.name == name)


def advice(report):
    return " ".join(check.advice for check in report.checks if check.passed is False)


# -- good closures pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.integers(0, 10_000))
def test_a_good_closure_passes_everything(dtype, seed):
    model, x, y = data(dtype, seed=seed)
    report = check_closure(closure_of(model, x, y), model.parameters(), seed=seed)
    assert {check.passed for check in report.checks} == {True}, str(report)
    assert report.ok
    report.raise_for_failure()


def test_in_float64_the_slopes_are_exact():
    model, x, y = data()
    report = check_closure(closure_of(model, x, y), model.parameters())
    assert value(report, GRADIENT) == pytest.approx(2, abs=0.01)
    assert value(report, SECOND) == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(6))
def test_kinks_are_no_mistake(dtype, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 3)).to(dtype)
    x, y = torch.randn(16, 5, dtype=dtype), torch.randint(3, (16,))
    report = check_closure(closure_of(model, x, y), model.parameters(), seed=seed)
    assert report.ok, str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_models_that_are_exact_pass_without_a_slope(dtype):
    torch.manual_seed(0)
    model = nn.Linear(4, 1).to(dtype)
    x = torch.randn(30, 4, dtype=dtype)

    def closure():
        mean = model(x).squeeze(1)
        return mean.mean(), td.Normal(mean, 1.0)  # a linear loss, a quadratic KL

    report = check_closure(closure, model.parameters())
    assert outcome(report, True) == {check.name for check in report.checks}, str(report)
    assert math.isnan(value(report, GRADIENT))
    assert math.isnan(value(report, SECOND))


def test_constraints_are_tested_as_the_loss_is():
    model, x, y = data()

    def closure(wrong=False):
        distribution = td.Categorical(logits=model(x))
        costs = distribution.probs[:, 0]
        mean = costs.mean() + (costs.detach() * costs).mean() * wrong
        return -distribution.log_prob(y).mean(), distribution, torch.stack([mean - 0.1, mean**2])

    assert check_closure(closure, model.parameters()).ok
    report = check_closure(lambda: closure(wrong=True), model.parameters())
    assert outcome(report, False) == {
        "the gradient of constraint 0",
        "the gradient of constraint 1",
    }


def test_low_precision_is_unknown_and_not_failed():
    model, x, y = data(torch.float32)

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        distribution = td.Categorical(logits=logits.float())
        return -distribution.log_prob(y).mean(), distribution

    report = check_closure(closure, model.parameters())
    assert outcome(report, False) == set(), str(report)
    assert outcome(report, None) <= {GRADIENT, SECOND}
    assert SECOND in outcome(report, None)
    assert "float64" in str(report)


@pytest.mark.parametrize("draws", ["dropout", "batch"])
def test_random_numbers_of_torch_repeat_in_every_call_of_a_step(draws):
    model, x, y = data(extra=[nn.Dropout(0.5)] if draws == "dropout" else [])

    def closure():
        rows = torch.randperm(48)[:32] if draws == "batch" else torch.arange(48)
        return closure_of(model, x[rows], y[rows])()

    report = check_closure(closure, model.parameters())
    assert report.ok, str(report)
    assert outcome(report, None) == set()
    assert "of torch, the same in every call" in str(report)


# -- each mistake fails its own check


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
@pytest.mark.parametrize("seed", range(5))
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
    """A Normal, registered anew in each test."""


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


# -- no trace


def world(model):
    params = [p.detach().clone() for p in model.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    return params, grads, modes, torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002


def same(a, b):
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fails_at", [None, 1, 2, 3, 20])
def test_the_world_is_restored(dtype, fails_at):
    model, x, y = data(dtype, extra=[nn.Dropout(0.2)])
    with torch.no_grad():
        model[0].bias[0] = -0.0
    model[0].weight.grad = torch.full_like(model[0].weight, 0.5)
    before, held, calls = world(model), model[0].weight.grad, count(1)

    def closure():
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(3)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.grad is None else p.grad.add_(1)
        if next(calls) == fails_at:
            raise KeyboardInterrupt
        return closure_of(model, x, y)()

    if fails_at is None:
        check_closure(closure, model.parameters())
    else:
        with pytest.raises(KeyboardInterrupt):
            check_closure(closure, model.parameters())
        assert next(calls) == fails_at + 1
    assert same(world(model), before)
    assert model[0].weight.grad is held


def test_the_closure_runs_under_grad_once_and_37_times():
    model, x, y = data()
    modes = []

    def closure():
        modes.append(torch.is_grad_enabled())
        return closure_of(model, x, y)()

    with torch.no_grad():
        check_closure(closure, model.parameters())
    assert modes == [True] + [False] * (2 + 2 * (13 + 4))


def test_the_seed_chooses_the_direction():
    model, x, y = data()
    closure = closure_of(model, x, y)
    one, two, other = (check_closure(closure, model.parameters(), seed=s) for s in (1, 1, 2))
    assert one == two
    assert one != other


# -- the report


def test_the_report_is_a_table():
    model, x, y = data()
    closure = closure_of(model, x, y)

    def drawing():
        random.random()
        return closure()

    report = check_closure(drawing, model.parameters())
    assert outcome(report, False) == {"random numbers repeat"}
    lines = str(report).splitlines()
    assert lines[-1] == "12 passed, 1 failed, 0 unknown"
    assert all(len(line) <= 100 for line in lines)
    rows = [line for line in lines[:-1] if not line.startswith(" ")]
    assert len(rows) == len(report.checks)
    width = max(len(check.name) for check in report.checks)
    for row, check in zip(rows, report.checks, strict=True):
        assert row[:9].strip() == ("ok" if check.passed else "FAILED")
        assert row[9 : 9 + width].strip() == check.name
        assert row[9 + width + 2 :] == check.measured
    assert not report.ok
    with pytest.raises(ValueError, match="self-test") as caught:
        report.raise_for_failure()
    assert str(report) in str(caught.value)


# -- the slope


LENGTHS = [2.0**-k for k in reversed(range(1, 14))]


def curve(error, floor=1e-12):
    return Curve(LENGTHS, list(map(error, LENGTHS)), [floor] * len(LENGTHS), LENGTHS)


def test_the_slope_is_read_at_small_lengths():
    unit = 2.0**-52
    assert judge(curve(lambda t: t**2), 2, unit).value == pytest.approx(2)
    wrong = judge(curve(lambda t: 0.01 * t + t**2), 2, unit)  # 2 at large ones
    assert wrong.passed is False
    assert wrong.value == pytest.approx(1, abs=0.1)
    assert judge(curve(lambda t: t**3), 2, unit).passed  # the next order happens to vanish


def test_rounding_is_no_slope():
    noisy = curve(lambda t: t**2 + 1e-6, floor=1e-6)
    verdict = judge(noisy, 2, 2.0**-52)
    assert verdict.passed
    assert verdict.value == pytest.approx(2, abs=0.2)
    assert judge(curve(lambda _: 1e-3, floor=1e-3), 2, 2.0**-23).passed is None
    assert judge(curve(lambda _: 1e-5, floor=1e-5), 2, 2.0**-23).passed
    assert judge(curve(lambda _: math.nan), 2, 2.0**-23).passed is None
