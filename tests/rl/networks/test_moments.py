import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl.networks.moments import ObservationNorm, RunningMoments


@st.composite
def samples(draw):
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, dim = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    offset = draw(st.sampled_from([0.0, 1.0, -1e8]))
    spread = draw(st.sampled_from([0.0, 1e-3, 1.0, 1e6]))
    x = offset + spread * torch.randn(n, dim, generator=g, dtype=torch.float64)
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=5)))
    return x, cuts


@given(samples())
def test_batches_merge_to_the_moments_of_all_samples(drawn):
    x, cuts = drawn
    moments = RunningMoments(x.shape[1:])
    for part in torch.tensor_split(x, cuts):
        moments.update(part)
    assert moments.count == len(x)
    size = x.abs().max().item() + 1e-300
    # the mean of n numbers is known to some units of the largest, the variance to as many of both
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=0, atol=1e-15 * size)
    exact = x.var(0, correction=0)
    slack = 1e-10 * exact + (1e-14 * size) ** 2 * len(x) + 1e-13 * exact.sqrt() * size
    assert bool(((moments.variance - exact).abs() <= slack).all())
    assert bool((moments.variance >= 0).all())


@given(samples())
def test_the_order_of_the_batches_does_not_matter(drawn):
    x, cuts = drawn
    parts = torch.tensor_split(x, cuts)
    there, back = RunningMoments(x.shape[1:]), RunningMoments(x.shape[1:])
    for a, b in zip(parts, reversed(parts), strict=True):
        there.update(a)
        back.update(b)
    size = x.abs().max().item() + 1e-300
    torch.testing.assert_close(there.mean, back.mean, rtol=0, atol=1e-15 * size)
    torch.testing.assert_close(
        there.variance.sqrt(), back.variance.sqrt(), rtol=1e-9, atol=1e-14 * size
    )


def test_observations_come_out_with_mean_zero_and_variance_one():
    torch.manual_seed(0)
    x = torch.tensor([3.0, -2.0, 7.0]) + torch.tensor([0.1, 50.0, 0.0]) * torch.randn(1000, 3)
    norm = ObservationNorm(3)
    assert torch.equal(norm(x), x.clamp(-10, 10))  # nothing seen yet
    norm.update(x)
    y = norm(x)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        y.var(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), rtol=1e-4, atol=0
    )
    assert norm(1e9 * torch.ones(3)).tolist() == [10.0, 10.0, 10.0]


def test_a_loaded_normaliser_is_the_saved_one():
    norm, other = ObservationNorm(2, clip=5.0), ObservationNorm(2, clip=5.0)
    norm.update(torch.randn(20, 2))
    other.load_state_dict(norm.state_dict())
    x = torch.randn(7, 2)
    assert torch.equal(norm(x), other(x))
    assert not torch.equal(norm(x), x)


def test_a_clip_that_lets_nothing_through_is_refused():
    with pytest.raises(ValueError, match="clip must be positive, got 0"):
        ObservationNorm(3, clip=0.0)


def test_a_normalisation_goes_back_to_its_start_and_can_be_pickled():
    norm = ObservationNorm(2)
    fresh = {key: x.clone() for key, x in norm.state_dict().items()}
    norm.update(5 + 3 * torch.randn(10, 2))
    norm.load_state_dict(fresh)
    x = torch.randn(3, 2)
    assert torch.equal(norm(x), x)
    assert torch.equal(pickle.loads(pickle.dumps(norm))(x), x)
