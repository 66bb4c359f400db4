"""What MINRES accepts: zeros, extremes, any operator; and what it refuses."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from counting import Counting
from minres_cases import KINDS
from strategies import DTYPES, systems
from trustregion import Status, minres
from trustregion.operators import DenseOperator
from trustregion.vector import ldexp


@pytest.mark.parametrize("which", ["b", "A", "M"])
@pytest.mark.parametrize(
    ("power", "dtype"),
    [(p, d) for p in (-140, -60, 60, 120) for d in DTYPES]
    + [(p, torch.float64) for p in (-1060, -700, 700, 1018)],
)
def test_no_scale_is_out_of_reach(power, dtype, which):
    subnormal = 2.0**power < torch.finfo(dtype).tiny
    if subnormal and which == "M":
        return  # products with it underflow
    A = torch.diag(torch.tensor([1.0, -2.0, 4.0], dtype=dtype))
    b, M = torch.ones(3, dtype=dtype), torch.diag(torch.tensor([1.0, 0.5, 0.25], dtype=dtype))
    plain = minres(A, b, M=M).x
    scaled = {"b": b, "A": A, "M": M}
    scaled[which] = ldexp(scaled[which], power)
    solution = minres(**scaled)
    expected = ldexp(plain, {"b": power, "A": -power, "M": 0}[which])
    if expected.isfinite().all():
        assert solution.status is Status.CONVERGED
        # subnormal entries have few digits
        loss = 1e-2 if subnormal else 1e-5
        torch.testing.assert_close(solution.x, expected, rtol=loss, atol=0)
    else:
        seen = []
        solution = minres(**scaled, callback=seen.append)
        assert solution.status is Status.NONFINITE_OPERATOR
        assert torch.equal(solution.x, torch.zeros(3, dtype=dtype))
        assert math.isfinite(solution.curvature)
        assert math.isfinite(solution.norm)
        assert not seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_right_hand_side_has_the_zero_solution(dtype):
    A = Counting(torch.eye(3, dtype=dtype))
    solution = minres(A, torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype))
    assert torch.equal(solution.x, torch.zeros(3, dtype=dtype))
    assert (solution.status, A.products) == (Status.CONVERGED, 0)


bad_numbers = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


@bad_numbers
def test_nonfinite_input_is_named(bad):
    b = torch.tensor([1.0, bad])
    assert minres(torch.eye(2), b).status is Status.NONFINITE_INPUT
    solution = minres(torch.eye(2), torch.ones(2), b)
    assert solution.status is Status.NONFINITE_INPUT
    assert solution.x.isfinite().all()


@bad_numbers
@given(
    system=systems(kinds=KINDS, max_n=12),
    at=st.integers(1, 8),
    warm=st.booleans(),
    where=st.booleans(),
    watch=st.booleans(),
)
def test_a_nonfinite_product_keeps_the_last_finite_iterate(bad, system, at, warm, where, watch):
    calls = 0

    def poisoned(v):
        nonlocal calls
        calls += 1
        out = v.clone() if where else system.A @ v
        if calls == at:
            out[0] = bad
        return out

    x0 = torch.zeros_like(system.b) if warm else None
    seen = []
    solution = minres(
        system.A if where else poisoned,
        system.b,
        x0,
        M=poisoned if where else None,
        rtol=0.0,
        stop_at_negative_curvature=watch,
        callback=seen.append,
    )
    assert solution.x.isfinite().all()
    assert math.isfinite(solution.curvature)
    assert solution.direction is None or solution.direction.isfinite().all()
    if calls >= at:
        assert solution.status is Status.NONFINITE_OPERATOR
        assert calls == at
    assert all(x.isfinite().all() for x in seen)


@bad_numbers
@pytest.mark.parametrize(("low", "watch"), [(-1.0, True), (0.0, False)])
def test_the_last_product_with_the_preconditioner_is_checked(bad, low, watch):
    A, b = torch.diag(torch.tensor([1.0, low, 1.0])), torch.tensor([1.0, 2.0, 1.0])

    def counted(stop):
        calls = 0

        def M(v):
            nonlocal calls
            calls += 1
            return v * bad if calls == stop else v.clone()

        return minres(A, b, M=M, stop_at_negative_curvature=watch), calls

    solution, calls = counted(None)
    assert solution.status is (Status.NEGATIVE_CURVATURE if watch else Status.LEAST_SQUARES)
    solution, _ = counted(calls)
    assert solution.status is Status.NONFINITE_OPERATOR
    assert solution.direction is None
    assert solution.x.isfinite().all()


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-160, 1e160, 1e300])
@pytest.mark.parametrize("last", [0.0, 1.0])
def test_preconditioners_of_any_scale_and_range(scale, last):
    A = torch.diag(torch.tensor([2.0, -1.0, last], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    for entries in ([1.0, 1.0, 1.0], [1.0, 1e-160, 1.0], [1.0, 1e160, 1.0]):
        M = torch.diag(scale * torch.tensor(entries, dtype=torch.float64))
        solution = minres(A, b, M=M)
        assert solution.x.isfinite().all()
        assert not math.isnan(solution.residual_norm)
        if solution.status is Status.CONVERGED:
            assert (A @ solution.x - b).norm() <= 1.1e-5 * b.norm()


def test_a_direction_that_underflows_is_left_alone():
    A, b = torch.diag(torch.tensor([1.0, 0.0])).double(), torch.tensor([1.0, 0.3]).double()
    calls = 0

    def M(v):  # its last product, with the residual of the least-squares solution, underflows
        nonlocal calls
        calls += 1
        return v * (1.0 if calls < 3 else 0.0)

    solution = minres(A, b, M=M)
    assert (solution.status, calls) == (Status.LEAST_SQUARES, 3)
    assert solution.x[0].item() == pytest.approx(1.0, rel=1e-6)
    assert solution.x.isfinite().all()


@bad_numbers
def test_the_preconditioner_is_not_asked_about_what_is_not_finite(bad):
    def M(v):
        assert v.isfinite().all()
        return v

    assert minres(lambda v: v * bad, torch.ones(2), M=M).status is Status.NONFINITE_OPERATOR


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e20, 1e38])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_operators_of_extreme_scale_never_give_a_nan(scale, sign):
    A = torch.diag(torch.tensor([1.0, sign, 1.0])) * scale
    solution = minres(A, torch.ones(3))
    assert solution.x.isfinite().all()
    if solution.status is Status.CONVERGED:
        torch.testing.assert_close(A @ solution.x, torch.ones(3), rtol=1e-4, atol=0)


def test_a_start_beyond_all_scales_is_survived():
    x0 = torch.tensor([1e300, -1e300], dtype=torch.float64)
    solution = minres(torch.eye(2).double(), torch.ones(2).double(), x0)
    assert solution.x.isfinite().all()
    assert solution.status is not Status.LEAST_SQUARES
    if solution.status is Status.CONVERGED:
        torch.testing.assert_close(solution.x, torch.ones(2).double())


@given(
    st.lists(st.floats(width=32), min_size=9, max_size=9),
    st.lists(st.floats(width=32), min_size=3, max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from([None, "M"]),
    st.booleans(),
)
@example([0.0] * 9, [1.0] * 3, torch.float32, None, False)
@example([1e30] * 9, [1e-30] * 3, torch.float32, "M", True)
def test_no_input_gives_a_nan_or_a_false_success(entries, b, dtype, M, watch):
    A, b = torch.tensor(entries, dtype=dtype).view(3, 3), torch.tensor(b, dtype=dtype)
    P = A.T @ A if M else None
    solution = minres(A, b, M=P, stop_at_negative_curvature=watch)
    assert solution.x.isfinite().all()
    assert not math.isnan(solution.residual_norm)
    assert not math.isnan(solution.model_value)
    if solution.status is Status.CONVERGED:
        x = solution.x.double()
        size = (A.double().abs() @ x.abs() + b.double().abs()).norm()
        true = (b.double() - A.double() @ x).norm()
        tiny = torch.finfo(dtype).tiny * (1 + x.abs().sum() + A.double().abs().sum())
        eps = torch.finfo(dtype).eps
        assert not true > 1e-5 * b.double().norm() * (1 + 1e-6) + 8 * eps * size + tiny


def test_operator_tensor_and_callable_are_the_same():
    A, b = torch.diag(torch.tensor([1.0, -2.0, 3.0])), torch.ones(3)
    x = minres(A, b).x
    assert torch.equal(minres(DenseOperator(A), b).x, x)
    assert torch.equal(minres(lambda v: A @ v, b).x, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_inputs_are_not_written_to_and_no_graph_is_built(dtype):
    A = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=dtype)).requires_grad_()
    b, x0 = torch.ones(3, dtype=dtype), torch.full((3,), 0.1, dtype=dtype)
    solution = minres(A, b, x0, M=lambda v: v)
    assert torch.equal(b, torch.ones(3, dtype=dtype))
    assert torch.equal(x0, torch.full((3,), 0.1, dtype=dtype))
    assert not solution.x.requires_grad
    assert solution.x.dtype == dtype


eye = torch.eye(2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((eye, [1.0, 2.0]), {}, TypeError, "got list"),
        ((eye, torch.ones(2, dtype=torch.complex64)), {}, TypeError, "complex64"),
        ((eye, torch.ones(2, 2)), {}, ValueError, "vector of shape"),
        ((eye, torch.ones(3)), {}, ValueError, "does not fit"),
        ((torch.ones(2, 3), torch.ones(2)), {}, ValueError, "square"),
        (("A", torch.ones(2)), {}, TypeError, "got str"),
        ((eye, torch.ones(2), torch.ones(3)), {}, ValueError, "x0 must"),
        ((eye, torch.ones(2)), {"rtol": -1.0}, ValueError, "rtol"),
        ((eye, torch.ones(2)), {"atol": math.nan}, ValueError, "atol"),
        ((eye, torch.ones(2)), {"max_iter": -1}, ValueError, "max_iter"),
        ((eye, torch.ones(2)), {"M": torch.eye(3)}, ValueError, "does not fit"),
        ((lambda v: v[:1], torch.ones(2)), {}, ValueError, "must map"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments, options, error, words):
    with pytest.raises(error, match=words):
        minres(*arguments, **options)
