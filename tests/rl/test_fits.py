"""Every way to fit a critic, beside torch's own optimizers."""

import copy
import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import nn

from agents import same
from rl import AdamFit, LBFGSFit, ObservationLayout, Regression, TrustRegionFit
from rl.fits import FITS, explained_variance
from rl.networks.critic import Critic
from rl.networks.encoders import Encoder
from rl.networks.numpy_twin import squared_error, value_function


def critic_of(width, hidden=(32,)):
    layout = ObservationLayout(Box(-np.inf, np.inf, (width,), np.float32))
    return Critic(Encoder(layout, hidden))


class Own(nn.Module):
    """A critic that is not the package's, so that torch computes it; it counts its calls."""

    def __init__(self, *layers):
        super().__init__()
        self.net = nn.Sequential(*layers)
        self.seen, self.calls_left = [], 10**9

    def forward(self, rows):
        self.seen.append(rows[:, 0].detach().clone())
        self.calls_left -= 1
        if self.calls_left == 0:
            raise KeyboardInterrupt
        return self.net(rows).squeeze(-1)


def fit(how, critic, x, y, optimizer=None, seed=0):
    """Fit, and return the error."""
    parameters = list(critic.parameters())
    optimizer = optimizer or how.optimizer(parameters)
    task = Regression(critic, parameters, x, y, torch.Generator().manual_seed(seed))
    return how(task, optimizer)


def state_of(optimizer):
    """Return a copy of the state of an optimizer, without the copy of the parameters."""
    return copy.deepcopy(optimizer.state_dict())


def assert_same_state(one, other):
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for key, entry in one["state"].items():
        assert entry.keys() == other["state"][key].keys()
        for name, x in entry.items():
            equal = torch.equal if isinstance(x, torch.Tensor) else lambda a, b: a == b
            assert equal(x, other["state"][key][name]), name


EVERY = [AdamFit(), LBFGSFit(), TrustRegionFit()]
every_fit = pytest.mark.parametrize("how", EVERY, ids=list(FITS))


def test_every_fit_is_tested_here():
    assert [type(how) for how in EVERY] == list(FITS.values())


@pytest.mark.parametrize(
    "how",
    [AdamFit(lr=1e-2, epochs=60, batch_size=64), LBFGSFit(steps=60), TrustRegionFit(steps=60)],
    ids=list(FITS),
)
def test_every_fit_reaches_a_linear_target(how):
    torch.manual_seed(0)
    critic, x = critic_of(2), torch.randn(512, 2)
    y = x[:, 0] - 2 * x[:, 1]
    error = fit(how, critic, x, y)
    with torch.no_grad():
        true = (critic(x) - y).square().mean().item()
        assert explained_variance(critic(x), y) > 0.99
    assert true < 0.01
    # Adam's is a mean as it went
    assert error == pytest.approx(true, rel=2 if isinstance(how, AdamFit) else 1e-4)


@pytest.mark.parametrize("how", [LBFGSFit(steps=3), TrustRegionFit(steps=3)])
def test_full_batch_fits_never_make_it_worse(how):
    torch.manual_seed(1)
    critic, x, y = critic_of(3, (8,)), torch.randn(64, 3), 1e3 * torch.randn(64)
    before = (critic(x) - y).square().mean().item()
    for _ in range(5):
        after = fit(how, critic, x, y)
        assert after <= before
        before = after


@pytest.mark.parametrize("steps", [1, 4])
def test_a_trust_region_fit_moves_the_values_within_its_radius(steps):
    torch.manual_seed(0)
    critic, x, y = critic_of(3), torch.randn(256, 3), 5 + torch.randn(256)
    with torch.no_grad():
        old = critic(x)
    delta, variance = 0.05, (old - y).square().mean()
    fit(TrustRegionFit(steps=steps, delta=delta), critic, x, y)
    with torch.no_grad():
        root = ((critic(x) - old).square().mean() / (2 * variance)).sqrt()
    assert 0.9 * delta**0.5 < root if steps == 1 else root > 0
    assert root <= steps * delta**0.5 * (1 + 1e-5)  # float32 rounding of the values


@every_fit
def test_a_critic_that_is_right_stays(how):
    critic, x = critic_of(2), torch.randn(32, 2)
    with torch.no_grad():  # by the arithmetic of the fit: to Adam the smallest error is one
        y = critic(x) if isinstance(how, TrustRegionFit) else value_function(critic)(x)
    kept = [p.clone() for p in critic.parameters()]
    assert fit(how, critic, x, y) == 0
    assert same(kept, list(critic.parameters()))


@every_fit
def test_a_fit_returns_the_error_of_what_it_wrote(how):
    critic, x, y = critic_of(2, (8,)), torch.randn(64, 2), torch.randn(64)
    error = fit(AdamFit(epochs=1, batch_size=64) if isinstance(how, AdamFit) else how, critic, x, y)
    true = (critic(x) - y).square().mean().item()
    # Adam's one pass of one batch is the error before its step
    assert error >= true if isinstance(how, AdamFit) else error == pytest.approx(true, rel=1e-5)


def test_every_sample_is_used_once_in_a_pass():
    critic = Own(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.arange(10.0).unsqueeze(1)
    fit(AdamFit(epochs=2, batch_size=4), critic, x, x[:, 0])
    assert [len(rows) for rows in critic.seen] == [4, 4, 2] * 2
    for epoch in (critic.seen[:3], critic.seen[3:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(10))
    assert not torch.equal(torch.cat(critic.seen[:3]), torch.cat(critic.seen[3:]))


def test_adam_on_a_flat_copy_is_torchs_adam_over_the_list():
    torch.manual_seed(0)
    critic = critic_of(4, (8, 5))
    twin, how = copy.deepcopy(critic), AdamFit(lr=1e-2, epochs=3, batch_size=16)
    parameters = list(twin.parameters())
    ours = how.optimizer(list(critic.parameters()))
    adam = torch.optim.Adam(parameters, lr=1e-2, fused=True)
    flat = nn.Parameter(torch.empty(sum(p.numel() for p in parameters)))
    for seed in range(3):
        x, y = torch.randn(50, 4), torch.randn(50)
        fit(how, critic, x, y, ours, seed)
        generator = torch.Generator().manual_seed(seed)
        inputs, error = squared_error(twin, flat, parameters, x)
        for _ in range(3):
            for positions in torch.randperm(50, generator=generator).split(16):
                flat.data.copy_(torch.cat([p.detach().flatten() for p in parameters]))
                error(inputs[positions], y[positions])
                parts = flat.grad.split([p.numel() for p in parameters])
                for p, g in zip(parameters, parts, strict=True):
                    p.grad = g.reshape(p.shape).clone()
                adam.step()
        for p, q in zip(critic.parameters(), parameters, strict=True):  # float32, some 30 steps
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_moments_last_from_one_fit_to_the_next():
    critic, x, y = critic_of(2), torch.randn(32, 2), torch.randn(32)
    how = AdamFit(epochs=1, batch_size=32)
    optimizer = how.optimizer(list(critic.parameters()))
    for steps in (1, 2):
        fit(how, critic, x, y, optimizer)
        assert optimizer.state_dict()["state"][0]["step"] == steps
    assert critic.linear[0].weight.grad is None  # it is the flat copy that has a gradient


# -- what fails leaves critic and optimizer as they were


@every_fit
@pytest.mark.parametrize("target", [math.nan, 1e25])
def test_targets_that_are_not_finite_or_overflow_change_nothing(how, target):
    torch.manual_seed(0)
    critic, x, y = critic_of(2), torch.randn(32, 2), torch.randn(32)
    optimizer = how.optimizer(list(critic.parameters()))
    fit(how, critic, x, y, optimizer)  # the optimizer has a state
    kept, state = [p.clone() for p in critic.parameters()], state_of(optimizer)
    with pytest.raises(ValueError, match=r"the critic's loss is (nan|inf)"):
        fit(how, critic, x, torch.full((32,), target), optimizer)
    assert same(kept, list(critic.parameters()))
    assert_same_state(state, state_of(optimizer))


def test_an_adam_that_diverges_names_its_option():
    critic, x, y = critic_of(2), torch.randn(64, 2), torch.randn(64)
    kept = [p.clone() for p in critic.parameters()]
    with pytest.raises(ValueError, match=r"in pass \d: it diverged. Lower lr of critic_fit"):
        fit(AdamFit(lr=1e30, batch_size=16), critic, x, y)
    assert same(kept, list(critic.parameters()))


@every_fit
@pytest.mark.parametrize("calls", [1, 2, 4])
def test_a_fit_that_is_interrupted_changes_nothing(how, calls):
    """Also no buffer: batch normalisation moves its own in each call."""
    torch.manual_seed(0)
    critic = Own(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    x, y = torch.randn(64, 2), torch.randn(64)
    optimizer = how.optimizer(list(critic.parameters()))
    fit(how, critic, x, y, optimizer)
    kept, state = {k: v.clone() for k, v in critic.state_dict().items()}, state_of(optimizer)
    critic.calls_left = calls
    with pytest.raises(KeyboardInterrupt):
        fit(how, critic, x, y, optimizer)
    assert critic.calls_left == 0
    assert same([*kept.values()], [*critic.state_dict().values()])
    assert_same_state(state, state_of(optimizer))


@every_fit
def test_after_an_interrupt_the_next_fit_is_as_if_there_had_been_none(how):
    torch.manual_seed(0)
    x, y = torch.randn(64, 2), torch.randn(64)
    critics = [Own(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(2)]
    critics[1].load_state_dict(critics[0].state_dict())
    for critic, interrupted in zip(critics, (False, True), strict=True):
        optimizer = how.optimizer(list(critic.parameters()))
        fit(how, critic, x, y, optimizer)
        if interrupted:
            critic.calls_left = 3
            with pytest.raises(KeyboardInterrupt):
                fit(how, critic, x, y, optimizer)
            critic.calls_left = 10**9
        fit(how, critic, x, y, optimizer)
    assert same(*(list(critic.parameters()) for critic in critics))


@every_fit
def test_parameters_that_are_frozen_after_a_fit_stay(how):
    """Adam's moments would carry them on."""
    torch.manual_seed(0)
    critic, x, y = critic_of(2, (8,)), torch.randn(64, 2), torch.randn(64)
    optimizer = how.optimizer(list(critic.parameters()))
    fit(how, critic, x, y, optimizer)
    critic.encoder.requires_grad_(requires_grad=False)
    kept = {name: p.clone() for name, p in critic.named_parameters()}
    before = (critic(x) - y).square().mean().item()
    fit(how, critic, x, y, optimizer)
    moved = {n for n, p in critic.named_parameters() if not torch.equal(p, kept[n])}
    assert moved == {"linear.0.weight", "linear.0.bias"}
    assert (critic(x) - y).square().mean() <= before


# -- options


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdamFit(lr=0.0), "lr must be a positive, finite number, got 0.0"),
        (lambda: AdamFit(lr=math.nan), "lr must be a positive"),
        (lambda: AdamFit(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: AdamFit(batch_size=2.5), "batch_size must be a whole number, got 2.5"),
        (lambda: LBFGSFit(steps=0), "steps must be at least 1"),
        (lambda: LBFGSFit(steps="many"), "steps must be a whole number, got 'many'"),
        (lambda: TrustRegionFit(delta=-1.0), "delta must be a positive"),
        (lambda: TrustRegionFit(damping=-1.0), "damping must be finite and not negative"),
        (lambda: TrustRegionFit(cg_max_iter=0), "cg_max_iter must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_numbers_of_numpy_are_taken():
    how = AdamFit(lr=np.float32(0.5), epochs=np.int64(3), batch_size=64.0)
    assert how == AdamFit(lr=0.5, epochs=3, batch_size=64)
    assert [type(x) for x in (how.lr, how.epochs, how.batch_size)] == [float, int, int]


def test_explained_variance():
    y = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(y, y) == 1
    assert explained_variance(torch.zeros(3), y) == 0
    assert math.isnan(explained_variance(y, torch.ones(3)))
