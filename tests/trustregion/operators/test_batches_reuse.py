"""What an operator of batches keeps between products, and which loaders it takes."""

import gc
import weakref

import pytest
import torch
from torch import distributions as td
from torch import nn
from torch.nn import functional as nnf
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from batch_cases import F64, LABELS, N, X, fisher, linear, weights
from trustregion import FisherOperator, Identity, to_dense
from trustregion.operators.batches import BatchedOperator, _memory
from trustregion.operators.ggn import GGNOperator
from trustregion.operators.hessian import HessianOperator


def counting(W):
    made = []

    def make(x):
        made.append(len(x))
        return fisher(W)(x)

    return make, made


def test_each_product_makes_each_operator_once_also_for_many_columns():
    make, made = counting(weights())
    A = BatchedOperator(make, X.split(5))
    assert made == [5]  # for the shape
    A @ torch.ones(12, dtype=F64)
    assert made == [5, 5, 5, 2]
    A @ torch.ones(12, 9, dtype=F64)
    assert made == [5, 5, 5, 2, 5, 5, 2]
    assert A.cached == 0


def test_with_room_for_all_each_operator_is_made_once_and_the_data_read_once():
    make, made = counting(weights())
    passes = []

    def batches():
        passes.append(1)
        return iter(X.split(5))

    A = BatchedOperator(make, batches, cache_bytes=1 << 30)
    passes.clear()
    first = A @ torch.ones(12, dtype=F64)
    for _ in range(3):
        assert torch.equal(A @ torch.ones(12, dtype=F64), first)
    assert (made, A.cached, len(passes)) == ([5, 5, 5, 2], 3, 1)


def test_a_cap_keeps_the_first_batches_only():
    W = torch.randn(3, 400, dtype=F64, requires_grad=True)
    x = torch.randn(8, 3, dtype=F64)
    make, made = counting(W)
    v = torch.randn(1200, dtype=F64)
    reference = fisher(W)(x) @ v
    operator = make(x[:2])
    operator @ v
    size = _memory(operator, set())
    # a later operator shares the parameters and the data with the first
    for cap, expected in ((0.9 * size, 0), (1.1 * size, 1), (5 * size, 4)):
        made.clear()
        A = BatchedOperator(make, x.split(2), cache_bytes=int(cap))
        for _ in range(2):
            torch.testing.assert_close(A @ v, reference, rtol=1e-12, atol=1e-15)
        assert A.cached == expected
        # one for the shape, all in the first pass, and in the second what is not kept
        assert len(made) == 1 + 4 + (4 - expected)


def test_memory_of_a_kept_operator_is_that_of_its_distinct_tensors():
    W = torch.randn(100, 50, requires_grad=True)
    x = torch.randn(64, 100)
    y = torch.tanh(x @ W)
    assert _memory(y, set()) == 4 * (64 * 100 + 64 * 50)
    assert _memory([y, {"again": (y, y[:3])}], set()) == _memory(y, set())
    seen = set()
    _memory(y, seen)
    assert _memory(torch.tanh(x @ W), seen) == 4 * 64 * 50
    F = FisherOperator(td.Categorical(logits=y), [W])
    # at least the graph and the probabilities that the metric keeps
    assert _memory(F, set()) >= _memory(y, set()) + 2 * 4 * 64 * 50


@pytest.mark.parametrize("backend", ["auto", "functional"])
def test_memory_of_an_operator_from_a_function(backend):
    def make(x):
        return FisherOperator.from_function(
            lambda p, x: linear(p["W"], x), {"W": weights().detach()}, x, backend=backend
        )

    A = BatchedOperator(make, X.split(5), cache_bytes=1 << 30)
    exact = to_dense(make(X))
    torch.testing.assert_close(to_dense(A), exact, rtol=1e-12, atol=1e-15)
    assert A.cached == 3


def test_one_operator_at_a_time_is_alive():
    W = weights()
    alive, most = weakref.WeakSet(), []

    def make(x):
        gc.collect()
        most.append(len(alive))
        operator = fisher(W)(x)
        alive.add(operator)
        return operator

    A = BatchedOperator(make, X.split(3))
    for _ in range(2):
        A @ torch.ones(12, dtype=F64)
    assert max(most) == 0


def test_a_data_loader():
    W = weights()
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=5)
    A = BatchedOperator(lambda b: fisher(W)(b[0]), loader)
    exact = to_dense(fisher(W)(X))
    torch.testing.assert_close(to_dense(A), exact, rtol=1e-12, atol=1e-15)


def test_parameters_may_change_between_products_when_nothing_is_kept():
    W = weights()
    A = BatchedOperator(fisher(W), X.split(5))
    v = torch.randn(12, dtype=F64)
    A @ v
    with torch.no_grad():
        W.mul_(2)
    torch.testing.assert_close(A @ v, fisher(W)(X) @ v, rtol=1e-12, atol=1e-15)


MAKERS = {
    "fisher": fisher,
    "a sum": lambda W: lambda x: FisherOperator(linear(W, x), [W]) + 0.1 * Identity(12, F64),
    "functional": lambda W: (
        lambda x: FisherOperator.from_function(
            lambda p: linear(p["W"], x), {"W": W}, backend="functional"
        )
    ),
    "graph of a function": lambda W: (
        lambda x: FisherOperator.from_function(lambda p: linear(p["W"], x), {"W": W})
    ),
    "hessian": lambda W: lambda x: HessianOperator(linear(W, x).logits.square().mean(), [W]),
    "hessian of a function": lambda W: (
        lambda x: HessianOperator.from_function(
            lambda p: linear(p["W"], x).logits.square().mean(), {"W": W}, backend="functional"
        )
    ),
}


@pytest.mark.parametrize("cache_bytes", [1 << 30, 9000])
@pytest.mark.parametrize("name", list(MAKERS))
def test_kept_operators_of_old_parameters_are_refused(name, cache_bytes):
    W = weights()
    A = BatchedOperator(MAKERS[name](W), X.split(5), size=len, cache_bytes=cache_bytes)
    v = torch.randn(12, dtype=F64)
    assert torch.equal(A @ v, A @ v)
    assert A.cached
    with torch.no_grad():
        W.mul_(3)
    with pytest.raises(RuntimeError, match=r"changed in place since . operators .* were kept"):
        A @ v
    new = BatchedOperator(MAKERS[name](W), X.split(5), size=len, cache_bytes=cache_bytes)
    assert torch.equal(new @ v, new @ v)


SHUFFLED = {
    "shuffle": {"shuffle": True, "batch_size": 5},
    "a part": {"sampler": SubsetRandomSampler(range(N)), "batch_size": 5},
    "batches": {"batch_sampler": BatchSampler(RandomSampler(range(N)), 5, False)},
    "batches of batches": {
        "batch_sampler": BatchSampler(BatchSampler(RandomSampler(range(N)), 5, False), 1, False)
    },
    "no batches": {"sampler": RandomSampler(range(N)), "batch_size": None},
    "an unknown one": {"batch_sampler": iter([[0]])},
}


@pytest.mark.parametrize("name", list(SHUFFLED))
def test_a_loader_that_may_shuffle_is_refused(name):
    loader = DataLoader(TensorDataset(X), **SHUFFLED[name])
    for batches in (loader, lambda: loader):
        with pytest.raises(ValueError, match=r"DataLoader with a .*which may shuffle"):
            BatchedOperator(fisher(weights()), batches)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


ORDERED = {
    "default": {"batch_size": 5},
    "positions": {"sampler": range(N), "batch_size": 5},
    "lists of positions": {"batch_sampler": [[0, 1, 2], list(range(3, N))]},
    "batches": {"batch_sampler": BatchSampler(SequentialSampler(range(N)), 5, False)},
}


@pytest.mark.parametrize("name", [*ORDERED, "stream"])
def test_a_loader_with_a_fixed_order_is_taken(name):
    W = weights()
    if name == "stream":
        loader = DataLoader(Stream(), batch_size=5)
    else:
        loader = DataLoader(X, **ORDERED[name])
    A = BatchedOperator(fisher(W), loader)
    torch.testing.assert_close(to_dense(A), to_dense(fisher(W)(X)), rtol=1e-12, atol=1e-15)


class Once:
    """Gives the same iterator again."""

    def __init__(self):
        self.iterator = iter(X.split(5))

    def __iter__(self):
        return self.iterator


def test_batches_that_serve_one_pass_are_refused():
    W = weights()
    for batches in (iter(X.split(5)), (x for x in X.split(5))):
        with pytest.raises(ValueError, match="iterator, which is exhausted after one pass"):
            BatchedOperator(fisher(W), batches)
    with pytest.raises(ValueError, match="exhausted after one pass"):
        BatchedOperator(fisher(W), Once())
    once = iter(X.split(5))
    with pytest.raises(ValueError, match="same iterator at each call"):
        BatchedOperator(fisher(W), lambda: once)
    with pytest.raises(ValueError, match="there are no batches"):
        BatchedOperator(fisher(W), [])
    loader = DataLoader(TensorDataset(X), batch_size=5, shuffle=True)
    with pytest.raises(ValueError, match="shuffle=False"):
        BatchedOperator(fisher(W), loader)
    with pytest.raises(TypeError, match=r"batches must be iterable.*got int"):
        BatchedOperator(fisher(W), 3)


class Spent:
    """Batches that change from one pass to the next."""

    def __init__(self, *passes):
        self.passes = list(passes)

    def __iter__(self):
        return iter(self.passes.pop(0))


@pytest.mark.parametrize(
    "later",
    [
        pytest.param([[], []], id="nothing left"),
        pytest.param([X.split(5)[:2], []], id="one batch less"),
        pytest.param([X.split(5), X.split(5)[::-1]], id="another order"),
        pytest.param([X.split(5)[1:], []], id="the first one is gone"),
        pytest.param([X.split(4), []], id="other sizes"),
    ],
)
def test_other_batches_in_a_later_pass_are_noticed(later):
    # two go to the question whether they are the same iterator
    A = BatchedOperator(fisher(weights()), Spent(*[X.split(5)] * 3, *later))
    v = torch.ones(12, dtype=F64)

    def passes():
        for _ in range(2):
            A @ v

    with pytest.raises(ValueError, match="needs the same batches each time"):
        passes()


def test_a_model_with_a_deep_network_in_a_data_loader():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=7)

    def make(batch):
        y = module(batch[0])
        return GGNOperator(nnf.cross_entropy(y, batch[1]), y, module.parameters())

    A = BatchedOperator(make, loader, size=lambda b: len(b[0]))
    exact = to_dense(make((X, LABELS)))
    torch.testing.assert_close(to_dense(A), exact, rtol=0, atol=1e-13 * exact.abs().max().item())
