"""Diagonal, trace and largest eigenvalues against dense matrices."""

import builtins
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import cg as scipy_cg
from scipy.sparse.linalg import eigsh

from counting import Counting
from strategies import DTYPES, POSITIVE, systems
from trustregion import Status, to_scipy
from trustregion.operators import DenseOperator, FunctionOperator
from trustregion.solvers import diagonal, largest_eigenvalues, trace

KINDS = (*POSITIVE, "rank-deficient", "sign-mixed")


def symmetric(n, seed=0, dtype=torch.float64):
    X = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (X + X.T).to(dtype)


class Blocks(DenseOperator):
    """Keeps the widths of the blocks it is given."""

    def __init__(self, matrix):
        super().__init__(matrix)
        self.widths = []

    def mm(self, V):
        self.widths.append(V.shape[1])
        return super().mm(V)


# -- diagonal and trace


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 5, 64, 65, 130])
def test_diagonal_and_trace_are_exact(n, dtype):
    A = symmetric(n, dtype=dtype)
    d = diagonal(DenseOperator(A))
    assert d.dtype is dtype
    assert torch.equal(d, A.diagonal())
    assert trace(DenseOperator(A)) == A.diagonal().double().sum().item()


def test_an_exact_diagonal_takes_n_products_in_blocks_of_bounded_width():
    A = Blocks(symmetric(130))
    diagonal(A)
    assert A.widths == [64, 64, 2]
    A = FunctionOperator((counted := Counting(symmetric(5))).mv, 5, torch.float64)
    diagonal(A)
    assert counted.products == 5


def test_an_estimate_takes_as_many_products_as_probes():
    A = Counting(symmetric(9))
    diagonal(A, probes=4)
    trace(A, probes=3)
    assert A.products == 7


@pytest.mark.parametrize("probes", [1, 4])
def test_estimates_are_unbiased_with_the_stated_variance(probes):
    A, runs = symmetric(6), 4000
    op = DenseOperator(A)
    d = torch.stack([diagonal(op, probes=probes, seed=seed) for seed in range(runs)])
    t = torch.tensor([trace(op, probes=probes, seed=seed) for seed in range(runs)])
    off = A.square().sum(dim=1) - A.diagonal().square()
    expected = off / probes
    # five standard errors of the mean; of a variance the relative one is about sqrt(2 / runs)
    assert ((d.mean(0) - A.diagonal()).abs() <= 5 * (expected / runs).sqrt()).all()
    torch.testing.assert_close(d.var(0), expected, rtol=0.15, atol=0.0)
    total = 2 * off.sum() / probes
    assert abs(t.mean() - A.trace()) <= 5 * (total / runs).sqrt()
    assert t.var().item() == pytest.approx(total.item(), rel=0.2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_estimate_is_exact_for_a_diagonal_matrix(dtype):
    d = torch.tensor([3.0, -1.0, 0.0, 0.5], dtype=dtype)
    assert torch.equal(diagonal(DenseOperator(torch.diag(d)), probes=1), d)
    assert trace(DenseOperator(torch.diag(d)), probes=1) == 2.5


@given(
    systems(kinds=KINDS, dtypes=[torch.float64]),  # nothing underflows
    st.integers(-60, 60),
    st.sampled_from([None, 3]),
)
def test_diagonals_scale_exactly(system, power, probes):
    scaled = diagonal(DenseOperator(system.A * 2.0**power), probes=probes)
    assert torch.equal(scaled, diagonal(DenseOperator(system.A), probes=probes) * 2.0**power)


def test_estimates_repeat_and_leave_the_global_generator_alone():
    A, state = DenseOperator(symmetric(7)), torch.get_rng_state()
    first = diagonal(A, probes=3, seed=5)
    assert torch.equal(first, diagonal(A, probes=3, seed=5))
    assert not torch.equal(first, diagonal(A, probes=3, seed=6))
    largest_eigenvalues(A, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("probes", [0, -1, 1.5, True])
def test_probes_are_a_positive_integer(probes):
    A = DenseOperator(symmetric(3))
    for function in (diagonal, trace):
        with pytest.raises(ValueError, match="probes must be"):
            function(A, probes=probes)


def test_a_diagonal_says_where_the_operator_is_not_finite():
    A = torch.eye(3)
    A[1, 1] = math.nan
    assert diagonal(DenseOperator(A)).isnan().any()


# -- largest eigenvalues


@given(systems(kinds=KINDS, max_n=25), st.integers(1, 4))
def test_every_pair_has_the_residual_it_says(system, k):
    n = len(system.b)
    k = min(k, n)
    top = largest_eigenvalues(DenseOperator(system.A), k)
    values, vectors = top.values, top.vectors.double()
    assert values.shape == (k,)
    assert vectors.shape == (n, k)
    assert top.vectors.dtype is system.A.dtype
    assert (values[1:] <= values[:-1]).all()
    size = torch.linalg.matrix_norm(system.exact, 2).item()
    # a product in the dtype, and vectors rounded to it
    noise = 4 * n**0.5 * system.eps * size
    true = torch.linalg.vector_norm(system.exact @ vectors - vectors * values, dim=0)
    assert ((true - top.residuals).abs() <= noise).all()
    gram = vectors.T @ vectors
    assert (gram - torch.eye(k, dtype=torch.float64)).abs().max() <= 4 * n * system.eps
    spectrum = torch.linalg.eigvalsh(system.exact)
    gaps = (values.unsqueeze(1) - spectrum).abs().amin(dim=1)
    assert (gaps <= true + noise).all()
    if top.status is Status.CONVERGED:
        assert (true <= 1e-3 * values.abs().max() + noise).all()


@given(systems(kinds=["log-uniform", "sign-mixed"], dtypes=[torch.float64], max_n=20))
def test_a_full_space_gives_all_eigenvalues(system):
    n = len(system.b)
    top = largest_eigenvalues(DenseOperator(system.A), n, rtol=1e-9, max_iter=n)
    expected = torch.linalg.eigvalsh(system.exact).flip(0)
    size = expected.abs().max()
    assert (top.values - expected).abs().max() <= 1e-9 * size


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_are_those_of_eigvalsh(dtype):
    # apart by more than the tolerance
    A = symmetric(60, dtype=dtype)
    expected = torch.linalg.eigvalsh(A.double()).flip(0)
    for k in (1, 3, 8):
        top = largest_eigenvalues(DenseOperator(A), k)
        assert top.status is Status.CONVERGED
        # twice the residual over the gap to the next, squared, is far less
        torch.testing.assert_close(top.values, expected[:k], rtol=2e-4, atol=0.0)


def test_negative_eigenvalues_are_not_the_largest():
    A = torch.diag(torch.cat([torch.tensor([-1e4]), torch.linspace(0, 1, 200)])).double()
    top = largest_eigenvalues(DenseOperator(A), 2, max_iter=150)
    assert top.status is Status.CONVERGED
    # a residual r moves a value by r at most
    torch.testing.assert_close(top.values, torch.tensor([1.0, 0.995]).double(), rtol=2e-3, atol=0)
    down = largest_eigenvalues(DenseOperator(-torch.diag(torch.arange(1.0, 30.0))), 1)
    assert down.values.item() == pytest.approx(-1.0, rel=1e-3)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("factor", [0.0, 1.0, -2.0])
def test_a_space_that_ends_early_is_continued_from_another_vector(k, factor):
    A = Counting(factor * torch.eye(5, dtype=torch.float64))
    top = largest_eigenvalues(A, k)
    assert top.status is Status.CONVERGED
    torch.testing.assert_close(top.values, torch.full((k,), factor, dtype=torch.float64))
    gram = top.vectors.T @ top.vectors
    torch.testing.assert_close(gram, torch.eye(k, dtype=torch.float64))
    assert top.products == 2 * k


def test_one_space_sees_one_vector_of_an_eigenspace():
    A = torch.diag(torch.tensor([4.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    assert largest_eigenvalues(DenseOperator(A), 2).values.tolist() == pytest.approx([4.0, 3.0])
    again = largest_eigenvalues(DenseOperator(A), 5)
    assert again.values.tolist() == pytest.approx([4.0, 4.0, 3.0, 2.0, 1.0])


def test_products_are_counted_and_bounded():
    matrix = symmetric(80)
    A = FunctionOperator((counted := Counting(matrix)).mv, 80, torch.float64)
    top = largest_eigenvalues(A, 3)
    assert top.products == counted.products <= 60 + 3
    assert largest_eigenvalues(DenseOperator(matrix), 3, rtol=1e-12, max_iter=10).products == 13
    hard = largest_eigenvalues(DenseOperator(symmetric(200)), 2, rtol=0.0)
    assert hard.products == 50 + 2  # the default limit
    assert hard.status is Status.MAX_ITER


def test_a_limit_that_is_too_low_is_reported():
    A = DenseOperator(symmetric(80))
    top = largest_eigenvalues(A, 2, rtol=1e-6, max_iter=4)
    assert top.status is Status.MAX_ITER
    assert top.residuals.max() > 1e-6 * top.values[0]


def test_a_tolerance_below_rounding_stagnates():
    A = DenseOperator(symmetric(6, dtype=torch.float32))
    assert largest_eigenvalues(A, 6, rtol=1e-9).status is Status.STAGNATED
    zero_top = -torch.diag(torch.arange(4.0))
    assert largest_eigenvalues(DenseOperator(zero_top), 1).status is Status.STAGNATED


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("after", [0, 1, 4, 5])
def test_an_operator_that_is_not_finite_is_a_status(bad, after):
    matrix, calls = symmetric(12), []

    def multiply(v):
        calls.append(v)
        return matrix @ v if len(calls) <= after else torch.full_like(v, bad)

    top = largest_eigenvalues(FunctionOperator(multiply, 12, torch.float64), 3)
    assert top.status is Status.NONFINITE_OPERATOR
    for tensor in (top.values, top.vectors, top.residuals):
        assert not tensor.isnan().any()
    assert top.products == len(calls)
    assert len(top.values) == min(after, 3)
    assert top.vectors.shape == (12, min(after, 3))


@given(systems(kinds=KINDS, dtypes=[torch.float64], max_n=12), st.integers(-60, 60))
def test_eigenvalues_scale_exactly(system, power):
    top = largest_eigenvalues(DenseOperator(system.A), 1)
    scaled = largest_eigenvalues(DenseOperator(system.A * 2.0**power), 1)
    assert torch.equal(scaled.values, top.values * 2.0**power)
    assert torch.equal(scaled.vectors, top.vectors)
    assert (scaled.status, scaled.products) == (top.status, top.products)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_huge_and_tiny_operators(scale):
    A = scale * torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
    top = largest_eigenvalues(DenseOperator(A), 2)
    assert top.status is Status.CONVERGED
    assert (top.values / scale).tolist() == pytest.approx([8.0, 7.0], rel=1e-6)


def test_one_dimension():
    top = largest_eigenvalues(DenseOperator(torch.tensor([[-3.0]])), 1)
    assert top.values.tolist() == [-3.0]
    assert top.vectors.abs().tolist() == [[1.0]]
    assert top.status is Status.CONVERGED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must lie between 1 and the dimension 4, got 0"),
        ({"k": 5}, "k must lie between 1 and the dimension 4, got 5"),
        ({"k": -1}, "k must be an integer and not negative"),
        ({"k": 1.5}, "k must be an integer"),
        ({"k": 3, "max_iter": 2}, "max_iter must be at least k = 3, got 2"),
        ({"k": 1, "max_iter": -1}, "max_iter must be an integer and not negative"),
        ({"k": 1, "rtol": -1.0}, "rtol must be a number and not negative"),
    ],
)
def test_wrong_arguments_of_eigenvalues_are_refused_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        largest_eigenvalues(DenseOperator(torch.eye(4)), **arguments)


# -- scipy


@pytest.mark.parametrize("dtype", DTYPES)
def test_scipy_solves_with_it(dtype):
    matrix = symmetric(20, dtype=dtype)
    matrix = matrix @ matrix + torch.eye(20, dtype=dtype)
    A = to_scipy(DenseOperator(matrix))
    assert A.shape == (20, 20)
    assert A.dtype == matrix.numpy().dtype
    b = np.ones(20, dtype=A.dtype)
    x, info = scipy_cg(A, b, rtol=1e-3, maxiter=400)
    assert info == 0
    assert np.linalg.norm(matrix.numpy() @ x - b) <= 2e-3 * np.linalg.norm(b)
    values = eigsh(A, k=2, return_eigenvectors=False)
    expected = torch.linalg.eigvalsh(matrix.double())[-2:]
    assert values == pytest.approx(expected.numpy(), rel=1e-4)


def test_scipy_products_have_the_shapes_of_their_arguments():
    matrix = torch.tensor([[1.0, 2.0, 0.0], [2.0, 5.0, 1.0], [0.0, 1.0, 3.0]])
    A, M = to_scipy(DenseOperator(matrix)), matrix.numpy()
    for shape in [(3,), (3, 1), (3, 2)]:
        X = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        for got in (A @ X, A.H @ X, (A.T @ X)):
            assert got.shape == shape
            assert got.dtype == np.float32
            assert np.array_equal(got, M @ X)
    for columns in (1, 2):
        X = np.ones((3, columns), dtype=np.float32)
        assert np.array_equal(A.matmat(X), M @ X)
        assert np.array_equal(A.rmatmat(X), M @ X)
    assert np.array_equal(A.matvec(np.ones(3)), M @ np.ones(3))


def test_scipy_is_lent_a_copy():
    kept = []
    A = to_scipy(FunctionOperator(lambda v: kept.append(v) or v.clone(), 2))
    x = np.ones(2, dtype=np.float32)
    A.matvec(x)
    kept[0].zero_()
    assert x.tolist() == [1.0, 1.0]


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="to_scipy needs scipy: pip install scipy"):
        to_scipy(DenseOperator(torch.eye(2)))
