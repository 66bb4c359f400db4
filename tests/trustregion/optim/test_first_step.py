"""The check of the first step: a closure that does not repeat is told so, and others are not."""

import random
import warnings
import weakref

import pytest
import torch
from torch import nn

from optimizers import natural, newton
from problems import bits, closure_of, data, network, unchanged
from trustregion import KFAC, Status

kinds = pytest.mark.parametrize("kind", [natural, newton])


def fresh_batches(seed=0):
    """A closure that draws another batch in each call, from a generator of its own."""
    model, x, y = data(torch.float32, n=256, seed=seed)
    draw = torch.Generator().manual_seed(seed)

    def closure():
        batch = torch.randint(len(x), (128,), generator=draw)
        return closure_of(model, x[batch], y[batch])()

    return model, closure


@kinds
@pytest.mark.parametrize("seed", range(3))
def test_a_closure_that_draws_a_batch_is_told_and_moves_nothing(kind, seed):
    model, closure = fresh_batches(seed)
    kept, optimizer = bits(model), kind(model.parameters())
    options = [dict(group) for group in optimizer.param_groups]
    with pytest.warns(UserWarning, match="draw the batch before the step"):
        optimizer.step(closure)
    assert optimizer.info.status is Status.NOT_REPRODUCIBLE
    assert optimizer.info.detail
    assert unchanged(model, kept)
    for before, after in zip(options, optimizer.param_groups, strict=True):
        assert {k: v for k, v in before.items() if k != "params"} == {
            k: v for k, v in after.items() if k != "params"
        }
    # The warning comes until a step has shown that the closure repeats.
    with pytest.warns(UserWarning, match="does not repeat"):
        optimizer.step(closure)
    assert unchanged(model, kept)


@kinds
@pytest.mark.parametrize("extra", [(), (nn.Dropout(0.5),), (nn.BatchNorm1d(8),)])
def test_a_closure_that_repeats_is_called_once_more_and_only_in_the_first_accepted_step(
    kind, extra
):
    model, x, y = data(torch.float32, extra=extra)
    calls, compute = [], closure_of(model, x, y)

    def closure():
        calls.append(1)
        return compute()

    optimizer = kind(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
        first = optimizer.info
        assert first.accepted
        assert first.evaluations == len(calls)
        before = len(calls)
        optimizer.step(closure)
    assert optimizer.info.evaluations == len(calls) - before


@kinds
def test_a_resumed_optimizer_is_not_checked_again(kind):
    model, x, y = data(torch.float32)
    closure = closure_of(model, x, y)
    optimizer = kind(model.parameters())
    optimizer.step(closure)
    kept, evaluations = bits(model), []
    for state in (optimizer.state_dict(), kind(model.parameters()).state_dict()):
        resumed = kind(model.parameters())
        resumed.load_state_dict(state)
        resumed.param_groups[0].update(
            {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        )
        resumed.step(closure)
        evaluations.append(resumed.info.evaluations)
        for p, k in zip(model.parameters(), kept, strict=True):
            p.data.copy_(k)
    assert evaluations[0] + 1 == evaluations[1]  # The second state has seen no step.


@kinds
def test_random_numbers_after_a_step_are_those_after_one_call(kind):
    model, x, y = data(torch.float32, extra=(nn.Dropout(0.5),))
    compute = closure_of(model, x, y)

    def closure():
        torch.rand(3)
        return compute()

    optimizer = kind(model.parameters())
    for _ in range(4):
        start, python = torch.get_rng_state(), random.getstate()
        closure()
        after = torch.get_rng_state()
        assert not torch.equal(start, after)
        torch.set_rng_state(start)
        optimizer.step(closure)
        assert torch.equal(torch.get_rng_state(), after)
        assert random.getstate() == python


class Watched(nn.Module):
    """Refers weakly to the activation of its first call, which the graph alone keeps alive."""

    def __init__(self):
        super().__init__()
        self.first, self.alive = None, []

    def forward(self, x):
        out = x.exp()
        if self.first is None:
            self.first = weakref.ref(out)
        else:
            self.alive.append(self.first() is not None)
        return out


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("options", [{}, {"damping": (1e-3, 1e-1)}, {"penalty": 1.0}])
def test_the_graph_of_the_first_call_is_freed_before_the_search(preconditioned, options):
    if preconditioned and isinstance(options.get("damping"), tuple):
        pytest.skip("several dampings take no preconditioner")
    watched = Watched()
    model = network(5, 8, 3, watched)
    _, x, y = data(torch.float32)
    M = KFAC(model) if preconditioned else None
    optimizer = natural(model.parameters(), preconditioner=M, **options)
    optimizer.step(closure_of(model, x, y))
    assert optimizer.info.accepted
    assert watched.alive
    assert not any(watched.alive)
