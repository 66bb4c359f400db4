import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import trim_mean

from rl.run.plots import bootstrap_interval, iqm, plot_runs


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40))
def test_the_interquartile_mean_is_that_of_rliable(scores):
    """It calls scipy's trimmed mean."""
    assert iqm(np.array(scores)) == pytest.approx(trim_mean(scores, 0.25), abs=1e-9)


def test_it_works_along_the_first_axis():
    scores = np.arange(12.0).reshape(4, 3)
    assert iqm(scores).tolist() == [4.5, 5.5, 6.5]


def test_the_interval_covers_at_about_its_level():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(size=20), draws=200)
        covered += low <= 0 <= high
    # percentile intervals of twenty are a little short; three standard errors of 200 around 0.9
    assert 0.84 < covered / 200 < 0.99


def test_no_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no run folders"):
        plot_runs([], tmp_path / "plot.png")
