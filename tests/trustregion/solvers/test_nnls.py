"""Laws of small least squares problems under inequalities."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.optimize import nnls as scipy_nnls

from strategies import DTYPES
from trustregion import Status
from trustregion.solvers.lowest import lowest_in_ball
from trustregion.solvers.nnls import least_distance, nnls

EPS = torch.finfo(torch.float64).eps


@st.composite
def matrices(draw, max_rows=8, max_columns=8, dtypes=(torch.float64,)):
    """A matrix and a right-hand side, in places parallel, opposite, zero, or of another scale."""
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, max_columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    A = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    b = torch.randn(rows, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["plain", "parallel", "opposite", "zero", "in the range"]))
    if kind == "parallel":
        A[:, -1] = 3 * A[:, 0]
    elif kind == "opposite":
        A[:, -1] = -A[:, 0]
    elif kind == "zero":
        A[:, -1] = 0
    elif kind == "in the range":
        b = A @ torch.rand(columns, generator=generator, dtype=torch.float64)
    A *= 10 ** draw(st.floats(-6, 6))
    dtype = draw(st.sampled_from(dtypes))
    return A.to(dtype), b.to(dtype)


@given(matrices(dtypes=tuple(DTYPES)))
def test_the_residual_is_the_least(problem):
    A, b = (x.double() for x in problem)
    solution = nnls(*problem)
    x = solution.x.double()
    other, best = scipy_nnls(A.numpy(), b.numpy())
    assert solution.status is Status.CONVERGED
    assert (x >= 0).all()
    eps = torch.finfo(problem[0].dtype).eps
    extent = b.norm() + (A.norm(dim=0) * (x + torch.from_numpy(other))).sum()
    # convexity: the squares differ by the gradient at most, which is zero to the rounding of A'r
    room = 200 * EPS * b.norm() * extent
    assert solution.residual_norm**2 <= best**2 + room
    assert best**2 <= solution.residual_norm**2 + room
    rounding = 10 * eps * extent  # that of x in its dtype
    assert abs((A @ x - b).norm() - solution.residual_norm) <= rounding


def test_more_least_squares_problems_never_make_it_worse():
    for seed in range(60):  # few of them ever have to give a variable up again
        generator = torch.Generator().manual_seed(seed)
        A, b = (torch.randn(*shape, generator=generator).double() for shape in ((3, 3), (3,)))
        sizes = [nnls(A, b, max_iter=limit).residual_norm for limit in range(8)]
        assert all(after <= before + 100 * EPS for before, after in itertools.pairwise(sizes))


def test_small_variables_are_not_lost():
    b = torch.tensor([1.0, 1e-13]).double()
    assert torch.equal(nnls(torch.eye(2).double(), b).x, b)


@given(matrices())
def test_the_conditions_of_optimality_hold(problem):
    """x >= 0, gradient >= 0, one of the two zero."""
    A, b = problem
    x = nnls(A, b).x
    gradient = A.T @ (A @ x - b)
    room = 200 * EPS * A.norm(dim=0) * (b.norm() + A.norm() * x.norm())
    assert (gradient >= -room).all()
    assert (gradient[x > 0].abs() <= room[x > 0]).all()


@given(matrices(), st.integers(-200, 200), st.integers(-200, 200))
def test_scaling_by_powers_of_two_is_exact(problem, A_power, b_power):
    A, b = problem
    plain, scaled = nnls(A, b), nnls(A * 2.0**A_power, b * 2.0**b_power)
    assert torch.equal(scaled.x, plain.x * 2.0 ** (b_power - A_power))
    assert scaled.residual_norm == plain.residual_norm * 2.0**b_power


@given(matrices(), st.integers(0, 5))
def test_a_limit_gives_the_best_so_far(problem, limit):
    A, b = problem
    full, solution = nnls(A, b), nnls(A, b, max_iter=limit)
    assert solution.iterations <= limit
    assert (solution.status is Status.MAX_ITER) == (full.iterations > limit)
    assert (solution.x >= 0).all()
    assert solution.residual_norm <= b.norm() * (1 + 10 * EPS)
    assert solution.residual_norm == pytest.approx(
        (A @ solution.x - b).norm().item(), rel=1e-6, abs=1e-9
    )


def test_one_least_squares_problem_for_each_change_of_the_free_set():
    b = torch.tensor([3.0, 2.0, -1.0])
    assert nnls(torch.eye(3), b).iterations == 2
    assert nnls(torch.eye(3), -b.abs()).iterations == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_input_that_is_not_finite_gives_zero(bad):
    A, b = torch.eye(2), torch.tensor([1.0, bad])
    for solution in (nnls(A, b), nnls(A * b, torch.ones(2))):
        assert solution.status is Status.NONFINITE_INPUT
        assert torch.equal(solution.x, torch.zeros(2))
    assert least_distance(A, b).status is Status.NONFINITE_INPUT
    assert least_distance(A * b, torch.ones(2)).status is Status.NONFINITE_INPUT


def test_a_solution_that_overflows_is_named():
    solution = nnls(torch.eye(2) * 1e-30, torch.ones(2) * 1e30)
    assert solution.status is Status.NONFINITE_OPERATOR
    assert torch.equal(solution.x, torch.zeros(2))
    assert solution.residual_norm == pytest.approx(2**0.5 * 1e30)
    point = least_distance(torch.eye(2) * 1e-30, torch.ones(2) * 1e30)
    assert point.status is Status.NONFINITE_OPERATOR
    assert torch.equal(point.x, torch.zeros(2))


@given(st.lists(st.floats(), min_size=6, max_size=6), st.lists(st.floats(), min_size=3, max_size=3))
def test_no_input_gives_a_nan(entries, b):
    A, b = torch.tensor(entries, dtype=torch.float64).view(3, 2), torch.tensor(b).double()
    solution, point = nnls(A, b), least_distance(A, b)
    assert solution.x.isfinite().all()
    assert not math.isnan(solution.residual_norm)
    assert point.x.isfinite().all()
    assert point.multipliers.isfinite().all()


# The shortest point of a polyhedron


@given(matrices(max_rows=6, max_columns=5, dtypes=tuple(DTYPES)))
def test_the_shortest_point_obeys_its_conditions(problem):
    """G x >= h, x = G'lambda, lambda >= 0 only where G x = h: sufficient for the shortest."""
    G, h = (x.double() for x in problem)
    point = least_distance(*problem)
    eps = torch.finfo(problem[0].dtype).eps
    if point.status is Status.CONVERGED:
        x, multipliers = point.x.double(), point.multipliers.double()
        room = 1e3 * eps * (h.abs() + G.norm(dim=1) * x.norm())
        assert (G @ x >= h - room).all()
        assert (multipliers >= 0).all()
        assert (multipliers[~point.active] == 0).all()
        assert ((G @ x - h)[point.active].abs() <= room[point.active]).all()
        pull = (G.norm(dim=1) * multipliers).sum()
        assert (G.T @ multipliers - x).norm() <= 1e3 * eps * (pull + x.norm())
        assert torch.linalg.matrix_rank(G[point.active]) == point.active.sum()
    else:
        # bounds that a single point met can contradict each other once in float32
        assert point.status in (Status.INFEASIBLE, Status.STAGNATED)
        assert point.status is Status.INFEASIBLE or problem[0].dtype is torch.float32
        assert not point.x.any()


@given(matrices(max_rows=6, max_columns=4))
def test_a_polyhedron_is_empty_if_a_linear_program_says_so(problem):
    G, h = problem
    sizes = G.norm(dim=1, keepdim=True)
    rows = (G / sizes.where(sizes > 0, 1)).numpy()
    bounds = (h / sizes.squeeze(1).where(sizes.squeeze(1) > 0, 1)).numpy()
    n = G.shape[1]
    found = linprog([0.0] * n, A_ub=-rows, b_ub=-bounds, bounds=[(None, None)] * n)
    assert (found.status == 2) == (least_distance(G, h).status is Status.INFEASIBLE)


@given(matrices(), st.integers(-200, 200), st.integers(-200, 200))
def test_the_scale_of_a_polyhedron_is_exact(problem, G_power, h_power):
    G, h = problem
    plain, scaled = least_distance(G, h), least_distance(G * 2.0**G_power, h * 2.0**h_power)
    assert torch.equal(scaled.x, plain.x * 2.0 ** (h_power - G_power))
    assert torch.equal(scaled.multipliers, plain.multipliers * 2.0 ** (h_power - 2 * G_power))


def test_contradictions_and_what_is_only_nearly_one():
    G, h = torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([1.0, -1.0]).double()
    assert least_distance(G, h + 1e-6).status is Status.INFEASIBLE
    met = least_distance(G, h)
    assert met.status is Status.CONVERGED
    assert met.x.item() == pytest.approx(1.0)
    thin = torch.tensor([[1.0, 1e-4], [-1.0, 1e-4]]).double()  # a wedge from the height 1e4 on
    assert least_distance(thin, torch.ones(2).double()).x.tolist() == pytest.approx([0.0, 1e4])
    thin[:, 1] = 1e-9
    assert least_distance(thin, torch.ones(2).double()).status is Status.INFEASIBLE


@pytest.mark.parametrize("noise", [0.0, 1e-16, -1e-16, 1e-12, -1e-12])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_of_rows_parallel_but_for_rounding_one_is_active(sign, noise):
    G = torch.tensor([[1.0, 2.0], [3.0 * sign, 6.0 * sign + noise], [0.5, 1.0]]).double()
    point = least_distance(G, G @ torch.tensor([1.0, 2.0]).double() - 1e-17)
    assert point.status is Status.CONVERGED
    assert point.x.tolist() == pytest.approx([1.0, 2.0])
    assert (G.T @ point.multipliers).tolist() == pytest.approx([1.0, 2.0])


def test_bounds_that_one_point_met_before_they_were_rounded():
    """In float32 they may contradict each other by 1e-8: a point to that, or none."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        G = torch.randn(4, 1 + seed % 2, generator=generator)
        if seed % 4 == 3:
            G[:, 1] = 3 * G[:, 0]
        h = G @ torch.rand(G.shape[1], generator=generator)
        point = least_distance(G, h)
        assert point.status in (Status.CONVERGED, Status.INFEASIBLE, Status.STAGNATED)
        if point.status is Status.CONVERGED:
            assert (G @ point.x >= h - 1e-5 * (h.abs() + G.norm(dim=1) * point.x.norm())).all()
            pull = (G.norm(dim=1) * point.multipliers).sum() + point.x.norm()
            assert (G.T @ point.multipliers - point.x).norm() <= 1e-4 * pull


@pytest.mark.parametrize("seed", [73, 227, 440, 463, 608, 665])
def test_more_rows_than_dimensions_through_one_point(seed):
    """Nearly parallel rows in float32, all met by one point: only independent ones are active."""
    generator = torch.Generator().manual_seed(seed)
    n = 1 + seed % 3
    G = torch.randn(n + 1 + seed % 2, n, generator=generator)
    for i in range(1, len(G)):
        if torch.rand(1, generator=generator) < 0.5:
            factor = 10 ** (3 * torch.rand(1, generator=generator))
            G[i] = factor * G[0] * (1 if torch.rand(1, generator=generator) < 0.7 else -1)
    G = torch.nn.functional.normalize(G.double())
    h = G @ torch.randn(n, generator=generator).double()
    point = least_distance(G, h)
    assert point.status in (Status.CONVERGED, Status.STAGNATED, Status.INFEASIBLE)
    assert point.active.sum() <= n
    if point.status is Status.CONVERGED:
        assert (G @ point.x >= h - 1e-9).all()


def test_bounds_that_are_none_and_normals_that_are_zero():
    G = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    point = least_distance(G, torch.tensor([2.0, -math.inf, -1.0]))
    assert point.x.tolist() == [2.0, 0.0]
    assert point.multipliers.tolist() == [2.0, 0.0, 0.0]
    assert least_distance(G, torch.tensor([2.0, 0.0, 0.0])).status is Status.CONVERGED
    assert least_distance(G, torch.tensor([2.0, 0.0, 1e-30])).status is Status.INFEASIBLE
    inside = least_distance(G, torch.tensor([-2.0, 0.0, 0.0]))
    assert (inside.status, inside.x.tolist()) == (Status.CONVERGED, [0.0, 0.0])
    assert not inside.active.any()


# A linear function over a ball and a polyhedron


def least_on(c, G, h):
    """The least c'y over every active set."""
    values = []
    for size in range(len(h) + 1):
        for active in map(list, itertools.combinations(range(len(h)), size)):
            inverse = torch.linalg.pinv(G[active])
            foot, flat = inverse @ h[active], c - inverse @ (G[active] @ c)
            points = [foot]
            if flat.norm() > 1e-9:
                points.append(foot - (1 - foot @ foot).clamp(min=0).sqrt() * flat / flat.norm())
            values += [c @ y for y in points if y.norm() <= 1 + 1e-9 and (G @ y >= h - 1e-9).all()]
    return min(values).item() if values else None


@given(matrices(max_rows=5, max_columns=5), st.sampled_from(["", "like", "against"]))
def test_the_lowest_point_of_the_ball(problem, kind):
    G, h = problem
    G = torch.nn.functional.normalize(G)
    h = h / 2
    c = torch.nn.functional.normalize(torch.linspace(-1, 2, G.shape[1]).double(), dim=0)
    if kind and bool(G[0].any()):
        c = G[0] if kind == "like" else -G[0]
    point, best = lowest_in_ball(c, G, h, 1e-13), least_on(c, G, h)
    assert (best is None) == (point.status is Status.INFEASIBLE)
    assert point.y.norm() <= 1 + 4 * EPS
    if best is not None:
        assert point.status is Status.CONVERGED
        assert (G @ point.y >= h - 1e-9).all()
        assert (c @ point.y).item() == pytest.approx(best, abs=1e-7)
        pull = c + point.ball_multiplier * point.y - G.T @ point.multipliers
        assert pull.norm() <= 1e-9 * (1 + point.ball_multiplier + point.multipliers.sum())


def lowest(c, G, h):
    c, G, h = (torch.tensor(x).double() for x in (c, G, h))
    return lowest_in_ball(c, G, h, 1e-13)


def test_a_vertex_on_the_way_is_left_again():
    """The point of the polyhedron nearest to -c is a vertex, the minimiser is on one edge of it."""
    point = lowest([1.0, 0.0], [[0.8, 0.6], [0.0, 1.0]], [-0.6, 0.2])
    assert point.y.tolist() == pytest.approx([-0.96, 0.28])
    assert point.multipliers[0] > point.multipliers[1] == 0


def test_without_an_objective_nothing_pulls_even_where_one_point_is_left():
    point = lowest([0.0, 0.0], [[0.0, 1.0]], [1.0])
    assert point.y.tolist() == [0.0, 1.0]
    assert (point.multipliers.tolist(), point.ball_multiplier) == ([0.0], 0.0)


def test_what_is_met_anyway_does_not_count_in_a_contradiction():
    G = [[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    point = lowest([1.0, 0.0], G, [0.5, 0.25, -5.0, 1.0])
    assert point.status is Status.INFEASIBLE
    assert point.y.tolist() == pytest.approx([0.125, 0.0], abs=1e-7)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nnls(torch.eye(2), [1.0, 2.0]), TypeError, "b must be a float32 or float64"),
        (lambda: nnls(torch.eye(2), torch.ones(2, 2)), ValueError, "b must be a vector"),
        (lambda: nnls(torch.eye(3), torch.ones(2)), ValueError, "A must be a matrix of 2 rows"),
        (lambda: nnls(torch.ones(2), torch.ones(2)), ValueError, r"got \(2,\), torch.float32"),
        (lambda: nnls(torch.eye(2), torch.ones(2).double()), ValueError, "of dtype torch.float64"),
        (lambda: nnls("A", torch.ones(2)), ValueError, "got str"),
        (lambda: nnls(torch.eye(2), torch.ones(2), max_iter=-1), ValueError, "max_iter"),
        (lambda: least_distance(torch.eye(2), [1.0]), TypeError, "h must be"),
        (lambda: least_distance(torch.eye(3), torch.ones(2)), ValueError, "G must be a matrix"),
    ],
)
def test_wrong_arguments_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_no_columns_and_no_constraints_are_allowed():
    assert nnls(torch.ones(2, 0), torch.ones(2)).residual_norm == pytest.approx(2**0.5)
    assert least_distance(torch.ones(0, 2), torch.ones(0)).x.tolist() == [0.0, 0.0]


def test_a_minimiser_that_rounding_hides_is_not_claimed():
    """The lowest point of a wedge of 1e-9 is its tip, which is far from a point below it."""
    G = torch.tensor([[1.0, 1e-9], [-1.0, 1e-9]]).double()
    point = lowest_in_ball(torch.tensor([0.0, 1.0]).double(), G, torch.zeros(2).double(), 1e-13)
    assert point.status is Status.STAGNATED
    assert point.y.tolist() == [0.0, 0.0]
