"""Nothing is lost in a step of NaturalTrustRegion, whatever happens."""

import math
import re
import signal

import pytest
import torch
import torch.utils.checkpoint
from torch import distributions as td
from torch import nn

from optimizers import natural
from problems import bits, problem, unchanged
from trustregion import FisherOperator, Status


class Stop(BaseException):
    """Not an Exception, like KeyboardInterrupt."""


def never_improving(closure):
    """A closure whose loss is worse elsewhere, so that every trial of the search is made."""
    start = closure()[1].logits

    def wrapped():
        loss, distribution = closure()
        moved = not torch.equal(distribution.logits, start)
        return loss + (1e3 if moved else 0.0), distribution

    return wrapped


TRIALS = 11  # of a search with 10 backtracks; they follow the first call


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("k", range(1, TRIALS + 2))
def test_an_exception_at_the_kth_call_restores_every_bit(error, k):
    model, working = problem()
    closure, calls = never_improving(working), 0

    def failing():
        nonlocal calls
        calls += 1
        if calls == k:
            raise error("at call", k)
        return closure()

    kept = bits(model)
    optimizer = natural(model.parameters(), 0.01, max_backtracks=TRIALS - 1)
    with pytest.raises(error) as caught:
        optimizer.step(failing)
    assert caught.value.args == ("at call", k)  # unchanged
    assert calls == k
    assert unchanged(model, kept)
    optimizer.step(working)
    assert optimizer.info.accepted  # and the optimizer still works


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", range(1, TRIALS + 2))
def test_a_nonfinite_loss_at_the_kth_call_never_reaches_a_parameter(bad, k):
    model, closure = problem()
    closure, calls = never_improving(closure), 0

    def poisoned():
        nonlocal calls
        calls += 1
        loss, distribution = closure()
        return (loss * 0 + bad if calls == k else loss), distribution

    kept = bits(model)
    optimizer = natural(model.parameters(), 0.01, max_backtracks=TRIALS - 1)
    optimizer.step(poisoned)
    assert unchanged(model, kept)
    status = optimizer.info.status
    if k == 1:
        assert status is Status.NONFINITE_LOSS
    elif k == TRIALS + 1:
        assert status is Status.NONFINITE_TRIAL
    else:
        assert status is Status.REJECTED_LOSS


def test_one_bad_trial_is_backed_away_from():
    model, closure = problem()
    calls = 0

    def bad_once():
        nonlocal calls
        calls += 1
        loss, distribution = closure()
        return (loss * math.nan if calls == 2 else loss), distribution

    optimizer = natural(model.parameters(), 0.01)
    optimizer.step(bad_once)
    assert optimizer.info.accepted
    assert optimizer.info.backtracks >= 1


@pytest.mark.parametrize("where", ["first", "trial"])
def test_a_real_interrupt_restores_every_bit(where):
    model, closure = problem()
    calls = 0

    def interrupted():
        nonlocal calls
        calls += 1
        if calls == (1 if where == "first" else 2):
            signal.raise_signal(signal.SIGINT)
        return closure()

    kept = bits(model)
    with pytest.raises(KeyboardInterrupt):
        natural(model.parameters(), 0.01).step(interrupted)
    assert unchanged(model, kept)


def test_a_kl_that_cannot_be_met_is_named():
    model, closure = problem()
    start = closure()[1].logits

    def jumping():  # a prediction that jumps as soon as a parameter moves
        loss, distribution = closure()
        moved = not torch.equal(distribution.logits, start)
        return loss, td.Categorical(logits=distribution.logits * (100 if moved else 1))

    kept = bits(model)
    optimizer = natural(model.parameters(), 0.01, max_backtracks=5)
    optimizer.step(jumping)
    assert optimizer.info.status is Status.REJECTED_KL
    assert "KL" in optimizer.info.detail
    assert unchanged(model, kept)


@pytest.mark.parametrize("penalty", [None, 1.0])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda i, loss, logits: (loss + 10 * i, logits), "the loss was .* in the first call"),
        (
            lambda i, loss, logits: (loss * (1 if i == 1 else math.nan), logits),
            "and nan in another",
        ),
        (lambda i, loss, logits: (loss, logits * 2**i), "the KL was 0.0 in the first call and"),
        (
            lambda i, loss, logits: (loss, logits * (1 if i == 1 else math.nan)),
            "and nan in another",
        ),
    ],
    ids=["loss", "loss NaN", "prediction", "prediction NaN"],
)
def test_what_another_call_returns_at_the_same_parameters_is_compared(changes, words, penalty):
    model, closure = problem()
    calls = 0

    def changing():
        nonlocal calls
        calls += 1
        loss, distribution = closure()
        loss, logits = changes(calls, loss, distribution.logits)
        return loss, td.Categorical(logits=logits, validate_args=False)

    kept = bits(model)
    delta = 1e-6 if penalty is None else math.inf
    optimizer = natural(model.parameters(), delta, penalty=penalty, max_backtracks=3)
    with pytest.warns(UserWarning, match="draw the batch before the step"):
        optimizer.step(changing)
    assert optimizer.info.status is Status.NOT_REPRODUCIBLE
    assert re.search(words, optimizer.info.detail)
    assert optimizer.info.evaluations == calls <= 6
    assert "check_closure" in str(optimizer.info.status)
    assert unchanged(model, kept)


def test_a_loss_that_repeats_to_its_rounding_is_reproducible():
    model, closure = problem()
    worse, calls = never_improving(closure), 0

    def rounded():
        nonlocal calls
        calls += 1
        loss, distribution = worse()
        return loss * (1 + 2.0**-30 * calls), distribution

    optimizer = natural(model.parameters(), 0.01, max_backtracks=2)
    optimizer.step(rounded)
    assert optimizer.info.status is Status.REJECTED_LOSS
    assert optimizer.info.evaluations == calls == 5  # one more than the search made


@pytest.mark.parametrize("at", [1, 2, 5])
def test_nan_in_a_product_is_a_status(at, monkeypatch):
    model, closure = problem()
    calls, mv = 0, FisherOperator.mv

    def poisoned(self, v):
        nonlocal calls
        calls += 1
        return mv(self, v) * (math.nan if calls == at else 1.0)

    monkeypatch.setattr(FisherOperator, "mv", poisoned)
    kept = bits(model)
    optimizer = natural(model.parameters(), 0.01)
    optimizer.step(closure)
    assert optimizer.info.cg_status is Status.NONFINITE_OPERATOR
    assert all(p.isfinite().all() for p in model.parameters())
    if at == 1:
        assert optimizer.info.status is Status.NONFINITE_OPERATOR
        assert unchanged(model, kept)
    else:  # the iterates before it are good
        assert optimizer.info.accepted


def test_a_nan_gradient_is_a_status_and_names_the_parameter():
    p, q = (torch.ones(2, requires_grad=True) for _ in range(2))

    def closure():  # the gradient of sqrt at zero is infinite
        return p.sum() + (q - 1).sqrt().sum(), td.Normal(p + q, 1.0)

    optimizer = natural([("p", p), ("q", q)], 0.01)
    optimizer.step(closure)
    assert optimizer.info.status is Status.NONFINITE_GRADIENT
    assert optimizer.info.detail == "parameter q"
    assert "parameter q" in str(optimizer.info)
    assert torch.equal(q, torch.ones(2))


def test_a_step_that_would_overflow_a_parameter_is_not_written():
    p = torch.full((2,), 3e38, requires_grad=True)

    def closure():  # F = 5e-37, so the ball's edge is 1.4e38 away
        assert p.isfinite().all()
        return -(p * 1e-18).sum(), td.Normal(p * 1e-18, 1.0)

    kept = p.detach().clone()
    optimizer = natural([p], 1e40, damping=0.0, max_backtracks=1)
    optimizer.step(closure)
    assert optimizer.info.status is Status.NONFINITE_TRIAL
    assert torch.equal(p, kept)


# -- nothing to do, or nothing that can be done


def test_a_zero_gradient_is_an_exact_no_op():
    p = torch.randn(3, requires_grad=True)
    kept = p.detach().clone()
    optimizer = natural([p], 0.01)
    optimizer.step(lambda: ((p * 0).sum(), td.Normal(p, 1.0)))
    assert optimizer.info.status is Status.STATIONARY
    assert optimizer.info.products == 0
    assert torch.equal(p, kept)


def test_a_fisher_of_zero_is_refused():
    """The distribution uses the parameter but does not move with it, here."""
    p = torch.zeros(3, requires_grad=True)
    optimizer = natural([p], 0.01)
    optimizer.step(lambda: (p.sum(), td.Normal(p.square(), 1.0)))
    assert optimizer.info.status is Status.ZERO_CURVATURE
    assert torch.equal(p, torch.zeros(3))
    optimizer = natural([p], 0.01, damping=0.0)
    optimizer.step(lambda: (p.sum(), td.Normal(p.square(), 1.0)))
    assert optimizer.info.status is Status.ZERO_CURVATURE
    assert torch.equal(p, torch.zeros(3))


def test_an_indefinite_preconditioner_is_a_status():
    model, closure = problem()
    kept = bits(model)
    optimizer = natural(model.parameters(), 0.01, preconditioner=lambda v: -v)
    optimizer.step(closure)
    assert optimizer.info.status is Status.INDEFINITE_PRECONDITIONER
    assert unchanged(model, kept)


# -- the step leaves no trace


def test_the_step_leaves_no_trace():
    model, closure = problem()
    norm = nn.BatchNorm1d(3).eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    state = torch.get_rng_state()
    buffers = [b.clone() for b in norm.buffers()]
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def with_norm():
        norm(x)
        return closure()

    natural(model.parameters(), 0.01).step(with_norm)
    assert torch.equal(torch.get_rng_state(), state)
    assert all((p.grad == 7.0).all() for p in model.parameters())
    assert model.training
    assert not norm.training
    assert all(torch.equal(a, b) for a, b in zip(buffers, norm.buffers(), strict=True))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_is_restored_also_after_an_error(enabled):
    model, closure = problem()
    optimizer = natural(model.parameters(), 0.01)
    with torch.set_grad_enabled(enabled):
        optimizer.step(closure)
        assert optimizer.info.accepted
        with pytest.raises(TypeError):
            optimizer.step(lambda: None)
        assert torch.is_grad_enabled() == enabled


def test_two_runs_are_equal_bit_for_bit():
    runs = []
    for _ in range(2):
        model, closure = problem()
        optimizer = natural(model.parameters(), 0.01)
        for _ in range(5):
            optimizer.step(closure)
        runs.append((bits(model), optimizer.info))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1] == runs[1][1]


def test_no_graph_is_kept_after_the_step():
    model, closure = problem()
    alive = []

    def watched():
        import weakref

        loss, distribution = closure()
        alive.append(weakref.ref(loss))
        return loss, distribution

    optimizer = natural(model.parameters(), 0.01)
    result = optimizer.step(watched)
    assert not result.requires_grad
    assert all(ref() is None for ref in alive)
