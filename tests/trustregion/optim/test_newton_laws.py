"""NewtonTrustRegion over many steps: invariances, failures, adaptation, resuming, bad input."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td

import oracles
from optimizers import newton
from strategies import costly
from trustregion import Status
from trustregion.optim.info import StepInfo

DTYPES = [torch.float32, torch.float64]
KINDS = {
    "gltr": {},
    "steihaug": {"solver": "steihaug"},
    "damped": {"radius": math.inf, "damping": 30.0, "damping_factor": 1.5},
    "both": {"damping": 0.5, "damping_factor": 1.5},
    "hessian-free": {
        "radius": math.inf,
        "damping": 30.0,
        "damping_factor": 1.5,
        "solver": "cg",
        "warm_start": 0.9,
    },
}
# 30: above the negative curvature of the waves below
kinds = pytest.mark.parametrize("kind", KINDS)


class Waves:
    """A smooth loss with minima, maxima and saddles, its scale and that of its parameters."""

    def __init__(self, dtype=torch.float64, seed=0, n=5, scale=1.0, unit=1.0):
        draw = torch.Generator().manual_seed(seed)
        self.W = torch.randn(8, n, generator=draw, dtype=torch.float64).to(dtype)
        start = torch.randn(n, generator=draw, dtype=torch.float64).to(dtype)
        self.x = (unit * start).requires_grad_()
        self.scale, self.unit = scale, unit

    def __call__(self):
        y = self.x / self.unit
        return self.scale * ((self.W @ y).sin().sum() + 0.3 * (y @ y))


def run(f, steps, closure=None, **options):
    optimizer = newton([f.x], **options)
    infos = []
    for _ in range(steps):
        optimizer.step(closure or f)
        infos.append(optimizer.info)
    return infos


# -- promises


@kinds
@costly
@given(seed=st.integers(0, 2**20), dtype=st.sampled_from(DTYPES))
def test_the_loss_never_rises_and_a_rejected_step_moves_nothing(kind, seed, dtype):
    f = Waves(dtype, seed)
    optimizer = newton([f.x], max_rejections=3, **KINDS[kind])
    for _ in range(12):
        before, kept = f().item(), f.x.detach().clone()
        optimizer.step(f)
        info = optimizer.info
        assert info.loss == before
        assert info.new_loss == f().item() <= before
        assert info.accepted or torch.equal(f.x, kept)
        assert info.actual_reduction == before - info.new_loss
        if info.accepted:
            assert info.predicted_reduction > 0


@kinds
@given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(DTYPES),
    power=st.sampled_from([-40, -7, 9, 30]),
    of_unit=st.booleans(),
)
@costly
def test_powers_of_two_in_the_loss_or_the_parameters_change_no_bit(
    kind, seed, dtype, power, of_unit
):
    options = {"rtol": 1e-3, "radius": 1.0, "damping": 0.0} | KINDS[kind]
    reference, two = Waves(dtype, seed), 2.0**power
    infos = run(reference, 6, **options)
    if of_unit:
        scaled = Waves(dtype, seed, unit=two)
        options |= {"radius": two * options["radius"], "damping": options["damping"] / two**2}
    else:
        scaled = Waves(dtype, seed, scale=two)
        options |= {"damping": two * options["damping"]}
    others = run(scaled, 6, **options)
    assert torch.equal(scaled.x / scaled.unit, reference.x)
    assert [i.rho for i in others] == [i.rho for i in infos]
    assert [i.status for i in others] == [i.status for i in infos]


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_maximising_is_minimising_the_negative(kind, dtype):
    f, g = Waves(dtype), Waves(dtype)
    down = run(f, 8, **KINDS[kind])
    up = run(g, 8, lambda: -g(), maximize=True, **KINDS[kind])
    assert torch.equal(f.x, g.x)
    assert [i.new_loss for i in down] == [-i.new_loss for i in up]
    assert [i.actual_reduction for i in down] == [i.actual_reduction for i in up]


class Stop(BaseException):
    pass


def never_better(f, k, event):
    """A closure none of whose trials will do, with an event at the k-th call."""
    calls, start = [], f.x.detach().clone()

    def closure():
        calls.append(0)
        if len(calls) == k and isinstance(event, BaseException):
            raise event
        if len(calls) == k:
            return f() * event
        return f() + (0.0 if torch.equal(f.x, start) else 1e6)

    return closure


@kinds
@pytest.mark.parametrize("k", range(1, 6))
def test_an_exception_at_the_kth_call_restores_every_bit(kind, k):
    f = Waves()
    before = f.x.detach().clone()
    optimizer = newton([f.x], **KINDS[kind])
    options = dict(optimizer.param_groups[0])
    with pytest.raises(Stop):
        optimizer.step(never_better(f, k, Stop()))
    assert torch.equal(f.x, before)
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
        k: v for k, v in options.items() if k != "params"
    }
    optimizer.step(f)  # and it goes on as if nothing had happened
    other = Waves()
    run(other, 1, **KINDS[kind])
    assert torch.equal(f.x, other.x)


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("k", range(1, 5))
def test_a_nonfinite_loss_at_the_kth_call_never_reaches_a_parameter(kind, bad, k):
    f = Waves()
    before = f.x.detach().clone()
    optimizer = newton([f.x], max_rejections=k - 2 if k > 1 else 5, **KINDS[kind])
    optimizer.step(never_better(f, k, bad))
    assert torch.equal(f.x, before)
    expected = Status.NONFINITE_LOSS if k == 1 else Status.NONFINITE_TRIAL
    assert optimizer.info.status is expected
    assert optimizer.info.evaluations == (1 if k == 1 else k + 1)  # the last where it started


@kinds
@pytest.mark.parametrize("part", ["loss", "distribution"])
def test_a_closure_that_does_not_repeat_is_named(kind, part):
    f, calls = Waves(), []
    before = f.x.detach().clone()

    def closure():
        calls.append(0)
        if part == "loss":
            return f() + 1e3 * len(calls)
        moved = 0.0 if torch.equal(f.x, before) else 1e6
        return f() + moved, td.Normal(f.W @ f.x + len(calls), 1.0)

    options = KINDS[kind] | ({"curvature": "ggn"} if part == "distribution" else {})
    optimizer = newton([f.x], max_rejections=3, **options)
    with pytest.warns(UserWarning, match="draw the batch before the step"):
        optimizer.step(closure)
    assert optimizer.info.status is Status.NOT_REPRODUCIBLE
    words = "the loss was" if part == "loss" else "the KL was 0.0 in the first call and"
    assert words in optimizer.info.detail
    assert optimizer.info.evaluations == len(calls)
    assert torch.equal(f.x, before)


@kinds
def test_one_nonfinite_trial_is_stepped_back_from(kind):
    f, calls = Waves(), []

    def closure():
        calls.append(0)
        return f() * (math.nan if len(calls) == 2 else 1.0)

    (info,) = run(f, 1, closure, **KINDS[kind])
    assert info.accepted
    assert info.backtracks == 1


def test_a_nonfinite_gradient_is_named():
    w, x = (torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = newton([("w", w), ("x", x)])
    optimizer.step(lambda: (w - 1).square().sum() + x.norm().sqrt())
    assert optimizer.info.status is Status.NONFINITE_GRADIENT
    assert optimizer.info.detail == "parameter x"
    assert not w.any()


@pytest.mark.parametrize("kind", ["gltr", "steihaug"])
def test_a_step_that_overflows_a_parameter_is_not_written(kind):
    x = torch.full((2,), 3e38, requires_grad=True)
    optimizer = newton([x], max_rejections=0, **({"radius": 3e38} | KINDS[kind]))
    optimizer.step(lambda: -(x * 1e-3).sum() + 1e-6 * (x * 1e-30).square().sum())
    assert optimizer.info.status is Status.NONFINITE_TRIAL
    assert torch.equal(x, torch.full((2,), 3e38))


@kinds
def test_a_zero_gradient_is_an_exact_no_op(kind):
    f = Waves(torch.float32)
    kept = f.x.detach().clone()
    (info,) = run(f, 1, lambda: (f.x * 0).sum(), **KINDS[kind])
    assert info.status is Status.STATIONARY
    assert (info.products, info.evaluations) == (0, 1)
    assert torch.equal(f.x, kept)


@pytest.mark.parametrize("kind", ["gltr", "steihaug", "both"])
def test_at_the_rounding_of_the_loss_the_radius_does_not_shrink(kind):
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def closure():
        moved = 0.0 if x[0] == 1 else 1e-9
        return 1e6 + 1e-12 * x.square().sum() + moved

    optimizer = newton([x], **KINDS[kind])
    optimizer.step(closure)
    assert optimizer.info.evaluations == 2  # no search for what cannot be seen
    assert optimizer.info.status is Status.CONVERGED
    assert "rounding" in optimizer.info.detail
    assert optimizer.param_groups[0]["radius"] >= 1.0
    assert torch.equal(x, torch.ones(2, dtype=torch.float64))


@kinds
def test_a_hessian_that_is_not_finite_is_a_status(kind):
    x = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)
    optimizer = newton([x], **KINDS[kind])
    optimizer.step(lambda: (x.abs() ** 1.5).sum())
    assert optimizer.info.status is Status.NONFINITE_OPERATOR
    assert x.tolist() == [0.0, 2.0]


# -- rates and groups


def test_the_rate_is_a_factor_on_the_step():
    whole, half = Waves(), Waves()
    start = whole.x.detach().clone()
    run(whole, 1, radius=0.01)
    run(half, 1, radius=0.01, lr=0.5)
    torch.testing.assert_close(half.x - start, 0.5 * (whole.x - start))


@given(seed=st.integers(0, 2**20), rate=st.floats(0.01, 1))
def test_a_group_at_a_fraction_of_the_rate_is_measured_in_units_of_it(seed, rate):
    draw = torch.Generator().manual_seed(seed)
    B = torch.randn(5, 5, generator=draw, dtype=torch.float64)
    A, g = B + B.T, torch.randn(5, generator=draw, dtype=torch.float64)
    a, b = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (2, 3))

    def closure():
        x = torch.cat([a, b])
        return g @ x + 0.5 * x @ A @ x

    groups = [{"params": [a]}, {"params": [b], "lr": 0.7 * rate}]
    optimizer = newton(groups, 0.3, lr=0.7, rtol=1e-13)
    optimizer.step(closure)
    D = torch.tensor([1.0, 1, rate, rate, rate], dtype=torch.float64).diag()
    expected = 0.7 * D @ oracles.trust_region(D @ A @ D, D @ g, 0.3)
    assert optimizer.info.rho == pytest.approx(1)  # predicted for 0.7 of the model's step
    torch.testing.assert_close(torch.cat([a, b]).detach(), expected, rtol=1e-5, atol=1e-7)


# -- resuming, and what it says


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_optimizer_continues_bit_for_bit(kind, dtype):
    f, g, file = Waves(dtype), Waves(dtype), io.BytesIO()
    first = newton([f.x], **KINDS[kind])
    for _ in range(4):
        first.step(f)
    torch.save((first.state_dict(), f.x.detach()), file)
    state, x = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    with torch.no_grad():
        g.x.copy_(x)
    second = newton(
        [g.x],
        radius=KINDS[kind].get("radius", 7.0),
        **{k: v for k, v in KINDS[kind].items() if k != "radius"},
    )
    second.load_state_dict(state)
    for _ in range(4):
        first.step(f)
        second.step(g)
        assert first.info == second.info
    assert torch.equal(f.x, g.x)


def test_info_accounts_for_the_step():
    x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
    optimizer = newton([x], 2.0, damping=1e-3)

    def closure():
        return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2, td.Normal(x, 1.0)

    before, loss = x.detach().clone(), optimizer.step(closure)
    info = optimizer.info
    assert loss.item() == info.loss == pytest.approx(24.2)
    assert info.new_loss == closure()[0].item()
    assert info.actual_reduction == info.loss - info.new_loss
    assert info.rho == info.actual_reduction / info.predicted_reduction
    assert info.kl == pytest.approx((x - before).square().sum().item() / 4)  # mean of two
    assert (info.radius, info.damping, info.scale) == (2.0, 1e-3, 1.0)
    assert info.cg_iterations >= 1
    assert 0 <= info.cg_residual < 0.6  # the forcing sequence begins at a half
    assert info.cg_status is Status.CONVERGED
    assert info.backend == "graph"
    assert isinstance(info, StepInfo)
    assert str(info) in repr(optimizer)


BAD = [
    ({"radius": 0.0}, "radius must be positive, got 0.0"),
    ({"radius": -1.0}, "radius must be positive, got -1.0"),
    ({"radius": "1"}, "radius must be a number, got '1'"),
    ({"radius": math.inf}, "give a finite radius, or a damping such as 1.0"),
    ({"radius": math.nan}, "radius must be positive, got nan"),
    ({"damping": -1.0}, "damping must be finite and not negative, got -1.0"),
    ({"damping": math.inf}, "damping must be finite and not negative, got inf"),
    ({"damping_factor": 1.0}, r"damping_factor must lie in \(1, inf\), got 1.0"),
    ({"max_iter": 0}, "max_iter must be an integer of at least 1, got 0"),
    ({"max_iter": 1.5}, "max_iter must be an integer of at least 1, got 1.5"),
    ({"rtol": 1.0}, r"rtol must lie in \[0, 1\), got 1.0"),
    ({"max_rejections": -1}, "max_rejections must be an integer and not negative, got -1"),
    ({"warm_start": 2.0}, r"warm_start must lie in \[0, 1\], got 2.0"),
    ({"metric_damping": 0.0}, "metric_damping must be positive and finite, got 0.0"),
    ({"lr": -1.0}, "lr must be finite and not negative, got -1.0"),
    ({"curvature": "fisher"}, 'curvature must be "hessian" or "ggn", got \'fisher\''),
    ({"solver": "newton"}, "solver must be .* got 'newton'"),
    ({"metric": "l2"}, "metric must be .* got 'l2'"),
    ({"rule": "nocedal"}, "rule must be .* got 'nocedal'"),
    ({"solver": "cg"}, "Pass radius=math.inf and a positive damping, got radius=1.0"),
    ({"metric": "fisher", "preconditioner": torch.eye(2)}, "give one"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_wrong_options_are_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        newton([torch.zeros(2, requires_grad=True)], **options)


@pytest.mark.parametrize(
    ("options", "returned", "error", "words"),
    [
        ({}, lambda x: x.square(), ValueError, r"one real number, got shape \(2,\).*\.mean\(\)"),
        ({}, lambda _: 1.0, TypeError, r"must be a tensor, got a float: do not call \.item\(\)"),
        ({}, lambda _: None, TypeError, "must be a tensor, got a NoneType"),
        ({}, lambda x: (x.sum(), x, x), TypeError, "must be a tensor, got a tuple of length 3"),
        ({}, lambda x: x.detach().sum(), ValueError, "carries no graph"),
        ({"curvature": "ggn"}, lambda x: x.square().sum(), ValueError, r"return \(loss, outputs\)"),
        ({"metric": "fisher"}, lambda x: x.square().sum(), ValueError, r"\(loss, distribution\)"),
        (
            {"metric": "fisher"},
            lambda x: (x.square().sum(), x),
            ValueError,
            r"\(loss, distribution\)",
        ),
    ],
)
def test_wrong_closures_are_refused_in_words_and_nothing_moves(options, returned, error, words):
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = newton([x], **options)
    with pytest.raises(error, match=words):
        optimizer.step(lambda: returned(x))
    assert torch.equal(x, torch.ones(2, dtype=torch.float64))
    assert optimizer.info is None
