"""The self-test of a closure: what passes, what it leaves untouched, and its report."""

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

from check_reports import GRADIENT, SECOND, outcome, value
from problems import closure_of, data
from strategies import costly
from trustregion import check_closure
from trustregion.check.slopes import Curve, judge

# -- good closures pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@costly
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
