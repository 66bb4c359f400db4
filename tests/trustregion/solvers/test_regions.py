"""Laws of the trust-region solvers."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import oracles
from counting import Counting
from region_solvers import SOLVERS, every
from strategies import DTYPES, POSITIVE, systems
from trustregion import Status, cg, gltr, lanczos, steihaug
from trustregion.solvers import forcing_sequence, trust_region_dense

ALL = [*POSITIVE, "rank-deficient", "sign-mixed"]


radii = st.floats(-3, 3).map(lambda power: 10.0**power)


def natural(system):
    """The length at which the quadratic and the linear term weigh the same."""
    return max(system.b.double().norm().item() / system.scale, 1e-300)


def model(system, s):
    s = s.double()
    return (0.5 * s @ system.exact @ s - system.b.double() @ s).item()


def weight(system, s):
    """The size of the terms of the model, whose rounding is that of its value."""
    size = s.double().norm().item()
    return (system.b.double().norm().item() + system.scale * size) * size


def cauchy(system, radius):
    """The minimiser of the model along -g."""
    b = system.b.double()
    if not b.norm() > 0:
        return b
    curvature, length = (b @ system.exact @ b / (b @ b)).item(), b.norm().item()
    t = radius / length
    return b * (t if curvature <= 0 else min(1 / curvature, t))


@every
@given(system=systems(kinds=ALL, max_n=20), factor=radii)
def test_the_step_lies_inside_the_radius_and_no_worse_than_cauchy(solver, system, factor):
    radius = factor * natural(system)
    step = solver(system.A, -system.b, radius)
    size = step.s.double().norm().item()
    assert step.s.isfinite().all()
    assert size <= radius * (1 + 4 * system.eps)
    assert step.norm == pytest.approx(size, rel=8 * system.eps, abs=0)
    if step.on_boundary:
        assert size == pytest.approx(radius, rel=8 * system.eps)
    gained, least = -model(system, step.s), -model(system, cauchy(system, radius))
    rounding = 20 * system.eps * weight(system, step.s)
    assert gained >= least * (1 - 1e-5) - rounding
    assert abs(step.predicted_reduction - gained) <= rounding
    curvature = (step.s.double() @ system.exact @ step.s.double()).item()
    assert abs(step.curvature - curvature) <= 2 * rounding


@pytest.mark.parametrize("solver", [gltr, trust_region_dense])
@given(system=systems(kinds=ALL, max_n=15, dtypes=[torch.float64]), factor=radii)
def test_the_exact_solvers_satisfy_the_optimality_conditions(solver, system, factor):
    radius = factor * natural(system)
    step = solver(system.A, -system.b, radius, rtol=1e-9)
    assert step.status in (Status.CONVERGED, Status.STAGNATED)
    s, multiplier = step.s, step.multiplier
    size = system.b.norm() + (system.scale + multiplier) * s.norm()
    residual = (system.exact @ s + multiplier * s - system.b).norm()
    assert residual <= 1e-9 * system.b.norm() + 100 * system.eps * size
    assert multiplier >= 0
    assert step.on_boundary or multiplier == 0
    if solver is trust_region_dense:  # which sees the whole spectrum
        lowest = torch.linalg.eigvalsh(system.exact)[0]
        assert lowest + multiplier >= -100 * system.eps * system.scale
        best = oracles.trust_region(system.exact, -system.b, radius)
        assert model(system, s) <= model(system, best) + 1e-9 * weight(system, best)


@given(systems(max_n=20, max_log_condition=4), radii)
def test_steihaug_gains_at_least_half(system, factor):
    radius = factor * natural(system)
    step = steihaug(system.A, -system.b, radius)
    best = oracles.trust_region(system.exact, -system.b.double(), radius)
    rounding = 20 * system.eps * weight(system, step.s)
    assert -model(system, step.s) >= -0.5 * model(system, best) - rounding


@given(systems(kinds=ALL, max_n=15, dtypes=[torch.float64]), radii)
def test_a_larger_region_gains_no_less(system, factor):
    radius = factor * natural(system)
    for solver in (gltr, trust_region_dense):
        gains = [
            solver(system.A, -system.b, r, rtol=1e-9).predicted_reduction
            for r in (0.5 * radius, radius, 2 * radius)
        ]
        assert gains[0] <= gains[1] * (1 + 1e-8) <= gains[2] * (1 + 3e-8)


@every
@given(system=systems(max_n=15, max_log_condition=3))
def test_inside_the_radius_the_step_is_the_newton_step(solver, system):
    direct = cg(system.A, system.b, rtol=1e-5)
    radius = 2 * direct.x.double().norm().item()
    step = solver(system.A, -system.b, radius, rtol=1e-5)
    assert not step.on_boundary
    assert step.multiplier == 0.0
    # both solve to 1e-5 relative residual
    assert (step.s - direct.x).norm() <= 2e-5 * system.condition * direct.x.norm()


@every
@given(system=systems(kinds=POSITIVE, max_n=15), power=st.sampled_from([-30, -3, 5, 30]))
def test_scaling_by_powers_of_two_is_exact(solver, system, power):
    factor, radius = 2.0**power, 0.7 * natural(system)
    step = solver(system.A, -system.b, radius)
    stretched = solver(system.A, -system.b * factor, radius * factor)
    assert torch.equal(stretched.s, step.s * factor)
    stiffer = solver(system.A * factor, -system.b, radius / factor)
    assert torch.equal(stiffer.s, step.s / factor)


@every
@given(system=systems(kinds=ALL, max_n=12, dtypes=[torch.float64]), factor=radii)
def test_the_metric_of_the_preconditioner(solver, system, factor):
    """With M = LL' the problem is the Euclidean one in L'AL, s = Lz."""
    n = len(system.b)
    L = torch.eye(n, dtype=torch.float64)
    L += 0.3 * torch.randn(n, n, generator=torch.Generator().manual_seed(0)).double().tril() / n
    radius = factor * natural(system)
    step = solver(system.A, -system.b, radius, M=L @ L.T, rtol=1e-8)
    A, b = L.T @ system.exact @ L, L.T @ system.b
    z = torch.linalg.solve_triangular(L, step.s[:, None], upper=False)[:, 0]
    assert z.norm() <= radius * (1 + 1e-12)
    assert step.norm == pytest.approx(z.norm().item(), rel=1e-10)
    plain = solver((A + A.T) / 2, -b, radius, rtol=1e-8)
    if step.status is plain.status:  # a truncated path may end one iteration apart
        gap = abs(step.predicted_reduction - plain.predicted_reduction)
        assert gap <= 1e-6 * abs(plain.predicted_reduction)


@given(
    st.floats(-150, 150),
    st.floats(-150, 150),
    st.floats(0, 1),
    st.floats(-1, 1),
    st.sampled_from([1.0, 1 - 1e-9, 1 - 2**-53]),
)
@example(0.0, 0.0, 1.0, 0.0, 1.0)
def test_both_step_lengths_to_the_edge_end_on_it(log_radius, log_length, near, cosine, most):
    """|x + tau p| = radius at both roots, whatever the scales, also with x on the edge."""
    from trustregion.solvers.steihaug import to_the_edge

    radius = 10.0**log_radius
    x = torch.tensor([radius * min(near, most), 0.0], dtype=torch.float64)
    p = torch.tensor([cosine, math.sqrt(1 - cosine * cosine)], dtype=torch.float64)
    p = p * 10.0**log_length
    forth, back = to_the_edge(x, x, p, p, radius)
    assert forth >= 0 >= back
    for tau in (forth, back):
        point = (x + tau * p) / radius
        assert point.norm().item() == pytest.approx(1, rel=1e-15 * 4)


@given(systems(kinds=ALL, max_n=20), radii, st.booleans())
def test_products_are_counted_and_a_smaller_radius_costs_none(system, factor, preconditioned):
    radius = factor * natural(system)
    M = (lambda v: 2 * v) if preconditioned else None
    for solver in (steihaug, gltr):
        A = Counting(system.A)
        step = solver(A, -system.b, radius, M=M)
        assert A.products == step.products
        assert step.iterations <= step.products <= step.iterations + 1
    A = Counting(system.A)
    space = lanczos(A, system.b, M=M, max_iter=0)
    first = gltr(A, -system.b, radius, space=space)
    spent = A.products
    assert first.products == spent
    shorter = gltr(A, -system.b, 0.1 * radius, space=space)
    fresh = gltr(system.A, -system.b, 0.1 * radius, M=M)
    assert shorter.products == A.products - spent
    # a shorter step needs no larger space, where the first was not kept from converging
    if first.status is Status.CONVERGED and first.multiplier > 0:
        assert shorter.products <= 1
    rounding = 50 * system.eps * weight(system, fresh.s) + 1e-4 * abs(fresh.predicted_reduction)
    assert shorter.predicted_reduction >= fresh.predicted_reduction - rounding


def test_steihaug_follows_negative_curvature_to_the_lower_end():
    A = torch.diag(torch.tensor([4.0, -1.0], dtype=torch.float64))
    g = torch.tensor([-4.0, -0.5], dtype=torch.float64)
    step = steihaug(A, g, radius=3.0)
    assert (step.status, step.iterations) == (Status.NEGATIVE_CURVATURE, 2)
    assert step.on_boundary
    assert step.norm == pytest.approx(3.0, rel=1e-14)
    assert math.isnan(step.multiplier)
    inside = steihaug(A, g, radius=3.0, max_iter=1)  # where the second direction starts
    ends = []
    x, s = inside.s, step.s
    p = (s - x) / (s - x).norm()
    along = (x @ p).item()
    for sign in (-1, 1):
        tau = -along + sign * math.sqrt(along**2 + 9 - (x @ x).item())
        end = x + tau * p
        ends.append((g @ end + 0.5 * end @ A @ end).item())
    assert -step.predicted_reduction == pytest.approx(min(ends), rel=1e-12)
    along = steihaug(torch.diag(torch.tensor([0.0, -1.0])), torch.tensor([1.0, 0.0]), 2.0)
    assert along.status is Status.ZERO_CURVATURE
    assert torch.equal(along.s, torch.tensor([-2.0, 0.0]))


def test_the_hard_case_needs_what_the_gradient_does_not_see():
    A = torch.diag(torch.tensor([-3.0, -3.0, 1.0, 4.0], dtype=torch.float64))
    g = torch.tensor([0.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    for solver in (gltr, trust_region_dense):
        step = solver(A, g, radius=5.0)
        assert step.hard_case
        assert step.multiplier == pytest.approx(3.0, rel=1e-12)
        torch.testing.assert_close(step.s[2:], torch.tensor([-0.5, -1 / 7]).double())
        assert step.s.norm().item() == pytest.approx(5.0, rel=1e-14)
        near = solver(A, g + torch.tensor([1e-9, 0, 0, 0]).double(), radius=5.0)
        assert near.predicted_reduction >= step.predicted_reduction * (1 - 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_a_saddle_the_exact_solvers_leave_it(dtype):
    A, g = torch.diag(torch.tensor([3.0, -1.0, 2.0], dtype=dtype)), torch.zeros(3, dtype=dtype)
    for solver in (gltr, trust_region_dense):
        step = solver(A, g, radius=2.0)
        assert (step.status, step.on_boundary) == (Status.CONVERGED, True)
        torch.testing.assert_close(step.s.abs(), torch.tensor([0.0, 2.0, 0.0], dtype=dtype))
        assert step.predicted_reduction == pytest.approx(2.0, rel=1e-6)
        Q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))
        turned = solver((Q @ A.float() @ Q.T).to(dtype), g, radius=2.0)
        assert turned.status is Status.CONVERGED  # relative to the multiplier: there is no |g|
        assert turned.predicted_reduction == pytest.approx(2.0, rel=1e-5)
    still = steihaug(A, g, radius=2.0)
    assert (still.status, still.products) == (Status.CONVERGED, 0)
    for solver in SOLVERS:
        resting = solver(A + 2 * torch.eye(3, dtype=dtype), g, radius=2.0)
        assert resting.status is Status.CONVERGED
        assert not resting.s.any()


@pytest.mark.parametrize("solver", [steihaug, gltr])
def test_a_forcing_sequence_is_a_tolerance(solver):
    A, g = torch.diag(torch.logspace(0, 4, 40, dtype=torch.float64)), torch.ones(40).double()
    loose = solver(A, g, 1e3, rtol=forcing_sequence(0.5))
    tight = solver(A, g, 1e3, rtol=1e-8)
    assert loose.products < tight.products
    assert loose.residual_norm <= 0.5 * g.norm()
    assert solver(A, g, 1e3, max_iter=3).status is Status.MAX_ITER


def test_steihaug_takes_the_far_end_where_that_is_lower():
    far = 0
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        A, g = A + A.T, torch.randn(3, generator=generator, dtype=torch.float64)
        step = steihaug(A, g, radius=1.0)
        if step.status is not Status.NEGATIVE_CURVATURE or step.iterations < 2:
            continue
        x = steihaug(A, g, radius=1.0, max_iter=step.iterations - 1).s
        p = (step.s - x) / (step.s - x).norm()
        along = (x @ p).item()
        other = x - (2 * along + (step.s - x).norm()) * p  # the other end of the chord
        assert other.norm().item() == pytest.approx(1, rel=1e-9)
        value = (g @ other + 0.5 * other @ A @ other).item()
        assert -step.predicted_reduction <= value + 1e-12
        far += bool((-g - A @ x) @ p < 0)  # uphill at first, lower at the end
    assert far > 0


def test_steihaug_returns_the_direction_it_followed():
    A = torch.diag(torch.tensor([-1.0, 2.0]))
    step = steihaug(A, torch.tensor([1.0, 0.0]), 1.0)
    assert step.direction @ A @ step.direction < 0
