"""The sketch of the curvature as a preconditioner."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counting import Counting
from preconditioner_rules import damped, spread
from strategies import systems
from trustregion import (
    Identity,
    Nystrom,
    Status,
    cg,
    to_dense,
)
from trustregion.operators import DenseOperator


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
