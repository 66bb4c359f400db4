"""A product for which the memory is too small is computed once more, with halves of the batches."""

from collections import namedtuple

import pytest
import torch

from batch_cases import F64, LABELS, X, fisher, linear, weights
from trustregion.operators.batches import BatchedOperator
from trustregion.operators.ggn import GGNOperator
from trustregion.operators.halves import halves

CPU = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried to"
ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU), MemoryError()]
V = torch.linspace(-1, 1, 12, dtype=F64)


class Narrow:
    """Makes operators, of at most so many rows while the memory is narrow."""

    def __init__(self, rows, error, *, at_product=False):
        self.W, self.rows, self.error, self.at_product = weights(), rows, error, at_product
        self.made = []

    def __call__(self, x):
        self.made.append(len(x))
        if not self.at_product:
            self.check(x)
        F = fisher(self.W)(x)
        multiply = F.mv

        def mv(v):
            self.check(x)
            return multiply(v)

        F.mv = mv
        return F

    def check(self, x):
        if len(x) > self.rows:
            raise self.error


@pytest.mark.parametrize(("at_product", "cache_bytes"), [(False, 0), (True, 0), (True, 1 << 30)])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_the_product_is_that_of_the_whole_and_later_ones_take_halves_too(
    error, at_product, cache_bytes
):
    make = Narrow(12, error, at_product=at_product)
    A = BatchedOperator(make, X.split(5), cache_bytes=cache_bytes)
    whole = A @ V
    assert A.cached == (3 if cache_bytes else 0)
    make.rows = 3
    with pytest.warns(UserWarning, match="the memory is too small .* with halves of the batches"):
        product = A @ V
    torch.testing.assert_close(product, whole, rtol=1e-12, atol=1e-12)
    assert A.total == 12
    assert A.cached == 0
    make.made.clear()
    torch.testing.assert_close(A @ V, product, rtol=0, atol=0)
    assert make.made == [2, 3, 2, 3, 1, 1]


def test_a_constructor_takes_halves_too():
    with pytest.warns(UserWarning, match="not enough memory"):
        A = BatchedOperator(Narrow(3, RuntimeError(CPU)), X.split(5))
    torch.testing.assert_close(A @ V, fisher(weights())(X) @ V)


def test_a_second_failure_is_raised_and_so_is_every_other_error():
    make = Narrow(12, ERRORS[0])
    A = BatchedOperator(make, X.split(5))
    make.rows = 2
    with pytest.warns(UserWarning, match="halves"), pytest.raises(torch.OutOfMemoryError):
        A @ V
    with pytest.raises(torch.OutOfMemoryError):
        A @ V
    make.rows, make.error = 12, None
    torch.testing.assert_close(A @ V, fisher(weights())(X) @ V)
    other = Narrow(12, RuntimeError("of the model"))
    B = BatchedOperator(other, X.split(5))
    other.rows, made = 4, len(other.made)
    with pytest.raises(RuntimeError, match="of the model"):
        B @ V
    assert other.made[made:] == [5]


def test_a_batch_that_cannot_be_cut_raises_the_error_of_the_memory():
    make = Narrow(1, ERRORS[0])
    A = BatchedOperator(lambda i: make(X[i : i + 1]), range(12), size=lambda _: 1)
    make.rows = 0
    with pytest.raises(torch.OutOfMemoryError):
        A @ V


def test_pairs_are_cut_together():
    W, rows = weights(), [12]

    def make(batch):
        x, y = batch
        if len(x) > rows[0]:
            raise MemoryError
        logits = linear(W, x).logits
        return GGNOperator(torch.nn.functional.cross_entropy(logits, y), (logits,), [W])

    A = BatchedOperator(make, [(X, LABELS)], size=lambda batch: len(batch[0]))
    whole = A @ V
    rows[0] = 6
    with pytest.warns(UserWarning, match="MemoryError"):
        torch.testing.assert_close(A @ V, whole)


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("batch", "first", "second"),
    [
        (torch.arange(5), torch.arange(2), torch.arange(2, 5)),
        ({"x": torch.ones(2), "name": "a"}, {"x": torch.ones(1), "name": "a"}, ...),
        ([torch.zeros(4), (torch.ones(4, 2),)], [torch.zeros(2), (torch.ones(2, 2),)], ...),
        (Pair(torch.ones(2), torch.zeros(2)), Pair(torch.ones(1), torch.zeros(1)), ...),
    ],
)  # fmt: skip
def test_halves_keep_the_structure(batch, first, second):
    one, other = halves(batch)
    assert str(one) == str(first)
    assert type(one) is type(first)
    assert str(other) == str(first if second is ... else second)


@pytest.mark.parametrize(
    "batch", [torch.ones(1), torch.ones(()), (torch.ones(4), torch.ones(3)), [], 7, "text"]
)
def test_other_batches_are_not_cut(batch):
    assert halves(batch) is None
