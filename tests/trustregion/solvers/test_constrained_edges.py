"""The constrained step at its limits: rounding, degenerate constraints, extremes, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from constrained_cases import F, e1, e2
from strategies import DTYPES
from trustregion import Status
from trustregion.solvers.constrained import constrained_kl_ball_step


def test_the_rounding_of_a_basis_of_long_vectors_is_corrected():
    """At condition 1e6 it is 280 eps of |a| |s| without a correction."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        Q, a, g = (torch.randn(k, 5, generator=generator).double() for k in (5, 3, 1))
        Q = torch.linalg.qr(Q).Q
        H = Q @ torch.diag(torch.logspace(-6, 0, 5, dtype=torch.float64)) @ Q.T
        step = constrained_kl_ball_step((H + H.T) / 2, g[0], 0.1, a, torch.zeros(3), rtol=1e-8)
        assert step.status is Status.CONVERGED
        rounding = torch.finfo(torch.float64).eps * a.norm(dim=1) * step.s.norm()
        assert (step.constraint_values <= rounding).all()


def test_directions_of_very_different_curvature_are_all_seen():
    A = torch.diag(torch.tensor([1e-12, 1.0]).double())
    step = constrained_kl_ball_step(A, e2, 0.5, e1, 5e5)  # the ball reaches 1e6 along e1
    assert step.status is Status.CONVERGED
    assert step.s.tolist() == pytest.approx([-5e5, -(0.75**0.5)])


def test_a_wedge_that_rounding_cannot_resolve_is_named():
    """The minimiser is the tip of a wedge of 1e-9, here at zero."""
    a = torch.tensor([[-1.0, -1e-9], [1.0, -1e-9]]).double()
    step = constrained_kl_ball_step(F, e2, 0.5, a, torch.zeros(2))
    assert step.status is Status.STAGNATED
    assert step.feasible


def test_solves_that_did_not_converge_are_named_and_the_step_is_still_feasible():
    A = torch.diag(torch.logspace(0, 3, 20, dtype=torch.float64))
    g, a = torch.ones(20, dtype=torch.float64), torch.linspace(-1, 1, 20, dtype=torch.float64)
    step = constrained_kl_ball_step(A, g, 0.1, a, 0.1, max_iter=3)
    assert step.status is Status.MAX_ITER
    assert step.feasible
    assert step.constraint_values.item() == pytest.approx(0.1 + (a @ step.s).item(), abs=1e-12)
    assert (0.5 * step.s @ A @ step.s).item() == pytest.approx(0.1, rel=1e-9)
    assert (
        0
        < step.predicted_reduction
        < constrained_kl_ball_step(A, g, 0.1, a, 0.1, rtol=1e-10).predicted_reduction
    )


def test_without_an_iteration_there_is_no_step():
    step = constrained_kl_ball_step(F, e1, 0.5, e2, -0.5, max_iter=0)
    assert (step.status, step.feasible, step.products) == (Status.MAX_ITER, True, 0)
    assert torch.equal(step.s, 0 * e1)


def test_a_direction_that_the_metric_does_not_see_is_named():
    step = constrained_kl_ball_step(
        torch.diag(torch.tensor([1.0, 0.0])),
        torch.ones(2),
        0.1,
        torch.eye(2),
        torch.tensor([-1.0, -1.0]),
    )
    assert step.status is Status.ZERO_CURVATURE
    assert step.s.isfinite().all()


@pytest.mark.parametrize("seed", range(8))
def test_a_constraint_that_no_step_in_the_span_changes_does_not_hold_it_back(seed):
    """What is left of a'x is rounding, and has no sign."""
    Q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))).Q
    g, a = torch.linalg.qr(Q.double()).Q.T[:2]
    step = constrained_kl_ball_step(torch.outer(g, g), g, 0.5, a, 0.0, max_iter=1)
    assert step.kl_model == pytest.approx(0.5)
    torch.testing.assert_close(step.s, -g)


def test_an_operator_that_is_another_one_later_is_not_trusted():
    calls = 0

    def fickle(v):
        nonlocal calls
        calls += 1
        return v if calls <= 2 else -v

    step = constrained_kl_ball_step(fickle, e1, 0.1, e2, -1.0)
    assert step.status is Status.ZERO_CURVATURE
    assert torch.equal(step.s, 0 * e1)


def test_steps_beyond_the_range_of_the_dtype_are_named():
    g, a = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    large = constrained_kl_ball_step(torch.eye(2) * 1e-30, g, 1e60, a, -1.0)
    assert large.status is Status.NONFINITE_OPERATOR
    assert torch.equal(large.s, torch.zeros(2))
    small = constrained_kl_ball_step(torch.eye(2) * 1e30, g, 1e-70, a, 1e-51)
    assert small.status is Status.STAGNATED  # the repair that there is underflows
    assert torch.equal(small.s, torch.zeros(2))
    assert not small.feasible


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["g", "a", "b"])
def test_input_that_is_not_finite_gives_no_step(where, bad):
    given = {"g": e1 + e2, "a": e1 - e2, "b": torch.zeros(1, dtype=torch.float64)}
    given[where] = given[where].clone()
    given[where][0] = bad
    step = constrained_kl_ball_step(F, given["g"], 0.1, given["a"], given["b"])
    assert step.status is Status.NONFINITE_INPUT
    assert torch.equal(step.s, 0 * e1)
    assert not step.constraint_values.isnan().any()
    assert (step.predicted_reduction, step.kl_model, step.products) == (0.0, 0.0, 0)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6])  # the last two make the metric of the span
def test_products_that_are_not_finite_give_no_step(at):
    calls = 0

    def poisoned(v):
        nonlocal calls
        calls += 1
        return v * torch.tensor([1.0, math.nan if calls == at else 2.0], dtype=v.dtype)

    step = constrained_kl_ball_step(poisoned, e1 + e2, 0.1, e1 - 2 * e2, 0.0)
    assert calls >= at
    assert step.status is Status.NONFINITE_OPERATOR
    assert torch.equal(step.s, 0 * e1)


extremes = st.sampled_from([0.0, 1.0, -1.0, 1e-300, 1e300, -1e-160, 1e160, 1e-38, 3.0, math.nan])


@given(
    st.lists(extremes, min_size=9, max_size=9),
    st.lists(extremes, min_size=9, max_size=9),
    st.lists(extremes, min_size=2, max_size=2),
    st.sampled_from([1e-300, 1e-10, 1.0, 1e10, 1e300]),
    st.sampled_from([0.0, 1e-3, 1e300]),
    st.sampled_from(DTYPES),
)
def test_no_input_gives_a_nan_or_raises(entries, vectors, b, delta, damping, dtype):
    A = torch.tensor(entries, dtype=dtype).view(3, 3)
    g, *a = torch.tensor(vectors, dtype=dtype).view(3, 3)
    b = torch.tensor(b, dtype=torch.float64)
    step = constrained_kl_ball_step((A + A.T) / 2, g, delta, torch.stack(a), b, damping=damping)
    assert step.s.isfinite().all()
    assert not step.constraint_values.isnan().any()
    assert not step.multipliers.isnan().any()
    assert (step.multipliers >= 0).all()
    assert step.ball_multiplier >= 0
    assert 0 <= step.kl_model <= delta
    assert not math.isnan(step.predicted_reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [-100, -40, 40, 100])
def test_the_scale_of_the_parameters_does_not_matter(power, dtype):
    """In units of 1 / u the gradients are u times and the metric u^2 times as large."""
    F, g = torch.diag(torch.tensor([1.0, 4.0, 16.0], dtype=dtype)), torch.ones(3, dtype=dtype)
    a, b = torch.tensor([1.0, -1.0, 0.5], dtype=dtype), 0.05
    plain = constrained_kl_ball_step(F, g, 0.1, a, b)
    unit = 2.0 ** (power // 2)
    scaled = constrained_kl_ball_step(F * unit**2, g * unit, 0.1, a * unit, b)
    assert torch.equal(scaled.s * unit, plain.s)
    assert scaled.status is plain.status is Status.CONVERGED


def test_the_inputs_are_not_written_to_and_the_step_has_their_dtype():
    g, a, b = torch.ones(2), torch.tensor([[1.0, -1.0]]), torch.tensor([0.01])
    step = constrained_kl_ball_step(torch.eye(2), g, 0.1, a, b)
    assert step.s.dtype is torch.float32
    assert torch.equal(g, torch.ones(2))
    assert torch.equal(a, torch.tensor([[1.0, -1.0]]))
    assert torch.equal(b, torch.tensor([0.01]))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"g": [1.0, 2.0]}, TypeError, "g must be a float32 or float64 tensor, got list"),
        ({"g": torch.ones(2, 2)}, ValueError, "g must be a vector"),
        ({"a": [1.0, 2.0]}, TypeError, "a must be a float32 or float64 tensor, got list"),
        ({"a": torch.ones(2, dtype=torch.int64)}, TypeError, "int64"),
        ({"a": torch.ones(3)}, ValueError, r"shape \(m, 2\) and dtype torch.float32"),
        ({"a": torch.ones(2).double()}, ValueError, "dtype torch.float64"),
        ({"a": torch.ones(1, 1, 2)}, ValueError, r"got shape \(1, 1, 2\)"),
        ({"a": torch.ones(0, 2), "b": torch.ones(0)}, ValueError, "no constraint"),
        ({"b": torch.ones(2)}, ValueError, "each of 1 rows of a, got 2"),
        ({"a": torch.ones(2, 2)}, ValueError, "each of 2 rows of a, got 1"),
        ({"delta": 0.0}, ValueError, "delta must be a positive finite number, got 0.0"),
        ({"delta": -1.0}, ValueError, "delta must"),
        ({"delta": math.nan}, ValueError, "delta must"),
        ({"damping": -1.0}, ValueError, "damping must be finite and not negative, got -1.0"),
        ({"damping": math.nan}, ValueError, "damping must"),
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"A": torch.eye(3)}, ValueError, "does not fit"),
        ({"A": "F"}, TypeError, "got str"),
        ({"M": torch.eye(3)}, ValueError, "does not fit"),
    ],
)
def test_wrong_constrained_arguments_are_refused_in_words(changes, error, words):
    given = {"A": torch.eye(2), "g": torch.ones(2), "delta": 0.1, "a": torch.ones(2), "b": 0.0}
    given |= changes
    positional = [given.pop(name) for name in ("A", "g", "delta", "a", "b")]
    with pytest.raises(error, match=words):
        constrained_kl_ball_step(*positional, **given)
