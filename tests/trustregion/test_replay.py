"""Operators that run a model again see the random numbers of its first run."""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from trustregion import FisherOperator, GGNOperator, HessianOperator, Identity, Status, cg, to_dense
from trustregion.operators import BatchedOperator, check_symmetric
from trustregion.replay import Replay, kept, repeatable

F64 = torch.float64


def dropout_net():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    return net.double().train(), torch.randn(12, 4, dtype=F64), torch.randint(3, (12,))


@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize("cache_bytes", [0, 20_000, 1 << 30])
def test_products_of_batches_are_of_one_matrix_in_spite_of_dropout(size, cache_bytes):
    net, x, _ = dropout_net()
    params = list(net.parameters())
    masks = []  # in the order of the first run of each batch

    def make(b):
        operator = FisherOperator(Categorical(logits=net(b)), params)
        masks.append(operator)
        return operator

    A = BatchedOperator(make, list(x.split(size)), cache_bytes=cache_bytes)
    before = torch.get_rng_state()
    first, second = to_dense(A), to_dense(A)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    # The oracle: the operators of the first runs, whose graphs hold their masks. The first batch
    # ran at construction, and again in the first product with the same mask.
    count = -(-12 // size)
    whole = sum(to_dense(F) * F.total for F in [masks[0], *masks[2 : count + 1]]) / 12
    torch.testing.assert_close(first, whole, rtol=1e-12, atol=1e-15)


def test_batches_have_masks_of_their_own():
    net, x, _ = dropout_net()
    params = list(net.parameters())
    same = [x[:1], x[:1]]  # one sample twice, whose operators differ by the mask alone
    made = []

    def make(b):
        made.append(FisherOperator(Categorical(logits=net(b)), params))
        return made[-1]

    A = BatchedOperator(make, same)
    to_dense(A)
    assert not torch.equal(to_dense(made[1]), to_dense(made[2]))


def test_a_solve_over_batches_with_dropout_converges():
    net, x, _ = dropout_net()
    params = list(net.parameters())
    A = BatchedOperator(
        lambda b: FisherOperator(Categorical(logits=net(b)), params), list(x.split(5))
    )
    check_symmetric(A)
    n = A.shape[0]
    solve = cg(A + 1e-2 * Identity(n, F64), torch.ones(n, dtype=F64), max_iter=3 * n)
    assert solve.status is Status.CONVERGED


class Augmented(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(4, dtype=F64)


@pytest.mark.parametrize("cache_bytes", [0, 9_000, 1 << 30])
def test_data_that_is_augmented_at_random_is_loaded_alike(cache_bytes):
    net, x, _ = dropout_net()
    params = list(net.parameters())
    loader = DataLoader(Augmented(x), batch_size=5)
    A = BatchedOperator(
        lambda b: FisherOperator(Categorical(logits=net(b)), params),
        loader,
        cache_bytes=cache_bytes,
    )
    before = torch.get_rng_state()
    assert torch.equal(to_dense(A), to_dense(A))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pass_that_raises_leaves_the_generators_alone_and_can_be_repeated():
    net, x, _ = dropout_net()
    params = list(net.parameters())
    fail = [False]

    def make(b):
        operator = FisherOperator(Categorical(logits=net(b)), params)
        if fail[0] and len(b) == 2:
            raise KeyboardInterrupt
        return operator

    A = BatchedOperator(make, list(x.split(5)))
    before, fail[0] = torch.get_rng_state(), True
    with pytest.raises(KeyboardInterrupt):
        to_dense(A)
    assert torch.equal(torch.get_rng_state(), before)
    fail[0] = False
    assert torch.equal(to_dense(A), to_dense(A))


def functional_operators(net, x, y):
    params = dict(net.named_parameters())

    def logits(p, x):
        return functional_call(net, p, (x,))

    yield FisherOperator.from_function(
        lambda p, x: Categorical(logits=logits(p, x)), params, x, backend="functional"
    )
    yield GGNOperator.from_function(
        logits, params, x, loss=cross_entropy, targets=y, backend="functional"
    )
    yield HessianOperator.from_function(
        lambda p, x: cross_entropy(logits(p, x), y), params, x, backend="functional"
    )

    def noisy(z, y):
        return cross_entropy(nn.functional.dropout(z), y)

    net = nn.Linear(4, 3).double()
    params = dict(net.named_parameters())
    yield GGNOperator.from_function(logits, params, x, loss=noisy, targets=y, backend="functional")


def test_operators_that_run_a_function_again_are_of_one_matrix_in_spite_of_dropout():
    for A in functional_operators(*dropout_net()):
        before = torch.get_rng_state()
        dense = to_dense(A)
        assert torch.equal(dense, to_dense(A))
        torch.testing.assert_close(dense, dense.T, rtol=1e-12, atol=1e-14)
        assert torch.equal(torch.get_rng_state(), before)


def test_the_first_run_draws_as_it_would_without_a_replay():
    torch.manual_seed(5)
    expected = torch.rand(3), torch.rand(3)
    torch.manual_seed(5)
    replay = Replay()
    found = replay.run("a", lambda: torch.rand(3)), replay.run("b", lambda: torch.rand(3))
    assert all(map(torch.equal, expected, found))
    assert torch.equal(replay.run("a", lambda: torch.rand(3)), expected[0])
    draw = repeatable(torch.rand)
    assert torch.equal(draw(3), draw(3))


def test_a_call_that_raises_is_no_first_run():
    replay = Replay()

    def fails():
        torch.rand(3)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 # no message
        replay.run("a", fails)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(replay.run("a", lambda: torch.rand(3)), expected)


def test_parts_in_which_nothing_is_drawn_share_one_state():
    replay = Replay()
    for part in range(100):
        replay.run(part, lambda: None)
    assert len({id(t) for states in replay._starts.values() for t in states}) == 1


def test_kept_restores_the_generators():
    before = torch.get_rng_state()
    with kept():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
