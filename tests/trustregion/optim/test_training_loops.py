"""Models as they are trained: autocast, checkpointing, BatchNorm, Dropout, compiled graphs."""

import copy

import pytest
import torch
from torch import nn
from torch.distributions import Categorical
from torch.utils.checkpoint import checkpoint

from trustregion import NaturalTrustRegion, NewtonTrustRegion

CLASSES, WIDTH = 3, 8
X = torch.randn(48, 5, generator=torch.Generator().manual_seed(0))
Y = (2 * X[:, :CLASSES]).argmax(1)


@pytest.fixture(params=[NaturalTrustRegion, NewtonTrustRegion], ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def _validation():
    """Torch's default, which torch.compile turns off for the rest of the process."""
    before = torch.distributions.Distribution._validate_args
    yield
    torch.distributions.Distribution.set_default_validate_args(before)
    torch.compiler.reset()


def network(*extra):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, WIDTH), *extra, nn.Tanh(), nn.Linear(WIDTH, CLASSES))


def closure_of(kind, forward):
    """The closure that an optimizer wants of a classifier."""

    def closure():
        distribution = Categorical(logits=forward(X))
        loss = -distribution.log_prob(Y).mean()
        return (loss, distribution) if kind is NaturalTrustRegion else loss

    return closure


def loss_of(returned):
    return returned[0].item() if isinstance(returned, tuple) else returned.item()


def theta(model):
    return [p.detach().clone() for p in model.parameters()]


# -- bfloat16


def test_autocast_in_the_closure_trains_float32_parameters(kind):
    model = network()

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        assert logits.dtype is torch.bfloat16
        return logits.float()

    optimizer, closure = kind(model.parameters(), 0.1), closure_of(kind, forward)
    first = loss_of(closure())
    for _ in range(10):
        optimizer.step(closure)
        assert loss_of(closure()) <= optimizer.info.loss
        if optimizer.info.accepted:
            assert loss_of(closure()) == optimizer.info.new_loss
    assert loss_of(closure()) < first - 0.2
    assert all(p.dtype is torch.float32 for p in model.parameters())


# -- activation checkpointing


def test_checkpointing_changes_no_bit_of_a_step(kind):
    plain, saving = network(), network()

    def forward(x):
        hidden = checkpoint(saving[:2], x, use_reentrant=False)
        return saving[2](hidden)

    for model, of in ((plain, plain), (saving, forward)):
        optimizer = kind(model.parameters())
        for _ in range(3):
            optimizer.step(closure_of(kind, of))
            assert optimizer.info.accepted
    assert all(map(torch.equal, theta(plain), theta(saving)))


# -- noise and running statistics


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_draws_one_mask_a_step_so_that_the_losses_of_a_step_compare(kind, checkpointed):
    model = network(nn.Dropout(0.5))

    def forward(x):
        return checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)

    optimizer, closure = kind(model.parameters(), 0.1), closure_of(kind, forward)
    assert len({loss_of(closure()) for _ in range(3)}) == 3  # it is noisy
    masks = set()
    for _ in range(3):
        start = torch.get_rng_state()
        before = loss_of(closure())
        one_call = torch.get_rng_state()
        torch.set_rng_state(start)
        optimizer.step(closure)
        assert torch.equal(torch.get_rng_state(), one_call)  # as if it had called once
        info = optimizer.info
        assert info.accepted
        assert info.loss == before
        torch.set_rng_state(start)
        assert loss_of(closure()) == info.new_loss < info.loss  # replayed
        masks.add(loss_of(closure()))
    assert len(masks) == 3


def test_a_batch_normalised_by_its_own_statistics_repeats_its_loss(kind):
    model = network(nn.BatchNorm1d(WIDTH))
    optimizer, closure = kind(model.parameters()), closure_of(kind, model)
    for step in range(3):
        optimizer.step(closure)
        info = optimizer.info
        assert info.accepted
        # the statistics move once in a step, however often it calls the closure
        assert model[1].num_batches_tracked == 2 * step + 1
        assert loss_of(closure()) == info.new_loss < info.loss
    assert model.training


def test_batch_norm_in_eval_mode_keeps_its_statistics(kind):
    model = network(nn.BatchNorm1d(WIDTH))
    model(X)
    model.eval()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    optimizer = kind(model.parameters())
    optimizer.step(closure_of(kind, model))
    assert optimizer.info.accepted
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


# -- compiled models


@pytest.mark.usefixtures("_validation")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # neither needs a C compiler
def test_a_compiled_model_steps_as_it_was_written_and_stays_compiled_outside(kind, backend):
    from torch._dynamo.utils import counters

    written, model = network(), network()
    compiled = torch.compile(model, backend=backend)
    optimizer, plain = kind(model.parameters()), kind(written.parameters())
    counters.clear()
    compiled(X)  # a compiled graph is there before the step
    for _ in range(2):
        optimizer.step(closure_of(kind, compiled))
        plain.step(closure_of(kind, written))
        assert optimizer.info.accepted
    assert all(map(torch.equal, theta(model), theta(written)))
    assert counters["stats"]["unique_graphs"] == 1  # the step compiled nothing more
    torch.testing.assert_close(compiled(X), written(X))
    assert counters["stats"]["unique_graphs"] == 1
