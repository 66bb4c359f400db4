"""Values are converted to the type of their option, and records can be written as text."""

import math
from dataclasses import dataclass, fields
from decimal import Decimal
from fractions import Fraction
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl import GAE, AdamFit, LBFGSFit, MonteCarlo, NStep, TrustRegionFit
from rl.experience.advantages import ADVANTAGES
from rl.fits import FITS
from rl.options import (
    check_counts,
    check_fractions,
    check_not_negative,
    check_positive,
    convert,
    record_from_text,
    record_to_text,
)

WIDTHS, MAYBE = tuple[int, ...], float | None
PLACE = Literal["here", "there"]


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, np.int64(4), 4),
        (int, np.uint8(4), 4),
        (int, 1e6, 1_000_000),
        (int, np.float64(256.0), 256),
        (int, 2**60 + 1, 2**60 + 1),
        (float, 3, 3.0),
        (float, np.float32(0.5), 0.5),
        (float, np.int32(2), 2.0),
        (float, Fraction(1, 4), 0.25),
        (float, math.inf, math.inf),
        (bool, True, True),
        (bool, np.bool_(False), False),
        (str, "cpu", "cpu"),
        (str, torch.device("cuda", 1), "cuda:1"),
        (WIDTHS, [32, 16], (32, 16)),
        (WIDTHS, np.array([32, 16]), (32, 16)),
        (WIDTHS, (np.int64(3), 4.0), (3, 4)),
        (WIDTHS, [], ()),
        (WIDTHS | None, None, None),
        (WIDTHS | None, [1], (1,)),
        (MAYBE, None, None),
        (MAYBE, np.float32(2.0), 2.0),
        (PLACE, "there", "there"),
    ],
)
def test_values_become_those_of_their_type(kind, value, expected):
    found = convert("option", kind, value)
    assert found == expected
    assert type(found) is type(expected)
    if isinstance(found, tuple):
        assert [type(item) for item in found] == [type(item) for item in expected]


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (int, 2.5, "a whole number, got 2.5"),
        (int, "4", "a whole number, got '4'"),
        (int, True, "a whole number, got True"),
        (int, np.bool_(True), "a whole number"),
        (int, math.nan, "a whole number, got nan"),
        (int, math.inf, "a whole number, got inf"),
        (int, None, "a whole number, got None"),
        (int, torch.tensor(3), "a whole number, got tensor"),
        (int, [3], r"a whole number, got \[3\]"),
        (float, "0.1", "a number, got '0.1'"),
        (float, False, "a number, got False"),
        (float, 1j, "a number, got 1j"),
        (float, Decimal("0.5"), "a number, got Decimal"),
        (bool, 1, "true or false, got 1"),
        (bool, "True", "true or false, got 'True'"),
        (str, 3, "a string, got 3"),
        (WIDTHS, 64, "a list, each item a whole number, got 64"),
        (WIDTHS, "64", "a list, each item a whole number, got '64'"),
        (WIDTHS, (64, 2.5), "a list, each item a whole number"),
        (MAYBE, "none", "a number or None, got 'none'"),
        (WIDTHS | None, 3, "a list, each item a whole number or None, got 3"),
        (PLACE, "elsewhere", "one of here, there, got 'elsewhere'"),
        (PLACE, ["here"], "one of here, there, got"),
    ],
)
def test_values_of_another_type_are_refused_with_what_was_given(kind, value, words):
    with pytest.raises(ValueError, match=rf"^option must be {words}"):
        convert("option", kind, value)


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (int, "12", 12),
        (int, "1e6", 1_000_000),
        (int, "123456789012345678901", 123456789012345678901),  # exactly
        (float, "1e-3", 1e-3),
        (float, "inf", math.inf),
        (bool, "True", True),
        (bool, "False", False),
        (MAYBE, "None", None),
        (MAYBE, "2", 2.0),
        (str, "12", "12"),
    ],
)
def test_numbers_may_be_text_where_that_is_said(kind, text, expected):
    found = convert("option", kind, text, text=True)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("kind", "text"), [(int, "1.5"), (int, "many"), (int, ""), (float, "x"), (bool, "yes")]
)
def test_text_that_is_no_such_number_is_refused(kind, text):
    with pytest.raises(ValueError, match=f"option must be .*, got '{text}'"):
        convert("option", kind, text, text=True)


# -- records as text

positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
counts = st.integers(min_value=1)
records = st.one_of(
    st.builds(AdamFit, lr=positive, epochs=counts, batch_size=counts),
    st.builds(LBFGSFit, steps=counts),
    st.builds(
        TrustRegionFit,
        steps=counts,
        delta=positive,
        damping=st.one_of(st.just(0.0), positive),
        cg_max_iter=counts,
    ),
    st.builds(GAE, gae_lambda=st.floats(0, 1)),
    st.builds(NStep, n=counts),
    st.just(MonteCarlo()),
)
KINDS = FITS | ADVANTAGES


@given(records)
def test_a_record_is_the_text_it_is_written_as(record):
    text = record_to_text(record, KINDS)
    again = record_from_text("option", text, KINDS)
    assert again == record
    assert type(again) is type(record)
    for field in fields(record):  # not only equal: 1 == 1.0 == True
        one, other = getattr(record, field.name), getattr(again, field.name)
        assert type(one) is type(other)


def test_text_may_leave_fields_out():
    assert record_from_text("fit", "adam", FITS) == AdamFit()
    assert record_from_text("fit", "adam:epochs=3", FITS) == AdamFit(epochs=3)
    assert record_from_text("fit", "adam: epochs = 3 , lr=1e-4", FITS) == AdamFit(1e-4, 3)
    assert record_from_text("adv", "gae", ADVANTAGES, gae_lambda=0.5, n=3) == GAE(0.5)
    assert record_from_text("adv", "n_step", ADVANTAGES, gae_lambda=0.5) == NStep()
    assert record_from_text("adv", "gae:gae_lambda=1", ADVANTAGES, gae_lambda=0.5) == GAE(1.0)
    assert record_to_text(MonteCarlo(), ADVANTAGES) == "monte_carlo"


@dataclass(frozen=True)
class Steeper(AdamFit):
    """A record of one's own."""


@pytest.mark.parametrize("own", [Steeper(), lambda *_: None, 3, None])
def test_other_objects_have_no_text(own):
    assert record_to_text(own, FITS) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sgd", "fit must be one of adam, lbfgs, trust_region, got 'sgd'"),
        ("", "fit must be one of"),
        ("adam:lrr=1", r"fit=adam has no field 'lrr=1': did you mean lr=\?"),
        ("adam:speed=1", "no field 'speed=1': it has lr, epochs, batch_size"),
        ("adam:lr", "no field 'lr'"),
        ("adam:lr=fast", "lr of fit=adam must be a number, got 'fast'"),
        ("adam:lr=", "lr of fit=adam must be a number, got ''"),
        ("adam:epochs=2.5", "epochs of fit=adam must be a whole number, got '2.5'"),
        ("adam:epochs=0", "epochs must be at least 1, got 0"),
        ("adam:lr=nan", "lr must be a positive, finite number, got nan"),
    ],
)
def test_text_that_names_no_record_is_refused_with_a_hint(text, words):
    with pytest.raises(ValueError, match=words):
        record_from_text("fit", text, FITS)


def test_a_record_without_fields_says_so():
    with pytest.raises(ValueError, match="adv=monte_carlo has no field 'n=3': it has none"):
        record_from_text("adv", "monte_carlo:n=3", ADVANTAGES)


# -- ranges


@dataclass
class Numbers:
    n: float | None


@pytest.mark.parametrize(
    ("check", "good", "bad", "words"),
    [
        (check_counts, [1, 5], [0, -1], "n must be at least 1, got"),
        (check_fractions, [0, 1, 0.5, None], [-0.1, 1.1, math.nan], r"must lie in \[0, 1\], got"),
        (check_positive, [1e-300, None], [0, -1, math.inf, math.nan], "must be a positive, finite"),
        (check_not_negative, [0, 2, None], [-1e-9, math.inf, math.nan], "finite and not negative"),
    ],
)
def test_ranges(check, good, bad, words):
    for n in good:
        check(Numbers(n), "n")
    for n in bad:
        with pytest.raises(ValueError, match=words):
            check(Numbers(n), "n")
