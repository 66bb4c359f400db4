"""Laws of every preconditioner that is built from products."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions as td
from torch import nn

from preconditioner_rules import damped, learn, spread
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
from trustregion.operators import DenseOperator
from trustregion.preconditioners import Preconditioner, Recycled
from trustregion.preconditioners.base import product_work

KINDS = (*POSITIVE, "rank-deficient", "sign-mixed")


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
def test_the_scale_of_the_operator_does_not_matter(name, system, damping, power):
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
def test_a_saved_state_continues_as_if_it_had_not_stopped(name):
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
def test_a_model_of_another_size_starts_over(name):
    rule = RULES[name]()
    for n in (12, 7):
        A, b = DenseOperator(spread(n)), torch.ones(n).double()
        for _ in range(2):
            M = rule.build(A, 0.1)
            assert (M @ b).shape == (n,)
            learn(rule, A, 0.1, b)


@pytest.mark.parametrize("name", RULES)
def test_a_model_of_another_dtype_continues(name):
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
def test_wrong_arguments_are_refused_in_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_custom_rule_needs_only_build():
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
