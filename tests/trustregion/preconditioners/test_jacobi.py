"""The diagonal preconditioner."""

import pytest
import torch
from torch import distributions as td
from torch import nn

from counting import Counting
from preconditioner_rules import damped, spread
from strategies import DTYPES
from trustregion import (
    FisherOperator,
    Jacobi,
    cg,
    to_dense,
)
from trustregion.operators import DenseOperator


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
