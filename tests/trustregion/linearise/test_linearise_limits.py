"""What the tape cannot read is left to autograd or refused in words."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from recorded_models import (
    FULL,
    INDICES,
    ROWS,
    Of,
    draw,
    run,
)
from trustregion.linearise import (
    choose,
    linearise,
)
from trustregion.linearise.rules import UnreadableGraph
from trustregion.operators import ParameterVector


def written(x, a):
    y = (x @ a).clone()
    y[0] = a[0]
    return y


@pytest.mark.parametrize("options", [{"mode": "max"}, {"mode": "sum", "weighted": True}], ids=str)
def test_bags_that_cannot_be_linearised_say_so(options):
    bag = nn.EmbeddingBag(7, 4, mode=options["mode"])
    weights = torch.rand(INDICES, requires_grad=True) if "weighted" in options else None
    y = bag(torch.randint(7, INDICES), per_sample_weights=weights)
    params = [bag.weight] if weights is None else [bag.weight, weights]
    with pytest.raises(RuntimeError, match="EmbeddingBag"):
        linearise([y], ParameterVector(params), "tape")


class Sine(torch.autograd.Function):
    """A function whose gradient is Python code."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize(
    "fn", [lambda x, a: Sine.apply(x @ a), written], ids=["python", "copy slices"]
)
def test_what_the_tape_cannot_read_is_left_to_autograd(fn):
    torch.manual_seed(0)
    model = Of(fn, FULL).double()
    vector = ParameterVector(model.parameters())
    outputs = [model(torch.randn(ROWS).double())]
    with pytest.raises(UnreadableGraph, match='use backend="graph"'):
        linearise(outputs, vector, "tape")
    assert linearise(outputs, vector).backend == "graph"


def test_unreadable_nodes_that_no_parameter_reaches_do_not_matter():
    x = torch.randn(ROWS, requires_grad=True)
    W = torch.randn(FULL, requires_grad=True)
    assert linearise([Sine.apply(x) @ W], ParameterVector([W])).backend == "tape"


def test_a_hook_that_changes_gradients_is_noticed():
    """The sweep runs no hooks; where they matter autograd is asked."""
    choose._AGREED.clear()
    W = torch.randn(FULL, requires_grad=True)
    y = torch.randn(ROWS) @ W
    y.register_hook(lambda grad: 2 * grad)
    assert linearise([y.tanh()], ParameterVector([W])).backend == "graph"


@pytest.mark.parametrize("backend", ["tape", "auto"])
def test_a_freed_graph(backend):
    (y,), vector = run("policy", torch.float32)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="already freed"):
        linearise([y], vector, backend)


@pytest.mark.parametrize("backend", ["tape", "graph"])
def test_parameters_that_moved_are_noticed(backend):
    (y,), vector = run("policy", torch.float32)
    J = linearise([y], vector, backend)
    v, u = draw(J.outputs, vector)
    J.jvp(v)
    with torch.no_grad():
        vector.params[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        J.jvp(v)
    with pytest.raises(RuntimeError, match="modified in place"):
        J.vjp(u)
    with pytest.raises(RuntimeError, match="modified in place"):
        linearise([y], vector, backend)


def test_an_unknown_backend():
    outputs, vector = run("policy", torch.float32)
    with pytest.raises(ValueError, match="auto, tape, graph, got 'fast'"):
        linearise(outputs, vector, "fast")


def test_values_that_are_not_finite_are_left_to_autograd():
    choose._AGREED.clear()
    W = torch.full(FULL, torch.inf, requires_grad=True)
    assert (
        linearise([torch.randn(ROWS) @ (W * 2).exp().log()], ParameterVector([W])).backend
        == "graph"
    )


def test_nothing_of_the_caller_is_touched():
    outputs, vector = run("policy", torch.float64)
    v, u = draw(outputs, vector)
    kept_v, kept_u = v.clone(), [x.clone() for x in u]
    state = torch.random.get_rng_state()
    J = linearise(outputs, vector)
    J.jvp(v), J.vjp(u)
    assert torch.equal(v, kept_v)
    assert all(torch.equal(x, kept) for x, kept in zip(u, kept_u, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in vector.params)
    assert not J.vjp(u).requires_grad


def test_complex_numbers_are_left_to_autograd_whatever_was_asked_before():
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    factors = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    y = torch.view_as_real(torch.view_as_complex(w.view(2, 2)) * factors)
    with pytest.raises(UnreadableGraph, match="complex"):
        linearise([y], ParameterVector([w]), "tape")
    assert linearise([y], ParameterVector([w])).backend == "graph"


def test_parameters_that_were_computed_are_left_to_autograd():
    base = torch.randn(4, 4).double().requires_grad_()
    w, b = base * 2, torch.zeros(4).double().requires_grad_()
    vector = ParameterVector([w, b])
    J = linearise([torch.randn(ROWS).double() @ w + b], vector)
    assert (J.backend, J.used) == ("graph", (0, 1))


@pytest.mark.parametrize("backend", ["auto", "tape", "graph"])
def test_reentrant_checkpoints_are_refused(backend):
    """Autograd itself does not see what is behind them."""
    inner, outer = nn.Linear(4, 4), nn.Linear(4, 2)
    x = torch.randn(ROWS, requires_grad=True)
    y = outer(checkpoint(inner, x, use_reentrant=True))
    vector = ParameterVector([*inner.parameters(), *outer.parameters()])
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        linearise([y], vector, backend)


class Detached(torch.autograd.Function):
    """A backward pass without a derivative of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return grad.detach() * 3 * ctx.x**2 + 0 * grad


def test_a_backward_pass_that_cannot_be_differentiated_is_refused():
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        linearise([Detached.apply(w)], ParameterVector([w]))


@pytest.mark.parametrize("backend", ["tape", "graph"])
def test_moving_the_parameters_of_a_linear_model_is_noticed_too(backend):
    model = nn.Linear(4, 2)
    J = linearise([model(torch.randn(ROWS))], ParameterVector(model.parameters()), backend)
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(RuntimeError, match="Build the operator again"):
        J.jvp(torch.ones(10))


def test_errors_of_the_tape_are_in_words():
    (y,), vector = run("solve", torch.float64)
    J = linearise([y], vector, "tape")
    with pytest.raises(ValueError, match=r"shape \(16,\), got \(1,\)"):
        J.jvp(torch.ones(1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match='backend="graph"'):
        torch.func.vmap(lambda v: J.jvp(v)[0])(torch.ones(2, 16, dtype=torch.float64))
    _, u = draw([y], vector)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="already freed"):
        J.vjp(u)


def test_outputs_of_inference_mode_are_refused_in_words():
    model = nn.Linear(4, 2)
    with torch.inference_mode():
        y = model(torch.randn(ROWS))
    with pytest.raises(ValueError, match="inference_mode"):
        linearise([y], ParameterVector(model.parameters()))
