import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustregion import backtracking


@given(st.floats(0.05, 0.95), st.integers(0, 20), st.integers(0, 25))
def test_p26_the_first_acceptable_scale_is_taken(factor, limit, first_good):
    tried = []

    def evaluate(scale):
        tried.append(scale)
        return len(tried) - 1

    search = backtracking(
        evaluate, lambda trial: trial >= first_good, factor=factor, max_backtracks=limit
    )
    stopped = min(first_good, limit)
    assert tried == [factor**j for j in range(stopped + 1)]
    assert search.accepted == (first_good <= limit)
    assert (search.trial, search.backtracks) == (stopped, stopped)
    assert search.scale == pytest.approx(factor**stopped)
