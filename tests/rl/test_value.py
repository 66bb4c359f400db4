import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import nn

from rl import ObservationLayout, TRPOConfig
from rl.fits import FITS, explained_variance
from rl.networks.critic import Critic
from rl.networks.encoders import Encoder


def critic_of(width, hidden=(32,)):
    layout = ObservationLayout(Box(-np.inf, np.inf, (width,), np.float32))
    return Critic(Encoder(layout, hidden))


def fit_of(name, critic, **options):
    return FITS[name](critic, list(critic.parameters()), TRPOConfig(**options))


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", FITS)
def test_every_fit_reaches_a_linear_target(name):
    torch.manual_seed(0)
    critic, x = critic_of(2), torch.randn(512, 2)
    y = x[:, 0] - 2 * x[:, 1]
    options = {"critic_lr": 1e-2, "critic_epochs": 60, "critic_batch_size": 64, "critic_steps": 60}
    error = fit_of(name, critic, **options).fit(x, y, generator())
    with torch.no_grad():
        true = (critic(x) - y).square().mean().item()
        assert explained_variance(critic(x), y) > 0.99
    assert true < 0.01
    assert error == pytest.approx(true, rel=1e-4 if name != "adam" else 2)  # a mean as it went


@pytest.mark.parametrize("name", ["trust_region", "lbfgs"])
def test_full_batch_fits_never_make_it_worse(name):
    torch.manual_seed(1)
    critic, x, y = critic_of(3, (8,)), torch.randn(64, 3), 1e3 * torch.randn(64)
    fit = fit_of(name, critic, critic_steps=3)
    before = (critic(x) - y).square().mean().item()
    for _ in range(5):
        after = fit.fit(x, y, generator())
        assert after <= before
        before = after


@pytest.mark.parametrize("steps", [1, 4])
def test_a_trust_region_fit_moves_the_values_within_its_radius(steps):
    torch.manual_seed(0)
    critic, x, y = critic_of(3), torch.randn(256, 3), 5 + torch.randn(256)
    with torch.no_grad():
        old = critic(x)
    delta, variance = 0.05, (old - y).square().mean()
    fit_of("trust_region", critic, critic_steps=steps, critic_delta=delta).fit(x, y, generator())
    with torch.no_grad():
        root = ((critic(x) - old).square().mean() / (2 * variance)).sqrt()
    assert 0.9 * delta**0.5 < root if steps == 1 else root > 0
    assert root <= steps * delta**0.5 * (1 + 1e-5)  # float32 rounding of the values


@pytest.mark.parametrize("name", FITS)
def test_a_critic_that_is_right_stays(name):
    critic, x = critic_of(2), torch.randn(32, 2)
    with torch.no_grad():  # by the arithmetic of the fit: to Adam the smallest error is one
        y = critic(x) if name == "trust_region" else critic.function()(x)
    kept = [p.clone() for p in critic.parameters()]
    assert fit_of(name, critic).fit(x, y, generator()) == 0
    assert all(map(torch.equal, kept, critic.parameters()))


@pytest.mark.parametrize("name", FITS)
def test_targets_that_are_not_finite_change_nothing(name):
    critic, x, y = critic_of(2), torch.randn(32, 2), torch.full((32,), math.nan)
    kept = [p.clone() for p in critic.parameters()]
    with pytest.raises(ValueError, match="the critic's loss is nan"):
        fit_of(name, critic).fit(x, y, generator())
    assert all(map(torch.equal, kept, critic.parameters()))


def test_every_sample_is_used_once_an_epoch():
    rows = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = critic_of(1, (4,))

        def forward(self, observations):
            rows.append(observations[:, 0].detach().clone())
            return self.inner(observations)

    x = torch.arange(10.0).unsqueeze(1)
    fit_of("adam", Spy(), critic_epochs=2, critic_batch_size=4).fit(x, x[:, 0], generator())
    assert [len(r) for r in rows] == [4, 4, 2] * 2
    for epoch in (rows[:3], rows[3:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(10))


def test_explained_variance():
    y = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(y, y) == 1
    assert explained_variance(torch.zeros(3), y) == 0
    assert math.isnan(explained_variance(y, torch.ones(3)))
