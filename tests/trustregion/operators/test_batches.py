"""The operator of batches is that of the whole data set."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as nnf

from batch_cases import F64, LABELS, N, X, fisher, linear, weights
from strategies import costly
from trustregion import FisherOperator, Identity, cg, to_dense
from trustregion.distributions import Weighted
from trustregion.operators import DenseOperator, FunctionOperator
from trustregion.operators.batches import BatchedOperator
from trustregion.operators.ggn import GGNOperator
from trustregion.operators.sampled import EmpiricalFisherOperator, MonteCarloFisherOperator


@st.composite
def partitions(draw):
    """Draw the sizes of consecutive batches that make up the data."""
    sizes = []
    while sum(sizes) < N:
        sizes.append(draw(st.integers(1, N - sum(sizes))))
    return sizes


@costly
@given(partitions(), st.sampled_from([0, 1 << 30, 3000]))
def test_any_partition_gives_the_operator_of_the_whole(sizes, cache_bytes):
    W = weights()
    batches = list(zip(X.split(sizes), LABELS.split(sizes), strict=True))
    makers = {
        "fisher": lambda x, _: FisherOperator(linear(W, x), [W]),
        "empirical": lambda x, y: EmpiricalFisherOperator(linear(W, x).log_prob(y), [W]),
        "ggn": lambda x, y: GGNOperator(nnf.cross_entropy(z := x @ W, y), z, [W]),
    }
    for make in makers.values():
        whole = to_dense(make(X, LABELS))
        A = BatchedOperator(
            lambda b, make=make: make(*b),
            batches,
            size=lambda b: len(b[0]),
            cache_bytes=cache_bytes,
        )
        for _ in range(2):  # with nothing kept, and with what is
            torch.testing.assert_close(
                to_dense(A), whole, rtol=0, atol=1e-13 * whole.abs().max().item()
            )
        assert A.total == N
        assert torch.equal(A @ X.flatten()[:12], A @ X.flatten()[:12])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_total_of_an_operator_is_its_weight(dtype):
    W = weights(dtype)
    A = BatchedOperator(fisher(W), [X[:2], X[2:3], X[3:]])
    exact = to_dense(fisher(weights())(X))
    dense = to_dense(A)
    assert (A.dtype, dense.dtype) == (dtype, dtype)
    # a few roundings of chained products
    atol = 30 * torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(dense.double(), exact, rtol=0, atol=atol)
    mc = BatchedOperator(
        lambda x: MonteCarloFisherOperator(linear(W, x), [W], samples=3), [X[:2], X[2:]]
    )
    mc @ torch.ones(12, dtype=dtype)
    assert mc.total == N


def test_weighted_samples_of_batches_combine_to_the_whole():
    W, w = weights(), torch.rand(N, dtype=F64)
    whole = FisherOperator(Weighted(linear(W), w), [W])
    batches = list(zip(X.split(5), w.split(5), strict=True))
    A = BatchedOperator(lambda b: FisherOperator(Weighted(linear(W, b[0]), b[1]), [W]), batches)
    torch.testing.assert_close(to_dense(A), to_dense(whole), rtol=1e-12, atol=1e-15)
    assert A.total == pytest.approx(w.sum().item(), rel=1e-14)
    oracle = (to_dense(FisherOperator(linear(W, x), [W])) for x in X.split(1))
    exact = sum(w_i * F_i for w_i, F_i in zip(w, oracle, strict=True)) / w.sum()
    torch.testing.assert_close(to_dense(whole), exact, rtol=1e-12, atol=1e-15)


def test_float32_products_are_summed_in_float64():
    parts = [1e8, 1.0, -1e8]
    A = BatchedOperator(lambda a: DenseOperator(torch.tensor([[a]])), parts, size=lambda _: 1)
    assert (A @ torch.ones(1)).item() == torch.tensor(1 / 3).item()


def test_weights_need_not_be_counts():
    A = BatchedOperator(
        lambda b: DenseOperator(torch.tensor([[b[0]]])),
        [(1.0, 0.5), (4.0, 0.25)],
        size=lambda b: b[1],
    )
    assert (A @ torch.ones(1)).item() == 2.0
    assert A.total == 0.75


def test_symmetry_algebra_and_a_solve():
    W = weights()
    A = BatchedOperator(fisher(W), X.split(5)) + 0.1 * Identity(12, F64)
    dense = to_dense(fisher(W)(X)) + 0.1 * torch.eye(12, dtype=F64)
    b = torch.randn(12, dtype=F64)
    solution = cg(A, b, rtol=1e-10)
    torch.testing.assert_close(solution.x, torch.linalg.solve(dense, b), rtol=1e-8, atol=0)


def test_wrong_arguments_are_named():
    W = weights()

    def ggn(x):
        y = x @ W
        return GGNOperator((y**2).mean(), y, [W])

    with pytest.raises(ValueError, match=r"a GGNOperator does not say how many.*size="):
        BatchedOperator(ggn, X.split(5))
    for size in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="size of a batch must be positive"):
            BatchedOperator(ggn, X.split(5), size=lambda _, size=size: size)
    with pytest.raises(TypeError, match=r"make must return a LinearOperator.*got Categorical"):
        BatchedOperator(lambda x: linear(W, x), X.split(5))
    for cap in (-1, float("nan")):
        with pytest.raises(ValueError, match="cache_bytes must be at least 0"):
            BatchedOperator(fisher(W), X.split(5), cache_bytes=cap)
    mixed = BatchedOperator(lambda k: Identity(k), [2, 3], size=lambda _: 1)
    with pytest.raises(ValueError, match="operators of the batches differ"):
        mixed @ torch.ones(2)
    wrong = BatchedOperator(lambda _: FunctionOperator(lambda v: v[:1], 2), [1], size=lambda _: 1)
    with pytest.raises(ValueError, match="must map a vector"):
        wrong @ torch.ones(2)


def test_no_grad_around_a_product_does_not_reach_the_model():
    W = weights()
    with torch.no_grad():
        A = BatchedOperator(fisher(W), X.split(5))
        product = A @ torch.ones(12, dtype=F64)
    assert product.abs().max() > 0
    assert not product.requires_grad
