"""The fast path does what torch does, and leaves to torch what it does not know."""

import copy
import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from agents import TwoNumbers, same
from rl import ObservationLayout, TRPOConfig
from rl.build import make_networks, observation_norm
from rl.networks.critic import Critic
from rl.networks.encoders import Encoder
from rl.networks.heads import GaussianHead
from rl.networks.moments import ObservationNorm
from rl.networks.numpy_twin import (
    actor,
    distribution_function,
    squared_error,
    value_function,
)
from rl.networks.policy import HeadPolicy

SPACE = Box(-np.inf, np.inf, (3,), np.float32)


def norm_of(width):
    norm = ObservationNorm(width, clip=1.0)
    norm.update(5 + 3 * torch.randn(20, width))
    return norm


def critic_of(width=3, hidden=(8, 5), norm=None):
    layout = ObservationLayout(Box(-np.inf, np.inf, (width,), np.float32))
    critic = Critic(Encoder(layout, hidden, norm))
    with torch.no_grad():  # biases begin at zero
        for p in critic.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return critic


@st.composite
def networks(draw):
    """A critic, and how many of its parameters, from the last, are fitted."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    width, hidden = draw(st.integers(1, 5)), draw(st.lists(st.integers(1, 6), max_size=3))
    critic = critic_of(width, hidden, norm_of(width) if draw(st.booleans()) else None)
    return critic, draw(st.integers(1, len(list(critic.parameters()))))


@given(networks(), st.integers(1, 9), st.data())
def test_the_error_and_its_gradient_are_those_of_autograd(case, n, data):
    """Of any last parameters: all of them, those above a shared or frozen encoder, half a layer."""
    critic, count = case
    parameters = list(critic.parameters())[-count:]
    rows, returns = 5 + 3 * torch.randn(n, critic.encoder.columns.numel()), torch.randn(n)
    kept = [p.clone() for p in critic.parameters()]
    x = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    inputs, error = squared_error(critic, x, parameters, rows)
    for _ in range(2):
        with torch.no_grad():  # each call reads it
            x.copy_(torch.randn_like(x))
        positions = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1)))
        found, gradient = error(inputs[positions], returns[positions]), x.grad.clone()
        other = copy.deepcopy(critic)
        fitted = list(other.parameters())[-count:]
        with torch.no_grad():
            for p, part in zip(fitted, x.split([p.numel() for p in fitted]), strict=True):
                p.copy_(part.view(p.shape))
        expected = (other(rows[positions]) - returns[positions]).square().mean()
        gradients = torch.autograd.grad(expected, fitted)
        # sums in another order, of terms that may cancel
        assert found == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
        flat = torch.cat([g.flatten() for g in gradients])
        torch.testing.assert_close(
            gradient, flat, rtol=1e-3, atol=1e-5 * (1 + flat.abs().max().item())
        )
    assert same(kept, list(critic.parameters()))  # it is x that moves
    assert all(p.grad is None for p in critic.parameters())


@pytest.mark.parametrize("fitted", [0, 2, 5])
def test_parameters_in_the_middle_are_fitted_too(fitted):
    torch.manual_seed(0)
    critic, rows, returns = critic_of(), torch.randn(20, 3), torch.randn(20)
    parameters = [list(critic.parameters())[fitted]]
    x = nn.Parameter(parameters[0].detach().flatten().clone())
    inputs, error = squared_error(critic, x, parameters, rows)
    expected = (critic(rows) - returns).square().mean()
    assert error(inputs, returns) == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(x.grad, gradient.flatten())


def test_batches_of_several_sizes_share_nothing():
    """The arrays of a call are kept for the next one of its size."""
    torch.manual_seed(0)
    critic, rows, returns = critic_of(), torch.randn(20, 3), torch.randn(20)
    parameters = list(critic.parameters())
    x = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    inputs, error = squared_error(critic, x, parameters, rows)
    batches = [torch.randperm(20)[:n] for n in (7, 3, 7, 20, 3, 1, 7)]
    found = [
        (error(inputs[positions], returns[positions]), x.grad.clone()) for positions in batches
    ]
    for positions, (value, gradient) in zip(batches, found, strict=True):
        _, alone = squared_error(critic, x, parameters, rows)
        assert alone(inputs[positions], returns[positions]) == value
        assert torch.equal(x.grad, gradient)
        expected = (critic(rows[positions]) - returns[positions]).square().mean()
        assert value == pytest.approx(expected.item(), rel=1e-5)


def test_overflow_is_an_error_that_is_not_finite_and_no_warning():
    critic, huge = critic_of(), torch.full((4,), 3e38)
    parameters = list(critic.parameters())
    x = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    inputs, error = squared_error(critic, x, parameters, torch.randn(4, 3))
    assert error(inputs, huge) == math.inf


@given(networks(), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_values_are_those_of_the_module(case, shape):
    critic, _ = case
    rows = 5 + 3 * torch.randn(*shape, critic.encoder.columns.numel())
    kept = rows.clone()
    values = value_function(critic)(rows)
    assert not values.requires_grad
    torch.testing.assert_close(values, critic(rows).detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(rows, kept)


def test_parameters_are_read_when_it_is_called():
    critic, rows = critic_of(), torch.randn(5, 3)
    values = value_function(critic)
    with torch.no_grad():
        for p in critic.parameters():
            p.mul_(2)
    torch.testing.assert_close(values(rows), critic(rows).detach())


# -- acting


@pytest.mark.parametrize(
    ("space", "options"),
    [
        (Discrete(3, start=2), {}),
        (MultiDiscrete([2, 3]), {}),
        (MultiBinary(3), {}),
        (Box(-1, 1, (2,), np.float32), {}),
        (Box(-1, 1, (2,), np.float32), {"state_dependent_std": True}),
        (Discrete(3), {"normalise_observations": True}),
    ],
)
def test_acting_is_what_the_policy_does(space, options):
    torch.manual_seed(0)
    config, layout = TRPOConfig(hidden=(16, 8), **options), ObservationLayout(SPACE)
    norm = observation_norm(layout, config)
    if norm is not None:
        norm.update(5 + 3 * torch.randn(100, 3))
    policy, _ = make_networks(layout, space, norm, config)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    rows, noise = 20 * torch.randn(2, 64, 3), policy.noise(2, 64, torch.Generator())
    act = actor(policy, noise)
    assert not by_torch(policy)
    for t in range(2):
        with torch.no_grad():
            expected = policy.act(rows[t], noise[t])
            log_prob = policy(rows[t]).log_prob(expected)
            found = distribution_function(policy)(rows[t]).log_prob(expected)
        # float32, of numbers near 20
        torch.testing.assert_close(torch.from_numpy(act(t, rows[t].numpy())), expected)
        torch.testing.assert_close(found, log_prob, rtol=1e-5, atol=1e-4)


def by_torch(network):
    """Say whether torch computes a policy or a critic, by counting its calls."""
    calls = []
    linear = network.linear[-1]
    forward, linear.forward = linear.forward, lambda x: calls.append(1) or forward(x)
    if isinstance(network, HeadPolicy):
        noise = network.noise(1, 2, torch.Generator())
        act = actor(network, noise)
        width = network.encoder.columns.numel()
        act(0, np.zeros((2, width), np.float32))
    else:
        value_function(network)(torch.zeros(2, 3))
    del linear.forward
    return bool(calls)


@pytest.mark.parametrize(
    "observations",
    [Box(0, 255, (8, 8), np.uint8), Dict(x=Box(-1, 1, (2,)), action_mask=MultiBinary(2))],
    ids=["images", "masks"],
)
def test_images_and_masks_are_left_to_torch(observations):
    layout, generator = ObservationLayout(observations), torch.Generator().manual_seed(0)
    policy, _ = make_networks(layout, Discrete(2), None, TRPOConfig(hidden=(4,)))
    noise = policy.noise(1, 3, generator)
    rows = np.ones((3, layout.width), layout.dtype)
    with torch.inference_mode():
        expected = policy.act(torch.from_numpy(rows), noise[0])
    assert actor(policy, noise)(0, rows).tolist() == expected.tolist()


class OwnEncoder(Encoder):
    """Another formula under the same name."""

    def forward(self, rows):
        return super().forward(rows) + 1


class OwnCritic(Critic):
    """As above."""

    def forward(self, rows):
        return 2 * super().forward(rows)


class OwnNorm(ObservationNorm):
    """As above."""

    def forward(self, observations):
        return observations + 7


class OwnPolicy(HeadPolicy):
    """As above."""

    def act(self, rows, noise):
        return torch.zeros(len(rows), dtype=torch.long)


def relu():
    return Critic(Encoder(ObservationLayout(SPACE), (8,), activation="relu"))


def of_body(*layers):
    critic = critic_of(hidden=(4,))
    critic.encoder.body = nn.Sequential(*layers)
    return critic


def hooked(place, kind):
    critic = critic_of()
    module = critic.get_submodule(place)
    if kind == "forward":
        module.register_forward_hook(lambda _, __, out: out + 1)
    else:
        module.register_forward_pre_hook(lambda _, x: (x[0] + 1,))
    return critic


def pruned():
    critic = critic_of()
    prune.random_unstructured(critic.linear[0], "weight", 0.5)
    return critic


def parametrised():
    critic = critic_of()
    parametrizations.weight_norm(critic.linear[0])
    return critic


DECLINED = {
    "another critic": lambda: OwnCritic(Encoder(ObservationLayout(SPACE), (8,))),
    "another encoder": lambda: Critic(OwnEncoder(ObservationLayout(SPACE), (8,))),
    "another normalisation": lambda: Critic(Encoder(ObservationLayout(SPACE), (8,), OwnNorm(3))),
    "another activation": relu,
    "a tanh before any layer": lambda: of_body(nn.Tanh(), nn.Linear(3, 4)),
    "two tanhs": lambda: of_body(nn.Linear(3, 4), nn.Tanh(), nn.Tanh()),
    "dropout": lambda: of_body(nn.Linear(3, 4), nn.Dropout(0.0)),
    "no bias": lambda: of_body(nn.Linear(3, 4, bias=False)),
    "layers within layers": lambda: of_body(nn.Sequential(nn.Linear(3, 4), nn.Tanh())),
    "a hook of the critic": lambda: hooked("", "forward"),
    "a hook of the encoder": lambda: hooked("encoder", "pre"),
    "a hook of its body": lambda: hooked("encoder.body", "forward"),
    "a hook of a layer": lambda: hooked("encoder.body.0", "forward"),
    "a hook before a layer": lambda: hooked("linear.0", "pre"),
    "pruning": pruned,
    "a parametrisation": parametrised,
}


@pytest.mark.parametrize("make", DECLINED.values(), ids=DECLINED)
def test_other_critics_are_left_to_torch(make):
    torch.manual_seed(0)
    critic, rows, returns = make(), torch.randn(6, 3), torch.randn(6)
    assert value_function(critic) is critic
    parameters = list(critic.parameters())
    x = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    inputs, error = squared_error(critic, x, parameters, rows)
    expected = (critic(rows) - returns).square().mean()
    assert error(inputs, returns) == pytest.approx(expected.item(), rel=1e-5)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, parameters)])
    torch.testing.assert_close(x.grad, gradient)


def test_plain_networks_are_not():
    """Otherwise the tests here would compare torch with itself."""
    critic = critic_of()
    assert value_function(critic) is not critic
    assert not by_torch(critic)
    assert not by_torch(policy_of())
    parameters = list(critic.parameters())
    x = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    critic.linear[-1].forward = None  # cannot be called
    for fitted in (parameters, parameters[-2:]):
        part = nn.Parameter(x.detach()[-sum(p.numel() for p in fitted) :].clone())
        inputs, error = squared_error(critic, part, fitted, torch.ones(2, 3))
        error(inputs, torch.ones(2))


@pytest.mark.parametrize("place", [torch.float64, "meta"])
def test_other_numbers_and_devices_are_left_to_torch(place):
    critic = critic_of().to(place)
    assert value_function(critic) is critic


def policy_of(space=None, kind=HeadPolicy, **options):
    layout = ObservationLayout(SPACE)
    made, _ = make_networks(layout, space or Discrete(2), None, TRPOConfig(hidden=(4,), **options))
    return kind(made.encoder, made.head)


def test_other_policies_are_left_to_torch():
    policy = policy_of(kind=OwnPolicy)
    act = actor(policy, policy.noise(1, 9, torch.Generator()))
    assert act(0, np.ones((9, 3), np.float32)).tolist() == [0] * 9
    for other in (policy, policy_of(activation="relu"), TwoNumbers(copies=True)):
        assert distribution_function(other) is other
    plain = policy_of()
    assert distribution_function(plain) is not plain
    assert by_torch(policy_of(activation="elu"))
    masked = policy_of()
    masked.columns = slice(0, 2)  # of an action mask
    assert by_torch(masked)
    hooked = policy_of()
    hooked.encoder.register_forward_hook(lambda *_: None)
    assert by_torch(hooked)


def test_a_head_of_ones_own_draws_itself():
    class Own(GaussianHead):
        def draw(self, outputs, noise):
            return super().draw(outputs, noise) + 100

    policy = policy_of(Box(-1, 1, (1,), np.float32))
    policy.head = Own(Box(-1, 1, (1,), np.float32))
    noise = policy.noise(1, 5, torch.Generator())
    assert (actor(policy, noise)(0, np.zeros((5, 3), np.float32)) > 50).all()
