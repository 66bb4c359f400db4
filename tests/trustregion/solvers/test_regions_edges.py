"""The trust-region solvers at the limits of their input: saddles, extremes, rounding, errors."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from region_solvers import every
from strategies import DTYPES
from trustregion import Status, gltr, lanczos, steihaug
from trustregion.solvers import trust_region_dense


@every
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("radius", [1e-300, 1e-30, 1e30, 1e300])
def test_radii_of_any_size(solver, dtype, radius):
    A, g = torch.diag(torch.tensor([1.0, 2.0], dtype=dtype)), torch.ones(2, dtype=dtype)
    step = solver(A, g, radius)
    assert step.s.isfinite().all()
    assert step.s.double().norm() <= radius * (1 + 1e-6)
    assert step.on_boundary == (radius < 1)


@every
@given(
    st.lists(st.floats(width=32), min_size=9, max_size=9),
    st.lists(st.floats(width=32), min_size=3, max_size=3),
    st.floats(1e-30, 1e30),
    st.sampled_from(DTYPES),
)
@example([0.0] * 9, [1.0] * 3, 1.0, torch.float32)
@example([1.0, 2, 3, 4, 5, 6, 7, 8, 9], [1.0] * 3, 1.0, torch.float64)
def test_no_input_gives_a_nan(solver, entries, g, radius, dtype):
    A = torch.tensor(entries, dtype=dtype).view(3, 3)
    step = solver((A + A.T) / 2, torch.tensor(g, dtype=dtype), radius)
    assert step.s.isfinite().all()
    assert not math.isnan(step.predicted_reduction)
    assert not math.isnan(step.residual_norm)
    if step.status is Status.CONVERGED:
        assert not math.isnan(step.multiplier)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("solver", [steihaug, gltr])
def test_a_nonfinite_product_is_named_and_the_step_before_it_kept(solver, at, bad):
    A, calls = torch.diag(torch.arange(1.0, 6.0)), 0

    def poisoned(v):
        nonlocal calls
        calls += 1
        out = A @ v
        if calls == at:
            out[0] = bad
        return out

    step = solver(poisoned, torch.ones(5), 10.0)
    assert step.status is Status.NONFINITE_OPERATOR
    assert step.s.isfinite().all()
    assert (step.predicted_reduction > 0) == (at > 1)
    assert trust_region_dense(poisoned, torch.ones(5), 10.0).status in (
        Status.NONFINITE_OPERATOR,
        Status.CONVERGED,
    )


@every
def test_nonfinite_gradients_and_wrong_preconditioners_are_named(solver):
    eye = torch.eye(2)
    step = solver(eye, torch.tensor([1.0, math.nan]), 1.0)
    assert (step.status, step.s.any().item()) == (Status.NONFINITE_INPUT, False)
    assert solver(eye, torch.ones(2), 1.0, M=-eye).status is Status.INDEFINITE_PRECONDITIONER


eye = torch.eye(2)


@every
@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((eye, torch.ones(2), 0.0), {}, ValueError, "radius must be"),
        ((eye, torch.ones(2), -1.0), {}, ValueError, "radius must be"),
        ((eye, torch.ones(2), math.nan), {}, ValueError, "radius must be"),
        ((eye, torch.ones(2), math.inf), {}, ValueError, "radius must be"),
        ((eye, torch.ones(3), 1.0), {}, ValueError, "does not fit"),
        ((eye, torch.ones(2, dtype=torch.complex64), 1.0), {}, TypeError, "twice the size"),
        ((eye, torch.ones(2, 1), 1.0), {}, ValueError, "vector of shape"),
        ((eye.double(), torch.ones(2), 1.0), {}, ValueError, "does not fit"),
        ((eye, torch.ones(2), 1.0), {"rtol": -1.0}, ValueError, "rtol"),
        ((eye, torch.ones(2), 1.0), {"M": torch.eye(3)}, ValueError, "does not fit"),
    ],
)
def test_wrong_arguments_are_refused_in_words(solver, arguments, options, error, words):
    with pytest.raises(error, match=words):
        solver(*arguments, **options)


def test_a_space_of_another_gradient_is_refused():
    space = lanczos(eye, torch.ones(2), max_iter=0)
    with pytest.raises(ValueError, match="another gradient"):
        gltr(eye, torch.ones(2), 1.0, space=space)
    assert gltr(eye, -torch.ones(2), 1.0, space=space).status is Status.CONVERGED


def test_the_step_length_to_the_edge_keeps_its_digits():
    """From just inside, nearly outwards: the naive root is all cancellation."""
    from decimal import Decimal, getcontext

    from trustregion.solvers.steihaug import to_the_edge

    getcontext().prec = 60
    for inside in (1e-4, 1e-9, 1e-14):
        x, y = 1 - inside, 0.25 * inside
        p, q = 0.9, 0.1
        at, along = (torch.tensor(v, dtype=torch.float64) for v in ((x, y), (p, q)))
        X, Y, P, Q = (Decimal(value) for value in (x, y, p, q))
        a, b, c = P * P + Q * Q, X * P + Y * Q, 1 - X * X - Y * Y
        exact = (-b + (b * b + a * c).sqrt()) / a
        # 1 - |x|^2 itself is good to eps / inside
        bound = 4 * 2.3e-16 / inside
        assert to_the_edge(at, at, along, along, 1.0)[0] == pytest.approx(
            float(exact), rel=bound + 1e-14
        )


@pytest.mark.parametrize("solver", [gltr, trust_region_dense])
def test_on_the_edge_is_on_it_to_the_last_digit(solver):
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(60, 60, generator=generator, dtype=torch.float64)
        g = torch.randn(60, generator=generator, dtype=torch.float64)
        step = solver(A + A.T, g, radius=0.1)
        assert step.on_boundary
        assert step.s.norm().item() == pytest.approx(0.1, rel=5e-16, abs=0)


@every
def test_what_float32_cannot_reach_is_not_claimed(solver):
    g = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(30, 30, generator=g, dtype=torch.float64))
    A = ((Q * torch.logspace(0, -4, 30, dtype=torch.float64)) @ Q.T).float()
    gradient = torch.randn(30, generator=g)
    step = solver(A, gradient, 1e9, rtol=1e-7)
    assert step.status is Status.STAGNATED
    true = (A.double() @ step.s.double() + gradient.double()).norm().item()
    assert 1e-7 * gradient.norm() < true < 1e-2 * gradient.norm()
    assert 0.02 * true < step.residual_norm < 50 * true
    edge = solver(A, gradient, 1.0, rtol=1e-4)
    if solver is not steihaug:  # whose equation holds on the edge too
        s = edge.s.double()
        residual = (A.double() @ s + edge.multiplier * s + gradient.double()).norm()
        assert edge.status is Status.CONVERGED
        assert residual <= 1e-4 * gradient.norm()
        tight = solver(A, gradient, 1.0, rtol=1e-10)
        assert tight.status is Status.STAGNATED


def rank_one(n, seed):
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(n, 1, generator=g, dtype=torch.float64)
    return u @ u.T


@pytest.mark.parametrize("solver", [steihaug, gltr])
def test_a_singular_metric_is_a_status_not_an_exception(solver):
    for seed in range(300):
        g = torch.Generator().manual_seed(seed)
        G = torch.randn(20, 20, generator=g, dtype=torch.float64)
        for dtype in DTYPES:
            A, M = (G @ G.T / 20).to(dtype), rank_one(20, seed).to(dtype)
            step = solver(A, torch.randn(20, generator=g).to(dtype), 0.1 + seed % 7, M=M)
            assert step.s.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_is_no_false_convergence_behind_a_rounded_preconditioner(dtype):
    """M of condition 1e5 is not symmetric to its smallest eigenvalue: the basis has to tell."""
    rtol = 1e-3 if dtype is torch.float32 else 1e-9
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        Q, _ = torch.linalg.qr(torch.randn(20, 20, generator=g, dtype=torch.float64))
        P, _ = torch.linalg.qr(torch.randn(20, 20, generator=g, dtype=torch.float64))
        exact = (Q * torch.logspace(0, -2, 20, dtype=torch.float64)) @ Q.T
        power = -5 if dtype is torch.float32 else -7
        M = ((P * torch.logspace(0, power, 20, dtype=torch.float64)) @ P.T).to(dtype)
        A, b = exact.to(dtype), torch.randn(20, generator=g).to(dtype)
        solution = lanczos(A, b, M=M, max_iter=20).solve(rtol=rtol)
        step = gltr(A, -b, 1e9, M=M, rtol=rtol)
        for x, status in ((solution.x, solution.status), (step.s, step.status)):
            true = (b.double() - A.double() @ x.double()).norm()
            rounding = torch.finfo(dtype).eps * (b.double().norm() + x.double().norm())
            if status is Status.CONVERGED:
                assert true <= rtol * b.double().norm() + rounding


def test_an_operator_that_is_not_symmetric_does_not_converge():
    A = torch.tensor([[1.0, 5.0, 0.0], [-5.0, 1.0, 2.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
    g = torch.ones(3, dtype=torch.float64)
    step = gltr(A, g, radius=1e3)
    residual = (A @ step.s + step.multiplier * step.s + g).norm()
    assert step.status is not Status.CONVERGED or residual <= 1e-5 * g.norm()


def test_a_space_is_that_of_one_operator_and_one_gradient():
    A, g = torch.diag(torch.tensor([1.0, 2.0])), torch.ones(2)
    space = lanczos(A, -g, max_iter=2)
    with pytest.raises(ValueError, match="another gradient or operator"):
        gltr(2 * A, g, 1.0, space=space)
    with pytest.raises(ValueError, match="its own preconditioner"):
        gltr(A, g, 1.0, M=eye, space=space)
    bad = torch.tensor([1.0, math.nan])
    poisoned = lanczos(A, -bad, max_iter=0)
    assert gltr(A, bad, 1.0, space=poisoned).status is Status.NONFINITE_INPUT
    with pytest.raises(ValueError, match="another gradient"):
        gltr(A, bad, 1.0, space=space)


def test_results_are_not_shared_with_the_space():
    space = lanczos(eye, torch.zeros(2), max_iter=0)
    space.solve().x.add_(5)
    space.minimize(1.0).s.add_(5)
    assert not space.solve().x.any()
    assert not space.minimize(1.0).s.any()
    poisoned = lanczos(eye, torch.tensor([1.0, math.nan]), max_iter=0)
    poisoned.minimize(1.0).s.fill_(9)
    assert not poisoned.minimize(1.0).s.any()


@every
def test_nothing_to_do_for_no_parameters(solver):
    step = solver(torch.zeros(0, 0), torch.zeros(0), 1.0)
    assert (step.status, step.s.shape) == (Status.CONVERGED, (0,))


def test_a_direction_of_hardly_any_curvature_is_not_followed_uphill():
    """1e-17 is below rounding, but over a radius of 1e12 it bends the model upwards again."""
    A = torch.diag(torch.tensor([1.0, 1e-17], dtype=torch.float64))
    g = torch.tensor([1.0, 1e-8], dtype=torch.float64)
    step = steihaug(A, g, radius=1e12, rtol=1e-12)
    assert step.status is Status.ZERO_CURVATURE
    assert step.predicted_reduction >= 0.5
    assert step.on_boundary == (step.norm > 0.999e12)
    far = steihaug(A, g, radius=1.5, rtol=1e-12)
    assert far.on_boundary
