"""Subsamples are sorted sets of positions, drawn uniformly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trustregion import subsample


@given(st.integers(1, 60), st.data(), st.integers(0, 2**40))
def test_a_subsample_is_a_sorted_set_of_positions_of_the_asked_size(n, data, seed):
    count = data.draw(st.integers(1, n))
    state = torch.get_rng_state()
    keep = subsample(n, count, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert (len(keep), keep.dtype) == (count, torch.int64)
    assert 0 <= keep[0] <= keep[-1] < n
    assert (keep.diff() > 0).all()
    assert torch.equal(keep, subsample(n, count, seed=seed))
    fraction = data.draw(st.floats(1e-6, 1))
    assert abs(len(subsample(n, fraction, seed=seed)) - max(1, n * fraction)) <= 0.5


def test_each_sample_is_drawn_equally_often():
    counts = torch.zeros(10)
    for seed in range(2000):
        counts[subsample(10, 3, seed=seed)] += 1
    # 600 each, five standard deviations of a binomial
    assert (counts - 600).abs().max() < 5 * (2000 * 0.3 * 0.7) ** 0.5
    assert torch.equal(subsample(10, 10, seed=4), torch.arange(10))
    assert torch.equal(subsample(10, 1.0, seed=4), torch.arange(10))


@pytest.mark.parametrize("amount", [0, 11, 0.0, 1.5, -1, float("nan")])
def test_amounts_out_of_range_are_named(amount):
    with pytest.raises(ValueError, match=r"count from 1 to 10.*fraction in"):
        subsample(10, amount)


def test_amounts_of_another_kind_are_named():
    for amount in ("3", True, None):
        with pytest.raises(TypeError, match=r"count .int. or a fraction .float."):
            subsample(10, amount)
    with pytest.raises(ValueError, match="at least one sample to draw from, got 0"):
        subsample(0, 1)
