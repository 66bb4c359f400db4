"""Every head: draws follow its distribution, the trust region sees it, environments take it."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from rl.networks.heads import GaussianHead, make_head
from trustregion import FisherOperator, mean_kl, to_dense

HEADS = {
    "discrete": (spaces.Discrete(4, start=-1), {}),
    "multi-discrete": (spaces.MultiDiscrete([2, 4, 3]), {}),
    "even multi-discrete": (spaces.MultiDiscrete([[3, 3], [3, 3]], start=[[1, 0], [0, 2]]), {}),
    "multi-binary": (spaces.MultiBinary((2, 2)), {}),
    "box": (spaces.Box(-1, 2, (2, 3), np.float32), {}),
    "state-dependent": (spaces.Box(-1, 2, (3,), np.float64), {"state_dependent_std": True}),
    "squashed": (spaces.Box(-1, 2, (3,), np.float32), {"squash": True}),
}
BOXES = ("box", "state-dependent", "squashed")


@pytest.fixture(params=HEADS)
def head(request):
    torch.manual_seed(0)
    space, options = HEADS[request.param]
    head = make_head(space, **options)
    head.space, head.box = space, request.param in BOXES
    return head


def draw(head, outputs, n, seed=0):
    noise = head.noise((n,), torch.Generator().manual_seed(seed))
    return head.draw(outputs.expand(n, -1), noise)


def test_draws_follow_the_distribution(head):
    """Mean log-probability of draws, and of torch's own samples of the same distribution."""
    n, outputs = 20_000, torch.randn(1, head.width)
    distribution = head(outputs.expand(n, -1))
    ours = distribution.log_prob(draw(head, outputs, n))
    theirs = distribution.log_prob(distribution.sample())
    # five standard errors of the difference of two means
    tolerance = 5 * (2 * theirs.var() / n).sqrt()
    assert abs(ours.mean() - theirs.mean()) < tolerance
    moments = draw(head, outputs, n).double().mean(0) - distribution.sample().double().mean(0)
    spread = distribution.sample().double().std(0)
    assert (moments.abs() <= 5 * spread * (2 / n) ** 0.5).all()


def test_actions_lie_in_their_space(head):
    outputs = 3 * torch.randn(1, head.width)
    actions = head.to_env(draw(head, outputs, 200).detach().numpy())
    assert all(head.space.contains(action) for action in actions)
    assert head.space.contains(head.to_env(head.mode(outputs).detach().numpy())[0])


def test_the_mode_is_the_likeliest(head):
    outputs = torch.randn(1, head.width)
    distribution = head(outputs)
    best = distribution.log_prob(head.mode(outputs))
    others = distribution.log_prob(draw(head, outputs, 500).unsqueeze(1)).flatten()
    assert (others <= best + 1e-6).all()  # rounding of the same log-probability


def test_the_trust_region_sees_it(head):
    """The Fisher matrix is the Hessian of the KL: half s'Fs for a small step s."""
    outputs = torch.randn(5, head.width, dtype=torch.float64, requires_grad=True)
    old, step = head.double()(outputs), 1e-4 * torch.randn(5, head.width, dtype=torch.float64)
    F = FisherOperator(old, [outputs])
    s = step.flatten()
    kl = mean_kl(old, head(outputs.detach() + step)).item()
    quadratic = 0.5 * (s @ to_dense(F) @ s).item()
    assert kl == pytest.approx(quadratic, rel=1e-2)  # the next term is 1e-4 of it, times cumulants


def test_forbidden_actions_have_no_probability():
    for name in ("discrete", "multi-discrete", "even multi-discrete"):
        head = make_head(HEADS[name][0])
        mask = torch.ones(head.width, dtype=torch.bool)
        mask[1] = False
        outputs = torch.randn(1, head.width, requires_grad=True)
        distribution = head(outputs.masked_fill(~mask, -torch.inf))
        actions = draw(head, outputs.detach().masked_fill(~mask, -torch.inf), 500)
        first = actions if actions.ndim == 1 else actions[:, 0]
        assert not (first == 1).any()
        distribution.log_prob(actions[:1]).sum().backward()
        assert outputs.grad.isfinite().all()
        assert outputs.grad[0, 1] == 0


def test_squashing_reaches_the_bounds_and_no_further():
    head = make_head(spaces.Box(-1, 3, (1,), np.float32), squash=True)
    actions = head.to_env(np.array([[-50.0], [0.0], [50.0]], np.float32))
    assert actions.flatten().tolist() == [-1, 1, 3]


def test_standard_deviations_of_the_network():
    head = make_head(spaces.Box(-1, 3, (2,), np.float32), state_dependent_std=True)
    assert head.log_std is None
    assert not list(head.parameters())
    normal = head(torch.tensor([[1.0, 2.0, 0.0, float(np.log(2.0))]])).base_dist
    torch.testing.assert_close(normal.mean, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(normal.stddev, torch.tensor([[1.0, 2.0]]))


@pytest.mark.parametrize(
    ("space", "options", "words"),
    [
        (spaces.Box(-np.inf, 1, (2,), np.float32), {"squash": True}, "bounded"),
        (spaces.Discrete(2), {"squash": True}, "squash_actions is for Box"),
        (spaces.MultiBinary(2), {"state_dependent_std": True}, "state_dependent_std is for Box"),
        (spaces.Text(3), {}, "unsupported action space Text"),
    ],
)
def test_options_that_do_not_fit_are_refused(space, options, words):
    with pytest.raises(ValueError, match=words):
        make_head(space, **options)


def test_a_head_keeps_its_log_std():
    head = GaussianHead(spaces.Box(-1, 1, (2,), np.float32))
    assert set(dict(head.named_parameters())) == {"log_std"}
