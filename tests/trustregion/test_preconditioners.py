"""The diagonal, the sketch and the recycled directions as preconditioners."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td
from torch import nn

from counting import Counting
from strategies import DTYPES, POSITIVE, systems
from trustregion import (
    FisherOperator,
    Identity,
    Jacobi,
    Nystrom,
    Status,
    cg,
    to_dense,
)
from trustregion.operators import DenseOperator, FunctionOperator
from trustregion.preconditioners import Preconditioner, Recycled
from trustregion.preconditioners.base import product_work

KINDS = (*POSITIVE, "rank-deficient", "sign-mixed")


def damped(A, damping):
    return A + damping * Identity(A.shape[0], A.dtype)


def spread(n=40, high=4.0, dtype=torch.float64, seed=0):
    """A matrix with eigenvalues from 1 to 10^high, in general position."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    A = (Q * torch.logspace(0, high, n, dtype=torch.float64)) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def learn(rule, A, damping, b, max_iter=15, M=None):
    """Show a rule one solve."""
    solve = cg(damped(rule.watch(A), damping), b, M=M, rtol=1e-9, max_iter=max_iter)
    rule.observe(solve)
    return solve


RULES = {
    "jacobi": Jacobi,
    "exact jacobi": lambda: Jacobi(1.0, probes="exact"),
    "nystrom": lambda: Nystrom(4),
    "recycled": lambda: Recycled(4),
}


def built(name, A, damping, b):
    rule = RULES[name]()
    learn(rule, A, damping, b)
    return rule.build(A, damping)


# -- every M is positive definite, whatever A is


@pytest.mark.parametrize("name", RULES)
@given(systems(kinds=KINDS, max_n=20), st.sampled_from([0.0, 1e-12, 1e-3, 10.0]))
def test_every_inverse_is_symmetric_positive_definite(name, system, damping):
    A = DenseOperator(system.A)
    M = built(name, A, damping * system.scale, system.b)
    assert (M.shape, M.dtype) == (A.shape, A.dtype)
    matrix = to_dense(M).double()
    size = torch.linalg.matrix_norm(matrix, 2)
    assert math.isfinite(size)
    # products in the dtype, with the entries of vectors of unit length; measured: 4 eps
    assert (matrix - matrix.T).abs().max() <= 20 * system.eps * size
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    assert values[0] > 0


@pytest.mark.parametrize("name", RULES)
@given(
    systems(kinds=KINDS, dtypes=[torch.float64], max_n=20),  # nothing underflows
    st.sampled_from([0.0, 1e-3]),
    st.integers(-40, 40),
)
def test_the_scale_of_the_operator_is_of_no_matter(name, system, damping, power):
    damping *= system.scale
    plain = built(name, DenseOperator(system.A), damping, system.b)
    factor = 2.0**power
    scaled = built(name, DenseOperator(system.A * factor), damping * factor, system.b)
    assert torch.equal(to_dense(plain), to_dense(scaled))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_huge_and_tiny_operators(name, dtype):
    scales = (1e-30, 3e38) if dtype is torch.float32 else (1e-300, 1.5e308)
    for scale in scales:
        A = DenseOperator((scale * (spread(8) / 1e4)).to(dtype))
        M = to_dense(built(name, A, 0.0, torch.ones(8, dtype=dtype))).double()
        assert torch.linalg.eigvalsh((M + M.T) / 2)[0] > 0


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("name", RULES)
def test_without_curvature_it_is_a_multiple_of_the_identity(name, damping):
    A, b = DenseOperator(torch.zeros(5, 5)), torch.ones(5)
    M = to_dense(built(name, A, damping, b))
    assert M[0, 0] > 0
    torch.testing.assert_close(M, M[0, 0] * torch.eye(5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("name", RULES)
def test_an_operator_that_is_not_finite_gives_the_identity_and_the_solve_says_so(name, bad):
    # 3e38 is finite, and its products are not
    A, b = DenseOperator(torch.full((5, 5), bad)), torch.ones(5)
    rule = RULES[name]()
    for _ in range(2):
        M = rule.build(A, 0.1)
        if not (name == "exact jacobi" and bad == 3e38):
            assert torch.equal(to_dense(M), torch.eye(5))
        assert learn(rule, A, 0.1, b, M=M).status is Status.NONFINITE_OPERATOR
    good = DenseOperator(torch.diag(torch.arange(1.0, 6.0)))
    learn(rule, good, 0.1, b)
    M = to_dense(rule.build(good, 0.1))  # nothing bad was kept
    assert M.isfinite().all()
    assert not torch.equal(M, torch.eye(5))


@pytest.mark.parametrize("name", RULES)
def test_one_dimension(name):
    M = built(name, DenseOperator(torch.tensor([[3.0]])), 0.5, torch.ones(1))
    assert to_dense(M).item() > 0


@pytest.mark.parametrize("name", RULES)
@given(systems(max_log_condition=3, dtypes=[torch.float64], max_n=20))
def test_the_solution_does_not_depend_on_the_preconditioner(name, system):
    A, damping = DenseOperator(system.A), 1e-3 * system.scale
    M = built(name, A, damping, system.b)
    solve = cg(damped(A, damping), system.b, M=M, rtol=1e-10)
    dense = system.exact + damping * torch.eye(len(system.b), dtype=torch.float64)
    exact = torch.linalg.solve(dense, system.b)
    assert solve.status is Status.CONVERGED
    assert (solve.x - exact).norm() <= 2e-10 * 1e3 * exact.norm()


@pytest.mark.parametrize("name", RULES)
def test_builds_repeat_write_to_nothing_and_leave_the_global_generator_alone(name):
    A, b, state = DenseOperator(spread(10)), torch.ones(10).double(), torch.get_rng_state()
    kept = A.matrix.clone()
    first, second = (to_dense(built(name, A, 0.1, b)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(A.matrix, kept)


@pytest.mark.parametrize("name", RULES)
def test_a_saved_state_goes_on_as_if_it_had_not_stopped(name):
    A, b = DenseOperator(spread(12)), torch.ones(12).double()
    straight, stopped = RULES[name](), RULES[name]()
    for rule in (straight, stopped):
        rule.build(A, 0.1)
        learn(rule, A, 0.1, b)
    resumed = RULES[name]()
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    B = DenseOperator(spread(12, seed=1))
    for _ in range(2):
        assert torch.equal(to_dense(straight.build(B, 0.2)), to_dense(resumed.build(B, 0.2)))
    assert all(isinstance(value, torch.Tensor | int) for value in resumed.state.values())


@pytest.mark.parametrize("name", RULES)
def test_a_model_of_another_size_starts_anew(name):
    rule = RULES[name]()
    for n in (12, 7):
        A, b = DenseOperator(spread(n)), torch.ones(n).double()
        for _ in range(2):
            M = rule.build(A, 0.1)
            assert (M @ b).shape == (n,)
            learn(rule, A, 0.1, b)


@pytest.mark.parametrize("name", RULES)
def test_a_model_of_another_dtype_goes_on(name):
    rule = RULES[name]()
    for dtype in (torch.float64, torch.float32):
        A = DenseOperator(spread(12, dtype=dtype))
        M = rule.build(A, 0.1)
        assert (M @ torch.ones(12, dtype=dtype)).dtype is dtype
        learn(rule, A, 0.1, torch.ones(12, dtype=dtype))


@pytest.mark.parametrize("damping", [-1.0, math.nan, math.inf, None, torch.tensor(1.0)])
@pytest.mark.parametrize("name", RULES)
def test_damping_is_a_finite_number_and_not_negative(name, damping):
    with pytest.raises(ValueError, match="damping must be a finite number and not negative"):
        RULES[name]().build(DenseOperator(torch.eye(3)), damping)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Jacobi(0.0), r"exponent must lie in \(0, 1\], got 0.0"),
        (lambda: Jacobi(1.5), r"exponent must lie in \(0, 1\]"),
        (lambda: Jacobi(decay=1.0), r"decay must lie in \[0, 1\), got 1.0"),
        (lambda: Jacobi(decay=-0.1), r"decay must lie in \[0, 1\)"),
        (lambda: Jacobi(probes=0), "probes must be a positive integer, got 0"),
        (lambda: Jacobi(probes=1.5), "probes must be an integer"),
        (lambda: Jacobi(every=0), "every must be a positive integer"),
        (lambda: Nystrom(0), "rank must be a positive integer, got 0"),
        (lambda: Nystrom(2, every=0), "every must be a positive integer"),
        (lambda: Recycled(0), "rank must be a positive integer, got 0"),
        (lambda: Recycled(-3), "rank must be an integer and not negative"),
    ],
)
def test_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_rule_of_ones_own_needs_a_build_only():
    class Half(Preconditioner):
        def build(self, A, damping):
            return 0.5 * Identity(A.shape[0], A.dtype)

    rule, A, b = Half(), DenseOperator(torch.eye(3)), torch.ones(3)
    assert learn(rule, A, 0.0, b, M=rule.build(A, 0.0)).iterations == 1
    assert (rule.products, rule.overhead, rule.every, rule.work(A)) == (0, 0.0, 1, 0.0)
    assert rule.state_dict() == {}


def test_the_work_of_a_product():
    assert product_work(DenseOperator(torch.eye(10))) == 200.0
    x = torch.randn(7, 3)
    layer = nn.Linear(3, 2)
    F = FisherOperator(td.Normal(layer(x), 1.0), layer.parameters())
    assert product_work(F) == 8 * 7 * 8
    assert Jacobi().work(F) == 0.0
    assert Nystrom(3).work(F) == 4 * 8 * 3 / 448
    assert Nystrom(30).work(F) == 4 * 8 * 8 / 448
    assert Recycled(3).work(F) == 8 * 8 * 3 / 448


# -- the diagonal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_diagonal_matrix_takes_one_iteration(dtype, damping):
    d = torch.logspace(-3, 3, 20, dtype=dtype)
    A, b = DenseOperator(torch.diag(d)), torch.ones(20, dtype=dtype)
    for rule in (Jacobi(1.0, probes="exact"), Jacobi(1.0, probes=1)):
        M = rule.build(A, damping)
        assert cg(damped(A, damping), b, M=M).iterations == 1
        inverse = to_dense(M).diagonal() * (d + damping)
        torch.testing.assert_close(inverse, inverse[:1].expand(20))


@pytest.mark.parametrize("exponent", [0.25, 0.75, 1.0])
def test_it_is_that_power_of_the_damped_diagonal(exponent):
    A = DenseOperator(spread(9))
    M = to_dense(Jacobi(exponent, probes="exact").build(A, 2.0))
    assert torch.equal(M, torch.diag(M.diagonal()))
    expected = (A.matrix.diagonal() + 2.0).pow(-exponent)
    torch.testing.assert_close(M.diagonal() / M[0, 0], expected / expected[0])


def test_entries_without_curvature_are_as_large_as_the_largest():
    A = DenseOperator(torch.diag(torch.tensor([4.0, 0.0, 1.0, -2.0])))
    m = to_dense(Jacobi(1.0, probes="exact").build(A, 0.0)).diagonal()
    assert torch.equal(m / m[0], torch.tensor([1.0, 1.0, 4.0, 1.0]))
    m = to_dense(Jacobi(1.0, probes="exact").build(A, 1.0)).diagonal()
    torch.testing.assert_close(m / m[0], torch.tensor([1.0, 5.0, 2.5, 5.0]))


def test_entries_far_apart_stay_finite():
    for dtype, tiny in ((torch.float32, 1e-42), (torch.float64, 1e-315)):
        A = DenseOperator(torch.diag(torch.tensor([1.0, tiny], dtype=dtype)))
        m = to_dense(Jacobi(1.0, probes="exact").build(A, 0.0)).diagonal()
        assert m.isfinite().all()
        assert m[1] > 1e15 * m[0]


@pytest.mark.parametrize(("probes", "each"), [("exact", 6), (1, 1), (3, 3)])
@pytest.mark.parametrize("every", [1, 3])
def test_products_of_a_diagonal_are_counted(probes, each, every):
    A, rule, spent = Counting(spread(6)), Jacobi(probes=probes, every=every), []
    for _ in range(4):
        rule.build(A, 0.1)
        spent.append(rule.products)
    assert spent == ([each] * 4 if every == 1 else [each, 0, 0, each])
    assert A.products == sum(spent)
    assert rule.overhead == 0.0


def test_estimates_are_averaged():
    rule = Jacobi(1.0, probes="exact", decay=0.75)
    first, second = torch.tensor([1.0, 4.0]).double(), torch.tensor([9.0, 4.0]).double()
    rule.build(DenseOperator(torch.diag(first)), 0.0)
    rule.build(DenseOperator(torch.diag(second)), 0.0)
    torch.testing.assert_close(rule.state["diagonal"], 0.75 * first + 0.25 * second)
    rule = Jacobi(1.0, probes="exact", decay=0.0)
    for d in (first, second):
        rule.build(DenseOperator(torch.diag(d)), 0.0)
    assert torch.equal(rule.state["diagonal"], second)


def test_the_damping_of_a_reused_diagonal_is_that_of_each_solve():
    A, rule = DenseOperator(torch.diag(torch.tensor([1.0, 3.0]))), Jacobi(1.0, every=9)
    for damping in (0.0, 1.0, 7.0):
        m = to_dense(rule.build(A, damping)).diagonal()
        assert (m[0] / m[1]).item() == pytest.approx((3 + damping) / (1 + damping))


def test_draws_differ_from_build_to_build_and_from_seed_to_seed():
    A = DenseOperator(spread(8))
    rule = Jacobi(probes=1, decay=0.0)
    first, second = (to_dense(rule.build(A, 0.1)) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, to_dense(Jacobi(probes=1, decay=0.0, seed=1).build(A, 0.1)))


def fisher(n=40, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    x = torch.randn(n, 4, dtype=dtype) * torch.logspace(-1.5, 1.5, 4, dtype=dtype)
    return model, FisherOperator(td.Categorical(logits=model(x)), model.parameters())


def test_the_estimate_of_a_fisher_matrix_is_unbiased_at_half_a_product_a_probe():
    _, F = fisher()
    exact = to_dense(F).diagonal()
    draws = []
    for seed in range(400):
        rule = Jacobi(probes=2, seed=seed)
        rule.build(F, 0.1)
        draws.append(rule.state["diagonal"])
    assert (rule.products, rule.overhead) == (0, 1.0)
    rule.build(F, 0.1)
    assert rule.overhead == 1.0
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 20
    assert (torch.stack(draws) >= 0).all()
    assert ((mean - exact).abs() <= 5 * error).all()


def test_it_saves_iterations_where_parameters_differ_in_scale():
    d = torch.logspace(-2, 2, 40, dtype=torch.float64)
    A, b = DenseOperator(d.unsqueeze(1) * spread(high=0.5) * d), d
    for exponent, factor in ((1.0, 0.2), (0.75, 0.5)):
        M = Jacobi(exponent, probes="exact").build(A, 0.0)
        assert cg(A, b, M=M).iterations < factor * cg(A, b).iterations


# -- the sketch


@given(systems(max_log_condition=6, dtypes=[torch.float64], max_n=25), st.integers(0, 3))
def test_a_sketch_of_full_rank_is_the_inverse(system, more):
    n = len(system.b)
    A, damping = DenseOperator(system.A), 1e-4 * system.scale
    M = Nystrom(n + more).build(A, damping)
    solve = cg(damped(A, damping), system.b, M=M, rtol=1e-6)
    assert solve.status is Status.CONVERGED
    assert solve.iterations <= 2
    dense = system.exact + damping * torch.eye(n, dtype=torch.float64)
    product = to_dense(M) @ dense
    # the rounding of the damped inverse, whose condition is 1e4 at most
    unit = product[0, 0] * torch.eye(n, dtype=torch.float64)
    assert (product - unit).abs().max() <= 1e-8 * product[0, 0]


def test_a_sketch_of_the_rank_is_exact():
    d = torch.tensor([9.0, 5.0, 2.0] + [0.0] * 12, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(15, 15, dtype=torch.float64)).Q
    A, b = DenseOperator((Q * d) @ Q.T), torch.ones(15, dtype=torch.float64)
    rule = Nystrom(3)
    M = rule.build(A, 0.1)
    torch.testing.assert_close(rule.state["values"], d[:3])
    U = Q[:, :3]
    weights = (2.0 + 0.1) / (d[:3] + 0.1)
    expected = (U * weights) @ U.T + torch.eye(15, dtype=torch.float64) - U @ U.T
    torch.testing.assert_close(to_dense(M), expected)
    assert cg(damped(A, 0.1), b, M=M).iterations == 2  # the smallest of them, and the damping
    over = Nystrom(8)  # what is above the rank is rounding, and left out
    over.build(A, 0.1)
    torch.testing.assert_close(over.state["values"], d[:3])


@pytest.mark.parametrize(("rank", "products"), [(3, 3), (6, 6), (50, 6)])
@pytest.mark.parametrize("every", [1, 2])
def test_products_of_a_sketch_are_counted(rank, products, every):
    A, rule, spent = Counting(spread(6)), Nystrom(rank, every=every), []
    for _ in range(4):
        rule.build(A, 0.1)
        spent.append(rule.products)
        assert (rule.overhead > 0) == (rule.products > 0)
    assert spent == ([products] * 4 if every == 1 else [products, 0] * 2)
    assert A.products == sum(spent)


def test_the_damping_of_a_reused_sketch_is_that_of_each_solve():
    A, rule = DenseOperator(torch.diag(torch.tensor([8.0, 2.0]).double())), Nystrom(2, every=9)
    for damping in (0.0, 1.0, 4.0):
        m = to_dense(rule.build(A, damping)).diagonal()
        assert (m[0] / m[1]).item() == pytest.approx((2 + damping) / (8 + damping))


def test_negative_curvature_is_left_out_of_a_sketch():
    A = DenseOperator(torch.diag(torch.tensor([-50.0, 4.0, 1.0, 0.0]).double()))
    rule = Nystrom(4)
    rule.build(A, 0.1)
    torch.testing.assert_close(rule.state["values"], torch.tensor([4.0, 1.0]).double())
    assert isinstance(Nystrom(3).build(-1.0 * Identity(4), 0.1), Identity)


def test_draws_of_a_sketch_differ():
    A, rule = DenseOperator(spread(12)), Nystrom(3, every=1)
    first, second = (to_dense(rule.build(A, 0.1)) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, to_dense(Nystrom(3, seed=1).build(A, 0.1)))


# -- the recycled directions


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_repeated_system_takes_fewer_iterations_at_no_product(dtype):
    A, b, rule = Counting(spread(dtype=dtype)), torch.ones(40, dtype=dtype), Recycled(10)
    iterations = []
    for _ in range(3):
        M = rule.build(A, 0.1)
        assert rule.products == 0
        solve = cg(damped(rule.watch(A), 0.1), b, M=M, rtol=1e-3)
        rule.observe(solve)
        iterations.append(solve.iterations)
        assert A.products == solve.products
        A.products = 0
    assert iterations[1] < 0.8 * iterations[0]


def test_a_slowly_changing_system_takes_fewer_iterations():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(60, 60, generator=g, dtype=torch.float64)
    rule, plain, recycled = Recycled(10), 0, 0
    d = torch.cat([torch.logspace(2, 4, 8), torch.linspace(1, 2, 52)]).double()
    for t in range(6):
        Q = torch.linalg.qr(X + 0.001 * t * torch.eye(60)).Q
        A, b = DenseOperator((Q * d) @ Q.T), torch.randn(60, generator=g, dtype=torch.float64)
        plain += cg(A, b).iterations
        solve = cg(rule.watch(A), b, M=rule.build(A, 0.0))
        rule.observe(solve)
        recycled += solve.iterations
    assert recycled < 0.8 * plain


def test_the_first_solve_has_nothing_to_recycle():
    rule = Recycled()
    assert isinstance(rule.build(DenseOperator(spread(5)), 0.0), Identity)
    assert (rule.products, rule.overhead) == (0, 0.0)


@pytest.mark.parametrize("damping", [0.0, 3.0])
def test_on_the_span_all_eigenvalues_are_the_smallest_ritz_value(damping):
    A, b = DenseOperator(spread(12, 2.0)), torch.ones(12).double()
    rule = Recycled(4)
    learn(rule, A, 1.0, b)
    assert rule.state["directions"].shape == (12, 4)
    P = rule.state["directions"]
    torch.testing.assert_close(A.matrix @ P, rule.state["images"])
    H = A.matrix + damping * torch.eye(12, dtype=torch.float64)
    M = to_dense(rule.build(A, damping))
    theta = torch.linalg.eigvalsh(P.T @ H @ P)[0]
    torch.testing.assert_close(M @ H @ P, theta * P)
    X = torch.randn(12, 3, dtype=torch.float64)
    X -= P @ torch.linalg.solve(P.T @ H @ P, P.T @ H @ X)  # conjugate to the directions
    # and nothing else changes: up to directions, M is the inverse's own on what is left
    torch.testing.assert_close(P.T @ H @ M @ H @ X, torch.zeros(4, 3).double(), atol=1e-8, rtol=0)
    assert rule.overhead > 0


@pytest.mark.parametrize("rank", [1, 3, 50])
def test_no_more_directions_are_kept_than_asked(rank):
    A, rule = DenseOperator(spread(8)), Recycled(rank)
    learn(rule, A, 0.1, torch.ones(8).double(), max_iter=6)
    assert rule.state["directions"].shape == (8, min(rank, 6))


def test_a_watched_operator_keeps_copies_and_says_the_same():
    A, rule = DenseOperator(spread(6)), Recycled(2)
    eye, buffer = rule.watch(A), torch.ones(6, dtype=torch.float64)
    assert torch.equal(eye @ buffer, A @ buffer)
    buffer.zero_()
    eye.mv(buffer)  # a zero vector is not a direction
    rule.observe(cg(A, torch.ones(6).double()))
    direction = rule.state["directions"]
    torch.testing.assert_close(direction.abs(), torch.full((6, 1), 6**-0.5).double())
    rule.observe(cg(A, torch.ones(6).double()))  # nothing was watched: nothing changes
    assert rule.state["directions"] is direction


def test_images_near_overflow_stay_in_range():
    d = torch.tensor([1.5e308, 1e308, 1.0], dtype=torch.float64)
    A, rule = DenseOperator(torch.diag(d)), Recycled(2)
    watched = rule.watch(A)
    for v in torch.eye(3).double()[:2]:
        watched.mv(v)
    rule.observe(cg(A, torch.ones(3).double()))
    expected = torch.diag(torch.tensor([2 / 3, 1.0, 1.0]).double())
    torch.testing.assert_close(to_dense(rule.build(A, 0.0)), expected)


def test_directions_that_repeat_are_kept_once():
    A, rule, v = DenseOperator(spread(6)), Recycled(5), torch.ones(6).double()
    watched = rule.watch(A)
    w = torch.arange(6.0).double()
    for direction in (v, 2 * v, w, v + 1e-12 * w):
        watched.mv(direction)
    rule.observe(cg(A, v))
    P = rule.state["directions"]
    assert P.shape == (6, 2)
    torch.testing.assert_close(A.matrix @ P, rule.state["images"])


def test_directions_of_negative_curvature_are_left_out():
    A = DenseOperator(torch.diag(torch.tensor([-5.0, 3.0, 2.0]).double()))
    rule, eye = Recycled(3), torch.eye(3).double()
    watched = rule.watch(A)
    for v in eye:
        watched.mv(v)
    rule.observe(cg(A, eye[1]))
    M = to_dense(rule.build(A, 0.0))
    torch.testing.assert_close(M, torch.diag(torch.tensor([1.0, 2 / 3, 1.0]).double()))


def test_a_solve_that_fails_leaves_what_was_known():
    A, b, rule = DenseOperator(spread(6)), torch.ones(6).double(), Recycled(3)
    learn(rule, A, 0.1, b)
    known = rule.state["directions"]
    bad = FunctionOperator(lambda v: v * math.nan, 6, torch.float64)
    learn(rule, bad, 0.1, b)
    assert rule.state["directions"] is known
