"""What may be passed as callbacks and loggers, and what ends a training."""

import numpy as np
import pytest

from rl import CSVLog
from rl.reports import as_callbacks, stops


def one(agent, log):
    return None


def two(agent, log, *rest, more=0):
    return False


def three(agent, log, more):
    pass


def named(agent, *, log):
    pass


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, []),
        ((), []),
        (one, [one]),
        ([one, None, two], [one, two]),
        ((None,), []),
        (iter([two, one]), [two, one]),
    ],
)
def test_none_one_or_several(given, expected):
    assert as_callbacks(given) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("log.csv", r"got 'log.csv'; for a file of the log, pass CSVLog\(path\)"),
        ([one, "log.csv"], "got 'log.csv'"),
        (3, "got 3"),
        ([[one]], "or a list of them, got"),
        (CSVLog, r"CSVLog is a class, not a callback: pass CSVLog\(...\)"),
        (lambda: None, "a callback gets the agent and the log: .* too many positional"),
        (three, "missing a required argument: 'more'"),
        (named, "a callback gets the agent and the log"),
    ],
)
def test_what_cannot_be_called_is_refused(given, words):
    with pytest.raises(TypeError, match=words):
        as_callbacks(given)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [([], False), ([None, True, 0, ""], False), ([True, False], True), ([np.False_], True)],
)
def test_only_false_stops(answers, expected):
    assert stops(answers) is expected
