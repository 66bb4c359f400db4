"""The promises of NaturalTrustRegion."""

import copy
import io
import math
import pickle
import re
import signal

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td
from torch import nn

from problems import bits, problem, unchanged
from trustregion import FisherOperator, NaturalTrustRegion, Status, kl_ball_step, mean_kl, to_dense
from trustregion.operators import FunctionOperator

# -- what a step does


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.integers(0, 10_000), st.floats(-6, 1), st.floats(-6, 0))
def test_an_accepted_step_improves_within_delta_and_a_rejected_one_moves_nothing(
    dtype, seed, log_delta, log_damping
):
    model, closure = problem(dtype, seed, n=20)
    delta = 10**log_delta
    optimizer = NaturalTrustRegion(model.parameters(), delta, damping=10**log_damping)
    for _ in range(3):
        before, (loss, old) = bits(model), closure()
        assert optimizer.step(closure).item() == loss.item()
        new_loss, new = closure()
        info = optimizer.info
        if info.accepted:
            assert new_loss < loss
            assert mean_kl(old, new) <= delta
            assert info.kl == mean_kl(old, new).item()
            assert info.new_loss == new_loss.item()
            assert info.actual_reduction == pytest.approx((loss - new_loss).item(), rel=1e-4)
        else:
            assert unchanged(model, before)
            assert (info.kl, info.new_loss, info.actual_reduction) == (0.0, loss.item(), 0.0)


def test_the_step_is_the_natural_gradient_step_of_a_dense_solve():
    model, closure = problem(torch.float64)
    params = list(model.parameters())
    loss, distribution = closure()
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(loss, params, retain_graph=True)])
    F = to_dense(FisherOperator(distribution, params))
    x = -torch.linalg.solve(F + 0.01 * torch.eye(len(g), dtype=g.dtype), g)
    s = x * (2 * 1e-6 / (x @ F @ x)).sqrt()
    before = torch.cat([p.detach().reshape(-1) for p in params])
    optimizer = NaturalTrustRegion(params, 1e-6, damping=0.01, cg_max_iter=200, cg_rtol=1e-12)
    optimizer.step(closure)
    moved = torch.cat([p.detach().reshape(-1) for p in params]) - before
    torch.testing.assert_close(moved, optimizer.info.scale * s, rtol=1e-6, atol=1e-12)
    predicted = -optimizer.info.scale * (g @ s).item()
    assert optimizer.info.predicted_reduction == pytest.approx(predicted, rel=1e-6)
    assert optimizer.info.rho == pytest.approx(1, abs=0.01)  # the radius is tiny


def test_small_steps_reach_the_edge_of_the_ball():
    for delta in (1e-6, 1e-4, 1e-2):
        model, closure = problem(torch.float64)
        optimizer = NaturalTrustRegion(model.parameters(), delta, backtrack_factor=0.95)
        optimizer.step(closure)
        assert optimizer.info.kl >= 0.8 * delta


def test_the_scale_of_the_loss_changes_nothing():
    results = []
    for factor in (1.0, 2.0**-60, 2.0**20):
        model, closure = problem()

        def scaled(closure=closure, factor=factor):
            loss, distribution = closure()
            return factor * loss, distribution

        NaturalTrustRegion(model.parameters(), 0.01).step(scaled)
        results.append(bits(model))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_function_does_not_depend_on_the_parametrization():
    """theta = T phi, solved exactly without damping, moves the function the same way."""
    torch.manual_seed(0)
    x = torch.randn(40, 4, dtype=torch.float64)
    y = (x.sum(1) > 0).double()
    T = torch.randn(4, 4, dtype=torch.float64) + 2 * torch.eye(4, dtype=torch.float64)
    outputs = []
    for matrix in (torch.eye(4, dtype=torch.float64), T):
        phi = torch.linalg.solve(matrix, torch.full((4,), 0.1).double()).requires_grad_()

        def closure(phi=phi, matrix=matrix):
            distribution = td.Bernoulli(logits=x @ (matrix @ phi))
            return -distribution.log_prob(y).mean(), distribution

        options = {"damping": 0.0, "cg_max_iter": 50, "cg_rtol": 1e-12}
        NaturalTrustRegion([phi], 0.01, **options).step(closure)
        outputs.append((x @ (matrix @ phi)).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("maximize", [False, True])
def test_maximize_is_the_negated_loss(maximize):
    model, closure = problem()

    def objective():
        loss, distribution = closure()
        return (-loss if maximize else loss), distribution

    optimizer = NaturalTrustRegion(model.parameters(), 0.01, maximize=maximize)
    start = optimizer.step(objective)
    info = optimizer.info
    assert info.accepted
    assert info.loss == start.item() == pytest.approx(objective()[0].item(), abs=0.5)
    assert (info.new_loss > info.loss) == maximize
    assert info.actual_reduction > 0
    reference, reference_closure = problem()
    NaturalTrustRegion(reference.parameters(), 0.01).step(reference_closure)
    assert unchanged(model, bits(reference))


def test_info_counts_products_and_evaluations():
    model, closure = problem()
    calls = 0

    def counted():
        nonlocal calls
        calls += 1
        return closure()

    optimizer = NaturalTrustRegion(model.parameters(), 0.5, cg_max_iter=7, cg_rtol=0.0)
    optimizer.step(counted)
    info = optimizer.info
    assert (info.products, info.cg_iterations, info.cg_status) == (7, 7, Status.MAX_ITER)
    assert calls == info.evaluations == info.backtracks + 2
    assert str(info).startswith("accepted: loss")


def test_trials_run_without_a_graph():
    model, closure = problem()
    modes = []

    def watched():
        modes.append(torch.is_grad_enabled())
        return closure()

    NaturalTrustRegion(model.parameters(), 0.01).step(watched)
    assert modes[0] is True
    assert set(modes[1:]) == {False}


def test_attention_models_work():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    head, x, y = nn.Linear(8, 3), torch.randn(6, 4, 8), torch.randint(3, (6,))

    def closure():
        distribution = td.Categorical(logits=head(layer(x).mean(1)))
        return -distribution.log_prob(y).mean(), distribution

    optimizer = NaturalTrustRegion([*layer.parameters(), *head.parameters()], 0.01)
    optimizer.step(closure)
    assert optimizer.info.accepted


@pytest.mark.parametrize("wrap", ["autocast", "checkpoint", "masked"])
def test_closures_of_all_kinds_work(wrap):
    model, _ = problem()
    x, y = torch.randn(30, 5), torch.randint(2, (30,))

    def closure():
        if wrap == "checkpoint":
            logits = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=wrap == "autocast"):
                logits = model(x).float()
        if wrap == "masked":  # the third class is impossible
            logits = logits + torch.tensor([0.0, 0.0, -math.inf])
        distribution = td.Categorical(logits=logits, validate_args=False)
        return -distribution.log_prob(y).mean(), distribution

    optimizer = NaturalTrustRegion(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.info.accepted


def test_compiled_models_run_as_they_were_written():
    torch.compiler.reset()  # what other tests compiled counts towards a limit, then nothing is
    (model, _), (other, _) = problem(), problem()
    x = torch.randn(6, 5)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x).sum().backward()  # compiled before, and again in use after each step

    def closure_of(network):
        def closure():
            distribution = td.Categorical(logits=network(x))
            return -distribution.log_prob(torch.zeros(6)).mean(), distribution

        return closure

    for network, of in ((compiled, model), (other, other)):
        optimizer = NaturalTrustRegion(of.parameters())
        for _ in range(3):
            optimizer.step(closure_of(network))
            assert optimizer.info.accepted
    assert unchanged(model, bits(other))
    assert "CompiledFunctionBackward" in type(compiled(x).grad_fn).__name__


def test_distributions_made_of_the_parameters_themselves():
    """Writing the parameters must not change the old distribution the KL is measured from."""
    mean = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    log_std = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def closure():
        q = td.Independent(td.Normal(mean, log_std.exp()), 1)
        return (mean - target).square().sum() - log_std.sum(), q

    optimizer = NaturalTrustRegion([mean, log_std], 0.1, damping=0.0)
    optimizer.step(closure)
    assert 0.05 < optimizer.info.kl <= 0.1


def test_the_returned_loss_is_the_first_one_also_if_it_is_a_parameter():
    p = torch.full((), 0.3, requires_grad=True)
    optimizer = NaturalTrustRegion([p], 0.01, maximize=True)
    loss = optimizer.step(lambda: (p, td.Normal(p, 1.0)))
    assert optimizer.info.accepted
    assert loss.item() == optimizer.info.loss == torch.tensor(0.3).item() != p.item()


def test_measurements_hold_under_autocast_around_the_step():
    """Autocast keeps casts of the weights; a trial must not be measured with those of another."""
    torch.manual_seed(0)
    layer, log_std = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))
    x, y = torch.randn(64, 5), torch.randn(64, 2)

    def closure():
        distribution = td.Normal(layer(x).float(), log_std.exp())
        return -distribution.log_prob(y).mean(), distribution

    optimizer = NaturalTrustRegion([*layer.parameters(), log_std], 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                _, old = closure()
            optimizer.step(closure)
            assert optimizer.info.accepted
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss, new = closure()
            assert optimizer.info.kl == mean_kl(old, new).item() <= 0.3
            assert optimizer.info.new_loss == loss.item()


def test_autocast_around_the_step_does_not_reach_the_curvature():
    """A closure that turns autocast off gives the step it gives without any."""
    results = []
    for outer in (False, True):
        model, closure = problem()

        def exact(closure=closure):
            with torch.autocast("cpu", enabled=False):
                return closure()

        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            NaturalTrustRegion(model.parameters(), 0.01).step(exact)
        results.append(bits(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointed_attention_works():
    torch.manual_seed(0)
    layer, head = (
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        nn.Linear(8, 3),
    )
    x, y = torch.randn(6, 4, 8), torch.randint(3, (6,))

    def closure():
        hidden = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        distribution = td.Categorical(logits=head(hidden.mean(1)))
        return -distribution.log_prob(y).mean(), distribution

    optimizer = NaturalTrustRegion([*layer.parameters(), *head.parameters()], 0.01)
    for training in (True, False):
        layer.train(training)
        optimizer.step(closure)
        assert optimizer.info.accepted
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def validation():
    """Torch's default, which torch.compile turns off for the rest of the process."""
    before = td.Distribution._validate_args
    td.Distribution.set_default_validate_args(True)
    yield
    td.Distribution.set_default_validate_args(before)


@pytest.mark.usefixtures("validation")
@pytest.mark.parametrize("validate", [None, False])
def test_a_trial_with_an_impossible_scale_is_backed_away_from(validate):
    """The loss falls with the scale, and the ball is wide enough to reach negative ones."""
    scale = torch.full((4,), 0.05, requires_grad=True)
    optimizer = NaturalTrustRegion([scale], 5.0, damping=0.0)
    optimizer.step(lambda: (scale.sum(), td.Normal(torch.zeros(4), scale, validate_args=validate)))
    assert optimizer.info.accepted
    assert optimizer.info.backtracks > 0
    assert (scale > 0).all()
    assert td.Distribution._validate_args is True


def test_arguments_are_validated_in_the_first_call():
    scale = torch.full((4,), -0.05, requires_grad=True)
    with pytest.raises(ValueError, match="scale"):
        NaturalTrustRegion([scale]).step(
            lambda: (scale.sum(), td.Normal(torch.zeros(4), scale, validate_args=True))
        )


def test_sparse_gradients_are_refused_by_name():
    embedding = nn.Embedding(4, 3, sparse=True)
    index = torch.tensor([0, 1])

    def closure():
        return embedding(index).sum(), td.Normal(embedding(index), 1.0)

    with pytest.raises(TypeError, match="gradient of parameter weight is sparse"):
        NaturalTrustRegion(embedding.named_parameters()).step(closure)


# -- nothing is lost, whatever happens


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
    optimizer = NaturalTrustRegion(model.parameters(), 0.01, max_backtracks=TRIALS - 1)
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
    optimizer = NaturalTrustRegion(model.parameters(), 0.01, max_backtracks=TRIALS - 1)
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

    optimizer = NaturalTrustRegion(model.parameters(), 0.01)
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
        NaturalTrustRegion(model.parameters(), 0.01).step(interrupted)
    assert unchanged(model, kept)


def test_a_kl_that_cannot_be_met_is_named():
    model, closure = problem()
    start = closure()[1].logits

    def jumping():  # a prediction that jumps as soon as a parameter moves
        loss, distribution = closure()
        moved = not torch.equal(distribution.logits, start)
        return loss, td.Categorical(logits=distribution.logits * (100 if moved else 1))

    kept = bits(model)
    optimizer = NaturalTrustRegion(model.parameters(), 0.01, max_backtracks=5)
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
        (lambda i, loss, logits: (loss, logits * 2**i), "the KL of the prediction from that of"),
        (lambda i, loss, logits: (loss, logits * (1 if i == 1 else math.nan)), "is nan, not 0"),
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
    optimizer = NaturalTrustRegion(model.parameters(), delta, penalty=penalty, max_backtracks=3)
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

    optimizer = NaturalTrustRegion(model.parameters(), 0.01, max_backtracks=2)
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
    optimizer = NaturalTrustRegion(model.parameters(), 0.01)
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
        return p.sum() + (q - 1).clamp(min=0).sqrt().sum(), td.Normal(p + q, 1.0)

    optimizer = NaturalTrustRegion([("p", p), ("q", q)], 0.01)
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
    optimizer = NaturalTrustRegion([p], 1e40, damping=0.0, max_backtracks=1)
    optimizer.step(closure)
    assert optimizer.info.status is Status.NONFINITE_TRIAL
    assert torch.equal(p, kept)


# -- nothing to do, or nothing that can be done


def test_a_zero_gradient_is_an_exact_no_op():
    p = torch.randn(3, requires_grad=True)
    kept = p.detach().clone()
    optimizer = NaturalTrustRegion([p], 0.01)
    optimizer.step(lambda: ((p * 0).sum(), td.Normal(p, 1.0)))
    assert optimizer.info.status is Status.STATIONARY
    assert optimizer.info.products == 0
    assert torch.equal(p, kept)


@pytest.mark.parametrize(
    ("power", "dtype"),
    [(-140, torch.float32), (120, torch.float32), (-1000, torch.float64), (1000, torch.float64)],
)
def test_gradients_of_every_size_give_the_same_step(power, dtype):
    steps = []
    for exponent in (0, power):
        p = torch.zeros(3, dtype=dtype, requires_grad=True)
        weights = (torch.tensor([1.0, -2.0, 3.0]).double() * 2.0**exponent).to(dtype)
        optimizer = NaturalTrustRegion([p], 0.01, damping=0.1)
        optimizer.step(lambda p=p, weights=weights: ((p * weights).sum(), td.Normal(p, 1.0)))
        assert optimizer.info.accepted
        assert 0 < optimizer.info.rho < 2
        steps.append(p.detach())
    assert torch.equal(*steps)


def test_a_fisher_of_zero_is_refused():
    """The distribution uses the parameter but does not move with it, here."""
    p = torch.zeros(3, requires_grad=True)
    optimizer = NaturalTrustRegion([p], 0.01)
    optimizer.step(lambda: (p.sum(), td.Normal(p.square(), 1.0)))
    assert optimizer.info.status is Status.ZERO_CURVATURE
    assert torch.equal(p, torch.zeros(3))
    optimizer = NaturalTrustRegion([p], 0.01, damping=0.0)
    optimizer.step(lambda: (p.sum(), td.Normal(p.square(), 1.0)))
    assert optimizer.info.status is Status.ZERO_CURVATURE
    assert torch.equal(p, torch.zeros(3))


def test_an_indefinite_preconditioner_is_a_status():
    model, closure = problem()
    kept = bits(model)
    optimizer = NaturalTrustRegion(model.parameters(), 0.01, preconditioner=lambda v: -v)
    optimizer.step(closure)
    assert optimizer.info.status is Status.INDEFINITE_PRECONDITIONER
    assert unchanged(model, kept)


def test_a_preconditioner_is_used():
    """With the inverse itself, one product gives the step that otherwise takes many."""
    model, closure = problem(torch.float64)
    params = list(model.parameters())
    F = to_dense(FisherOperator(closure()[1], params))
    inverse = torch.linalg.inv(F + 0.01 * torch.eye(len(F), dtype=F.dtype))
    exact = NaturalTrustRegion(params, 0.01, damping=0.01, preconditioner=inverse)
    exact.step(closure)
    assert exact.info.products == 1


def test_exact_curvature_of_one_dimension():
    """Normal(p, s): F = 1/s^2, so the step to the ball's edge is s sqrt(2 delta)."""
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = NaturalTrustRegion([p], 0.02, damping=0.0)
    optimizer.step(lambda: (p.sum(), td.Normal(p, 3.0)))
    assert p.item() == pytest.approx(-3 * math.sqrt(0.04))
    assert optimizer.info.backtracks == 0


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

    NaturalTrustRegion(model.parameters(), 0.01).step(with_norm)
    assert torch.equal(torch.get_rng_state(), state)
    assert all((p.grad == 7.0).all() for p in model.parameters())
    assert model.training
    assert not norm.training
    assert all(torch.equal(a, b) for a, b in zip(buffers, norm.buffers(), strict=True))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_is_restored_also_after_an_error(enabled):
    model, closure = problem()
    optimizer = NaturalTrustRegion(model.parameters(), 0.01)
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
        optimizer = NaturalTrustRegion(model.parameters(), 0.01)
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

    optimizer = NaturalTrustRegion(model.parameters(), 0.01)
    result = optimizer.step(watched)
    assert not result.requires_grad
    assert all(ref() is None for ref in alive)


# -- torch.optim citizenship


def test_learning_rate_is_a_factor_on_the_length():
    lengths = []
    for lr in (1.0, 0.5, torch.tensor(0.25)):
        model, closure = problem(torch.float64)
        before = torch.cat([p.reshape(-1) for p in bits(model)])
        NaturalTrustRegion(model.parameters(), 1e-8, lr=lr).step(closure)
        lengths.append((torch.cat([p.reshape(-1) for p in bits(model)]) - before).norm())
    assert (lengths[1] / lengths[2]).item() == pytest.approx(2, rel=1e-6)
    assert (lengths[0] / lengths[1]).item() == pytest.approx(2, rel=1e-6)


def test_schedulers_work_and_a_rate_of_zero_is_a_no_op():
    model, closure = problem()
    optimizer = NaturalTrustRegion(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, epoch / 2))
    kept, kls = bits(model), []
    for _ in range(3):
        optimizer.step(closure)
        kls.append(optimizer.info.kl)
        if len(kls) == 1:
            assert optimizer.info.status is Status.ZERO_LENGTH
            assert unchanged(model, kept)
        scheduler.step()
    assert kls[0] == 0
    assert all(0 < kl <= 0.01 for kl in kls[1:])


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, 10, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 1.0, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
    ],
)
def test_torchs_schedulers_work(make):
    model, closure = problem()
    optimizer = NaturalTrustRegion(model.parameters(), 0.01)
    scheduler = make(optimizer)
    for _ in range(5):
        loss = optimizer.step(closure)
        assert optimizer.info.accepted
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*[loss] * plateau)


def test_damping_can_be_a_tensor():
    model, closure = problem()
    optimizer = NaturalTrustRegion(model.parameters(), 0.01, damping=torch.tensor(1e-3))
    optimizer.step(closure)
    assert optimizer.info.accepted


def test_delta_can_be_scheduled():
    model, closure = problem()
    optimizer = NaturalTrustRegion(model.parameters(), 0.01)
    optimizer.param_groups[0]["delta"] = torch.tensor(1e-5)
    optimizer.step(closure)
    assert 0 < optimizer.info.kl <= 1e-5
    optimizer.param_groups[0]["delta"] = -1.0
    kept = bits(model)
    with pytest.raises(ValueError, match="delta must be a positive KL radius"):
        optimizer.step(closure)
    assert unchanged(model, kept)


def test_groups_share_one_ball_and_have_their_own_rates():
    single, closure = problem(torch.float64)
    NaturalTrustRegion(single.parameters(), 0.01).step(closure)
    model, closure = problem(torch.float64)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = NaturalTrustRegion(groups, 0.01)
    optimizer.step(closure)
    assert unchanged(model, bits(single))

    model, closure = problem(torch.float64)
    kept = bits(model)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    optimizer = NaturalTrustRegion(groups, 0.01)
    optimizer.step(closure)
    assert optimizer.info.accepted
    now = bits(model)
    assert all(torch.equal(a, b) for a, b in zip(kept[:2], now[:2], strict=True))
    assert not torch.equal(kept[2], now[2])


@given(st.integers(0, 1000), st.floats(0.0, 1.0), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_unequal_rates_still_give_a_descent_direction(seed, rate, damping):
    model, closure = problem(torch.float64, seed, n=20)
    groups = [{"params": model[0].parameters(), "lr": rate}, {"params": model[2].parameters()}]
    optimizer = NaturalTrustRegion(groups, 0.01, damping=damping)
    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.info.predicted_reduction > 0
        assert optimizer.info.accepted


def test_unequal_rates_reach_the_edge_and_keep_the_prediction():
    model, closure = problem(torch.float64)
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters()}]
    optimizer = NaturalTrustRegion(groups, 1e-8, damping=0.1, backtrack_factor=0.95)
    optimizer.step(closure)
    assert optimizer.info.rho == pytest.approx(1, abs=0.01)
    assert optimizer.info.kl >= 0.8e-8


def test_a_group_at_rate_zero_is_as_if_it_were_frozen():
    frozen, closure = problem(torch.float64)
    for p in frozen[0].parameters():
        p.requires_grad_(False)
    NaturalTrustRegion(frozen[2].parameters(), 0.01).step(closure)
    model, closure = problem(torch.float64)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}]
    NaturalTrustRegion(groups, 0.01).step(closure)
    for ours, expected in zip(model.parameters(), frozen.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_a_gradient_in_groups_of_rate_zero_only_is_stationary():
    p, q = (torch.zeros(2, requires_grad=True) for _ in range(2))
    optimizer = NaturalTrustRegion([{"params": [p], "lr": 0.0}, {"params": [q]}], 0.01)
    optimizer.step(lambda: (p.sum() + 0 * q.sum(), td.Normal(p + q, 1.0)))
    assert optimizer.info.status is Status.STATIONARY


def test_groups_that_disagree_are_refused_and_not_added():
    p, q = (torch.zeros(2, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match=r"delta is 0.1 in group 0 and 0.2 in group 1"):
        NaturalTrustRegion([{"params": [p], "delta": 0.1}, {"params": [q], "delta": 0.2}])
    optimizer = NaturalTrustRegion([p], 0.1)
    with pytest.raises(ValueError, match="share one trust region"):
        optimizer.add_param_group({"params": [q], "damping": 3.0})
    assert len(optimizer.param_groups) == 1


def test_frozen_and_unused_parameters_stay():
    model, closure = problem()
    unused = nn.Parameter(torch.ones(2))
    model[0].weight.requires_grad_(False)
    kept = bits(model)
    optimizer = NaturalTrustRegion([*model.parameters(), unused], 0.01)
    optimizer.step(closure)
    assert optimizer.info.accepted
    assert torch.equal(model[0].weight, kept[0])
    assert not torch.equal(model[0].bias, kept[1])
    assert torch.equal(unused, torch.ones(2))
    model[0].weight.requires_grad_(True)  # unfreezing works too
    optimizer.step(closure)
    assert not torch.equal(model[0].weight, kept[0])


def test_tied_parameters():
    torch.manual_seed(0)
    embed = nn.Linear(4, 4, bias=False)
    x, y = torch.randn(20, 4), torch.randint(4, (20,))

    def closure():
        distribution = td.Categorical(logits=torch.tanh(embed(x)) @ embed.weight)
        return -distribution.log_prob(y).mean(), distribution

    optimizer = NaturalTrustRegion(embed.parameters(), 0.01)
    optimizer.step(closure)
    assert optimizer.info.accepted


def _train(steps, optimizer, closure):
    for _ in range(steps):
        optimizer.step(closure)


def test_resuming_from_a_state_dict_is_exact():
    straight, closure = problem()
    _train(6, NaturalTrustRegion(straight.parameters(), 0.02), closure)

    model, closure = problem()
    optimizer = NaturalTrustRegion(model.parameters(), 0.02)
    _train(3, optimizer, closure)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, closure = problem()
    resumed.load_state_dict(saved["model"])
    optimizer = NaturalTrustRegion(resumed.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    _train(3, optimizer, closure)
    assert unchanged(resumed, bits(straight))
    assert optimizer.param_groups[0]["delta"] == 0.02
    steps = [state["step"].item() for state in optimizer.state.values()]
    assert steps == [6.0] * 4


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_an_optimizer_step(duplicate):
    model, closure = problem()
    optimizer = NaturalTrustRegion(
        model.parameters(),
        0.02,
        preconditioner=torch.eye(sum(p.numel() for p in model.parameters())),
    )
    optimizer.step(closure)
    twin = duplicate(optimizer)
    assert twin.info == optimizer.info
    assert torch.equal(twin.preconditioner, optimizer.preconditioner)
    params = twin.param_groups[0]["params"]
    x = torch.randn(10, 5)

    def own():
        hidden = torch.tanh(x @ params[0].T + params[1])
        distribution = td.Categorical(logits=hidden @ params[2].T + params[3])
        return -distribution.log_prob(torch.zeros(10)).mean(), distribution

    twin.step(own)
    assert twin.info.accepted


def test_a_state_dict_of_an_older_version_loads():
    model, closure = problem()
    optimizer = NaturalTrustRegion(model.parameters(), 0.02)
    optimizer.step(closure)
    state = optimizer.state_dict()
    del state["param_groups"][0]["cg_rtol"]
    other = NaturalTrustRegion(model.parameters())
    other.load_state_dict(state)
    other.step(closure)
    assert other.param_groups[0]["cg_rtol"] == other.defaults["cg_rtol"]


def test_a_step_without_closure_is_for_checkpointing_libraries():
    model, closure = problem()
    optimizer = NaturalTrustRegion(model.parameters(), 0.01)
    kept = bits(model)
    assert optimizer.step() is None
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert optimizer.step(None) is None
    assert unchanged(model, kept)
    assert len(optimizer.state) == len(kept)  # every parameter has state, as they require
    model[0].bias.grad += 1
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()
    optimizer.step(closure)


def test_distributed_checkpointing_reads_and_restores_the_state():
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model, closure = problem()
    optimizer = NaturalTrustRegion(model.parameters(), 0.02)
    kept = bits(model)
    state = get_optimizer_state_dict(model, optimizer)  # before the first step
    assert set(state["state"]) == {name for name, _ in model.named_parameters()}
    other = NaturalTrustRegion(model.parameters())
    set_optimizer_state_dict(model, other, state)
    assert unchanged(model, kept)
    assert other.param_groups[0]["delta"] == 0.02
    other.step(closure)
    assert other.info.accepted


def test_hooks_run_once_and_in_order():
    model, closure = problem()
    optimizer = NaturalTrustRegion(model.parameters(), 0.01)
    order = []
    optimizer.register_step_pre_hook(lambda *_: order.append("before"))
    optimizer.register_step_post_hook(lambda *_: order.append("after"))
    optimizer.step(closure)
    assert order == ["before", "after"]
    assert "delta: 0.01" in repr(optimizer)


# -- errors teach


p = torch.zeros(2, requires_grad=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"delta": 0.0}, "delta must be a positive KL radius"),
        ({"delta": -1.0}, "got -1.0"),
        ({"delta": math.nan}, "delta"),
        ({"delta": math.inf}, "delta"),
        ({"lr": -0.1}, "lr must be"),
        ({"lr": math.nan}, "lr must be"),
        ({"damping": -1e-3}, "damping must be"),
        ({"cg_max_iter": 0}, "cg_max_iter must be an integer of at least 1"),
        ({"cg_rtol": 1.0}, r"cg_rtol must lie in \[0, 1\)"),
        ({"backtrack_factor": 1.0}, "backtrack_factor must lie between"),
        ({"max_backtracks": -1}, "max_backtracks must be an integer and not negative"),
        ({"max_backtracks": 2.5}, "max_backtracks must be an integer"),
        ({"cg_max_iter": 2.5}, "cg_max_iter must be an integer"),
        ({"cg_max_iter": None}, "cg_max_iter must be an integer"),
    ],
)
def test_wrong_options_are_refused_at_construction(options, words):
    with pytest.raises(ValueError, match=words):
        NaturalTrustRegion([p], **options)


def normal():
    return td.Normal(p, 1.0)


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (lambda: p.sum(), TypeError, r"the tuple \(loss, distribution\), got a Tensor"),
        (lambda: None, TypeError, "got a NoneType"),
        (lambda: (p.sum(), normal(), 3), TypeError, "constraints must be a real tensor"),
        (lambda: (p.sum(), normal(), p, p), TypeError, "got a tuple of length 4"),
        (lambda: [p.sum(), normal()], TypeError, "got a list of length 2"),
        (lambda: (normal(), p.sum()), TypeError, "the loss comes first"),
        (lambda: (p.sum().item(), normal()), TypeError, r"do not call .item\(\)"),
        (lambda: (p * 2, normal()), ValueError, r"one real number, got shape \(2,\)"),
        (lambda: (p.sum().long(), normal()), ValueError, "dtype torch.int64"),
        (lambda: (p.sum(), p), TypeError, "wrap network outputs"),
        (lambda: (p.detach().sum(), normal()), ValueError, "loss carries no graph"),
        (
            lambda: (p.sum(), td.Normal(p.detach(), 1.0)),
            ValueError,
            "outputs carry no graph",
        ),
        (lambda: (p.sum(), td.Laplace(p, 1.0)), TypeError, "Laplace is refused"),
    ],
)
def test_wrong_closures_are_refused_in_words(returned, error, words):
    optimizer = NaturalTrustRegion([p], 0.01)
    with pytest.raises(error, match=words):
        optimizer.step(returned)
    assert torch.equal(p, torch.zeros(2))


def test_a_closure_that_calls_backward_is_told_not_to():
    model, closure = problem()

    def old_habit():
        loss, distribution = closure()
        loss.backward()
        return loss, distribution

    with pytest.raises(RuntimeError, match=r"must not call backward\(\)"):
        NaturalTrustRegion(model.parameters()).step(old_habit)


def test_derivatives_in_trials_are_named_and_restored():
    model, closure = problem()

    def old_habit():
        loss, distribution = closure()
        loss.backward(retain_graph=True)
        return loss, distribution

    kept = bits(model)
    with pytest.raises(RuntimeError, match=r"derivative in a trial.*torch\.enable_grad\(\)"):
        NaturalTrustRegion(model.parameters()).step(old_habit)
    assert unchanged(model, kept)


def test_a_closure_may_differentiate_under_enable_grad():
    """A loss with a derivative of the model in it, as physics-informed losses have."""
    model, _ = problem(torch.float64)
    x = torch.randn(20, 5, dtype=torch.float64)

    def closure():
        with torch.enable_grad():
            inputs = x.clone().requires_grad_()
            outputs = model(inputs)
            (slope,) = torch.autograd.grad(outputs[:, 0].sum(), inputs, create_graph=True)
        distribution = td.Normal(outputs, 1.0)
        return (slope.sum(1) - 1).square().mean() + outputs.square().mean(), distribution

    optimizer = NaturalTrustRegion(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.info.accepted


def test_inference_mode_is_refused():
    model, closure = problem()
    optimizer = NaturalTrustRegion(model.parameters())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        optimizer.step(closure)


def test_nan_parameters_at_entry_are_named():
    model, closure = problem()
    with torch.no_grad():
        model[2].bias[1] = math.nan
    optimizer = NaturalTrustRegion(model.named_parameters())
    with pytest.raises(ValueError, match=r"parameter 2.bias holds a NaN"):
        optimizer.step(closure)


def test_frozen_models_are_refused():
    frozen = torch.zeros(2)
    with pytest.raises(ValueError, match="all of them are frozen"):
        NaturalTrustRegion([frozen]).step(lambda: (p.sum(), normal()))


def test_parameters_outside_the_distribution_are_named():
    """A value head in the loss but not in the distribution has no KL to bound it."""
    value = torch.ones(2, requires_grad=True)

    def closure():
        return p.sum() + value.square().sum(), normal()

    optimizer = NaturalTrustRegion([("policy", p), ("value", value)], 0.01)
    with pytest.raises(ValueError, match=r"depends on parameter\(s\) value, the distribution"):
        optimizer.step(closure)
    joint = NaturalTrustRegion([p, value], 0.01)
    joint.step(lambda: (closure()[0], {"policy": normal(), "value": td.Normal(value, 1.0)}))
    assert joint.info.accepted


def test_a_batch_that_changes_between_calls_is_refused_and_restored():
    q = torch.zeros(2, requires_grad=True)
    sizes = iter([3, 4])

    def closure():
        return q.sum(), td.Normal(q.sum().expand(next(sizes)), 1.0)

    with pytest.raises(ValueError, match="keep the batch fixed"):
        NaturalTrustRegion([q], 0.01).step(closure)
    assert torch.equal(q, torch.zeros(2))


def test_callable_operators_are_usable_as_public_parts():
    """The pieces compose without the optimizer, as the documentation says."""
    F = FunctionOperator(lambda v: 4 * v, 2)
    step = kl_ball_step(-torch.ones(2), torch.ones(2), 0.5, damped_curvature=8.0, damping=0.0)
    assert 0.5 * (step.s @ (F @ step.s)).item() == pytest.approx(0.5)
