import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rl import ObservationLayout
from rl.networks.critic import Critic
from rl.networks.encoders import Encoder
from rl.networks.moments import ObservationNorm
from rl.networks.numpy_twin import DenseNetwork
from rl.networks.squared_error import squared_error


def network_of(widths, tanh, seed=0):
    """Linear layers of these widths, with a tanh where the flags say so."""
    torch.manual_seed(seed)
    layers = []
    for (a, b), after in zip(pairwise(widths), [*tanh, False], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()] if after else [nn.Linear(a, b)]
    return nn.Sequential(*layers)


def critic_of(width=3, hidden=(8, 5), norm=None):
    layout = ObservationLayout(Box(-np.inf, np.inf, (width,), np.float32))
    return Critic(Encoder(layout, hidden, norm))


shapes = st.tuples(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.integers(1, 9),
    st.integers(0, 5),
)


@given(shapes)
def test_values_and_gradient_are_those_of_the_modules(case):
    widths, tanh, rows, seed = case
    module = network_of([*widths, 1], tanh, seed)
    x, y = torch.randn(rows, widths[0]), torch.randn(rows)
    network = DenseNetwork.of(module)
    assert network is not None
    expected = module(x)
    torch.testing.assert_close(torch.from_numpy(network(x.numpy())), expected.detach())
    error = (expected[:, 0] - y).square().mean()
    found, gradient = network.squared_error(x.numpy(), y.numpy())
    assert found == pytest.approx(error.item(), rel=1e-5, abs=1e-9)  # a sum in another order
    parameters = network.parameters()
    assert [id(p) for p in parameters] == [id(p) for p in module.parameters()]
    for g, p in zip(torch.autograd.grad(error, parameters), gradient, strict=True):
        torch.testing.assert_close(torch.from_numpy(p), g)


def test_parameters_are_read_when_it_is_called():
    module = network_of([2, 4, 1], [True])
    network, x = DenseNetwork.of(module), torch.randn(5, 2)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
        torch.testing.assert_close(torch.from_numpy(network(x.numpy())), module(x))


def test_arguments_stay_as_they_are():
    network, x = DenseNetwork.of(network_of([2, 4, 1], [True])), np.ones((3, 2), np.float32)
    y = np.ones(3, np.float32)
    network(x)
    network.squared_error(x, y)
    assert (x == 1).all()
    assert (y == 1).all()


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
        nn.Sequential(nn.Tanh(), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Tanh()),
        nn.Linear(2, 2, dtype=torch.float64),
        nn.Linear(2, 2, device="meta"),
        nn.Linear(2, 2, bias=False),
        nn.LayerNorm(2),
        nn.Sequential(nn.Sequential(nn.Linear(2, 2))),
    ],
)
def test_other_networks_are_left_to_torch(module):
    assert DenseNetwork.of(module) is None


def test_a_split_is_before_the_first_fitted_layer():
    module = network_of([2, 4, 4, 1], [True, True])
    network, x = DenseNetwork.of(module), torch.randn(5, 2).numpy()
    for first, layer in enumerate((module[0], module[2], module[4])):
        frozen, fitted = network.split([layer.bias])
        assert (len(frozen.layers), len(fitted.layers)) == (first, 3 - first)
        np.testing.assert_array_equal(fitted(frozen(x)), network(x))
    frozen, fitted = network.split([])
    assert not fitted.layers


def by_torch(critic, parameters, rows, returns, positions):
    error = (critic(rows[positions]) - returns[positions]).square().mean()
    return error.item(), torch.autograd.grad(error, parameters)


@pytest.mark.parametrize("fitted", ["everything", "the last layer", "a bias"])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_error_of_a_critic_and_its_gradient(fitted, normalised):
    norm = ObservationNorm(3, clip=1.0) if normalised else None
    if norm is not None:
        norm.update(torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 7.0], [4.0, 1.0, -1.0]]))
    torch.manual_seed(0)
    critic, rows, returns = critic_of(norm=norm), 3 * torch.randn(20, 3), torch.randn(20)
    parameters = {
        "everything": list(critic.parameters()),
        "the last layer": list(critic.linear.parameters()),
        "a bias": [critic.encoder.body[0].bias],
    }[fitted]
    error = squared_error(critic, parameters, rows, returns)
    for positions in (torch.arange(20), torch.tensor([3, 1, 3])):
        expected, gradient = by_torch(critic, parameters, rows, returns, positions)
        assert error(positions) == pytest.approx(expected, rel=1e-5)  # a sum in another order
        for p, g in zip(parameters, gradient, strict=True):
            torch.testing.assert_close(p.grad, g)
    chosen = {id(p) for p in parameters}
    assert all(p.grad is None for p in critic.parameters() if id(p) not in chosen)
    values = critic.function()(rows.reshape(4, 5, 3))
    torch.testing.assert_close(values, critic(rows.reshape(4, 5, 3)).detach())


def test_overflow_is_an_error_that_is_not_finite_and_no_warning():
    critic, huge = critic_of(), torch.full((4,), 3e38)
    error = squared_error(critic, list(critic.parameters()), torch.randn(4, 3), huge)
    assert error(torch.arange(4)) == math.inf
