"""What may be passed as callbacks, and what is refused before anything is learnt."""

import numpy as np
import pytest

from rl import TRPO, CSVLog, EvaluateBest, Every, SaveCheckpoint, StopOnReward, checkpoint, load
from rl.reports import as_callbacks, stops
from toys import Bandit, Clock

SMALL = {"n_envs": 4, "steps_per_update": 64, "hidden": (8,)}


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
    with pytest.raises(TypeError, match=words):
        Every(10, given)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [([], False), ([None, True, 0, ""], False), ([True, False], True), ([np.False_], True)],
)
def test_only_false_stops(answers, expected):
    assert stops(answers) is expected


def test_several_can_be_called_every_so_often():
    calls = []
    both = Every(96, [lambda *_: calls.append(1), None, lambda agent, _: agent.iterations < 4])
    agent = TRPO(lambda: Clock(length=3, truncate=True), **SMALL).learn(1000, False, both)
    assert (len(calls), agent.iterations) == (2, 4)


@pytest.mark.parametrize("steps", [0, "100", None, float("nan")])
def test_steps_are_a_number(steps):
    with pytest.raises(ValueError, match="steps must be at least 1, got"):
        Every(steps, one)


@pytest.mark.parametrize("threshold", ["475", None, float("nan")])
def test_thresholds_are_numbers(threshold):
    with pytest.raises(ValueError, match="threshold must be a number, got"):
        StopOnReward(threshold)


def test_folders_are_made_at_once_or_refused(tmp_path):
    SaveCheckpoint(str(tmp_path / "a" / "b"))
    EvaluateBest(Bandit, str(tmp_path / "c" / "best.zip"))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", "c"]
    (tmp_path / "file").touch()
    for make in (
        lambda: SaveCheckpoint(tmp_path / "file"),
        lambda: CSVLog(tmp_path / "file" / "log.csv"),
        lambda: EvaluateBest(Bandit, tmp_path / "file" / "best.zip"),
    ):
        with pytest.raises(OSError, match="file"):
            make()
    with pytest.raises(ValueError, match="is a folder"):
        EvaluateBest(Bandit, tmp_path / "a")


def test_an_environment_that_is_not_there_is_named_at_once():
    with pytest.raises(ValueError, match="cannot make environment 'NoSuch-v1'"):
        EvaluateBest("NoSuch-v1")
    with pytest.raises(TypeError, match=r"env must be an id .* or a gymnasium VectorEnv, got int"):
        EvaluateBest(3)


# -- the best agent of a training that is resumed


def test_a_best_agent_is_replaced_by_a_better_one_alone(tmp_path):
    best = tmp_path / "best.zip"
    agent = TRPO(lambda: Clock(length=3), **SMALL)
    EvaluateBest(lambda: Clock(length=5), best, episodes=2)(agent, {})
    assert checkpoint.read(best)["notes"] == {"eval/mean_reward": 5.0}
    first = best.read_bytes()
    for length, mean, kept in ((4, 5.0, True), (5, 5.0, True), (6, 6.0, False)):
        again = EvaluateBest(lambda n=length: Clock(length=n), best, episodes=2)
        assert again.best_mean == 5.0
        again(agent, {})
        assert again.best_mean == mean
        assert (best.read_bytes() == first) is kept
    assert load(best, Clock).num_timesteps == 0


def test_a_file_that_does_not_say_what_it_reached_is_kept(tmp_path):
    best = tmp_path / "best.zip"
    TRPO(Bandit, **SMALL).save(best)
    before = best.read_bytes()
    with pytest.raises(ValueError, match="does not say what its agent reached"):
        EvaluateBest(Bandit, best)
    best.write_bytes(before[:100])
    with pytest.raises(checkpoint.CheckpointError, match="truncated"):
        EvaluateBest(Bandit, best)
