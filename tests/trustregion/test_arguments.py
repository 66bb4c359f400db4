"""One wording for the checks of arguments."""

import math

import numpy as np
import pytest
import torch

from trustregion.arguments import (
    as_count,
    as_not_negative,
    as_number,
    as_number_in,
    as_positive,
    check_count,
    check_damping,
    check_radius,
    finite,
)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), torch.tensor([2.0])])
def test_what_a_scheduler_may_write_becomes_a_float(value):
    for found in (
        as_number("lr", value),
        as_positive("lr", value),
        as_not_negative("lr", value),
        as_number_in("lr", value, "[0, 2]"),
    ):
        assert type(found) is float
        assert found == 2.0


@pytest.mark.parametrize("value", ["2", True, None, [2.0], torch.ones(2), 1j])
def test_what_is_not_a_number_is_refused_by_name(value):
    for convert in (as_number, as_positive, as_not_negative):
        with pytest.raises(ValueError, match=r"^lr must be a number, got "):
            convert("lr", value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: as_positive("radius", 0.0), "radius must be positive and finite, got 0.0"),
        (lambda: as_positive("radius", math.inf), "radius must be positive and finite, got inf"),
        (
            lambda: as_positive("radius", math.nan, infinite=True),
            "radius must be positive, got nan",
        ),
        (lambda: as_not_negative("lr", -1), "lr must be finite and not negative, got -1.0"),
        (lambda: as_not_negative("lr", -1, infinite=True), "lr must not be negative, got -1.0"),
        (lambda: as_number_in("rtol", 1.0, "[0, 1)"), "rtol must lie in [0, 1), got 1.0"),
        (lambda: as_number_in("decay", 0.0, "(0, 1]"), "decay must lie in (0, 1], got 0.0"),
        (lambda: as_number_in("decay", math.nan, "(0, 1]"), "decay must lie in (0, 1], got nan"),
        (lambda: as_count("k", 0, 1), "k must be an integer of at least 1, got 0"),
        (
            lambda: as_count("k", True),
            "k must be an integer and not negative, got True of type bool",
        ),
        (lambda: check_count("k", 1.0), "k must be an integer and not negative, got 1.0"),
        (
            lambda: check_radius("delta", math.nan),
            "delta must be a positive finite number, got nan",
        ),
        (
            lambda: check_damping(torch.tensor(1.0)),
            "damping must be a finite number and not negative, got tensor(1.) of type Tensor: pass"
            " a Python number, for example by .item()",
        ),
    ],
)
def test_an_error_says_what_was_expected_and_given(call, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 # the whole message is compared
        call()
    assert str(error.value) == words


def test_limits_that_fit():
    assert as_positive("radius", math.inf, infinite=True) == math.inf
    assert as_not_negative("lr", 0) == 0.0
    assert as_number_in("rtol", 0, "[0, 1)") == 0.0
    assert as_number_in("decay", 1, "(0, 1]") == 1.0
    assert as_count("k", np.int64(3), 3) == 3
    check_count("k", None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_entry_decides_whether_a_tensor_is_finite(dtype, bad):
    u = torch.full((50,), torch.finfo(dtype).max, dtype=dtype)
    assert finite(u)
    assert finite(u[:0])
    for i in (0, 17, 49):
        for other in (1.0, math.inf):
            v = u.clone()
            v[i - 1], v[i] = other, bad
            assert not finite(v)
