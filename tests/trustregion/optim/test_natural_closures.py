"""Closures of every kind, and what NaturalTrustRegion refuses in words."""

import math

import pytest
import torch
import torch.utils.checkpoint
from torch import distributions as td
from torch import nn

from optimizers import natural
from problems import bits, problem, unchanged
from trustregion import mean_kl


def test_trials_run_without_a_graph():
    model, closure = problem()
    modes = []

    def watched():
        modes.append(torch.is_grad_enabled())
        return closure()

    natural(model.parameters(), 0.01).step(watched)
    assert modes[0] is True
    assert set(modes[1:]) == {False}


def test_attention_models_work():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    head, x, y = nn.Linear(8, 3), torch.randn(6, 4, 8), torch.randint(3, (6,))

    def closure():
        distribution = td.Categorical(logits=head(layer(x).mean(1)))
        return -distribution.log_prob(y).mean(), distribution

    optimizer = natural([*layer.parameters(), *head.parameters()], 0.01)
    optimizer.step(closure)
    assert optimizer.info.accepted


@pytest.mark.parametrize("wrap", ["autocast", "checkpoint", "masked"])
def test_closures_of_all_kinds_work(wrap):
    model, _ = problem()
    x, y = torch.randn(30, 5), torch.randint(2, (30,))

    def closure():
        if wrap == "checkpoint":
            logits = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=wrap == "autocast"):
                logits = model(x).float()
        if wrap == "masked":  # the third class is impossible
            logits = logits + torch.tensor([0.0, 0.0, -math.inf])
        distribution = td.Categorical(logits=logits, validate_args=False)
        return -distribution.log_prob(y).mean(), distribution

    optimizer = natural(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.info.accepted


def test_compiled_models_run_as_they_were_written():
    torch.compiler.reset()  # what other tests compiled counts towards a limit, then nothing is
    (model, _), (other, _) = problem(), problem()
    x = torch.randn(6, 5)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x).sum().backward()  # compiled before, and again in use after each step

    def closure_of(network):
        def closure():
            distribution = td.Categorical(logits=network(x))
            return -distribution.log_prob(torch.zeros(6)).mean(), distribution

        return closure

    for network, of in ((compiled, model), (other, other)):
        optimizer = natural(of.parameters())
        for _ in range(3):
            optimizer.step(closure_of(network))
            assert optimizer.info.accepted
    assert unchanged(model, bits(other))
    assert "CompiledFunctionBackward" in type(compiled(x).grad_fn).__name__


def test_distributions_made_of_the_parameters_themselves():
    """Writing the parameters must not change the old distribution the KL is measured from."""
    mean = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    log_std = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def closure():
        q = td.Independent(td.Normal(mean, log_std.exp()), 1)
        return (mean - target).square().sum() - log_std.sum(), q

    optimizer = natural([mean, log_std], 0.1, damping=0.0)
    optimizer.step(closure)
    assert 0.05 < optimizer.info.kl <= 0.1


def test_the_returned_loss_is_the_first_one_also_if_it_is_a_parameter():
    p = torch.full((), 0.3, requires_grad=True)
    optimizer = natural([p], 0.01, maximize=True)
    loss = optimizer.step(lambda: (p, td.Normal(p, 1.0)))
    assert optimizer.info.accepted
    assert loss.item() == optimizer.info.loss == torch.tensor(0.3).item() != p.item()


def test_measurements_hold_under_autocast_around_the_step():
    """Autocast keeps casts of the weights; a trial must not be measured with those of another."""
    torch.manual_seed(0)
    layer, log_std = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))
    x, y = torch.randn(64, 5), torch.randn(64, 2)

    def closure():
        distribution = td.Normal(layer(x).float(), log_std.exp())
        return -distribution.log_prob(y).mean(), distribution

    optimizer = natural([*layer.parameters(), log_std], 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                _, old = closure()
            optimizer.step(closure)
            assert optimizer.info.accepted
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss, new = closure()
            assert optimizer.info.kl == mean_kl(old, new).item() <= 0.3
            assert optimizer.info.new_loss == loss.item()


def test_autocast_around_the_step_does_not_reach_the_curvature():
    """A closure that turns autocast off gives the step it gives without any."""
    results = []
    for outer in (False, True):
        model, closure = problem()

        def exact(closure=closure):
            with torch.autocast("cpu", enabled=False):
                return closure()

        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            natural(model.parameters(), 0.01).step(exact)
        results.append(bits(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_checkpointed_attention_works():
    torch.manual_seed(0)
    layer, head = (
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        nn.Linear(8, 3),
    )
    x, y = torch.randn(6, 4, 8), torch.randint(3, (6,))

    def closure():
        hidden = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        distribution = td.Categorical(logits=head(hidden.mean(1)))
        return -distribution.log_prob(y).mean(), distribution

    optimizer = natural([*layer.parameters(), *head.parameters()], 0.01)
    for training in (True, False):
        layer.train(training)
        optimizer.step(closure)
        assert optimizer.info.accepted
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.fixture
def validation():
    """Torch's default, which torch.compile turns off for the rest of the process."""
    before = td.Distribution._validate_args
    td.Distribution.set_default_validate_args(True)
    yield
    td.Distribution.set_default_validate_args(before)


@pytest.mark.usefixtures("validation")
@pytest.mark.parametrize("validate", [None, False])
def test_a_trial_with_an_impossible_scale_is_backed_away_from(validate):
    """The loss falls with the scale, and the ball is wide enough to reach negative ones."""
    scale = torch.full((4,), 0.05, requires_grad=True)
    optimizer = natural([scale], 5.0, damping=0.0)
    optimizer.step(lambda: (scale.sum(), td.Normal(torch.zeros(4), scale, validate_args=validate)))
    assert optimizer.info.accepted
    assert optimizer.info.backtracks > 0
    assert (scale > 0).all()
    assert td.Distribution._validate_args is True


def test_arguments_are_validated_in_the_first_call():
    scale = torch.full((4,), -0.05, requires_grad=True)
    with pytest.raises(ValueError, match="scale"):
        natural([scale]).step(
            lambda: (scale.sum(), td.Normal(torch.zeros(4), scale, validate_args=True))
        )


def test_sparse_gradients_are_refused_by_name():
    embedding = nn.Embedding(4, 3, sparse=True)
    index = torch.tensor([0, 1])

    def closure():
        return embedding(index).sum(), td.Normal(embedding(index), 1.0)

    with pytest.raises(TypeError, match="gradient of parameter weight is sparse"):
        natural(embedding.named_parameters()).step(closure)


# -- what is refused

p = torch.zeros(2, requires_grad=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"delta": 0.0}, "delta must be a positive KL radius"),
        ({"delta": -1.0}, "got -1.0"),
        ({"delta": math.nan}, "delta"),
        ({"delta": math.inf}, "delta"),
        ({"lr": -0.1}, "lr must be"),
        ({"lr": math.nan}, "lr must be"),
        ({"damping": -1e-3}, "damping must be"),
        ({"cg_max_iter": 0}, "cg_max_iter must be an integer of at least 1"),
        ({"cg_rtol": 1.0}, r"cg_rtol must lie in \[0, 1\)"),
        ({"backtrack_factor": 1.0}, r"backtrack_factor must lie in \(0, 1\)"),
        ({"max_backtracks": -1}, "max_backtracks must be an integer and not negative"),
        ({"max_backtracks": 2.5}, "max_backtracks must be an integer"),
        ({"cg_max_iter": 2.5}, "cg_max_iter must be an integer"),
        ({"cg_max_iter": None}, "cg_max_iter must be an integer"),
    ],
)
def test_wrong_options_are_refused_at_construction(options, words):
    with pytest.raises(ValueError, match=words):
        natural([p], **options)


def normal():
    return td.Normal(p, 1.0)


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (lambda: p.sum(), TypeError, r"the tuple \(loss, distribution\), got a Tensor"),
        (lambda: None, TypeError, "got a NoneType"),
        (lambda: (p.sum(), normal(), 3), TypeError, "constraints must be a real tensor"),
        (lambda: (p.sum(), normal(), p, p), TypeError, "got a tuple of length 4"),
        (lambda: [p.sum(), normal()], TypeError, "got a list of length 2"),
        (lambda: (normal(), p.sum()), TypeError, "the loss comes first"),
        (lambda: (p.sum().item(), normal()), TypeError, r"do not call .item\(\)"),
        (lambda: (p * 2, normal()), ValueError, r"one real number, got shape \(2,\)"),
        (lambda: (p.sum().long(), normal()), ValueError, "dtype torch.int64"),
        (lambda: (p.sum(), p), TypeError, "wrap network outputs"),
        (lambda: (p.detach().sum(), normal()), ValueError, "loss carries no graph"),
        (
            lambda: (p.sum(), td.Normal(p.detach(), 1.0)),
            ValueError,
            "outputs carry no graph",
        ),
        (lambda: (p.sum(), td.Laplace(p, 1.0)), TypeError, "Laplace is refused"),
    ],
)
def test_wrong_closures_are_refused_in_words(returned, error, words):
    optimizer = natural([p], 0.01)
    with pytest.raises(error, match=words):
        optimizer.step(returned)
    assert torch.equal(p, torch.zeros(2))


def test_a_closure_that_calls_backward_is_told_not_to():
    model, closure = problem()

    def old_habit():
        loss, distribution = closure()
        loss.backward()
        return loss, distribution

    with pytest.raises(RuntimeError, match=r"must not call backward\(\)"):
        natural(model.parameters()).step(old_habit)


def test_derivatives_in_trials_are_named_and_restored():
    model, closure = problem()

    def old_habit():
        loss, distribution = closure()
        loss.backward(retain_graph=True)
        return loss, distribution

    kept = bits(model)
    with pytest.raises(RuntimeError, match=r"derivative in a trial.*torch\.enable_grad\(\)"):
        natural(model.parameters()).step(old_habit)
    assert unchanged(model, kept)


def test_a_closure_may_differentiate_under_enable_grad():
    """A loss with a derivative of the model in it, as physics-informed losses have."""
    model, _ = problem(torch.float64)
    x = torch.randn(20, 5, dtype=torch.float64)

    def closure():
        with torch.enable_grad():
            inputs = x.clone().requires_grad_()
            outputs = model(inputs)
            (slope,) = torch.autograd.grad(outputs[:, 0].sum(), inputs, create_graph=True)
        distribution = td.Normal(outputs, 1.0)
        return (slope.sum(1) - 1).square().mean() + outputs.square().mean(), distribution

    optimizer = natural(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.info.accepted


def test_inference_mode_is_refused():
    model, closure = problem()
    optimizer = natural(model.parameters())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        optimizer.step(closure)


def test_nan_parameters_at_entry_are_named():
    model, closure = problem()
    with torch.no_grad():
        model[2].bias[1] = math.nan
    optimizer = natural(model.named_parameters())
    with pytest.raises(ValueError, match=r"parameter 2.bias holds a NaN"):
        optimizer.step(closure)


def test_frozen_models_are_refused():
    frozen = torch.zeros(2)
    with pytest.raises(ValueError, match="all of them are frozen"):
        natural([frozen]).step(lambda: (p.sum(), normal()))


def test_parameters_outside_the_distribution_are_named():
    """A value head in the loss but not in the distribution has no KL to bound it."""
    value = torch.ones(2, requires_grad=True)

    def closure():
        return p.sum() + value.square().sum(), normal()

    optimizer = natural([("policy", p), ("value", value)], 0.01)
    with pytest.raises(ValueError, match=r"depends on parameter\(s\) value, the distribution"):
        optimizer.step(closure)
    joint = natural([p, value], 0.01)
    joint.step(lambda: (closure()[0], {"policy": normal(), "value": td.Normal(value, 1.0)}))
    assert joint.info.accepted


def test_a_batch_that_changes_between_calls_is_refused_and_restored():
    q = torch.zeros(2, requires_grad=True)
    sizes = iter([3, 4])

    def closure():
        return q.sum(), td.Normal(q.sum().expand(next(sizes)), 1.0)

    with pytest.raises(ValueError, match="keep the batch fixed"):
        natural([q], 0.01).step(closure)
    assert torch.equal(q, torch.zeros(2))
